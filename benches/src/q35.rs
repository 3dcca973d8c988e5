//! The peer of group `resize`: QEMU's own hotplug, as its users have it. Machine `q35` with ACPI, `device_add` and
//! `device_del` over QMP, and Debian's kernel, since ours has no ACPI. Its PID 1 is `exerciser hotplug`, which brings each CPU online
//! as udev's rule would, and says on the serial port what the guest has.

use std::io::{BufRead, BufReader, PipeReader, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use benches::subject::qemu_version;
use e2e::vm::pack_initrd;
use e2e::{SHARE, command::wait_until};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Debian's kernel wants more than ours.
const BOOT_MIB: u32 = 512;
const LIMIT: Duration = Duration::from_secs(300);

/// Name and version.
pub fn name() -> Result<String> {
    Ok(format!("QEMU q35 {}", qemu_version()?))
}

/// A running guest.
#[derive(Debug)]
pub struct Q35 {
    qemu: Child,
    console: BufReader<PipeReader>,
    monitor: BufReader<UnixStream>,
    /// CPUs online and MiB, as the guest last said.
    has: (u32, u32),
    /// What QEMU said is gone, and nobody has waited for yet.
    gone: Vec<String>,
    _folder: TempDir,
}

impl Q35 {
    /// Boots one with a vCPU that can be given `cpus - 1` more, and memory.
    pub fn boot(cpus: u8) -> Result<Q35> {
        let folder = tempfile::tempdir_in("/var/tmp")?;
        let socket = folder.path().join("qmp");
        let (console, output) = std::io::pipe()?;
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args([
                "-M",
                "q35,accel=kvm",
                "-cpu",
                "host",
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
            ])
            .args(["-smp", &format!("1,sockets={cpus},cores=1,threads=1,maxcpus={cpus}")])
            .args(["-m", &format!("{BOOT_MIB}M,slots=8,maxmem=16G")])
            .arg("-kernel")
            .arg(Path::new(SHARE).join("vmlinuz"))
            .arg("-initrd")
            .arg(initrd(folder.path())?)
            .args(["-append", "console=ttyS0 quiet panic=-1 memhp_default_state=online_movable -- hotplug"])
            .args(["-serial", "stdio", "-qmp", &format!("unix:{},server,wait=off", socket.display())])
            .stdin(Stdio::null())
            .stdout(output);
        let qemu = command.spawn().context("starting QEMU")?;
        drop(command);
        wait_until("QEMU's monitor is there", || Ok(UnixStream::connect(&socket).is_ok()))?;
        let monitor = UnixStream::connect(&socket)?;
        monitor.set_read_timeout(Some(LIMIT))?;
        let mut vm = Q35 {
            qemu,
            console: BufReader::new(console),
            monitor: BufReader::new(monitor),
            has: (0, 0),
            gone: vec![],
            _folder: folder,
        };
        vm.message()?; // its greeting
        vm.ask("qmp_capabilities", &json!({}))?;
        vm.until(|(cpus, _)| cpus == 1)?;
        Ok(vm)
    }

    /// Adds vCPUs until there are `cpus`, or takes them away; milliseconds until the guest has said so, or QEMU that it gave them
    /// up.
    pub fn set_cpus(&mut self, cpus: u32) -> Result<f64> {
        let start = Instant::now();
        let now = self.has.0;
        for number in now..cpus {
            let id = format!("cpu{number}");
            let place = json!({"driver": "host-x86_64-cpu", "id": id, "socket-id": number, "core-id": 0, "thread-id": 0});
            self.ask("device_add", &place)?;
        }
        for number in cpus..now {
            self.remove(&format!("cpu{number}"))?;
        }
        if cpus > now {
            self.until(|(has, _)| has == cpus)?;
        }
        self.has.0 = cpus;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }

    /// The same for a DIMM of `mib`.
    pub fn add_memory(&mut self, mib: u32) -> Result<f64> {
        let goal = self.has.1 + mib;
        let start = Instant::now();
        let id = format!("m{mib}");
        let memory = json!({"qom-type": "memory-backend-ram", "id": id, "size": u64::from(mib) << 20});
        self.ask("object-add", &memory)?;
        self.ask("device_add", &json!({"driver": "pc-dimm", "id": format!("d{mib}"), "memdev": id}))?;
        self.until(|(_, has)| has >= goal)?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }

    /// Takes the DIMM of `mib` away again.
    pub fn remove_memory(&mut self, mib: u32) -> Result<f64> {
        let start = Instant::now();
        self.remove(&format!("d{mib}"))?;
        let took = start.elapsed().as_secs_f64() * 1e3;
        self.ask("object-del", &json!({"id": format!("m{mib}")}))?;
        self.has.1 -= mib;
        Ok(took)
    }

    fn remove(&mut self, id: &str) -> Result<()> {
        self.ask("device_del", &json!({"id": id}))?;
        // Its events come in between and after.
        while !self.gone.iter().any(|other| other == id) {
            self.take_event()?;
        }
        self.gone.retain(|other| other != id);
        Ok(())
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> Result<()> {
        let request = json!({"execute": command, "arguments": arguments}).to_string();
        self.monitor.get_mut().write_all(request.as_bytes())?;
        loop {
            let message = self.message()?;
            if message.get("return").is_some() {
                return Ok(());
            }
            self.keep(&message)?;
        }
    }

    fn take_event(&mut self) -> Result<()> {
        let message = self.message()?;
        self.keep(&message)
    }

    fn keep(&mut self, message: &Value) -> Result<()> {
        if let Some(error) = message.get("error") {
            bail!("QEMU: {error}");
        }
        let device = message["data"]["device"].as_str().map(str::to_owned);
        match message["event"].as_str() {
            Some("DEVICE_DELETED") => self.gone.extend(device),
            Some(event @ ("DEVICE_UNPLUG_GUEST_ERROR" | "MEM_UNPLUG_ERROR" | "ACPI_DEVICE_OST")) => {
                let status = message["data"]["info"]["status"].as_u64().unwrap_or(0);
                // Table 6.58 of ACPI 6.5: 1 and 0x80 to 0x82 are failures of an ejection.
                ensure!(event == "ACPI_DEVICE_OST" && !matches!(status, 1 | 0x80..=0x82), "QEMU: {message}");
            }
            _ => {}
        }
        Ok(())
    }

    fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(self.monitor.read_line(&mut line).context("QEMU's monitor")? > 0, "QEMU's monitor has ended");
        Ok(serde_json::from_str(&line)?)
    }

    /// Reads what the guest says until it has what is wanted.
    fn until(&mut self, wanted: impl Fn((u32, u32)) -> bool) -> Result<()> {
        while !wanted(self.has) {
            let mut line = String::new();
            ensure!(self.console.read_line(&mut line)? > 0, "QEMU's guest has ended");
            let mut numbers = line.split_whitespace().map(str::parse);
            // The kernel may have something to say too.
            if let (Some(Ok(cpus)), Some(Ok(mib)), None) = (numbers.next(), numbers.next(), numbers.next()) {
                self.has = (cpus, mib);
            }
        }
        Ok(())
    }
}

impl Drop for Q35 {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn initrd(folder: &Path) -> Result<std::path::PathBuf> {
    let tree = folder.join("tree");
    std::fs::create_dir(&tree)?;
    std::fs::copy(Path::new(SHARE).join("exerciser"), tree.join("exerciser"))?;
    symlink("exerciser", tree.join("init"))?;
    pack_initrd(&tree, folder)
}
