//! Mounts in the forms that snapshotters hand over.

use agent_api::users::{IdMap, IdRange};
use proptest::prelude::*;
use serde_json::json;

use super::*;

fn encode(text: &[u8]) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for group in text.chunks(3) {
        let bits =
            group.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for n in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * n) & 63) as usize];
            out.push(if n <= group.len() { digit.into() } else { '=' });
        }
    }
    out
}

fn mount(kind: &str, options: &[String]) -> Mount {
    Mount { type_: kind.into(), source: "overlay".into(), options: options.to_vec(), ..Mount::default() }
}

fn extra(value: &serde_json::Value) -> String {
    format!("extraoption={}", encode(value.to_string().as_bytes()))
}

fn volume(value: &serde_json::Value) -> String {
    format!("io.katacontainers.volume={}", encode(value.to_string().as_bytes()))
}

fn options(more: &[String]) -> Vec<String> {
    let base = "/var/lib/containerd-nydus/snapshots";
    let mut options = vec![
        format!("workdir={base}/7/work"),
        format!("upperdir={base}/7/fs"),
        format!("lowerdir={base}/2/mnt"),
    ];
    options.extend_from_slice(more);
    options
}

/// The daemon's configuration as it was until version 2.2 and as it is since.
fn configs() -> [serde_json::Value; 2] {
    [
        json!({
            "device": {
                "backend": {"type": "registry", "config": {"scheme": "https", "host": "r.example", "repo": "a/b", "auth": "dTpw"}},
                "cache": {"type": "blobcache", "config": {"work_dir": "/var/lib/containerd-nydus/cache"}}
            },
            "mode": "direct", "digest_validate": false, "fs_prefetch": {"enable": true, "threads_count": 4}
        }),
        json!({
            "version": 2, "id": "x",
            "backend": {"type": "registry", "registry": {"host": "r.example", "repo": "a/b", "auth": "dTpw"}},
            "cache": {"type": "blobcache", "filecache": {"work_dir": "/var/lib/containerd-nydus/cache"}},
            "rafs": {"mode": "direct", "prefetch": {"enable": true}}
        }),
    ]
}

fn nydus_extra(config: &serde_json::Value) -> serde_json::Value {
    json!({
        "source": "/var/lib/containerd-nydus/snapshots/2/fs/image/image.boot",
        "config": config.to_string(),
        "snapshotdir": "/var/lib/containerd-nydus/snapshots/7",
        "fs_version": "v6"
    })
}

#[test]
fn extraoption_is_taken_exactly_with_either_form_of_configuration() {
    for config in configs() {
        let mount = mount("fuse.nydus-overlayfs", &options(&[extra(&nydus_extra(&config))]));
        assert!(is_image(&mount) && is_helper(&mount.type_));
        let root = parse(&mount).unwrap();
        assert_eq!(root.bootstrap, Path::new("/var/lib/containerd-nydus/snapshots/2/fs/image/image.boot"));
        assert_eq!(root.config, config.to_string());
        assert_eq!((root.layers.len(), root.volatile, root.warnings.len()), (0, false, 0));
        let upper = root.upper.clone().unwrap();
        assert_eq!(upper.parent, Path::new("/var/lib/containerd-nydus/snapshots/7"));
        assert_eq!((upper.upper, upper.work), ("fs".into(), "work".into()));
        let said = format!("{root:?}");
        assert!(!said.contains("dTpw"), "credentials are in {said}");
        let mut older = nydus_extra(&config);
        older["fs_version"] = json!("v5");
        let root_of_older = parse(&mount_of(&older)).unwrap();
        assert!(root_of_older == root, "the version is the image service's to see");
    }
}

fn mount_of(described: &serde_json::Value) -> Mount {
    mount("fuse.nydus-overlayfs", &options(&[extra(described)]))
}

#[test]
fn a_kata_volume_is_taken_exactly() {
    for kind in ["image_nydus_block", "layer_nydus_block", "image_nydus_fs", "layer_nydus_fs"] {
        let [config, _] = configs();
        let value = json!({
            "volume_type": kind, "source": "/b/image.boot", "fs_type": "rafsv6", "options": ["ro"],
            "nydus_image": {"config": config.to_string(), "snapshot_dir": "/s/7"}
        });
        let root = parse(&mount("fuse.nydus-overlayfs", &options(&[volume(&value)]))).unwrap();
        assert_eq!((root.bootstrap.to_str(), root.config), (Some("/b/image.boot"), config.to_string()));
        assert_eq!(root.warnings, [""; 0]);
    }
}

#[test]
fn layers_over_the_image_stay_in_order() {
    let [config, _] = configs();
    let mut options = options(&[extra(&nydus_extra(&config)), "volatile".into()]);
    options[2] = "lowerdir=/s/6/fs:/s/5/fs:/s/2/mnt".into();
    let root = parse(&mount("fuse.nydus-overlayfs", &options)).unwrap();
    assert_eq!(root.layers, [Path::new("/s/6/fs"), Path::new("/s/5/fs")]);
    assert!(root.volatile);
    // A view: nothing to write to.
    options.drain(..2);
    assert_eq!(parse(&mount("fuse.nydus-overlayfs", &options)).unwrap().upper, None);
}

/// `mountRemote` of nydus-snapshotter: for a view the image's mount, then the view's own folder.
#[test]
fn a_view_of_nydus_snapshotter_has_no_layers() {
    let [config, _] = configs();
    let extra = extra(&nydus_extra(&config));
    let view = "lowerdir=/s/2/mnt:/var/lib/containerd-nydus/snapshots/7/fs".to_owned();
    let root = parse(&mount("fuse.nydus-overlayfs", &[view, extra.clone()])).unwrap();
    assert_eq!((root.layers.len(), root.upper), (0, None));
    let other = "lowerdir=/s/8/fs:/s/2/mnt".to_owned();
    let root = parse(&mount("fuse.nydus-overlayfs", &[other, extra])).unwrap();
    assert_eq!(root.layers, [Path::new("/s/8/fs")]);
}

#[test]
fn owners_are_shifted_as_the_sandbox_has_them_and_not_otherwise() {
    let parsed = |more: &[&str]| {
        let mut all = vec![extra(&nydus_extra(&configs()[0]))];
        all.extend(more.iter().map(|&option| option.to_owned()));
        parse(&mount("fuse.nydus-overlayfs", &options(&all)))
    };
    let map = |outside| IdMap::new([IdRange { inside: 0, outside, count: 65_536 }]).unwrap();
    let users = IdMaps { uids: map(100_000), gids: map(200_000) };
    let shifted = parsed(&["uidmap=0:100000:65536", "gidmap=0:200000:65536"]).unwrap();
    assert_eq!(shifted.maps.as_ref(), Some(&users));
    shifted.is_for(Some(&users)).unwrap();
    let plain = parsed(&[]).unwrap();
    plain.is_for(None).unwrap();
    let said = |root: &ImageRoot, users: Option<&IdMaps>| root.is_for(users).unwrap_err().to_string();
    assert!(said(&plain, Some(&users)).contains("capabilities = [\"remap-ids\"]"));
    let others = IdMaps { uids: map(100_000), gids: map(100_000) };
    for users in [None, Some(&others)] {
        assert!(said(&shifted, users).contains("are not the maps of the sandbox's"));
    }
    let said = |more: &[&str]| parsed(more).unwrap_err().to_string();
    assert_eq!(said(&["gidmap=0:1:1"]), "the image mount has gidmap and no uidmap");
    assert_eq!(
        said(&["uidmap=0:1", "gidmap=0:1:1"]),
        "option \"uidmap\" of the image mount is not supported"
    );
}

#[test]
fn unknown_fields_are_named_in_warnings() {
    let [config, _] = configs();
    let mut value = nydus_extra(&config);
    value["quantum"] = json!({"secret": 1});
    value["nothing"] = json!(null);
    let root = parse(&mount("fuse.nydus-overlayfs", &options(&[extra(&value)]))).unwrap();
    assert_eq!(
        root.warnings,
        ["field \"quantum\" of the image mount's extraoption is not known and left out"]
    );
    let value = json!({
        "volume_type": "image_nydus_fs", "source": "/b", "new": 1,
        "nydus_image": {"config": "", "snapshot_dir": "/s", "other": []}
    });
    let root = parse(&mount("fuse.nydus-overlayfs", &options(&[volume(&value)]))).unwrap();
    assert_eq!(root.warnings.len(), 2);
    assert!(root.warnings[0].contains("other") && root.warnings[1].contains("new"), "{:?}", root.warnings);
}

#[test]
fn the_helper_is_known_under_its_other_names() {
    for kind in ["fuse.nydus-overlayfs", "fuse.nydus-overlayfs-abcde", "fuse./usr/local/bin/nydus-overlayfs"]
    {
        assert!(is_helper(kind), "{kind}");
    }
    for kind in ["overlay", "fuse", "fuse.", "fuse.sshfs", "nydus-overlayfs", "fuse./nydus-overlayfs/x"] {
        assert!(!is_helper(kind), "{kind}");
    }
}

#[test]
fn what_is_refused_is_refused_in_words() {
    let [config, _] = configs();
    let good = nydus_extra(&config);
    let with = |field: &str, value: serde_json::Value| {
        let mut changed = good.clone();
        changed[field] = value;
        extra(&changed)
    };
    let kata = |kind: &str| volume(&json!({"volume_type": kind, "source": "/x"}));
    let refused =
        |more: &[String]| parse(&mount("fuse.nydus-overlayfs", &options(more))).unwrap_err().to_string();
    let cases = [
        (with("fs_version", json!("v4")), "the image is RAFS \"v4\"; supported are v5 and v6"),
        (with("fs_version", json!(6)), "\"fs_version\" is not a text"),
        (with("source", json!("")), "extraoption of the image mount has no \"source\""),
        (with("source", json!("image.boot")), "must be an absolute path"),
        (with("source", json!("/a/../b")), "must be an absolute path without \"..\""),
        (with("config", json!(7)), "\"config\" is not a text or an object"),
        ("extraoption=???".into(), "option extraoption of the image mount: not base64"),
        ("extraoption=".into(), "not JSON, at line 1"),
        (extra(&json!([1])), "not a JSON object"),
        (kata("image_guest_pull"), "image volumes of type \"image_guest_pull\" are not supported"),
        (kata("image_raw_block"), "supported are image_nydus_block"),
        (kata("image_nydus_block"), "has no \"nydus_image\""),
        (volume(&json!({"source": "/x"})), "has no \"volume_type\""),
    ];
    for (option, text) in cases {
        let said = refused(&[option]);
        assert!(said.contains(text), "{said:?} does not say {text:?}");
    }
    let two = [extra(&good), with("source", json!("/other"))];
    assert!(refused(&two).starts_with("2 image volumes for one root"), "{}", refused(&two));
    assert!(refused(&[extra(&good), "redirect_dir=on".into()]).contains("\"redirect_dir\""));
    let half = mount("fuse.nydus-overlayfs", &[extra(&good), "lowerdir=/m".into(), "upperdir=/u/fs".into()]);
    assert_eq!(parse(&half).unwrap_err().to_string(), "the image mount has upperdir and no workdir");
    let apart = ["upperdir=/a/fs".into(), "workdir=/b/work".into(), "lowerdir=/m".into(), extra(&good)];
    assert!(
        parse(&mount("fuse.nydus-overlayfs", &apart))
            .unwrap_err()
            .to_string()
            .contains("not beside each other")
    );
    // The same image, described in both ways, is one.
    let both = [
        extra(&good),
        volume(&json!({
            "volume_type": "image_nydus_block", "source": good["source"], "nydus_image": {"config": "", "snapshot_dir": ""}
        })),
    ];
    assert!(parse(&mount("fuse.nydus-overlayfs", &options(&both))).is_ok());
}

proptest! {
    /// Whatever comes: it is read or refused.
    #[test]
    fn no_mount_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), raw in ".{0,80}", kind in ".{0,30}") {
        for option in [format!("extraoption={raw}"), format!("io.katacontainers.volume={}", encode(&bytes))] {
            let mount = mount(&kind, &[option, raw.clone()]);
            let _ = is_helper(&kind);
            let _ = parse(&mount);
        }
    }

    /// Any JSON in any field.
    #[test]
    fn no_description_makes_it_panic(value in json_value(), field in 0usize..7) {
        let [config, _] = configs();
        let mut described = nydus_extra(&config);
        let name = ["source", "config", "snapshotdir", "fs_version", "x", "nydus_image", "volume_type"][field];
        described[name] = value.clone();
        let _ = parse(&mount("fuse.nydus-overlayfs", &options(&[extra(&described)])));
        let mut described = json!({"volume_type": "image_nydus_fs", "source": "/x", "nydus_image": {"config": ""}});
        described[name] = value;
        let _ = parse(&mount("fuse.nydus-overlayfs", &options(&[volume(&described)])));
    }
}

fn json_value() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(json!(null)),
        any::<bool>().prop_map(|b| json!(b)),
        any::<i64>().prop_map(|n| json!(n)),
        "\\PC{0,20}".prop_map(|s| json!(s)),
    ];
    leaf.prop_recursive(3, 20, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(|list| json!(list)),
            prop::collection::btree_map("\\PC{0,8}", inner, 0..4).prop_map(|map| json!(map)),
        ]
    })
}
