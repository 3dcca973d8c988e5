//! Single files of an image, as containerd wants its lists of users and groups.

use std::fs;

use convert::rafs::Options;
use images::users::{Reader, UsersError};

use crate::sample::{Running, Sample, folder_config, noise};

#[test]
fn single_files_are_fetched_and_nothing_else() {
    let sample = Sample::new();
    let etc = sample.root().join("etc");
    fs::create_dir(&etc).unwrap();
    // More than one block of names in the folder, and a file of several chunks.
    for number in 0..400 {
        fs::write(etc.join(format!("file-with-a-long-name-{number:04}")), "x").unwrap();
    }
    fs::write(etc.join("passwd"), "root:x:0:0::/:/bin/sh\n").unwrap();
    let group = [noise(9, 150_000), vec![0; 200_000], noise(10, 10)].concat();
    fs::write(etc.join("group"), &group).unwrap();
    std::os::unix::fs::symlink("passwd", etc.join("link")).unwrap();
    for version in [5, 6] {
        of_version(&sample, version, &group);
    }
}

fn of_version(sample: &Sample, version: u8, group: &[u8]) {
    let options = Options { version, chunk_size: 64 << 10, ..Options::default() };
    let built = sample.build(&format!("users-{version}"), &options);
    let running = Running::plain();
    let reader = Reader::open(&running.socket(), &built.bootstrap, &folder_config(&sample.blobs())).unwrap();
    assert_eq!(reader.read("etc/passwd").unwrap().unwrap(), b"root:x:0:0::/:/bin/sh\n");
    assert_eq!(reader.read("/etc//group").unwrap().unwrap(), group);
    assert_eq!(reader.read("empty").unwrap().unwrap(), b"");
    for no_file in ["etc/shadow", "etc", "", "etc/link", "etc/passwd/x"] {
        assert!(reader.read(no_file).unwrap().is_none(), "{no_file}");
    }
    assert!(running.stats().chunk_bytes < 600_000, "{:?}", running.stats());
}

#[test]
fn a_service_that_is_not_there_is_said_to_be() {
    let sample = Sample::new();
    let built = sample.build_v6();
    let socket = sample.folder.path().join("nobody");
    let error = Reader::open(&socket, &built.bootstrap, "").unwrap_err();
    assert!(matches!(error, UsersError::Connect { .. }));
    assert!(error.to_string().contains("ctvm-images serve"), "{error}");
}
