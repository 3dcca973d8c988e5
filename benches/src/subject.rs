//! The VMMs under measurement: ours, and the peer that Debian ships. Both get the same kernel, image, vCPU, memory
//! and devices: a console, vsock, and a read-only disk or, without one, an initial RAM disk. No entropy device: the
//! lab's processor has RDRAND.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use command_fds::{CommandFdExt, FdMapping};
use e2e::{BIN, SHARE};
use vmm_api::{
    CONTROL_FD, Client, ConsoleConfig, DiskConfig, FdIndex, KernelConfig, Op, Reply, Timeline, VmConfig,
    VsockConfig,
};

/// Guest memory of every measured VM, MiB.
pub const MEMORY_MIB: u32 = 128;
/// What a guest's console shows once the agent's connection is up.
pub const READY: &str = "CTVM-READY";
/// The agent dials this port when it is ready.
const READY_PORT: u32 = 1024;
/// What every guest is told; the marks come from the agent.
const CMDLINE: &str = "console=hvc0 quiet panic=-1 reboot=t ctvm_mark=1";
/// And where its root is.
const DISK_CMDLINE: &str = "root=/dev/vda ro rootfstype=erofs init=/sbin/init";
const LIMIT: Duration = Duration::from_secs(120);

/// A VMM to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// `ctvm-vmm`.
    Ctvm,
    /// `qemu-system-x86_64 -M microvm` with all that is optional off.
    Qemu,
}

/// What the guest's root is.
#[derive(Debug, Clone, Copy)]
pub enum Root<'a> {
    /// The guest image as a disk, as it ships.
    Disk,
    /// An initial RAM disk, and no disk.
    Initrd(&'a Path),
}

impl Root<'_> {
    fn cmdline(self) -> String {
        match self {
            Root::Disk => format!("{CMDLINE} {DISK_CMDLINE}"),
            Root::Initrd(_) => CMDLINE.to_owned(),
        }
    }
}

/// A VM that was started.
#[derive(Debug)]
pub struct Started {
    /// When the child was about to exec, CLOCK_MONOTONIC µs.
    pub exec_us: u64,
    /// The VMM process.
    pub vmm: Child,
    /// The guest's console.
    pub console: std::io::PipeReader,
    /// Our VMM's own stages.
    pub timeline: Option<Timeline>,
    /// The lease: the VM ends with it.
    _control: Option<Client>,
    _listener: Option<OwnedFd>,
}

impl Subject {
    /// Both, in the order they alternate.
    pub const ALL: [Subject; 2] = [Subject::Ctvm, Subject::Qemu];

    /// Name and version.
    pub fn name(self) -> Result<&'static str> {
        static QEMU: OnceLock<String> = OnceLock::new();
        match self {
            Subject::Ctvm => Ok("ctvm"),
            Subject::Qemu => {
                if QEMU.get().is_none() {
                    // Another thread would have found the same.
                    let _ = QEMU.set(format!("QEMU microvm {}", qemu_version()?));
                }
                Ok(QEMU.get().expect("set above"))
            }
        }
    }

    /// Starts a VM.
    pub fn start(self, root: Root<'_>) -> Result<Started> {
        match self {
            Subject::Ctvm => start_ctvm(root),
            Subject::Qemu => start_qemu(root),
        }
    }
}

impl Started {
    /// Reads the console up to `mark` and says when it came, CLOCK_MONOTONIC µs.
    pub fn wait_for_mark(&mut self, mark: &str) -> Result<u64> {
        let mut seen = String::new();
        let mut byte = [0; 512];
        loop {
            if seen.contains(mark) {
                return Ok(now_us());
            }
            match self.console.read(&mut byte)? {
                0 => bail!("the console ended before {mark}: {seen}"),
                n => seen.push_str(&String::from_utf8_lossy(&byte[..n])),
            }
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
    }
}

/// Version of the QEMU that Debian ships.
pub fn qemu_version() -> Result<String> {
    let text = e2e::run(Command::new("qemu-system-x86_64").arg("--version"))?.ok()?;
    Ok(text.split_whitespace().nth(3).context("qemu's version")?.to_owned())
}

/// CLOCK_MONOTONIC in µs.
pub fn now_us() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: clock_gettime writes one timespec, which `now` is.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    u64::try_from(now.tv_sec * 1_000_000 + now.tv_nsec / 1000).expect("the clock does not run before zero")
}

/// Spawns `command`; the child stamps the clock as its last act before exec.
fn spawn_stamped(command: &mut Command) -> Result<(Child, u64)> {
    let (mut reader, writer) = std::io::pipe()?;
    let fd = writer.as_raw_fd();
    let stamp = move || {
        let stamp = now_us().to_le_bytes();
        // SAFETY: `stamp` is readable for its length; the descriptor is open in the child, as `writer` lives until
        // after spawn. A failed write shows as a short read below.
        unsafe { libc::write(fd, stamp.as_ptr().cast(), stamp.len()) };
        Ok(())
    };
    // SAFETY: between fork and exec the closure calls clock_gettime and write only, both async-signal-safe.
    unsafe { command.pre_exec(stamp) };
    let child = command.spawn().with_context(|| format!("starting {command:?}"))?;
    let mut stamp = [0; 8];
    reader.read_exact(&mut stamp)?;
    drop(writer);
    Ok((child, u64::from_le_bytes(stamp)))
}

fn start_ctvm(root: Root<'_>) -> Result<Started> {
    start_ctvm_with(root, |_, _| Ok(()))
}

/// Starts our VMM with more in its configuration: `change` gives descriptors by calling its second argument.
pub fn start_ctvm_with(
    root: Root<'_>,
    change: impl FnOnce(&mut VmConfig, &mut dyn FnMut(OwnedFd) -> FdIndex) -> Result<()>,
) -> Result<Started> {
    let (ours, theirs) = vmm_api::frame::pair()?;
    let share = Path::new(SHARE);
    let mut fds: Vec<OwnedFd> = Vec::new();
    let mut give = |fd: OwnedFd| {
        fds.push(fd);
        FdIndex(u8::try_from(fds.len() - 1).expect("few files"))
    };
    let image = give(File::open(share.join("vmlinux"))?.into());
    let (console, output) = std::io::pipe()?;
    let (disks, initrd) = match root {
        Root::Disk => {
            let disk = give(File::open(share.join("rootfs.erofs"))?.into());
            (vec![DiskConfig::read_only(disk, "root")], None)
        }
        Root::Initrd(path) => (vec![], Some(give(File::open(path)?.into()))),
    };
    let kernel_config = KernelConfig { image, initrd, cmdline: root.cmdline(), pvh: true };
    let mut config = VmConfig {
        name: "bench".into(),
        disks,
        vsock: Some(VsockConfig { cid: 3, ports: vec![READY_PORT] }),
        console: Some(ConsoleConfig { output: Some(give(output.into())), input: None }),
        ..VmConfig::new(MEMORY_MIB, kernel_config)
    };
    change(&mut config, &mut give)?;
    let mut command = Command::new(Path::new(BIN).join("ctvm-vmm"));
    command.stdin(Stdio::null()).fd_mappings(vec![FdMapping { parent_fd: theirs, child_fd: CONTROL_FD }])?;
    let (vmm, exec_us) = spawn_stamped(&mut command)?;
    let mut client = Client::new(ours);
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    client.call(Op::Configure(Box::new(config)), &borrowed, LIMIT)?;
    // The console ends with the VMM.
    drop(fds);
    let (Reply::Booted { timeline }, _) = client.call(Op::Boot, &[], LIMIT)? else {
        bail!("boot answered oddly")
    };
    Ok(Started { exec_us, vmm, console, timeline: Some(timeline), _control: Some(client), _listener: None })
}

/// The peer without devices, with the guest's kernel.
pub fn qemu(cmdline: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    let machine = "microvm,accel=kvm,acpi=off,x-option-roms=off,rtc=off,pit=off,pic=off,isa-serial=off,auto-kernel-cmdline=on";
    command
        .args(["-M", machine, "-cpu", "host", "-smp", "1", "-m", &MEMORY_MIB.to_string()])
        .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-append", cmdline])
        .args(["-kernel", &format!("{SHARE}/vmlinux")])
        .stdin(Stdio::null());
    command
}

fn start_qemu(root: Root<'_>) -> Result<Started> {
    let listener = listen_vsock(READY_PORT)?;
    let (console, output) = std::io::pipe()?;
    let mut command = qemu(&root.cmdline());
    command
        .args(["-chardev", "stdio,id=console,signal=off", "-device", "virtio-serial-device"])
        .args(["-device", "virtconsole,chardev=console"])
        .args(["-device", "vhost-vsock-device,guest-cid=3"])
        .stdout(output)
        .stderr(Stdio::inherit());
    match root {
        Root::Disk => command
            .args(["-drive", &format!("id=root,file={SHARE}/rootfs.erofs,format=raw,if=none,readonly=on")])
            .args(["-device", "virtio-blk-device,drive=root"]),
        Root::Initrd(path) => command.arg("-initrd").arg(path),
    };
    let (vmm, exec_us) = spawn_stamped(&mut command)?;
    drop(command);
    Ok(Started { exec_us, vmm, console, timeline: None, _control: None, _listener: Some(listener) })
}

/// Listens on a vsock port of the host, so that a guest behind vhost finds somebody there.
fn listen_vsock(port: u32) -> Result<OwnedFd> {
    // SAFETY: socket takes no pointers; a descriptor it returns is new, and ours alone.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).context("an AF_VSOCK socket (is vhost_vsock loaded?)");
    }
    // SAFETY: as above.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all bits zero is a valid sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).expect("a small number");
    address.svm_cid = libc::VMADDR_CID_ANY;
    address.svm_port = port;
    let size = libc::socklen_t::try_from(size_of_val(&address)).expect("a small number");
    // SAFETY: bind reads `size` bytes of `address`, which lives here.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) };
    // SAFETY: listen takes no pointers.
    let listening = unsafe { libc::listen(socket.as_raw_fd(), 16) };
    if bound < 0 || listening < 0 {
        return Err(std::io::Error::last_os_error())
            .with_context(|| format!("listening on vsock port {port}"));
    }
    Ok(socket)
}
