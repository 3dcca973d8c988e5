//! Drives a real agent through everything it serves, in place of the shim.
//!
//! `drive AT ROOTFS [NAME…]`: waits for an agent at `vsock` (port 1024 of this machine) or `unix:DIRECTORY`, runs
//! the stories of `stories.rs` (or those named) and ends with the number that failed. `ROOTFS` says what a
//! container's root is: a directory where the agent runs, or a block device there with an EROFS; with busybox and the
//! usual mount points in it.

mod shim;
mod stories;

use agent_api::task::Mount;
use anyhow::{Context, Result};

use crate::shim::Shim;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (at, rootfs) = args.first().zip(args.get(1)).context("usage: drive vsock|unix:DIR ROOTFS [NAME…]")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let failed = runtime.block_on(async {
        let shim = Shim::meet(at, mounts(rootfs)).await?;
        stories::run_all(&shim, &args[2..]).await
    })?;
    std::process::exit(i32::from(failed > 0));
}

fn mounts(rootfs: &str) -> Vec<Mount> {
    let mount = |kind: &str, source: &str, options: &[&str]| Mount {
        type_: kind.to_owned(),
        source: source.to_owned(),
        options: options.iter().map(|&option| option.to_owned()).collect(),
        ..Default::default()
    };
    if rootfs.starts_with("/dev/") {
        vec![mount("erofs", rootfs, &["ro"])]
    } else {
        vec![mount("bind", rootfs, &["rbind"])]
    }
}
