//! A microVM with a guest that runs a shell script: the VMM and its devices, without agent and containerd.

use std::fs::{self, File, OpenOptions};
use std::io::{PipeWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use command_fds::{CommandFdExt, FdMapping};
use tempfile::TempDir;
use vmm_api::{
    CONTROL_FD, Client, ConsoleConfig, DiskConfig, Event, ExitReason, FdIndex, FsCache, FsConfig,
    KernelConfig, MemoryConfig, NetConfig, Op, Reply, Stats, VmConfig, VsockConfig,
};

use crate::command::{LIMIT, run};
use crate::{BIN, SHARE, debug_kernel};

/// A line the guest's script prints when it is done.
const DONE: &str = "script-done status=";

/// What a guest is told of the disk that [`make_root`] makes, when it is the first one.
pub const ROOT_CMDLINE: &str = "root=/dev/vda ro rootfstype=erofs init=/sbin/init";

/// What to boot and what to run in it.
#[derive(Debug)]
pub struct GuestSpec {
    /// vCPUs.
    pub vcpus: u8,
    /// Most vCPUs; `vcpus` if not said.
    pub max_vcpus: Option<u8>,
    /// Memory in MiB.
    pub memory: MemoryConfig,
    /// File name of the kernel below [`SHARE`].
    pub kernel: &'static str,
    /// Enter at the PVH note.
    pub pvh: bool,
    /// Put the guest's file system in an initial RAM disk in place of a disk.
    pub initrd: bool,
    /// Disks after the root disk: file, read-only, id, queues.
    pub disks: Vec<(File, bool, String, u8)>,
    /// Network devices: the queues of a tap, hardware address, MTU.
    pub nets: Vec<(Vec<OwnedFd>, [u8; 6], u16)>,
    /// Directory shown as `share` in the file share.
    pub share: Option<(File, bool)>,
    /// Words after those of every guest on the kernel's command line.
    pub cmdline: &'static str,
    /// Ports of the host that the guest may dial.
    pub ports: Vec<u32>,
    /// A balloon, with free page reporting.
    pub balloon: bool,
    /// Images can be attached.
    pub images: bool,
    /// Shell commands; they run as root in the guest, with /proc, /sys, /dev and a tmpfs on /tmp.
    pub script: String,
    /// Programs of this machine to find in the guest's `/bin`.
    pub programs: Vec<PathBuf>,
}

impl Default for GuestSpec {
    fn default() -> Self {
        GuestSpec {
            vcpus: 1,
            max_vcpus: None,
            memory: MemoryConfig::new(128),
            kernel: "vmlinux",
            pvh: true,
            initrd: false,
            disks: Vec::new(),
            nets: Vec::new(),
            share: None,
            cmdline: "",
            ports: vec![1024],
            balloon: false,
            images: false,
            script: String::new(),
            programs: Vec::new(),
        }
    }
}

/// A script that does what [`Guest::ask`] says.
pub const SHELL: &str = "stty -echo; echo listening; while read -r line; do eval \"$line\"; done";

/// A running microVM.
#[derive(Debug)]
pub struct Guest {
    client: Client,
    vmm: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
    /// What the guest reads on its console.
    input: PipeWriter,
    asked: u32,
    _folder: TempDir,
}

/// What a script printed and how it ended.
#[derive(Debug)]
pub struct ScriptOutput {
    /// Lines on the console before the end.
    pub lines: Vec<String>,
    /// Exit status of the script.
    pub status: i32,
}

impl ScriptOutput {
    /// The value of the line `NAME=value`.
    pub fn value(&self, name: &str) -> Result<&str> {
        let prefix = format!("{name}=");
        let found = self.lines.iter().find_map(|l| l.strip_prefix(&prefix));
        found.with_context(|| format!("no line {prefix}… in {:#?}", self.lines))
    }
}

impl GuestSpec {
    /// Boots it.
    pub fn boot(self) -> Result<Guest> {
        self.boot_with(|_| Ok(vec![]))
    }

    /// Boots it with more disks, made by `more`, which gives descriptors by calling its argument.
    pub fn boot_with(
        self,
        more: impl FnOnce(&mut dyn FnMut(OwnedFd) -> FdIndex) -> Result<Vec<DiskConfig>>,
    ) -> Result<Guest> {
        let folder = tempfile::Builder::new().prefix("guest").tempdir_in("/var/tmp")?;
        let share = Path::new(SHARE);
        let mut fds: Vec<OwnedFd> = Vec::new();
        let mut give = |file: OwnedFd| {
            fds.push(file);
            FdIndex(u8::try_from(fds.len() - 1).expect("few files"))
        };
        let image = give(File::open(share.join(self.kernel))?.into());
        let mut disks = Vec::new();
        let mut initrd = None;
        let mut cmdline = String::from("console=hvc0 quiet panic=-1 reboot=k");
        if self.initrd {
            let tree = folder.path().join("tree");
            make_tree(&tree, &self.script, &self.programs)?;
            initrd = Some(give(File::open(pack_initrd(&tree, folder.path())?)?.into()));
            cmdline += " rdinit=/sbin/init";
        } else {
            let file = give(File::open(make_root(folder.path(), &self.script, &self.programs)?)?.into());
            disks.push(DiskConfig::read_only(file, "root"));
            cmdline += " ";
            cmdline += ROOT_CMDLINE;
        }
        if debug_kernel() {
            // Warnings too are shown.
            cmdline += " loglevel=5";
        }
        if !self.cmdline.is_empty() {
            cmdline = format!("{cmdline} {}", self.cmdline);
        }
        for (file, read_only, id, queues) in self.disks {
            disks.push(DiskConfig { file: give(file.into()), read_only, id, queues, image: None });
        }
        disks.extend(more(&mut give)?);
        let mut nets = Vec::new();
        for (taps, mac, mtu) in self.nets {
            nets.push(NetConfig { taps: taps.into_iter().map(&mut give).collect(), mac, mtu });
        }
        let (reader, writer) = std::io::pipe()?;
        let output = Some(give(writer.into()));
        let (typed, input) = std::io::pipe()?;
        let typed = Some(give(typed.into()));
        // At the PVH note, a kernel with KASAN faults before its first line.
        let kernel = KernelConfig { image, initrd, cmdline, pvh: self.pvh && !debug_kernel() };
        let config = VmConfig {
            name: "e2e".into(),
            vcpus: self.vcpus,
            max_vcpus: self.max_vcpus,
            memory: self.memory,
            disks,
            nets,
            vsock: Some(VsockConfig { cid: 3, ports: self.ports }),
            rng: true,
            balloon: self.balloon,
            images: self.images,
            fs: self.share.is_some().then(|| FsConfig { tag: "ctvm".into(), threads: 1 }),
            console: Some(ConsoleConfig { output, input: typed }),
            ..VmConfig::new(0, kernel)
        };
        let (client, vmm) = start_vmm()?;
        let mut guest = Guest {
            client,
            vmm,
            lines: collect_lines(reader),
            seen: vec![],
            input,
            asked: 0,
            _folder: folder,
        };
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        guest.client.call(Op::Configure(Box::new(config)), &borrowed, LIMIT).context("configure")?;
        drop(fds);
        if let Some((dir, read_only)) = self.share {
            let op = Op::FsMount {
                share: None,
                at: "share".into(),
                dir: FdIndex(0),
                read_only,
                cache: FsCache::Shared,
                layer: false,
            };
            guest.client.call(op, &[dir.as_fd()], LIMIT).context("fs mount")?;
        }
        guest.client.call(Op::Boot, &[], LIMIT).context("boot")?;
        Ok(guest)
    }

    /// Boots it, waits for the end of its script, and for the VM's own end.
    pub fn run(self) -> Result<ScriptOutput> {
        let mut guest = self.boot()?;
        let output = guest.script()?;
        let reason = guest.exit_reason()?;
        if reason != ExitReason::GuestReset {
            bail!("the VM ended with {reason:?} after {output:#?}");
        }
        Ok(output)
    }
}

impl Guest {
    /// Waits for a console line for which `want` is true.
    pub fn wait_for_line(&mut self, what: &str, mut want: impl FnMut(&str) -> bool) -> Result<String> {
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    ensure!(!is_complaint(&line), "the guest's kernel: {line}, after {:#?}", self.seen);
                    self.seen.push(line.clone());
                    if want(&line) {
                        return Ok(line);
                    }
                }
                Err(RecvTimeoutError::Timeout) => bail!("no {what} within {LIMIT:?} in {:#?}", self.seen),
                Err(RecvTimeoutError::Disconnected) => bail!("no {what} before the end of {:#?}", self.seen),
            }
        }
    }

    /// What the console has shown up to the last line that was waited for.
    pub fn lines(&self) -> &[String] {
        &self.seen
    }

    /// Waits for the end of the script.
    pub fn script(&mut self) -> Result<ScriptOutput> {
        let last = self.wait_for_line("end of the script", |l| l.starts_with(DONE))?;
        let status = last[DONE.len()..].trim().parse()?;
        let mut lines = std::mem::take(&mut self.seen);
        lines.pop();
        Ok(ScriptOutput { lines, status })
    }

    /// Has the guest's shell carry out `command`; what it printed. For guests whose script is [`SHELL`].
    pub fn ask(&mut self, command: &str) -> Result<String> {
        if self.asked == 0 {
            // What comes before somebody reads is lost.
            self.wait_for_line("shell", |line| line == "listening")?;
        }
        self.asked += 1;
        let end = format!("asked {}", self.asked);
        self.seen.clear();
        writeln!(self.input, "{command}; echo asked {}", self.asked)?;
        self.wait_for_line(command, |line| line == end)?;
        let mut lines = std::mem::take(&mut self.seen);
        lines.pop();
        if debug_kernel() {
            // It says more than others, and between the lines of who was asked.
            lines.retain(|line| !line.starts_with("[ "));
        }
        Ok(lines.join("\n"))
    }

    /// The owner's end of the control socket.
    pub fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    /// Carries out one operation without descriptors.
    pub fn call(&mut self, op: Op) -> Result<Reply> {
        Ok(self.client.call(op, &[], LIMIT)?.0)
    }

    /// Counters.
    pub fn stats(&mut self) -> Result<Stats> {
        match self.call(Op::Stats)? {
            Reply::Stats(stats) => Ok(*stats),
            other => bail!("stats answered {other:?}"),
        }
    }

    /// The next event, with its descriptors.
    pub fn event(&mut self) -> Result<(Event, Vec<OwnedFd>)> {
        self.client.next_event(LIMIT)?.with_context(|| format!("no event within {LIMIT:?}"))
    }

    /// Process id of the VMM.
    pub fn vmm_pid(&self) -> i32 {
        i32::try_from(self.vmm.id()).expect("a pid fits i32")
    }

    /// Waits for the VM's end and says why it ended; checks that the process' exit status says the same.
    pub fn exit_reason(&mut self) -> Result<ExitReason> {
        loop {
            if let (Event::Exiting { reason }, _) = self.event()? {
                let status = self.vmm.wait()?;
                if status.code() != Some(reason.exit_status().into()) {
                    bail!("{status} does not fit {reason:?}");
                }
                return Ok(reason);
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
        let late: Vec<_> = self.lines.try_iter().collect();
        let at = late.iter().position(|line| is_complaint(line));
        if let Some(at) = at.filter(|_| !std::thread::panicking()) {
            panic!("the guest's kernel: {:#?}", &late[at..]);
        }
    }
}

/// What a kernel that looks for its own mistakes says when it finds one; it has a warning for the processor's makers, too.
fn is_complaint(line: &str) -> bool {
    const WORDS: [&str; 4] = ["WARNING: ", "BUG: ", "INFO: task ", "Kernel panic"];
    // Behind the time, on the console, or behind level and number, in /dev/kmsg.
    let message = line.split_once("] ").or_else(|| line.split_once(';')).map_or(line, |(_, message)| message);
    debug_kernel() && WORDS.iter().any(|word| message.starts_with(word))
}

/// Starts a VMM and gives the owner's end of its control socket.
pub fn start_vmm() -> Result<(Client, Child)> {
    let (ours, theirs) = vmm_api::frame::pair()?;
    let mut command = Command::new(Path::new(BIN).join("ctvm-vmm"));
    command.stdin(Stdio::null()).fd_mappings(vec![FdMapping { parent_fd: theirs, child_fd: CONTROL_FD }])?;
    let vmm = command.spawn().context("starting ctvm-vmm")?;
    Ok((Client::new(ours), vmm))
}

/// A file of `size` bytes of a fixed pattern, open for reading and writing, already unlinked.
pub fn scratch_file(size: u64) -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).open("/var/tmp")?;
    file.set_len(size)?;
    Ok(file)
}

/// Spawns a thread that turns the console into lines.
fn collect_lines(mut console: std::io::PipeReader) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut pending = Vec::new();
        let mut chunk = [0; 4096];
        while let Ok(n @ 1..) = console.read(&mut chunk) {
            pending.extend_from_slice(&chunk[..n]);
            while let Some(end) = pending.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                // Nobody listens any more when the test is over.
                if sender.send(line).is_err() {
                    return;
                }
            }
        }
    });
    receiver
}

/// Makes in `folder` the image of a guest's root disk whose init runs `script`, with `programs` in its `/bin`; its path.
///
/// # Errors
/// What the file system or `mkfs.erofs` says.
pub fn make_root(folder: &Path, script: &str, programs: &[PathBuf]) -> Result<PathBuf> {
    let (tree, root) = (folder.join("tree"), folder.join("root.erofs"));
    make_tree(&tree, script, programs)?;
    run(Command::new("mkfs.erofs").args(["--quiet", "-T0"]).arg(&root).arg(&tree))?.ok()?;
    Ok(root)
}

/// A guest tree of one static busybox and the script.
fn make_tree(tree: &Path, script: &str, programs: &[PathBuf]) -> Result<()> {
    for folder in ["bin", "sbin", "proc", "sys", "dev", "tmp", "run", "mnt"] {
        fs::create_dir_all(tree.join(folder))?;
    }
    fs::copy(Path::new(SHARE).join("busybox"), tree.join("bin/busybox"))?;
    symlink("busybox", tree.join("bin/sh"))?;
    for program in programs {
        let name = program.file_name().with_context(|| format!("{} has no name", program.display()))?;
        fs::copy(program, tree.join("bin").join(name)).with_context(|| program.display().to_string())?;
    }
    let init = format!(
        "#!/bin/sh\nmount() {{ /bin/busybox mount \"$@\"; }}\n\
         mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs tmp /tmp\n\
         mount -t devtmpfs dev /dev 2>/dev/null\n\
         /bin/busybox mkdir /tmp/bin; /bin/busybox --install -s /tmp/bin; export PATH=/tmp/bin:/bin\n\
         exec </dev/hvc0 >/dev/hvc0 2>&1\n\
         ( set -e\n{script}\n)\necho \"{DONE}$?\"\nsync; reboot -f\n"
    );
    fs::write(tree.join("sbin/init"), init)?;
    fs::set_permissions(tree.join("sbin/init"), fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// Packs `tree` as an initial RAM disk in `folder`, uncompressed.
pub fn pack_initrd(tree: &Path, folder: &Path) -> Result<PathBuf> {
    let file = folder.join("initrd");
    let script = "cd \"$1\" && find . | cpio --quiet -o -H newc > \"$2\"";
    run(Command::new("sh").args(["-c", script, "sh"]).arg(tree).arg(&file))?.ok()?;
    Ok(file)
}
