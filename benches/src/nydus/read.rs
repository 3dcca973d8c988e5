//! Reads in a container, past what its own kernel has in memory: from the disk of a Nydus image, from an unpacked image by virtio-fs, and
//! from an ext4 on a plain disk.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use benches::rows::Row;
use e2e::{LoopDevice, SHARE, run};

use super::link::NO_LIMIT;
use super::node::{NYDUS, Node, OCI, Way};
use super::{GROUP, MEDIUM, MIB, pages};

/// Large files of the image, read from end to end and at random.
const LIBRARY: &str = "usr/lib/x86_64-linux-gnu/libnode.so.108";
const DATA: &str = "usr/lib/x86_64-linux-gnu/libicudata.so.72.1";
/// Reads of 4 KiB in a round. The first ones are far apart, each in a chunk of its own.
const COLD: &str = "16";
const WARM: &str = "300";
/// A round is made for so many of the asked runs, one at least.
const RUNS_A_ROUND: usize = 5;
/// Where the ext4 is in its container.
const MOUNTED: &str = "tmp";

/// Figures of one place.
#[derive(Debug, Default)]
struct Reads {
    /// MiB/s.
    sequential: Vec<f64>,
    /// µs.
    random: Vec<f64>,
}

impl Reads {
    fn last(&self) -> Option<f64> {
        self.sequential.last().map(|rate| rate.round())
    }
}

/// Runs the part.
pub fn measure(node: &mut Node, runs: usize) -> Result<Vec<Row>> {
    node.link.set(NO_LIMIT)?;
    let (mut nydus, mut virtio_fs, mut disk) = <([Reads; 2], [Reads; 2], [Reads; 2])>::default();
    let mut every_file = Vec::new();
    let rounds = (runs / RUNS_A_ROUND).max(1);
    for round in 0..rounds {
        let container = Reader::start(node, NYDUS, &[])?;
        container.read("", COLD, &mut nydus[0])?;
        container.warm("")?;
        container.read("", WARM, &mut nydus[1])?;
        if round == 0 {
            every_file.push(container.read_all()?);
        }
        container.end()?;
        node.forget(MEDIUM.repository, NYDUS)?;
        eprintln!("nydus, read, round {round}: Nydus {:?} MiB/s", nydus.each_ref().map(Reads::last));
    }
    // Part `memory` needs it, too, and it is long in coming.
    node.pull_if_absent(MEDIUM.repository, OCI)?;
    let unpacked = node.files(OCI);
    let disk_image = DiskImage::make(node.disk(), &unpacked)?;
    for round in 0..rounds {
        pages::forget(&find(&unpacked, LIBRARY)?)?;
        pages::forget(&find(&unpacked, DATA)?)?;
        let container = Reader::start(node, OCI, &[])?;
        container.read("", COLD, &mut virtio_fs[0])?;
        container.warm("")?;
        container.read("", WARM, &mut virtio_fs[1])?;
        container.end()?;
        disk_image.forget_pages()?;
        let container =
            Reader::start(node, OCI, &["--cap-add", "CAP_SYS_ADMIN", "--device", disk_image.device.name()])?;
        container.exec(&["mount", "-t", "ext4", "-o", "ro", disk_image.device.name(), "/tmp"])?;
        container.read(MOUNTED, COLD, &mut disk[0])?;
        container.warm(MOUNTED)?;
        container.read(MOUNTED, WARM, &mut disk[1])?;
        container.end()?;
        let last = [&virtio_fs, &disk].map(|of| of.each_ref().map(Reads::last));
        eprintln!("nydus, read, round {round}: virtio-fs and ext4 {last:?} MiB/s");
    }
    let places = [
        ("cold", "Nydus, from the registry", &nydus[0]),
        ("cold", "virtio-fs, from its disk", &virtio_fs[0]),
        ("cold", "ext4, from its disk", &disk[0]),
        ("warm", "Nydus", &nydus[1]),
        ("warm", "virtio-fs", &virtio_fs[1]),
        ("warm", "ext4", &disk[1]),
    ];
    let mut rows = Vec::new();
    for (state, subject, reads) in &places {
        let name = format!("{state}, read from end to end");
        rows.extend(Row::of(GROUP, name, *subject, "MiB/s", reads.sequential.clone()));
    }
    for (state, subject, reads) in &places {
        let name = format!("{state}, read 4 KiB at random");
        rows.extend(Row::of(GROUP, name, *subject, "µs", reads.random.clone()));
    }
    let total = every_file.iter().map(|bytes| bytes / MIB).collect();
    rows.extend(Row::of(
        GROUP,
        format!("{}: over the link, every file read", MEDIUM.name),
        NYDUS.subject,
        "MiB",
        total,
    ));
    Ok(rows)
}

/// A container that reads.
struct Reader<'a> {
    node: &'a Node,
    /// What had come over the link before the image.
    received: u64,
}

const ID: &str = "reader";

const READ_ALL: &str = "
import os
for top in '/usr', '/etc', '/var':
    for folder, _, names in os.walk(top):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path) and not os.path.islink(path):
                with open(path, 'rb', buffering=0) as file:
                    while file.read(1 << 20):
                        pass
";

impl<'a> Reader<'a> {
    fn start(node: &'a Node, way: Way, options: &[&str]) -> Result<Reader<'a>> {
        let received = node.link.received()?;
        if way == NYDUS {
            node.pull(MEDIUM.repository, way)?;
        }
        let mount = format!("type=bind,src={SHARE},dst=/opt,options=rbind:ro");
        let options: Vec<&str> = ["--mount", &mount].iter().chain(options).copied().collect();
        node.start_container(MEDIUM.repository, way, &options, ID, &["sleep", "100000"])?;
        Ok(Reader { node, received })
    }

    fn exec(&self, command: &[&str]) -> Result<String> {
        self.node.exec(ID, command)
    }

    /// Reads both files below `root` of the container, of the second one `count` blocks.
    fn read(&self, root: &str, count: &str, reads: &mut Reads) -> Result<()> {
        let said = self.exec(&["/opt/exerciser", "read", "sequential", &path(root, LIBRARY)])?;
        let (bytes, us) = said.split_once(' ').with_context(|| format!("the reader said {said:?}"))?;
        reads.sequential.push(bytes.parse::<f64>()? / MIB / (us.parse::<f64>()? / 1e6));
        let said = self.exec(&["/opt/exerciser", "read", "random", &path(root, DATA), count])?;
        for nanoseconds in said.split(' ') {
            reads.random.push(nanoseconds.parse::<f64>()? / 1000.0);
        }
        Ok(())
    }

    /// Has the host have all of the second file, too.
    fn warm(&self, root: &str) -> Result<()> {
        self.exec(&["/opt/exerciser", "read", "sequential", &path(root, DATA)]).map(drop)
    }

    /// Reads every file of the image; what has come over the link for it in all.
    fn read_all(&self) -> Result<f64> {
        self.exec(&["python3", "-c", READ_ALL])?;
        Ok((self.node.link.received()? - self.received) as f64)
    }

    fn end(self) -> Result<()> {
        self.node.remove(ID)
    }
}

fn path(root: &str, file: &str) -> String {
    Path::new("/").join(root).join(file).display().to_string()
}

/// An ext4 with the two files, as a block device.
struct DiskImage {
    device: LoopDevice,
}

impl DiskImage {
    fn make(parent: &Path, unpacked: &Path) -> Result<DiskImage> {
        let folder = tempfile::tempdir_in(parent)?;
        let (tree, image) = (folder.path().join("tree"), folder.path().join("image"));
        for file in [LIBRARY, DATA] {
            let to = tree.join(file);
            std::fs::create_dir_all(to.parent().context("a file in a folder")?)?;
            std::fs::copy(find(unpacked, file)?, to)?;
        }
        std::fs::File::create(&image)?.set_len(128 << 20)?;
        run(Command::new("mkfs.ext4").arg("-q").arg("-d").arg(&tree).arg(&image))?.ok()?;
        Ok(DiskImage { device: LoopDevice::with(&std::fs::read(image)?)? })
    }

    fn forget_pages(&self) -> Result<()> {
        run(Command::new("blockdev").arg("--flushbufs").arg(self.device.node()))?.ok().map(drop)
    }
}

/// A file of the image among the snapshots of its layers.
fn find(snapshots: &Path, file: &str) -> Result<PathBuf> {
    for snapshot in std::fs::read_dir(snapshots)? {
        let path = snapshot?.path().join("fs").join(file);
        if path.exists() {
            return Ok(path);
        }
    }
    anyhow::bail!("no {file} below {}", snapshots.display())
}
