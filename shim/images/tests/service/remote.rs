//! Blobs of a registry, which is slow, wrong, picky, or away.

use std::time::{Duration, Instant};

use crate::registry::{Registry, Wants};
use crate::sample::{Running, Sample, until};

const EIO: u32 = 5;

/// `user:password` in base64.
const AUTH: &str = r#", "auth": "dXNlcjpwYXNzd29yZA==""#;

#[test]
fn an_image_of_a_registry_reads_as_the_folder() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let registry = Registry::with_blobs(&sample.blobs());
    let running = Running::plain();
    let client = running.open(&built.bootstrap, &registry.config(""));
    assert_eq!(registry.state().log.len(), 0, "opening asks for nothing");
    sample.compare(&built.bootstrap, &client);
    let name = format!("http://{}/a/b", registry.address);
    let from = running.stats().from[&name];
    assert_eq!(from.bytes, registry.state().sent as u64);
    assert!(registry.state().log.iter().all(|line| line.contains(" bytes=") && line.ends_with("-> 206")));
}

#[test]
fn a_zran_image_of_a_registry_reads_as_the_folder() {
    let sample = Sample::new();
    let built = sample.build_zran();
    let registry = Registry::with_blobs(&sample.blobs());
    let running = Running::plain();
    let client = running.open(&built.bootstrap, &registry.config(""));
    sample.compare(&built.bootstrap, &client);
}

#[test]
fn fifty_openers_fetch_each_byte_once() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let registry = Registry::with_blobs(&sample.blobs());
    registry.state().latency = Duration::from_millis(20);
    let running = Running::plain();
    let clients: Vec<_> = (0..50).map(|_| running.open(&built.bootstrap, &registry.config(""))).collect();
    let threads: Vec<_> = clients
        .into_iter()
        .map(|client| std::thread::spawn(move || assert_eq!(client.fetch_all(), 0)))
        .collect();
    threads.into_iter().for_each(|thread| thread.join().expect("fetched"));
    let sent = registry.state().sent;
    let image =
        images::rafs::Image::parse(&std::fs::read(&built.bootstrap).expect("read")).expect("an image");
    let stored: usize = image.blobs[0].chunks.iter().map(|chunk| chunk.stored_size as usize).sum();
    assert_eq!(sent, stored);
}

#[test]
fn registries_that_want_a_name_or_a_token() {
    let sample = Sample::new();
    let built = sample.build_v6();
    for wants in [Wants::Basic, Wants::Bearer] {
        let registry = Registry::with_blobs(&sample.blobs());
        registry.state().wants = wants.clone();
        let running = Running::plain();
        let client = running.open(&built.bootstrap, &registry.config(""));
        assert_eq!(client.fetch(0, 0, 1), EIO, "{wants:?}: nobody without a name");
        let client = running.open(&built.bootstrap, &registry.config(AUTH));
        assert_eq!(client.fetch_all(), 0, "{wants:?}");
        assert!(registry.state().tokens <= 2, "a token is used as long as it is good");
        // A token that is good no longer, before its time.
        registry.state().tokens += u32::from(wants == Wants::Bearer);
        let other = sample.build_v6_of(2 << 20);
        registry.add(&sample.blobs());
        let client = running.open(&other.bootstrap, &registry.config(AUTH));
        assert_eq!(client.fetch_all(), 0, "{wants:?}");
        let refused = registry.state().log.iter().filter(|line| line.ends_with("401")).count();
        assert!(refused <= 5, "{:?}", registry.state().log);
    }
}

#[test]
fn what_is_forbidden_or_missing_or_wrong_is_an_error_at_once() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let running = Running::with("[fetch]\nread_ahead_kib = 0\nprefetch = false\npatience_s = 100");
    let started = Instant::now();
    let registry = Registry::with_blobs(&sample.blobs());
    let client = running.open(&built.bootstrap, &registry.config(""));
    registry.state().wants = Wants::Nobody;
    assert_eq!(client.fetch(0, 0, 1), EIO);
    registry.state().wants = Wants::Nothing;
    registry.state().tampered = true;
    assert_eq!(client.fetch(0, 0, 1), EIO);
    assert_eq!(client.ready(0), 0);
    registry.state().tampered = false;
    registry.state().cut = Some(100);
    assert_eq!(client.fetch(0, 0, 1), EIO);
    assert_eq!(client.fetch(0, client.blocks(0) - 1, 1), EIO, "a range behind the end");
    let blobs = std::mem::take(&mut registry.state().blobs);
    assert_eq!(client.fetch(0, 0, 1), EIO);
    (registry.state().blobs, registry.state().cut) = (blobs, None);
    assert_eq!(client.fetch(0, 0, 1), 0, "nothing is remembered of what went wrong");
    assert!(started.elapsed() < Duration::from_secs(20), "nobody waited for what would not change");
}

#[test]
fn a_registry_that_goes_and_comes_back_is_waited_for() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let registry = Registry::with_blobs(&sample.blobs());
    let running = Running::with("[fetch]\nread_ahead_kib = 0\nprefetch = false\npatience_s = 30");
    let client = running.open(&built.bootstrap, &registry.config(""));
    assert_eq!(client.fetch(0, 0, 1), 0);
    registry.state().down = true;
    std::thread::scope(|scope| {
        let wait = scope.spawn(|| client.fetch(0, 100, 1));
        std::thread::sleep(Duration::from_millis(700));
        assert!(!wait.is_finished(), "it waits");
        registry.state().down = false;
        registry.state().status = Some(503);
        std::thread::sleep(Duration::from_millis(700));
        registry.state().status = None;
        assert_eq!(wait.join().expect("an answer"), 0);
    });
    let from = running.stats().from[&format!("http://{}/a/b", registry.address)];
    assert!(from.retries >= 2 && from.failures == 0, "{from:?}");
}

#[test]
fn a_registry_that_stays_away_is_an_error_in_time() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let registry = Registry::with_blobs(&sample.blobs());
    registry.state().down = true;
    let running = Running::plain();
    let client = running.open(&built.bootstrap, &registry.config(""));
    let started = Instant::now();
    assert_eq!(client.fetch(0, 0, 1), EIO);
    assert!(started.elapsed() < Duration::from_secs(6), "patience is 2 s: {:?}", started.elapsed());
}

#[test]
fn a_registry_that_stays_away_is_one_error_for_neighbours() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let registry = Registry::with_blobs(&sample.blobs());
    registry.state().down = true;
    let running = Running::with("[fetch]\nread_ahead_kib = 0\nprefetch = false\npatience_s = 2");
    let client = running.open(&built.bootstrap, &registry.config(""));
    let started = Instant::now();
    assert_eq!(client.fetch(0, 0, 256), EIO, "16 chunks in one read");
    assert!(started.elapsed() < Duration::from_secs(6), "patience is 2 s: {:?}", started.elapsed());
}

#[test]
fn wrong_bytes_are_asked_for_again_once() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let registry = Registry::with_blobs(&sample.blobs());
    let running = Running::with("[fetch]\nread_ahead_kib = 0\nprefetch = false");
    let client = running.open(&built.bootstrap, &registry.config(""));
    let asked = || registry.state().log.len();
    registry.state().tampered_once = 1;
    assert_eq!(client.fetch(0, 0, 1), 0, "changed on its way, and not the second time");
    assert_eq!((asked(), running.stats().tampered), (2, 1));
    registry.state().tampered_once = 2;
    assert_eq!(client.fetch(0, 16, 1), EIO, "wrong twice");
    assert_eq!((asked(), running.stats().tampered), (4, 3));
    // Four chunks in one read: each is asked for again by itself.
    registry.state().tampered_once = 2;
    assert_eq!(client.fetch(0, 64, 64), EIO, "one of four is wrong twice");
    // 16 blocks of the first, and three of these chunks.
    until("the others to come", || (asked(), client.ready(0)) == (9, 16 * 4));
    sample.compare(&built.bootstrap, &client);
}

#[test]
fn a_zran_index_that_is_changed_on_its_way_is_asked_for_again() {
    let sample = Sample::new();
    let built = sample.build_zran();
    let registry = Registry::with_blobs(&sample.blobs());
    let running = Running::with("[fetch]\nread_ahead_kib = 0\nprefetch = false");
    let client = running.open(&built.bootstrap, &registry.config(""));
    registry.state().tampered_once = 1;
    assert_eq!(client.fetch(0, 0, 1), 0);
}

#[test]
fn mirrors_come_first_and_are_left_when_they_are_bad() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let (mirror, registry) = (Registry::with_blobs(&sample.blobs()), Registry::with_blobs(&sample.blobs()));
    let mirrored = format!(
        r#", "mirrors": [{{"host": "http://127.0.0.1:1"}}, {{"host": "http://{}"}}]"#,
        mirror.address
    );
    let running = Running::plain();
    let client = running.open(&built.bootstrap, &registry.config(&mirrored));
    assert_eq!(client.fetch(0, 0, 1), 0);
    assert_eq!((mirror.state().log.len(), registry.state().log.len()), (1, 0));
    mirror.state().tampered = true;
    assert_eq!(client.fetch(0, 20, 1), 0, "wrong bytes of a mirror are not the end");
    assert_eq!(registry.state().log.len(), 1);
    mirror.state().tampered = false;
    mirror.state().blobs.clear();
    assert_eq!(client.fetch(0, 40, 1), 0);
    assert_eq!(registry.state().log.len(), 2);
    mirror.state().down = true;
    for block in [60, 80, 100] {
        assert_eq!(client.fetch(0, block, 1), 0);
    }
    assert_eq!(registry.state().log.len(), 5);
}

#[test]
fn another_images_bad_source_is_not_mine() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let (bad, good) = (Registry::with_blobs(&sample.blobs()), Registry::with_blobs(&sample.blobs()));
    bad.state().tampered = true;
    bad.state().latency = Duration::from_millis(300);
    let running = Running::plain();
    let (first, second) =
        (running.open(&built.bootstrap, &bad.config("")), running.open(&built.bootstrap, &good.config("")));
    std::thread::scope(|scope| {
        let wait = scope.spawn(|| first.fetch(0, 0, 1));
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(second.fetch(0, 0, 1), 0, "it joined a flight that fails, and flew again");
        assert_eq!(wait.join().expect("an answer"), EIO);
    });
}

#[test]
fn a_limit_is_kept() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let registry = Registry::with_blobs(&sample.blobs());
    let running = Running::with("[fetch]\nrate_kib = 1024\nread_ahead_kib = 0\nprefetch = false");
    let client = running.open(&built.bootstrap, &registry.config(""));
    let started = Instant::now();
    for first in [0, 256, 512, 768] {
        assert_eq!(client.fetch(0, first, 256), 0);
    }
    let sent = registry.state().sent;
    // The last read passes without waiting for its own bytes.
    let least = Duration::from_millis(sent.saturating_sub(1 << 20) as u64 * 1000 / (1 << 20)) * 9 / 10;
    assert!(least > Duration::from_millis(500), "{sent} bytes are enough to see it");
    assert!(started.elapsed() > least, "{sent} bytes in {:?}", started.elapsed());
}

#[test]
fn a_proxy_is_gone_around_only_where_it_may_be() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let registry = Registry::with_blobs(&sample.blobs());
    let running = Running::plain();
    for (fallback, wanted) in [(true, 0), (false, EIO)] {
        let more = format!(r#", "proxy": {{"url": "http://127.0.0.1:1", "fallback": {fallback}}}"#);
        let client = running.open(&built.bootstrap, &registry.config(&more));
        assert_eq!(client.fetch(0, if fallback { 0 } else { 40 }, 1), wanted);
    }
    // A proxy for plain HTTP is asked for the whole URL.
    let proxy = Registry::new();
    let more = format!(r#", "proxy": {{"url": "http://{}"}}"#, proxy.address);
    let client = running.open(&built.bootstrap, &registry.config(&more));
    assert_eq!(client.fetch(0, 80, 1), EIO, "this one has nothing");
    assert!(proxy.state().log[0].contains(&format!("GET http://{}/v2/a/b/blobs/", registry.address)));
}

#[test]
fn a_registry_with_https_is_believed_by_its_authority() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let key = rustls::pki_types::PrivateKeyDer::Pkcs8(made.key_pair.serialize_der().into());
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let server = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .expect("a server");
    let server = std::sync::Arc::new(server);
    let registry = Registry::wrapped(std::sync::Arc::new(move |stream| {
        let connection = rustls::ServerConnection::new(std::sync::Arc::clone(&server)).ok()?;
        Some(Box::new(rustls::StreamOwned::new(connection, stream)))
    }));
    registry.add(&sample.blobs());
    let authority = sample.folder.path().join("ca.pem");
    std::fs::write(&authority, made.cert.pem()).expect("a file");
    let host = format!("localhost:{}", registry.address.port());
    let rule = format!(
        "[fetch]\nread_ahead_kib = 0\nprefetch = false\npatience_s = 1\n[[registry]]\nhost = \"{host}\"\nca = {authority:?}"
    );
    let config = |more: &str| {
        format!(
            r#"{{"backend": {{"type": "registry", "registry": {{"host": "{host}", "repo": "a/b"{more}}}}}}}"#
        )
    };
    let strangers = Running::plain();
    let client = strangers.open(&built.bootstrap, &config(""));
    assert_eq!(client.fetch(0, 0, 1), EIO, "nobody answers for it");
    let client = strangers.open(&built.bootstrap, &config(r#", "skip_verify": true"#));
    assert_eq!(client.fetch(0, 0, 1), 0, "it was said not to matter");
    let running = Running::with(&rule);
    let client = running.open(&built.bootstrap, &config(""));
    sample.compare(&built.bootstrap, &client);
}
