//! From the kernel's hand-over to a machine on which commands can run.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_move, unmount};
use rustix::system::{RebootCommand, reboot};

/// In the initramfs: paths of module files in the order in which they load. Its presence marks the first stage.
pub const MODULE_LIST: &str = "/modules.list";

/// Disk with the lab's root file system, an EROFS image.
const ROOT_DISK: &str = "/dev/vda";

/// Disk with what is tested, an EROFS image; missing in a lab for looking around.
const PRODUCT_DISK: &str = "/dev/vdb";

/// Where `lab-init` puts itself in the new root. On the overlay's tmpfs, so the image need not hold it.
const SELF_IN_ROOT: &str = "/lab-init";

/// Modules for tests, KVM apart.
const MODULES: [&str; 15] = [
    "virtio_net",
    "virtio-rng",
    "vhost_vsock",
    "vhost_net",
    "tun",
    "veth",
    "bridge",
    "loop",
    "ext4",
    "fuse",
    "virtiofs",
    "overlay",
    "erofs",
    "vsock_loopback",
    "nbd",
];

/// First stage: mounts the root and becomes its `lab-init`. Returns only on failure.
pub fn enter_root() -> Result<()> {
    for folder in ["/dev", "/proc", "/sys", "/lower", "/rw", "/root"] {
        fs::create_dir_all(folder).with_context(|| format!("make {folder}"))?;
    }
    mount_at("devtmpfs", "/dev", "devtmpfs", "mode=0755")?;
    mount_at("proc", "/proc", "proc", "")?;
    mount_at("sysfs", "/sys", "sysfs", "")?;
    let list = fs::read_to_string(MODULE_LIST).context("read the module list")?;
    for module in list.lines() {
        load_module(module).with_context(|| format!("load {module}"))?;
    }
    wait_for(ROOT_DISK)?;
    mount(ROOT_DISK, "/lower", "erofs", MountFlags::RDONLY, None).context("mount the root disk")?;
    mount_at("tmpfs", "/rw", "tmpfs", "mode=0755")?;
    fs::create_dir("/rw/upper")
        .and_then(|()| fs::create_dir("/rw/work"))
        .context("make the overlay's folders")?;
    mount_at("overlay", "/root", "overlay", "lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work")?;
    fs::copy("/proc/self/exe", format!("/root{SELF_IN_ROOT}")).context("copy lab-init to the root")?;
    for folder in ["/dev", "/proc", "/sys"] {
        fs::create_dir_all(format!("/root{folder}"))?;
        mount_move(folder, format!("/root{folder}")).with_context(|| format!("move {folder}"))?;
    }
    rustix::process::chdir("/root").context("enter the root")?;
    mount_move(".", "/").context("move the root")?;
    rustix::process::chroot(".").context("chroot")?;
    Err(Command::new(SELF_IN_ROOT).exec()).context("execute lab-init in the root")
}

/// Second stage: everything a test may expect of a machine.
pub fn bring_up() -> Result<()> {
    for folder in
        ["/dev/pts", "/dev/shm", "/tmp", "/run", "/root", "/var/lib/containerd", "/var/log", "/sys/fs/cgroup"]
    {
        fs::create_dir_all(folder).with_context(|| format!("make {folder}"))?;
    }
    mount_at("devpts", "/dev/pts", "devpts", "mode=0620,ptmxmode=0666")?;
    mount_at("tmpfs", "/dev/shm", "tmpfs", "mode=1777")?;
    mount_at("tmpfs", "/tmp", "tmpfs", "mode=1777,size=90%")?;
    mount_at("tmpfs", "/run", "tmpfs", "mode=0755,size=90%")?;
    // An overlay cannot be the upper layer of another overlay: containerd's snapshots need a file system of their own.
    mount_at("tmpfs", "/var/lib/containerd", "tmpfs", "mode=0711,size=90%")?;
    mount_at("tmpfs", "/var/tmp", "tmpfs", "mode=1777,size=90%")?;
    show_product()?;
    mount_at("cgroup2", "/sys/fs/cgroup", "cgroup2", "")?;
    mount_at("debugfs", "/sys/kernel/debug", "debugfs", "")?;
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        symlink(target, link).or_else(|error| if Path::new(link).exists() { Ok(()) } else { Err(error) })?;
    }
    rustix::system::sethostname(b"lab").context("set the host name")?;
    // The one that does not fit the processor does not load.
    for module in ["kvm-amd", "kvm-intel"] {
        if !Path::new("/dev/kvm").exists() {
            let _ = run("modprobe", &["-q", module], ""); // a test that needs KVM says so itself
        }
    }
    // Each by itself: `modprobe -a` stops at nothing, but reports everything as one failure.
    for module in MODULES {
        let _ = run("modprobe", &["-q", module], ""); // a module this kernel has built in or lacks
    }
    run(
        "ip",
        &["-batch", "-"],
        "link set lo up\naddr add 10.0.2.15/24 dev eth0\nlink set eth0 up\nroute add default via 10.0.2.2\n",
    )?;
    // What a command finds when it is started by hand; lab-init passes the same to commands it runs.
    fs::write("/etc/hosts", "127.0.0.1 localhost lab\n").context("write /etc/hosts")?;
    // Nobody answers there; containerd wants the file, and pods get a copy.
    fs::write("/etc/resolv.conf", "nameserver 192.0.2.53\n").context("write /etc/resolv.conf")?;
    // Descriptors, processes and mappings enough for ten VMs and their tests at once.
    fs::write("/proc/sys/kernel/printk", "4 4 1 7\n").context("set the console's log level")?;
    rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit { current: Some(65_536), maximum: Some(1 << 20) },
    )
    .context("raise the descriptor limit")
}

/// Shows the second disk, where there is one, as `/opt/ctvm`, and lets it be changed: a developer's lab gets new
/// builds while it runs.
fn show_product() -> Result<()> {
    if !Path::new(PRODUCT_DISK).exists() {
        return Ok(());
    }
    for folder in ["/opt/ctvm", "/mnt"] {
        fs::create_dir_all(folder).with_context(|| format!("make {folder}"))?;
    }
    mount_at("tmpfs", "/mnt", "tmpfs", "mode=0700")?;
    for folder in ["/mnt/lower", "/mnt/upper", "/mnt/work"] {
        fs::create_dir(folder).with_context(|| format!("make {folder}"))?;
    }
    mount(PRODUCT_DISK, "/mnt/lower", "erofs", MountFlags::RDONLY, None)
        .context("mount the product's disk")?;
    mount_at("overlay", "/opt/ctvm", "overlay", "lowerdir=/mnt/lower,upperdir=/mnt/upper,workdir=/mnt/work")?;
    fs::create_dir_all("/etc/ctvm").context("make /etc/ctvm")?;
    fs::copy("/opt/ctvm/share/config.toml", "/etc/ctvm/config.toml").context("configure the shim")?;
    // Off the tree again: a test may count mounts, and /mnt is for whoever needs it.
    unmount("/mnt/lower", UnmountFlags::DETACH)
        .and_then(|()| unmount("/mnt", UnmountFlags::DETACH))
        .context("tidy /mnt")
}

/// Writes everything back and ends the machine. Never returns.
pub fn power_off() -> ! {
    rustix::fs::sync();
    let _ = reboot(RebootCommand::PowerOff); // what is left when it fails is to stop here and be killed
    loop {
        std::thread::park();
    }
}

/// Runs a tool of the lab's user land to its end, with `input` on its standard input.
fn run(program: &str, args: &[&str], input: &str) -> Result<()> {
    let mut child = Command::new(program)
        .args(args)
        .env("PATH", crate::run::PATH)
        .stdin(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {program}"))?;
    child
        .stdin
        .take()
        .expect("stdin is piped above")
        .write_all(input.as_bytes())
        .with_context(|| format!("feed {program}"))?;
    let status = child.wait().with_context(|| format!("wait for {program}"))?;
    ensure!(status.success(), "{program} {args:?}: {status}");
    Ok(())
}

fn mount_at(source: &str, target: &str, kind: &str, options: &str) -> Result<()> {
    let options = CString::new(options).expect("options are literals without NUL");
    mount(source, target, kind, MountFlags::empty(), options.as_c_str())
        .with_context(|| format!("mount {kind} at {target}"))
}

fn load_module(path: &str) -> Result<()> {
    let file = File::open(path).context("open")?;
    match rustix::system::finit_module(file.as_fd(), c"", 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => bail!("finit_module: {error}"),
    }
}

/// Waits until devtmpfs shows `path`: a driver may finish its probe after its module is loaded.
fn wait_for(path: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !Path::new(path).exists() {
        ensure!(Instant::now() < deadline, "{path} did not appear within 20 s");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
