//! Group `size`: what has to be on a node's disk.

use std::path::Path;

use anyhow::{Context, Result};
use e2e::{BIN, SHARE};

use benches::rows::Row;

/// Runs the group.
pub fn group() -> Result<Vec<Row>> {
    let mib = |folder: &str, file: &str| -> Result<f64> {
        let path = Path::new(folder).join(file);
        let size = std::fs::metadata(&path).with_context(|| format!("{}", path.display()))?.len();
        Ok(size as f64 / f64::from(1 << 20))
    };
    let (kernel, rootfs) = (mib(SHARE, "vmlinux")?, mib(SHARE, "rootfs.erofs")?);
    let row = |name: &str, value: f64| Row::of("size", name, "ctvm", "MiB", vec![value]);
    let rows = [
        row("guest kernel", kernel),
        row("guest image", rootfs),
        row("guest kernel and image", kernel + rootfs).map(|r| r.budget(12.0)),
        row("ctvm-vmm", mib(BIN, "ctvm-vmm")?),
        row("containerd-shim-ctvm-v2", mib(BIN, "containerd-shim-ctvm-v2")?),
    ];
    Ok(rows.into_iter().flatten().collect())
}
