//! The daemon's configuration: whatever it says, it is read, refused or warned of.
#![no_main]

use images::config::Backend;
use images::config::nydusd::Daemon;
use libfuzzer_sys::fuzz_target;

/// Words that make JSON worth reading.
const WORDS: [&str; 32] = [
    "{\"device\":",
    "{\"backend\":",
    "{\"type\":",
    "\"registry\"",
    "\"localfs\"",
    ",\"registry\":",
    ",\"localfs\":",
    ",\"config\":",
    "{\"host\":",
    ",\"repo\":",
    ",\"auth\":",
    "\"dTpw\"",
    ",\"mirrors\":[",
    "]",
    "}",
    "{",
    "\"x\"",
    ",\"scheme\":",
    "\"http\"",
    ",\"timeout\":",
    "7",
    "-1",
    "null",
    ",\"proxy\":",
    "{\"url\":",
    ",\"fs_prefetch\":",
    "{\"enable\":",
    "true",
    ",\"dir\":",
    "{\"dir\":",
    ",\"alt_dirs\":[",
    ",\"cache\":",
];

fuzz_target!(|data: &[u8]| {
    let text = match data.split_first() {
        Some((0..128, rest)) => rest.iter().map(|byte| WORDS[usize::from(*byte) % 32]).collect::<String>(),
        Some((_, rest)) => String::from_utf8_lossy(rest).into_owned(),
        None => return,
    };
    let Ok(daemon) = Daemon::parse(&text) else { return };
    match daemon.backend {
        Backend::Folder { folders } => assert!(!folders.is_empty()),
        Backend::Registry(registry) => {
            assert!(registry.scheme == "http" || registry.scheme == "https");
            assert!(!registry.host.is_empty() && !registry.repo.is_empty());
            assert!(registry.link.timeout_s > 0 && registry.link.connect_timeout_s > 0);
            assert!(!format!("{registry:?}").contains("password"));
        }
        Backend::Bucket(bucket) => {
            assert!(bucket.scheme == "http" || bucket.scheme == "https");
            assert!(!bucket.endpoint.is_empty() && !bucket.bucket.is_empty());
            assert!(bucket.link.timeout_s > 0 && bucket.link.connect_timeout_s > 0);
        }
    }
});
