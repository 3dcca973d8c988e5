//! Unpacked Debian packages: making such a tree, and running its programs from where it lies.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// Folders that moved below `/usr`; packages still name them both ways.
const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];

/// What no lab needs.
const LEFT_OUT: [&str; 5] =
    ["./usr/share/doc", "./usr/share/man", "./usr/share/locale", "./usr/share/info", "./usr/share/lintian"];

/// A folder with a Debian user land.
#[derive(Debug, Clone)]
pub struct Tree {
    root: PathBuf,
}

impl Tree {
    /// An existing tree.
    pub fn at(root: &Path) -> Self {
        Self { root: root.to_path_buf() }
    }

    /// An empty tree with the merged folders' links in place.
    pub fn create(root: &Path) -> Result<Self> {
        for name in MERGED {
            fs::create_dir_all(root.join("usr").join(name)).with_context(|| format!("make usr/{name}"))?;
            symlink(format!("usr/{name}"), root.join(name)).with_context(|| format!("link {name}"))?;
        }
        Ok(Self::at(root))
    }

    /// Where it lies.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Unpacks packages into it, without their scripts.
    pub fn unpack(&self, packages: &[PathBuf]) -> Result<()> {
        for package in packages {
            let mut archive = Command::new("dpkg-deb")
                .arg("--fsys-tarfile")
                .arg(package)
                .stdout(Stdio::piped())
                .spawn()
                .context("start dpkg-deb")?;
            let stream = archive.stdout.take().expect("stdout is piped above");
            let unpacked = Command::new("tar")
                .args([
                    "--extract",
                    "--keep-directory-symlink",
                    "--no-same-owner",
                    "--delay-directory-restore",
                ])
                .args(LEFT_OUT.map(|name| format!("--exclude={name}")))
                .arg("--directory")
                .arg(&self.root)
                .stdin(stream)
                .status()
                .context("start tar")?;
            let listed = archive.wait().context("wait for dpkg-deb")?;
            ensure!(
                listed.success() && unpacked.success(),
                "unpack {}: dpkg-deb {listed}, tar {unpacked}",
                package.display()
            );
        }
        Ok(())
    }

    /// One of its programs, run on this machine with the tree's own C library, so that neither this machine's
    /// version of it nor its set of installed packages matters.
    pub fn program(&self, name: &str) -> Command {
        let libraries: Vec<String> = ["usr/lib/x86_64-linux-gnu", "usr/lib", "usr/lib64"]
            .iter()
            .map(|folder| self.path(folder).display().to_string())
            .collect();
        let mut command = Command::new(self.path("lib64/ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(libraries.join(":")).arg(self.path(name));
        command
    }
}
