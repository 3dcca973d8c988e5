//! The program, and the list of what to fetch ahead that it takes from its standard input.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use images::rafs::Image;
use tempfile::TempDir;

#[test]
fn a_list_of_paths_is_in_the_image_and_names_their_chunks() {
    let work = TempDir::new().expect("a temporary folder");
    let root = work.path().join("root");
    fs::create_dir_all(root.join("many/deep")).expect("folders");
    fs::write(root.join("alone"), vec![1; 10_000]).expect("a file");
    fs::write(root.join("other"), vec![2; 10_000]).expect("a file");
    for name in 0..300 {
        fs::write(root.join(format!("many/file-with-a-name-{name}")), format!("{name}")).expect("a file");
    }
    fs::write(root.join("many/deep/down"), "deep").expect("a file");
    for (version, list, wanted) in
        [("6", "/alone\n", 3), ("6", "/many\n", 301), ("5", "/alone\n", 3), ("5", "/many\n", 301)]
    {
        let out = work.path().join(format!("{version}{}", wanted));
        let mut convert = Command::new(env!("CARGO_BIN_EXE_ctvm-convert"))
            .args(["folder", "--prefetch", "--chunk-size", "4096", "--fs-version", version])
            .args([&root, &out])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("the program");
        convert.stdin.take().expect("a pipe").write_all(list.as_bytes()).expect("written");
        assert!(convert.wait().expect("waited for").success());
        let image = Image::parse(&fs::read(out.join("image.boot")).expect("read")).expect("an image");
        // A chunk that several files share is fetched once: /alone's three are two, or three.
        let distinct: std::collections::HashSet<_> = image.prefetch.iter().collect();
        assert_eq!(distinct.len(), image.prefetch.len(), "each once");
        let bytes: u32 = image
            .prefetch
            .iter()
            .map(|chunk| image.blobs[chunk.blob as usize].chunks[chunk.chunk as usize].size)
            .sum();
        let (least, most) = if wanted == 3 { (4096 + 1808, 10_000) } else { (300, 4000) };
        assert!(
            (least..=most).contains(&bytes),
            "version {version}, {list:?}: {bytes} bytes in {distinct:?}"
        );
        let check = Command::new(env!("CARGO_BIN_EXE_ctvm-convert"))
            .arg("check")
            .arg("--blobs")
            .arg(out.join("blobs"))
            .arg(out.join("image.boot"))
            .output()
            .expect("the program");
        let said = String::from_utf8_lossy(&check.stdout);
        assert!(said.starts_with(&format!("fine: version {version}, 303 files")), "{said}");
    }
}
