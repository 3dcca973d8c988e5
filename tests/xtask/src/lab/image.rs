//! What a lab machine runs: a kernel and a root image from Debian packages.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::apt::{Apt, Package, Suite};
use crate::cache::{Cache, Key};
use crate::steps::{quietly, step};
use crate::tree::Tree;

/// What the lab's user land holds; dependencies follow.
const USER_LAND: [&str; 35] = [
    "base-files",
    "base-passwd",
    "bash",
    "bsdutils",
    "busybox",
    "containerd",
    "containernetworking-plugins",
    "coreutils",
    "cpio",
    "dash",
    "diffutils",
    "docker-registry",
    "e2fsprogs",
    "erofs-utils",
    "findutils",
    "fuse3",
    "grep",
    "gzip",
    "hostname",
    "iproute2",
    "iptables",
    "kmod",
    "libcap2-bin",
    "libseccomp2",
    "mawk",
    "mount",
    "nydus-snapshotter",
    "procps",
    "qemu-system-x86",
    "runc",
    "sed",
    "socat",
    "strace",
    "tar",
    "util-linux",
];

/// Where more containerds come from than the user land's own.
const MORE_CONTAINERDS: [Suite; 2] = [Suite::Bookworm, Suite::Forky];

const KERNEL: [&str; 1] = ["linux-image-cloud-amd64"];

/// Modules that the initramfs needs to mount the root.
const ROOT_MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "erofs", "overlay"];

/// Kernel, first modules and root image of the lab machine.
#[derive(Debug, Clone)]
pub struct Image {
    folder: PathBuf,
}

impl Image {
    /// From the cache, made if need be.
    pub fn get(cache: &Cache, apt: &Apt<'_>) -> Result<Self> {
        apt.with_fresh_lists_if_needed(|| {
            let user_land = apt.resolve(Suite::Trixie, &USER_LAND)?;
            let kernel: Vec<_> = apt
                .resolve(Suite::Bookworm, &KERNEL)?
                .into_iter()
                .filter(|package| package.name().starts_with("linux-image-6"))
                .collect();
            ensure!(kernel.len() == 1, "expected one kernel image in {KERNEL:?}, found {}", kernel.len());
            let containerds = MORE_CONTAINERDS
                .into_iter()
                .map(|suite| Ok((suite, only_containerd(apt.resolve(suite, &["containerd"])?)?)))
                .collect::<Result<Vec<_>>>()?;
            let mut key = Key::new("lab image", 3);
            let more = containerds.iter().flat_map(|(_, packages)| packages);
            for package in user_land.iter().chain(&kernel).chain(more) {
                key = key.text(&package.file).text(&package.sha256);
            }
            let folder = cache.entry("lab", &key, |folder| {
                let user_land = apt.fetch(Suite::Trixie, &USER_LAND, &user_land)?;
                let kernel = apt.fetch(Suite::Bookworm, &KERNEL, &kernel)?;
                let mut more = Vec::new();
                for (suite, packages) in &containerds {
                    more.extend(apt.fetch(*suite, &["containerd"], packages)?);
                }
                step("make the lab's root image", || make(cache, folder, &user_land, &kernel, &more))
            })?;
            Ok(Self { folder })
        })
    }

    pub fn kernel(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    pub fn root(&self) -> PathBuf {
        self.folder.join("root.erofs")
    }

    /// Writes an initramfs of `lab-init` and the first modules to `path`.
    pub fn write_initramfs(&self, lab_init: &Path, path: &Path) -> Result<()> {
        let mut archive = Vec::new();
        let list =
            fs::read_to_string(self.folder.join("modules.list")).context("read the image's module list")?;
        put(&mut archive, "init", 0o100_755, &fs::read(lab_init).context("read lab-init")?);
        put(&mut archive, "modules.list", 0o100_644, list.as_bytes());
        put(&mut archive, "modules", 0o040_755, &[]);
        for module in list.lines() {
            let name = module.trim_start_matches('/');
            put(&mut archive, name, 0o100_644, &fs::read(self.folder.join(name)).context("read a module")?);
        }
        put(&mut archive, "TRAILER!!!", 0, &[]);
        fs::File::create(path).and_then(|mut file| file.write_all(&archive)).context("write the initramfs")
    }
}

/// Of a closure, the package itself: the rest is in the user land.
fn only_containerd(closure: Vec<Package>) -> Result<Vec<Package>> {
    let found: Vec<_> = closure.into_iter().filter(|package| package.name() == "containerd").collect();
    ensure!(found.len() == 1, "expected one containerd, found {}", found.len());
    Ok(found)
}

fn make(
    cache: &Cache,
    folder: &Path,
    user_land: &[PathBuf],
    kernel: &[PathBuf],
    containerds: &[PathBuf],
) -> Result<()> {
    let tree = Tree::create(&folder.join("tree"))?;
    tree.unpack(user_land)?;
    tree.unpack(kernel)?;
    for package in containerds {
        let other = Tree::at(&tree.path(&format!("opt/containerd/{}", minor_version(package)?)));
        fs::create_dir_all(other.root()).with_context(|| format!("make {}", other.root().display()))?;
        other.unpack(std::slice::from_ref(package))?;
    }
    let release = only_name_in(&tree.path("usr/lib/modules"))?;
    fs::rename(tree.path(&format!("boot/vmlinuz-{release}")), folder.join("vmlinuz"))
        .context("take the kernel out")?;
    fs::remove_dir_all(tree.path("boot")).context("remove /boot")?;
    let mut depmod = tree.program("usr/sbin/depmod");
    quietly(cache, "depmod", depmod.arg("-b").arg(tree.root()).arg(&release))?;
    take_modules(&tree, &release, folder)?;
    configure(&tree)?;
    let mut erofs = tree.program("usr/bin/mkfs.erofs");
    erofs.args(["--all-root", "-T0", "-U", "c7000000-0000-4000-8000-000000000001"]);
    quietly(cache, "mkfs.erofs", erofs.arg(folder.join("root.erofs")).arg(tree.root()))?;
    fs::remove_dir_all(tree.root()).context("remove the unpacked tree")
}

/// `1.6` of `containerd_1.6.20~ds1-1+deb12u1_amd64.deb`.
fn minor_version(package: &Path) -> Result<String> {
    let name = package.file_name().unwrap_or_default().to_string_lossy();
    let version = name.split('_').nth(1).unwrap_or_default();
    let mut numbers = version.split('.');
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) => Ok(format!("{major}.{minor}")),
        _ => bail!("package {name:?} has no version"),
    }
}

/// What maintainer scripts would have done, as far as anything in the lab cares.
fn configure(tree: &Tree) -> Result<()> {
    let write = |name: &str, text: &str| {
        fs::write(tree.path(name), text).with_context(|| format!("write {name} of the lab's root"))
    };
    for name in ["passwd", "group"] {
        fs::copy(
            tree.path(&format!("usr/share/base-passwd/{name}.master")),
            tree.path(&format!("etc/{name}")),
        )
        .with_context(|| format!("make /etc/{name}"))?;
    }
    write("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n")?;
    write("etc/hostname", "lab\n")?;
    write("etc/machine-id", "c7000000000040008000000000000001\n")?;
    symlink("mawk", tree.path("usr/bin/awk")).context("link awk")?;
    for name in
        ["iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"]
    {
        symlink("xtables-nft-multi", tree.path("usr/sbin").join(name))
            .with_context(|| format!("link {name}"))?;
    }
    for name in ["dev", "proc", "sys", "run", "tmp", "root", "var/lib/containerd", "mnt"] {
        fs::create_dir_all(tree.path(name)).with_context(|| format!("make /{name}"))?;
    }
    Ok(())
}

/// Copies the modules for the root out of the tree, in the order in which they load.
fn take_modules(tree: &Tree, release: &str, folder: &Path) -> Result<()> {
    let base = tree.path(&format!("usr/lib/modules/{release}"));
    let dependencies = fs::read_to_string(base.join("modules.dep")).context("read modules.dep")?;
    fs::create_dir(folder.join("modules")).context("make the modules folder")?;
    let mut list = String::new();
    for (number, module) in load_order(&dependencies, &ROOT_MODULES)?.iter().enumerate() {
        let name = Path::new(module).file_name().context("module without a name")?.to_string_lossy();
        let name = format!("modules/{number:02}-{name}");
        fs::copy(base.join(module), folder.join(&name)).with_context(|| format!("copy {module}"))?;
        list += &format!("/{name}\n");
    }
    fs::write(folder.join("modules.list"), list).context("write the module list")
}

/// Paths of `names` and all they need, dependencies first, from the text of a `modules.dep`.
fn load_order(dependencies: &str, names: &[&str]) -> Result<Vec<String>> {
    let mut order: Vec<String> = Vec::new();
    for name in names {
        let file = format!("{name}.ko");
        let (path, needs) = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(path, _)| Path::new(path).file_name().is_some_and(|found| *found == *file))
            .with_context(|| format!("the kernel has no module {name}"))?;
        // depmod writes the deepest dependency last.
        for path in needs.split_whitespace().rev().chain([path]) {
            if !order.iter().any(|have| have == path) {
                order.push(path.to_string());
            }
        }
    }
    Ok(order)
}

fn only_name_in(folder: &Path) -> Result<String> {
    let names: Vec<_> = fs::read_dir(folder)
        .with_context(|| format!("list {}", folder.display()))?
        .collect::<Result<_, _>>()
        .with_context(|| format!("list {}", folder.display()))?;
    ensure!(names.len() == 1, "{} holds {} names, expected one", folder.display(), names.len());
    Ok(names[0].file_name().to_string_lossy().into_owned())
}

/// Appends a file or folder to a cpio archive in the form the kernel unpacks (`newc`,
/// early-userspace/buffer-format.rst). A folder must come before what is in it.
fn put(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let number = archive.len() + 1; // any number, as long as each file has its own
    let fields = [number, mode as usize, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "kernel/a/virtio.ko:\n\
        kernel/a/virtio_ring.ko: kernel/a/virtio.ko\n\
        kernel/a/virtio_pci.ko: kernel/a/virtio_ring.ko kernel/a/virtio.ko\n\
        kernel/b/virtio_blk.ko: kernel/a/virtio_ring.ko kernel/a/virtio.ko\n";

    #[test]
    fn modules_load_after_what_they_need_and_once() {
        let order = load_order(DEPENDENCIES, &["virtio_pci", "virtio_blk"]).unwrap();
        let names = [
            "kernel/a/virtio.ko",
            "kernel/a/virtio_ring.ko",
            "kernel/a/virtio_pci.ko",
            "kernel/b/virtio_blk.ko",
        ];
        assert_eq!(order, names);
    }

    #[test]
    fn missing_module_is_named() {
        let error = load_order(DEPENDENCIES, &["nvme"]).unwrap_err();
        assert!(error.to_string().contains("nvme"));
    }

    #[test]
    fn archive_members_are_aligned() {
        let mut archive = Vec::new();
        put(&mut archive, "modules", 0o040_755, &[]);
        put(&mut archive, "modules/a", 0o100_644, b"12345");
        put(&mut archive, "modules/bc", 0o100_644, b"1");
        assert_eq!(archive.len() % 4, 0);
        let heads: Vec<usize> =
            (0..archive.len()).filter(|at| archive[*at..].starts_with(b"070701")).collect();
        assert_eq!(heads.len(), 3);
        assert!(heads.iter().all(|at| at % 4 == 0));
    }
}
