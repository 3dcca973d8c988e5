//! Boots a kernel by hand: `boot [options] KERNEL [DISK…]`. The console, or serial port, comes out here.
//!
//! A driver for development; operators have `ctvm run`.

use std::fs::File;
use std::io::{PipeReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use command_fds::{CommandFdExt, FdMapping};
use vmm_api::{
    CONTROL_FD, Client, ConsoleConfig, DiskConfig, Event, FdIndex, FsConfig, KernelConfig, Op, Reply,
    VmConfig, VsockConfig,
};

const LIMIT: Duration = Duration::from_secs(120);

struct Options {
    vmm: String,
    vmm_args: Vec<String>,
    config: VmConfig,
    files: Vec<OwnedFd>,
    times: u32,
    quiet: bool,
    /// A word on the console to stop the clock at, and where the console can be read.
    mark: Option<(String, PipeReader)>,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let mut times = 1;
    let mut done = 0;
    while done < times {
        let options = parse(&args)?;
        times = options.times;
        boot(options)?;
        done += 1;
    }
    Ok(())
}

fn parse(args: &[String]) -> Result<Options> {
    let mut files: Vec<OwnedFd> = vec![];
    let mut give = |file: OwnedFd| {
        files.push(file);
        FdIndex(u8::try_from(files.len() - 1).expect("few files"))
    };
    let stdout = || std::io::stdout().as_fd().try_clone_to_owned();
    let cmdline = "console=hvc0 quiet reboot=k panic=-1 root=/dev/vda ro rootfstype=erofs init=/sbin/init";
    let kernel = KernelConfig { image: FdIndex(0), initrd: None, cmdline: cmdline.into(), pvh: true };
    let mut options = Options {
        vmm: "ctvm-vmm".into(),
        vmm_args: vec![],
        config: VmConfig { name: "boot".into(), ..VmConfig::new(128, kernel) },
        files: vec![],
        times: 1,
        quiet: false,
        mark: None,
    };
    let config = &mut options.config;
    let mut images = vec![];
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || args.next().context("a value is missing");
        match arg.as_str() {
            "--vmm" => options.vmm = value()?.clone(),
            "--vmm-arg" => options.vmm_args.push(value()?.clone()),
            "--vcpus" => config.vcpus = value()?.parse()?,
            "--memory" => config.memory.size_mib = value()?.parse()?,
            "--prefault" => config.memory.prefault = true,
            "--hugetlbfs" => config.memory.backing = vmm_api::GuestMemoryBacking::Hugetlbfs,
            "--cmdline" => config.kernel.cmdline = value()?.clone(),
            "--append" => config.kernel.cmdline = format!("{} {}", config.kernel.cmdline, value()?),
            "--no-pvh" => config.kernel.pvh = false,
            "--initrd" => config.kernel.initrd = Some(give(File::open(value()?)?.into())),
            "--serial" => config.serial = Some(give(stdout()?)),
            "--console" => {
                config.console = Some(ConsoleConfig { output: Some(give(stdout()?)), input: None });
            }
            "--mark" => {
                let (reader, writer) = std::io::pipe()?;
                config.console = Some(ConsoleConfig { output: Some(give(writer.into())), input: None });
                options.mark = Some((value()?.clone(), reader));
            }
            "--vsock" => config.vsock = Some(VsockConfig { cid: 3, ports: vec![1024] }),
            "--rng" => config.rng = true,
            "--fs" => config.fs = Some(FsConfig { tag: "ctvm".into(), threads: 1 }),
            "--times" => options.times = value()?.parse()?,
            "--quiet" => options.quiet = true,
            option if option.starts_with("--") => bail!("unknown option {option}"),
            image => images.push(image),
        }
    }
    let (kernel, disks) = images.split_first().context("a kernel is wanted")?;
    config.kernel.image = give(File::open(kernel).with_context(|| (*kernel).to_owned())?.into());
    for disk in disks {
        let file = give(File::open(disk).with_context(|| (*disk).to_owned())?.into());
        config.disks.push(DiskConfig::read_only(file, ""));
    }
    options.files = files;
    Ok(options)
}

/// Reads the console until `word` comes, and leaves a thread to read the rest.
fn wait_for(word: &str, mut console: PipeReader) -> Result<()> {
    let (mut seen, mut chunk) = (String::new(), [0; 4096]);
    while !seen.contains(word) {
        let n = console.read(&mut chunk)?;
        if n == 0 {
            bail!("the console ended without {word}: {seen}");
        }
        seen.push_str(&String::from_utf8_lossy(&chunk[..n]));
    }
    std::thread::spawn(move || std::io::copy(&mut console, &mut std::io::sink()));
    Ok(())
}

fn boot(options: Options) -> Result<()> {
    let (ours, theirs) = vmm_api::frame::pair()?;
    let mut command = Command::new(&options.vmm);
    command.args(&options.vmm_args);
    command.fd_mappings(vec![FdMapping { parent_fd: theirs, child_fd: CONTROL_FD }])?;
    let start = Instant::now();
    let mut vmm = command.spawn().with_context(|| options.vmm.clone())?;
    // With it goes the VMM's end of the socket, so that we see it close.
    drop(command);
    let mut client = Client::new(ours);
    let fds: Vec<_> = options.files.iter().map(AsFd::as_fd).collect();
    client.call(Op::Configure(Box::new(options.config)), &fds, LIMIT)?;
    let (reply, _) = client.call(Op::Boot, &[], LIMIT)?;
    if let Reply::Booted { timeline: t } = reply
        && !options.quiet
    {
        eprintln!(
            "us after main: configure {}, kvm {}, loaded {}, running {}; {:?} after spawn",
            t.configure_us - t.main_us,
            t.kvm_ready_us - t.main_us,
            t.loaded_us - t.main_us,
            t.running_us - t.main_us,
            start.elapsed()
        );
    }
    drop(options.files);
    if let Some((word, console)) = options.mark {
        wait_for(&word, console)?;
        let marked = start.elapsed();
        let Reply::Stats(stats) = client.call(Op::Stats, &[], LIMIT)?.0 else { bail!("no stats") };
        let total: u64 = stats.exits.values().sum();
        eprintln!("{word} {} us after spawn; {total} exits: {:?}", marked.as_micros(), stats.exits);
    }
    loop {
        match client.next_event(LIMIT)? {
            None => bail!("the VM did not end within {LIMIT:?}"),
            Some((Event::Exiting { reason }, _)) => {
                let status = vmm.wait()?;
                eprintln!("{reason}; {status}; {:?} after spawn", start.elapsed());
                return Ok(());
            }
            Some((event, _)) => eprintln!("{event:?}"),
        }
    }
}
