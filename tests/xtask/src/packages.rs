//! Packages that builds need on this machine. What runs in the lab needs none: it comes from unpacked packages.

use std::process::Command;

use anyhow::{Result, bail};

use crate::cache::Cache;
use crate::steps::{output, quietly, step};

/// Package and why it is needed.
const NEEDED: [(&str, &str); 20] = [
    ("bc", "guest kernel"),
    ("binutils", "guest kernel"),
    ("bison", "guest kernel"),
    ("cmake", "the image converter"),
    ("erofs-utils", "guest image"),
    ("flex", "guest kernel"),
    ("g++", "fuzzer"),
    ("gcc", "everything"),
    ("libelf-dev", "guest kernel"),
    ("libglib2.0-dev", "the lab's QEMU"),
    ("libseccomp-dev", "guest agent"),
    ("libslirp-dev", "the lab's QEMU"),
    ("libssl-dev", "guest kernel, the image converter"),
    ("make", "guest kernel"),
    ("ninja-build", "the lab's QEMU"),
    ("patch", "guest kernel, the lab's QEMU"),
    ("pkg-config", "guest agent, the lab's QEMU"),
    ("protobuf-compiler", "the tests' CRI client"),
    ("python3-venv", "the lab's QEMU"),
    ("xz-utils", "guest kernel"),
];

/// Installs what is missing when run by root; else fails with the one command to run.
pub fn ensure(cache: &Cache) -> Result<()> {
    let missing = missing();
    if missing.is_empty() {
        return Ok(());
    }
    let install = ["install", "--yes", "--no-install-recommends"];
    if !rustix::process::geteuid().is_root() {
        bail!(
            "this machine lacks {} package(s); run as root: apt-get update && apt-get {} {}",
            missing.len(),
            install.join(" "),
            missing.join(" ")
        );
    }
    step(&format!("install {}", missing.join(" ")), || {
        let apt_get = |args: &[&str], more: &[&str]| {
            let mut command = Command::new("apt-get");
            command.env("DEBIAN_FRONTEND", "noninteractive").arg("-q").args(args).args(more);
            quietly(cache, "apt-get", &mut command)
        };
        apt_get(&["update"], &[])?;
        apt_get(&install, &missing)
    })
}

fn missing() -> Vec<&'static str> {
    NEEDED
        .iter()
        .map(|(package, _)| *package)
        .filter(|package| {
            let status = output(Command::new("dpkg-query").args([
                "--show",
                "--showformat=${db:Status-Status}",
                package,
            ]));
            !status.is_ok_and(|status| status == "installed")
        })
        .collect()
}
