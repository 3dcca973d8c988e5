//! The other two releases of containerd in the lab, by `ctr`: each says hello to a shim in its own way.
#![cfg(feature = "lab")]

use std::process::Command;

use anyhow::Result;
use e2e::{Containerd, Setup, Status, run_with_input};

fn start(release: &str) -> Result<Containerd> {
    Setup { release: Some(release.to_owned()), ..Setup::default() }.start()
}

fn a_whole_life(release: &str) -> Result<()> {
    // Sandboxes are told apart by namespace and id, whichever daemon asks for them.
    let id = |name: &str| format!("{name}-{release}");
    let (says, takes, stays) = (&*id("says"), &*id("takes"), &*id("stays"));
    let mut containerd = start(release)?;
    let version = e2e::run(containerd.ctr().arg("version"))?.ok()?;
    assert!(
        version.contains(&format!(" {release}.")) || version.contains(&format!("v{release}.")),
        "{version}"
    );

    let output = containerd.run(&["--rm"], says, &["sh", "-c", "echo out; echo err >&2; exit 42"])?;
    assert_eq!((output.code, output.text().as_str()), (42, "out"), "{}", output.errors());
    assert!(output.errors().contains("err"));
    let input = vec![7; 1 << 20];
    let mut ours = containerd.run_command(&["--rm"], takes, &["md5sum"]);
    let expected = run_with_input(&mut Command::new("md5sum"), input.clone())?.ok()?;
    assert_eq!(run_with_input(&mut ours, input)?.ok()?, expected);

    containerd.run(&["-d"], stays, &["sleep", "1000"])?.ok()?;
    assert_eq!(containerd.exec(stays, "one", &["sh", "-c", "exit 7"])?.code, 7);
    containerd.stop()?;
    containerd.start_again()?;
    containerd.wait_for(stays, Status::Running)?;
    assert_eq!(containerd.exec(stays, "two", &["echo", "still here"])?.ok()?, "still here");
    containerd.kill_task(stays)?;
    containerd.wait_for(stays, Status::Stopped)?;
    containerd.remove(stays)
}

#[test]
fn a_whole_life_under_containerd_1_6() -> Result<()> {
    a_whole_life("1.6")
}

#[test]
fn a_whole_life_under_containerd_2_1() -> Result<()> {
    a_whole_life("2.1")
}
