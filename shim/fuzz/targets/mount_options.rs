//! A root file system's mount: whatever a snapshotter hands over, it is read exactly, refused in words, or left to be an ordinary overlay.
#![no_main]

use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use containerd_shim_protos::api::Mount;
use libfuzzer_sys::fuzz_target;
use shim::container::image::{is_helper, is_image, parse};
use shim::container::rootfs;

/// Options, and pieces of them. Those that begin with `extraoption=` or `io.katacontainers.volume=` have their rest encoded.
const WORDS: [&str; 48] = [
    "lowerdir=",
    "upperdir=",
    "workdir=",
    "/s/7/fs",
    "/s/7/work",
    "/s/6/fs",
    ":",
    "/s/2/mnt",
    "/..",
    "..",
    ",",
    "\\",
    "ro",
    "rw",
    "volatile",
    "userxattr",
    "index=off",
    "redirect_dir=on",
    "metacopy=on",
    "bind",
    "rbind",
    "rprivate",
    "=",
    "{\"source\":",
    "\"/s/2/fs/image/image.boot\"",
    ",\"config\":",
    "\"{}\"",
    "{}",
    ",\"snapshotdir\":",
    ",\"fs_version\":",
    "\"v6\"",
    "\"v5\"",
    "{\"volume_type\":",
    "\"image_nydus_fs\"",
    "\"layer_nydus_block\"",
    "\"image_guest_pull\"",
    ",\"source\":",
    ",\"nydus_image\":{\"config\":",
    ",\"snapshot_dir\":",
    "}",
    "null",
    "7",
    ",\"dm_verity\":",
    ",\"fs_type\":",
    ",\"options\":[",
    "]",
    "{\"auth\":\"dTpw\"}",
    "\u{fc}",
];
/// As a registry's credentials are in a configuration.
const SECRET: &str = "dTpw";
const ENCODED: [&str; 2] = ["extraoption=", "io.katacontainers.volume="];
const KINDS: [&str; 6] = [
    "fuse.nydus-overlayfs",
    "fuse.nydus-overlayfs-x",
    "fuse./usr/bin/nydus-overlayfs",
    "overlay",
    "bind",
    "erofs",
];

/// Options of the input's bytes: 0xff ends one, 0xfe and 0xfd begin one that is encoded, others are words; a raw input is base64 of nobody.
fn options(data: &[u8]) -> Vec<String> {
    data.split(|byte| *byte == 0xff)
        .map(|option| match option {
            [byte @ 0xfd..=0xfe, rest @ ..] => {
                let words: String = rest.iter().map(|byte| WORDS[usize::from(*byte) % WORDS.len()]).collect();
                format!("{}{}", ENCODED[usize::from(*byte == 0xfd)], STANDARD.encode(words))
            }
            [0xfc, rest @ ..] => format!("{}{}", ENCODED[rest.len() % 2], String::from_utf8_lossy(rest)),
            [0xfb, rest @ ..] => String::from_utf8_lossy(rest).into_owned(),
            words => words.iter().map(|byte| WORDS[usize::from(*byte) % WORDS.len()]).collect(),
        })
        .collect()
}

fn is_plain(path: &Path) -> bool {
    let text = path.to_str().unwrap_or(",");
    path.is_absolute()
        && !text.contains([',', ':', '\\', '\0'])
        && !path.components().any(|part| part.as_os_str() == "..")
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, rest)) = data.split_first() else { return };
    let mount = Mount {
        type_: KINDS[usize::from(*kind) % KINDS.len()].to_owned(),
        source: "overlay".to_owned(),
        options: options(rest),
        ..Mount::default()
    };
    // What the shim makes of it before it touches the host.
    let _ = rootfs::parse(std::slice::from_ref(&mount));
    let _ = is_helper(&mount.type_);
    if !is_image(&mount) {
        return;
    }
    let parsed = parse(&mount);
    if let Ok(root) = &parsed {
        assert!(is_plain(&root.bootstrap));
        assert!(root.layers.iter().all(|layer| is_plain(layer)));
        if let Some(upper) = &root.upper {
            assert!(is_plain(&upper.parent) && upper.upper != upper.work);
        }
    }
    // What is in a configuration is in no log and in no error; what is no configuration may be.
    let said = parsed
        .map_or_else(|error| format!("{error} {error:?}"), |root| format!("{root:?} {:?}", root.warnings));
    let is_plain_text = mount.options.iter().any(|option| option.contains(SECRET));
    assert!(is_plain_text || !said.contains(SECRET), "{said}");
});
