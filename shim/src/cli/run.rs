//! `ctvm run`: boots a VM by hand, its console on this terminal.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use agent_api::{AGENT_PORT, GUEST_CID, LOG_PORT, STREAM_PORT};
use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use vmm_api::config::{MAX_DISKS, MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB};
use vmm_api::{
    Client, ClientError, ConsoleConfig, DiskConfig, Event, ExitReason, FdIndex, GuestMemoryBacking,
    KernelConfig, MemoryConfig, Op, VmConfig, VsockConfig,
};

use crate::cli::Failure;
use crate::cli::console::{Keys, RawMode};
use crate::vmm::{self, ControlSlot, VmmError};

/// How long the VMM may take for one answer; a prefault of much memory takes a while.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
/// Console output that waits for this terminal: a pipe's greatest size without privileges.
const CONSOLE_BUFFER: usize = 1 << 20;

/// A VM to boot.
#[derive(Debug, Clone, Args)]
pub struct Run {
    /// Guest kernel: an ELF vmlinux or a bzImage
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Root file system image, the first disk (/dev/vda); read-only unless --rw
    #[arg(long, value_name = "FILE")]
    pub rootfs: Option<PathBuf>,
    /// Let the guest write to the root file system
    #[arg(long, requires = "rootfs")]
    pub rw: bool,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// vCPUs, 1 to 32
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_VCPUS)))]
    pub cpus: u8,
    /// Guest memory in MiB, or with a suffix: 512, 512M, 3G
    #[arg(long, value_name = "SIZE", default_value = "256", value_parser = memory_mib)]
    pub memory: u32,
    /// Most memory it can be grown to while it runs, as --memory
    #[arg(long, value_name = "SIZE", value_parser = memory_mib)]
    pub max_memory: Option<u32>,
    /// Let the guest give free memory back by itself (balloon with free page reporting)
    #[arg(long)]
    pub balloon: bool,
    /// A further disk, FILE or FILE:ro; may be given several times
    #[arg(long = "disk", value_name = "FILE[:ro]")]
    pub disks: Vec<String>,
    /// Virtio console (hvc0) on this terminal, or none
    #[arg(long, value_name = "KIND", default_value = "virtio", value_parser = ["virtio", "none"])]
    pub console: String,
    /// Serial console (ttyS0) on standard output as well: slow, but it speaks before any driver does
    #[arg(long)]
    pub serial: bool,
    /// Words to add to the kernel's command line
    #[arg(long, value_name = "WORDS", default_value = "")]
    pub cmdline: String,
    /// Back guest memory with 2 MiB pages of hugetlbfs
    #[arg(long)]
    pub hugepages: bool,
    /// Populate guest memory before the guest starts
    #[arg(long)]
    pub prefault: bool,
    /// The monitor's binary [default: beside this one, else in PATH]
    #[arg(long, value_name = "FILE")]
    pub vmm: Option<PathBuf>,
    /// Show what the monitor logs
    #[arg(long, short)]
    pub verbose: bool,
}

pub(super) fn memory_mib(text: &str) -> Result<u32, String> {
    let (digits, factor) = match text.char_indices().last() {
        Some((at, 'M' | 'm')) => (&text[..at], 1),
        Some((at, 'G' | 'g')) => (&text[..at], 1024),
        _ => (text, 1),
    };
    let size = digits.parse::<u32>().ok().and_then(|n| n.checked_mul(factor));
    match size {
        Some(mib) if (MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&mib) && mib.is_multiple_of(2) => Ok(mib),
        Some(mib) => {
            Err(format!("{mib} MiB is not from {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB} MiB and a multiple of 2"))
        }
        None => Err(format!("{text:?} is not a size like 512, 512M or 3G")),
    }
}

/// Files of the VM as they go to the VMM, each with its place in the packet.
#[derive(Default)]
struct Files(Vec<OwnedFd>);

impl Files {
    fn add(&mut self, file: impl Into<OwnedFd>) -> FdIndex {
        let index = u8::try_from(self.0.len()).expect("the command line allows far fewer");
        self.0.push(file.into());
        FdIndex(index)
    }
}

/// Boots the VM and stays until it ends.
///
/// # Errors
/// See [`Failure`].
pub fn run(options: &Run, mut slot: ControlSlot) -> Result<(), Failure> {
    let mut files = Files::default();
    let (input_theirs, input) = pipe().map_err(local("a pipe for the console"))?;
    let (output, output_theirs) = pipe().map_err(local("a pipe for the console"))?;
    // Where it cannot be, a guest that says much at once loses some of it.
    let _ = fcntl_setpipe_size(&output, CONSOLE_BUFFER);
    let config = vm_config(options, &mut files, input_theirs, output_theirs)?;

    let binary = vmm::find_binary(options.vmm.as_deref())?;
    // Kept in memory: an error is told once, in our words, unless the VMM had no chance to tell us.
    let log = memfd_create("ctvm-vmm-log", MemfdFlags::CLOEXEC).map_err(|e| local("a log")(e.into()))?;
    let log = File::from(log);
    let vmm_log = match options.verbose {
        true => Stdio::inherit(),
        false => log.try_clone().map_err(local("a log"))?.into(),
    };
    let (mut child, socket) = vmm::spawn(&binary, &mut slot, vmm_log)?;
    let mut client = Client::new(socket);
    let booted = {
        let fds: Vec<BorrowedFd<'_>> = files.0.iter().map(AsFd::as_fd).collect();
        client
            .call(Op::Configure(Box::new(config)), &fds, ANSWER_TIMEOUT)
            .and_then(|_| client.call(Op::Boot, &[], ANSWER_TIMEOUT))
    };
    // The console ends when the VMM's end of the pipe is the last.
    drop(files);
    let reason = match booted {
        Ok(_) => attend(&mut client, input, &output),
        Err(error) => Err(Failure::Client(error)),
    };
    // The lease: a VMM that is left behind by an error ends with it.
    drop(client);
    let status = child.wait().map_err(|source| Failure::Vmm(VmmError::Spawn { path: binary, source }))?;
    match reason? {
        Some(ExitReason::Shutdown | ExitReason::GuestReset) => Ok(()),
        Some(reason) => Err(Failure::Ended(reason)),
        None => Err(Failure::Crashed { status, last_line: last_line(&log) }),
    }
}

fn last_line(log: &File) -> String {
    let mut end = [0; 4096];
    let length = log.metadata().map_or(0, |m| m.len());
    let n = log.read_at(&mut end, length.saturating_sub(4096)).unwrap_or(0);
    String::from_utf8_lossy(&end[..n]).lines().next_back().unwrap_or_default().to_owned()
}

fn pipe() -> std::io::Result<(OwnedFd, OwnedFd)> {
    Ok(pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?)
}

fn local(what: &'static str) -> impl FnOnce(std::io::Error) -> Failure {
    move |source| Failure::Local { what, source }
}

fn open(what: &'static str, path: &Path, write: bool) -> Result<File, Failure> {
    let opened = OpenOptions::new().read(true).write(write).open(path).and_then(|file| {
        // Opening a directory for reading succeeds, and fails much later.
        if file.metadata()?.is_dir() { Err(std::io::ErrorKind::IsADirectory.into()) } else { Ok(file) }
    });
    opened.map_err(|source| Failure::File { what, path: path.to_owned(), source })
}

fn vm_config(options: &Run, files: &mut Files, input: OwnedFd, output: OwnedFd) -> Result<VmConfig, Failure> {
    let image = files.add(open("kernel", &options.kernel, false)?);
    let initrd = match &options.initrd {
        Some(path) => Some(files.add(open("initrd", path, false)?)),
        None => None,
    };
    let mut disks = Vec::new();
    let mut disk = |what, path: &Path, read_only: bool, id: String| {
        let file = files.add(open(what, path, !read_only)?);
        disks.push(DiskConfig { file, read_only, id, queues: 1, image: None });
        Ok::<_, Failure>(())
    };
    if let Some(path) = &options.rootfs {
        disk("rootfs", path, !options.rw, "root".into())?;
    }
    for (n, text) in options.disks.iter().enumerate() {
        let (path, read_only) = match text.strip_suffix(":ro") {
            Some(path) => (path, true),
            None => (text.as_str(), false),
        };
        disk("disk", path.as_ref(), read_only, format!("disk{n}"))?;
    }
    if disks.len() > MAX_DISKS {
        let source = std::io::Error::other(format!("{} disks, at most {MAX_DISKS} can be", disks.len()));
        return Err(Failure::Local { what: "disks", source });
    }
    let serial = match options.serial {
        true => {
            let stdout = std::io::stdout().as_fd().try_clone_to_owned().map_err(local("standard output"))?;
            Some(files.add(stdout))
        }
        false => None,
    };
    let console = (options.console == "virtio")
        .then(|| ConsoleConfig { input: Some(files.add(input)), output: Some(files.add(output)) });
    let kernel = KernelConfig { image, initrd, cmdline: cmdline(options), pvh: true };
    Ok(VmConfig {
        name: "ctvm-run".into(),
        vcpus: options.cpus,
        memory: MemoryConfig {
            backing: match options.hugepages {
                true => GuestMemoryBacking::Hugetlbfs,
                false => GuestMemoryBacking::Anonymous,
            },
            prefault: options.prefault,
            max_mib: options.max_memory,
            ..MemoryConfig::new(options.memory)
        },
        disks,
        // Our own image dials these; the connections are held, and another image does not notice.
        vsock: Some(VsockConfig { cid: GUEST_CID, ports: vec![AGENT_PORT, STREAM_PORT, LOG_PORT] }),
        rng: true,
        balloon: options.balloon,
        console,
        serial,
        ..VmConfig::new(options.memory, kernel)
    })
}

fn cmdline(options: &Run) -> String {
    let mut words = vec!["reboot=k", "panic=-1"];
    if options.serial {
        words.extend(["8250.nr_uarts=1", "earlyprintk=ttyS0", "console=ttyS0"]);
    }
    // The last console named is the one that programs get.
    if options.console == "virtio" {
        words.push("console=hvc0");
    }
    if options.rootfs.is_some() {
        words.extend(["root=/dev/vda", if options.rw { "rw" } else { "ro" }]);
    }
    words.push(options.cmdline.trim());
    words.join(" ").trim_end().to_owned()
}

/// Relays the console until the VM ends; how it ended, if its VMM said so.
fn attend(client: &mut Client, input: OwnedFd, output: &OwnedFd) -> Result<Option<ExitReason>, Failure> {
    let stdin = std::io::stdin();
    let raw = RawMode::enter(&stdin).map_err(local("the terminal"))?;
    if raw.is_some() {
        eprint!("ctvm: the guest's console; leave with Ctrl-A x\r\n");
    }
    let mut input = Some(input);
    let mut keys = Keys::default();
    let mut held = Vec::new();
    let mut console_open = true;
    let mut reason = None;
    let mut vmm_open = true;
    loop {
        if vmm_open {
            match next_event(client, &mut held) {
                Ok(Some(why)) => {
                    reason = Some(why);
                    vmm_open = false;
                }
                Ok(None) => {}
                Err(ClientError::Frame(_)) => vmm_open = false,
                Err(error) => return Err(Failure::Client(error)),
            }
        }
        // What the console still holds is shown before the end is told.
        if !vmm_open && !console_open {
            return Ok(reason);
        }
        let mut fds = Vec::with_capacity(3);
        let mut what = Vec::with_capacity(3);
        if vmm_open {
            fds.push(PollFd::new(client, PollFlags::IN));
            what.push(Ready::Vmm);
        }
        if console_open {
            fds.push(PollFd::new(output, PollFlags::IN));
            what.push(Ready::Console);
        }
        if input.is_some() && vmm_open {
            fds.push(PollFd::new(&stdin, PollFlags::IN));
            what.push(Ready::Keyboard);
        }
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(e) => return Err(local("waiting")(e.into())),
        }
        let ready: Vec<Ready> =
            fds.iter().zip(what).filter(|(fd, _)| !fd.revents().is_empty()).map(|(_, what)| what).collect();
        drop(fds);
        for what in ready {
            match what {
                Ready::Vmm => {}
                Ready::Console => {
                    console_open = show(output).map_err(local("standard output"))?;
                }
                Ready::Keyboard => {
                    let leave = type_in(&stdin, &mut keys, &mut input, raw.is_some());
                    if leave.map_err(local("standard input"))? {
                        // The answer is the exit, which the loop waits for.
                        let _ = client.call(Op::Shutdown, &[], ANSWER_TIMEOUT);
                    }
                }
            }
        }
    }
}

enum Ready {
    Vmm,
    Console,
    Keyboard,
}

/// Takes the VMM's next event, if there is one; the reason when it is the last.
fn next_event(client: &mut Client, held: &mut Vec<OwnedFd>) -> Result<Option<ExitReason>, ClientError> {
    while let Some((event, fds)) = client.next_event(Duration::ZERO)? {
        match event {
            // Held, so that an agent does not see its host hang up.
            Event::VsockAccepted { .. } if held.len() < 64 => held.extend(fds),
            // It gives its VM no images.
            Event::VsockAccepted { .. } | Event::ImageLost { .. } => {}
            Event::Exiting { reason } => return Ok(Some(reason)),
        }
    }
    Ok(None)
}

/// Shows console output; false when it has ended.
fn show(output: &OwnedFd) -> std::io::Result<bool> {
    let mut buffer = [0; 4096];
    match rustix::io::read(output, &mut buffer) {
        Ok(0) => Ok(false),
        Ok(n) => {
            let mut stdout = std::io::stdout().lock();
            stdout.write_all(&buffer[..n])?;
            stdout.flush()?;
            Ok(true)
        }
        Err(Errno::AGAIN | Errno::INTR) => Ok(true),
        Err(e) => Err(e.into()),
    }
}

/// Passes typed bytes on; true when the user wants to leave. Only a terminal has keys to leave with.
fn type_in(
    stdin: &impl AsFd,
    keys: &mut Keys,
    input: &mut Option<OwnedFd>,
    terminal: bool,
) -> std::io::Result<bool> {
    let mut buffer = [0; 1024];
    let n = match rustix::io::read(stdin, &mut buffer) {
        Ok(n) => n,
        Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
        // A terminal that hung up.
        Err(Errno::IO) => 0,
        Err(e) => return Err(e.into()),
    };
    if n == 0 {
        *input = None;
        return Ok(false);
    }
    let (bytes, leave) = if terminal {
        let typed = keys.read(&buffer[..n]);
        (typed.bytes, typed.leave)
    } else {
        (buffer[..n].to_vec(), false)
    };
    let Some(pipe) = input.as_ref() else { return Ok(leave) };
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        match rustix::io::write(pipe, rest) {
            Ok(n) => rest = &rest[n..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                poll(&mut [PollFd::new(pipe, PollFlags::OUT)], None)?;
            }
            // The guest has no console to read from.
            Err(_) => {
                *input = None;
                break;
            }
        }
    }
    Ok(leave)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        run: Run,
    }

    fn parse(line: &str) -> Result<Run, String> {
        let words = std::iter::once("ctvm").chain(line.split(' '));
        Line::try_parse_from(words).map(|l| l.run).map_err(|e| e.to_string())
    }

    #[test]
    fn sizes_are_read_and_limited() {
        assert_eq!(memory_mib("512"), Ok(512));
        assert_eq!(memory_mib("512M"), Ok(512));
        assert_eq!(memory_mib("3G"), Ok(3072));
        assert!(memory_mib("32").unwrap_err().contains("32 MiB is not from 64"));
        assert!(memory_mib("65").unwrap_err().contains("multiple of 2"));
        assert!(memory_mib("9999999G").unwrap_err().contains("is not a size"));
        assert!(memory_mib("much").unwrap_err().contains("\"much\" is not a size"));
        let e = parse("--kernel k --cpus 33").unwrap_err();
        assert!(e.contains("33 is not in 1..=32"), "{e}");
    }

    #[test]
    fn the_command_line_follows_the_devices() {
        let run = parse("--kernel k --rootfs r --cmdline quiet").unwrap();
        assert_eq!(cmdline(&run), "reboot=k panic=-1 console=hvc0 root=/dev/vda ro quiet");
        let run = parse("--kernel k --serial --console none").unwrap();
        assert_eq!(cmdline(&run), "reboot=k panic=-1 8250.nr_uarts=1 earlyprintk=ttyS0 console=ttyS0");
    }

    #[test]
    fn the_last_line_of_a_log_is_found() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(last_line(&file), "");
        (&file).write_all(format!("{}\nlast words\n", "x".repeat(9000)).as_bytes()).unwrap();
        assert_eq!(last_line(&file), "last words");
    }

    #[test]
    fn files_are_opened_as_asked_and_named_when_missing() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        for name in ["k", "r", "d"] {
            std::fs::write(path(name), name).unwrap();
        }
        let line = format!("--kernel {} --rootfs {} --disk {}:ro", path("k"), path("r"), path("d"));
        let mut files = Files::default();
        let (r, w) = pipe().unwrap();
        let config = vm_config(&parse(&line).unwrap(), &mut files, r, w).unwrap();
        assert_eq!(config.disks.len(), 2);
        assert!(config.disks.iter().all(|d| d.read_only));
        assert_eq!(files.0.len(), 5);
        assert_eq!(config.console.unwrap().output, Some(FdIndex(4)));

        let (r, w) = pipe().unwrap();
        let missing = parse(&format!("--kernel {}", path("none"))).unwrap();
        let failure = vm_config(&missing, &mut Files::default(), r, w).unwrap_err();
        assert_eq!(failure.exit_status(), 3);
        assert!(failure.line().starts_with(&format!("kernel {}: No such file", path("none"))));
    }
}
