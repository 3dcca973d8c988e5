use super::*;

/// As nydus-snapshotter 0.13 hands it over.
const OLD: &str = r#"{
  "device": {
    "backend": {
      "type": "registry",
      "config": {
        "readahead": false, "host": "registry.test:5000", "repo": "a/b", "auth": "dTpw", "timeout": 5,
        "connect_timeout": 0, "retry_limit": 2, "scheme": "http", "skip_verify": true,
        "mirrors": [{"host": "http://mirror.test", "ping_url": "x", "headers": {"X-A": "1"}, "speed": 1}, {}],
        "proxy": {"url": "http://egress.test:8080", "fallback": false}
      }
    },
    "cache": {"type": "blobcache", "config": {"work_dir": "/x"}}
  },
  "mode": "direct", "digest_validate": false, "iostats_files": false, "enable_xattr": true,
  "fs_prefetch": {"enable": true, "threads_count": 8, "merging_size": 1048576, "bandwidth_rate": 1000, "prefetch_all": true}
}"#;

#[test]
fn the_old_form_of_a_registry() {
    let daemon = Daemon::parse(OLD).expect("fine");
    let Backend::Registry(registry) = daemon.backend else { panic!("a registry") };
    assert_eq!((registry.scheme.as_str(), registry.host.as_str()), ("http", "registry.test:5000"));
    assert_eq!(registry.auth, Some(Auth::Basic { user: "u".into(), password: "p".into() }));
    assert_eq!((registry.link.timeout_s, registry.link.connect_timeout_s), (5, 5));
    assert_eq!((registry.mirrors.len(), registry.link.skip_verify), (1, true));
    assert_eq!(registry.mirrors[0].headers["X-A"], "1");
    assert_eq!(registry.link.proxy, Some(Proxy { url: "http://egress.test:8080".into(), fallback: false }));
    assert_eq!(daemon.ahead, Some(Ahead { listed: true, all: true, rate: 1000 }));
    let warnings = daemon.warnings.join("\n");
    for named in ["device.backend.config.readahead", "mirrors[0].speed", "mirrors[1].host"] {
        assert!(warnings.contains(named), "{named}: {warnings}");
    }
}

#[test]
fn the_new_form_of_a_registry_and_of_folders() {
    let daemon = Daemon::parse(
        r#"{"version": 2, "id": "x", "backend": {"type": "registry", "registry":
            {"host": "h", "repo": "r", "registry_token": "t"}},
            "cache": {"type": "filecache", "filecache": {"work_dir": "/x"}, "prefetch": {"enable": false}},
            "rafs": {"mode": "direct", "colour": "blue"}}"#,
    )
    .expect("fine");
    let Backend::Registry(registry) = daemon.backend else { panic!("a registry") };
    assert_eq!((registry.scheme.as_str(), registry.auth), ("https", Some(Auth::Token("t".into()))));
    assert_eq!(daemon.ahead, Some(Ahead { listed: false, all: false, rate: 0 }));
    assert_eq!(daemon.warnings, ["rafs.colour is unknown: left out"]);

    let daemon = Daemon::parse(
        r#"{"version": 2, "backend": {"type": "localfs", "localfs": {"dir": "/a", "alt_dirs": ["/b"]}}}"#,
    )
    .expect("fine");
    assert_eq!(daemon.backend, Backend::Folder { folders: vec!["/a".into(), "/b".into()] });
    assert_eq!((daemon.ahead, daemon.warnings.len()), (None, 0));
}

#[test]
fn both_forms_of_a_bucket() {
    let daemon = Daemon::parse(
        r#"{"device": {"backend": {"type": "oss", "config": {"endpoint": "oss.test", "bucket_name": "b",
            "object_prefix": "n/", "access_key_id": "i", "access_key_secret": "s", "timeout": 7, "retry_limit": 2}}}}"#,
    )
    .expect("fine");
    let Backend::Bucket(oss) = &daemon.backend else { panic!("a bucket") };
    assert_eq!((&oss.store, oss.link.timeout_s, oss.prefix.as_str()), (&Store::Oss, 7, "n/"));
    assert_eq!(format!("{oss:?}"), "https://oss.test/b/n/", "no secrets in logs");
    assert!(daemon.warnings.is_empty(), "{:?}", daemon.warnings);
    let daemon = Daemon::parse(
        r#"{"version": 2, "backend": {"type": "s3", "s3": {"region": "r", "bucket_name": "b", "scheme": "http"}}}"#,
    )
    .expect("fine");
    let Backend::Bucket(s3) = daemon.backend else { panic!("a bucket") };
    assert_eq!((s3.endpoint.as_str(), s3.scheme.as_str()), ("s3.amazonaws.com", "http"));
    assert!(s3.keys.is_none() && s3.store == Store::S3 { region: "r".into() });
}

#[test]
fn what_cannot_be_used_is_refused_in_words() {
    for (json, words) in [
        ("", "not JSON"),
        ("[]", "names no back end"),
        ("{}", "names no back end"),
        (r#"{"device": 7}"#, "names no back end"),
        (r#"{"device": {"backend": {"type": 7}}}"#, "names no back end"),
        (r#"{"backend": {"type": "http-proxy"}}"#, "back end http-proxy"),
        (r#"{"backend": {"type": "oss"}}"#, "no endpoint of the oss"),
        (r#"{"backend": {"type": "s3", "s3": {"region": "r"}}}"#, "no bucket_name of the s3"),
        (
            r#"{"backend": {"type": "s3", "s3": {"region": "r", "bucket_name": "b", "access_key_id": "i"}}}"#,
            "no access_key_secret",
        ),
        (r#"{"backend": {"type": "registry", "registry": []}}"#, "no host"),
        (r#"{"backend": {"type": "registry", "registry": {"host": "h"}}}"#, "no repo"),
        (r#"{"backend": {"type": "localfs"}}"#, "no dir"),
    ] {
        let error = Daemon::parse(json).expect_err(json).to_string();
        assert!(error.contains(words), "{json}: {error}");
    }
}

#[test]
fn values_of_another_kind_are_named() {
    let daemon = Daemon::parse(
        r#"{"backend": {"type": "registry", "registry": {"host": "h", "repo": "r", "scheme": 5, "timeout": -1,
            "auth": "%", "mirrors": {}, "skip_verify": "yes", "proxy": []}}}"#,
    )
    .expect("fine");
    assert_eq!(daemon.warnings.len(), 6, "{:?}", daemon.warnings);
}
