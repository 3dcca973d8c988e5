//! One lab machine: the QEMU process, its readiness, its console, its end.
//!
//! A machine belongs to the run that started it and dies with it, in good order or by the kernel's parent-death
//! signal. The one exception is a machine started with `--up`, whose state file lets later runs find it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab_protocol::{PORT, READY};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use super::client::Client;
use super::image::Image;
use super::qemu::Qemu;
use crate::apt::Apt;
use crate::cache::Cache;
use crate::host::{self, Kvm};
use crate::product::Product;
use crate::steps::show_tail;

/// A lab machine that is not ready by then never will be. It takes 5 s on an idle machine.
const READY_WITHIN: Duration = Duration::from_secs(240);

/// How long a machine may take to power off before it is killed.
const GONE_WITHIN: Duration = Duration::from_secs(20);

/// Numbers the machines of this run.
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// How the folder of a machine begins that ends with its run; the run's process number and the machine's own follow.
const ONCE: &str = ".once-";

const CONSOLE: &str = "console.log";
const STATE: &str = "lab.json";
const PRODUCT: &str = "product.erofs";

/// What kind of lab machine is wanted.
#[derive(Debug)]
pub struct Shape {
    pub cpus: u32,
    pub memory_mib: u32,
    /// Instruction count as the clock: one CPU, and everything timed in it repeats.
    pub exact: bool,
    /// What is found at [`IN_LAB`](crate::product::IN_LAB), beside an `/etc/ctvm/config.toml` that points there.
    pub product: Option<Product>,
}

impl Default for Shape {
    fn default() -> Self {
        Self { cpus: 2, memory_mib: 6144, exact: false, product: None }
    }
}

/// What later runs need to find a machine that stays.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    pid: i32,
    /// Start time of the process in clock ticks, since process numbers are used again.
    started: u64,
    port: u16,
    exact: bool,
}

/// A running lab machine.
#[derive(Debug)]
pub struct Machine {
    folder: PathBuf,
    client: Client,
    /// Ours to end, unless it stays.
    qemu: Option<Child>,
    keep_folder: bool,
    /// Where its console is kept when something failed.
    logs: PathBuf,
}

impl Machine {
    /// Makes what every machine starts from, for later.
    pub fn prepare(cache: &Cache) -> Result<()> {
        let apt = Apt::open(cache)?;
        Image::get(cache, &apt)?;
        Qemu::get(cache, &apt).map(drop)
    }

    /// Starts a machine that ends with this run.
    pub fn start(cache: &Cache, shape: &Shape) -> Result<Self> {
        let folder = cache.folder("run")?;
        clear_leftovers(&folder);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = folder.join(format!("{ONCE}{}-{number}", std::process::id()));
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        Self::launch(cache, shape, &folder, false)
    }

    /// Starts a machine that stays until [`Machine::stop`].
    pub fn start_to_stay(cache: &Cache, shape: &Shape, name: &str) -> Result<Self> {
        let folder = named_folder(cache, name)?;
        let mut machine = Self::launch(cache, shape, &folder, true)?;
        let qemu = machine.qemu.as_ref().expect("`launch` returns a running machine");
        let pid = i32::try_from(qemu.id()).expect("process numbers fit in i32");
        let started = start_time(pid).context("read QEMU's start time")?;
        let state = State { pid, started, port: machine.client.port(), exact: shape.exact };
        fs::write(machine.folder.join(STATE), serde_json::to_vec(&state)?)
            .context("write the machine's state")?;
        machine.qemu = None; // from here on nobody waits for it but init
        Ok(machine)
    }

    /// The machine that was started to stay under `name`, when it runs.
    pub fn find(cache: &Cache, name: &str) -> Result<Option<Self>> {
        let folder = named_folder(cache, name)?;
        let Ok(text) = fs::read(folder.join(STATE)) else { return Ok(None) };
        let state: State = serde_json::from_slice(&text).context("read the machine's state")?;
        if start_time(state.pid) != Some(state.started) {
            return Ok(None);
        }
        let client = Client::new(state.port, state.exact);
        Ok(Some(Self { folder, client, qemu: None, keep_folder: true, logs: cache.folder("logs")? }))
    }

    /// Ends a machine that was started to stay. False when there is none.
    pub fn stop(cache: &Cache, name: &str) -> Result<bool> {
        let Some(machine) = Self::find(cache, name)? else { return Ok(false) };
        let text = fs::read(machine.folder.join(STATE)).context("read the machine's state")?;
        let state: State = serde_json::from_slice(&text).context("read the machine's state")?;
        let _ = machine.client.power_off(); // a frozen machine is killed below
        let gone = || start_time(state.pid) != Some(state.started);
        if !wait_until(GONE_WITHIN, gone) {
            let pid = Pid::from_raw(state.pid).context("process number 0 in the machine's state")?;
            kill_process(pid, Signal::KILL).context("kill QEMU")?;
            ensure!(wait_until(GONE_WITHIN, gone), "QEMU (process {}) does not end", state.pid);
        }
        fs::remove_file(machine.folder.join(STATE)).context("remove the machine's state")?;
        Ok(true)
    }

    pub fn client(&self) -> Client {
        self.client
    }

    /// Shows the end of the machine's console, and keeps the whole of it when the machine goes.
    pub fn show_console(&self) {
        let path = self.folder.join(CONSOLE);
        if self.keep_folder {
            return show_tail(&path);
        }
        let name = self.folder.file_name().unwrap_or_default().to_string_lossy();
        let kept = self.logs.join(format!("console-{}.log", name.trim_start_matches(ONCE)));
        let _ = fs::copy(path, &kept); // shown all the same, then, as an empty file
        show_tail(&kept);
    }

    fn launch(cache: &Cache, shape: &Shape, folder: &Path, stay: bool) -> Result<Self> {
        let apt = Apt::open(cache)?;
        let image = Image::get(cache, &apt)?;
        let kvm = if shape.exact || !host::nests() { Kvm::Absent } else { host::kvm() };
        let qemu = Qemu::get(cache, &apt)?;
        let lab_init = crate::build::lab_init()?;
        image.write_initramfs(&lab_init, &folder.join("initramfs"))?;
        if let Some(product) = &shape.product {
            product.write_disk(cache, &folder.join(PRODUCT))?;
        }
        // Another process may take the port between our look and QEMU's: then QEMU says so and we look again.
        for _ in 0..3 {
            let port = free_port()?;
            let ready = listen(folder)?;
            let mut command = qemu.command();
            arguments(&mut command, shape, kvm, &image, port);
            let process = spawn(command, folder, stay)?;
            let client = Client::new(port, shape.exact);
            let mut machine = Self {
                folder: folder.to_path_buf(),
                client,
                qemu: Some(process),
                keep_folder: stay,
                logs: cache.folder("logs")?,
            };
            match machine.await_ready(&ready) {
                Ok(()) => return Ok(machine),
                Err(_) if machine.port_was_taken() => {}
                Err(error) => {
                    machine.show_console();
                    show_tail(&folder.join("qemu.log"));
                    return Err(error);
                }
            }
        }
        bail!("three ports in a row were taken by others")
    }

    fn await_ready(&mut self, listener: &UnixListener) -> Result<()> {
        let qemu = self.qemu.as_mut().expect("called on a machine just launched");
        let deadline = Instant::now() + READY_WITHIN;
        let connection = loop {
            match listener.accept() {
                Ok((connection, _)) => break connection,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("accept QEMU's serial port"),
            }
            if let Some(status) = qemu.try_wait().context("look after QEMU")? {
                bail!("QEMU ended before the lab was ready: {status}");
            }
            ensure!(Instant::now() < deadline, "QEMU did not start within {} s", READY_WITHIN.as_secs());
            std::thread::sleep(Duration::from_millis(5));
        };
        connection.set_nonblocking(false).context("make the serial port blocking")?;
        connection.set_read_timeout(Some(READY_WITHIN)).context("set a read timeout")?;
        let mut line = String::new();
        BufReader::new(connection)
            .read_line(&mut line)
            .with_context(|| format!("the lab was not ready within {} s", READY_WITHIN.as_secs()))?;
        ensure!(line.trim_end() == READY, "the lab machine ended before it was ready");
        Ok(())
    }

    fn port_was_taken(&self) -> bool {
        fs::read_to_string(self.folder.join("qemu.log"))
            .is_ok_and(|log| log.contains("Could not set up host forwarding"))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(mut qemu) = self.qemu.take() {
            let _ = qemu.kill(); // nothing in it is worth keeping; it may have ended already
            let _ = qemu.wait(); // reaps it
        }
        if !self.keep_folder {
            let _ = fs::remove_dir_all(&self.folder); // what stays is removed by the next start
        }
    }
}

fn arguments(command: &mut Command, shape: &Shape, kvm: Kvm, image: &Image, port: u16) {
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-machine", "q35"]);
    match kvm {
        Kvm::Hardware => command.args(["-accel", "kvm", "-cpu", "host"]),
        Kvm::Absent => command.args(["-cpu", "EPYC-v3,+svm,+npt"]),
    };
    let mut line = "console=ttyS0 quiet panic=-1 mitigations=off".to_owned();
    if shape.exact {
        command.args(["-accel", "tcg,thread=single", "-smp", "1", "-icount", "shift=0,sleep=off"]);
    } else {
        if kvm == Kvm::Absent {
            command.args(["-accel", "tcg,thread=multi"]);
            // QEMU's counter is one for all CPUs, without the flag that would say so. The kernel would read the ACPI timer,
            // with a lock of QEMU's at each look at the clock.
            line.push_str(" tsc=reliable");
            // Each timer that is set or ends wakes QEMU's main thread, which takes a processor from a CPU: 2,800 times a second
            // where the kernel asks for each moment alone, 500 where it looks at all timers 250 times a second.
            line.push_str(" nohz=off highres=off");
            // Programs that lie where they lay are known to QEMU; security modules, asked at each file opened, guard nothing.
            line.push_str(" norandmaps lsm= hardened_usercopy=off");
            // In exact time all of this is as it was, for the sake of older figures.
        }
        command.arg("-smp").arg(shape.cpus.to_string());
    }
    command.arg("-m").arg(format!("{}M", shape.memory_mib));
    command.arg("-kernel").arg(image.kernel()).args(["-initrd", "initramfs"]);
    command.args(["-append", &line]);
    command.args(["-chardev", &format!("file,id=console,path={CONSOLE}"), "-serial", "chardev:console"]);
    command.args(["-chardev", "socket,id=ready,path=ready.sock", "-serial", "chardev:ready"]);
    let root = image.root();
    command.arg("-drive").arg(format!("if=none,id=root,format=raw,readonly=on,file={}", root.display()));
    command.args(["-device", "virtio-blk-pci,drive=root"]);
    if shape.product.is_some() {
        command.arg("-drive").arg(format!("if=none,id=product,format=raw,readonly=on,file={PRODUCT}"));
        command.args(["-device", "virtio-blk-pci,drive=product"]);
    }
    command.arg("-netdev").arg(format!("user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:{PORT}"));
    command.args(["-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci"]);
}

fn spawn(mut command: Command, folder: &Path, stay: bool) -> Result<Child> {
    let log = fs::File::create(folder.join("qemu.log")).context("make QEMU's log")?;
    let also = log.try_clone().context("clone the log's descriptor")?;
    command.current_dir(folder).stdin(Stdio::null()).stdout(log).stderr(also);
    let parent = std::process::id();
    // SAFETY: between fork and exec only setsid, prctl and getppid are called, all async-signal-safe, and nothing is
    // allocated.
    unsafe {
        command.pre_exec(move || {
            if stay {
                rustix::process::setsid()?;
            } else {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                // The parent may have died before the line above took effect.
                let alive = rustix::process::getppid()
                    .is_some_and(|pid| pid.as_raw_nonzero().get().cast_unsigned() == parent);
                if !alive {
                    return Err(std::io::ErrorKind::Interrupted.into());
                }
            }
            Ok(())
        });
    }
    command.spawn().context("start QEMU")
}

/// A socket for the machine's second serial port, on which it says that it is ready.
fn listen(folder: &Path) -> Result<UnixListener> {
    let path = folder.join("ready.sock");
    let _ = fs::remove_file(&path); // left by an earlier start
    // By way of the folder's descriptor, since the path of a socket may have 107 bytes only.
    let handle = fs::File::open(folder).context("open the machine's folder")?;
    let listener = UnixListener::bind(format!("/proc/self/fd/{}/ready.sock", handle.as_raw_fd()))
        .with_context(|| format!("listen at {}", path.display()))?;
    listener.set_nonblocking(true).context("make the listener non-blocking")?;
    Ok(listener)
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("look for a free port")?;
    Ok(listener.local_addr().context("look for a free port")?.port())
}

fn named_folder(cache: &Cache, name: &str) -> Result<PathBuf> {
    let plain = !name.is_empty()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
    ensure!(plain, "a lab's name is made of letters, digits, `-` and `_`, not {name:?}");
    cache.folder("run").map(|folder| folder.join(name)).and_then(|folder| {
        fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        Ok(folder)
    })
}

/// Removes the folders of runs that were interrupted.
fn clear_leftovers(folder: &Path) {
    for item in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = item.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(ONCE).and_then(|rest| rest.split('-').next()?.parse().ok());
        if owner.is_some_and(|pid| start_time(pid).is_none()) {
            let _ = fs::remove_dir_all(item.path()); // another run may be removing it too
        }
    }
}

/// When the process `pid` started, in clock ticks since boot (proc(5), `/proc/pid/stat`, field 22).
fn start_time(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = text.rsplit_once(") ")?; // the name before it may hold anything
    let mut fields = fields.split(' ');
    (fields.next() != Some("Z")).then_some(())?;
    fields.nth(18)?.parse().ok()
}

fn wait_until(limit: Duration, done: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while !done() {
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}
