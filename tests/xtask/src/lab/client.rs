//! Running commands in a lab machine and copying files, over the protocol of `lab-init`.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command as Process, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab_protocol::{CHUNK, Command, Exit, Frame, Kind};

/// How often a command's connection shows that the lab machine lives, in milliseconds.
const BEAT_MS: u32 = 2_000;

/// Silence for this long means that the lab machine is frozen. Generous: two emulated CPUs share the host's two with
/// compilers, and a beat is late when they do.
const FROZEN_AFTER: Duration = Duration::from_secs(120);

/// The same in exact mode, where the machine runs many times slower than its clock.
const FROZEN_AFTER_EXACT: Duration = Duration::from_secs(1_200);

/// Exit code of a command that ran out of its time, as `timeout(1)` has it.
const TIMED_OUT: u8 = 124;

/// Exit code of a command that could not be started, as shells have it.
const NOT_STARTED: u8 = 127;

/// Where a running lab machine accepts commands.
#[derive(Debug, Clone, Copy)]
pub struct Client {
    port: u16,
    /// Instruction-exact time: no beats, since they would be work for the machine that is measured.
    exact: bool,
}

/// A command's streams on this side.
pub struct Streams<'a> {
    pub stdin: Box<dyn Read + Send>,
    pub stdout: &'a mut dyn Write,
    pub stderr: &'a mut dyn Write,
}

impl Client {
    pub fn new(port: u16, exact: bool) -> Self {
        Self { port, exact }
    }

    pub fn port(self) -> u16 {
        self.port
    }

    /// Whether its clock counts instructions.
    pub fn is_exact(self) -> bool {
        self.exact
    }

    /// Runs `command` to its end, or kills it after `limit`, which counts as exit code 124.
    pub fn run(self, command: &Command, streams: Streams<'_>, limit: Option<Duration>) -> Result<Exit> {
        let mut connection = self.connect()?;
        let start = Instant::now();
        let command = Command { beat_ms: if self.exact { 0 } else { BEAT_MS }, ..command.clone() };
        Frame::write(&mut connection, Kind::Exec, &command.encode()).context("send the command")?;
        let outlet = Arc::new(Mutex::new(connection.try_clone().context("clone the connection")?));
        let timed_out = Arc::new(AtomicBool::new(false));
        feed(streams.stdin, &outlet, command.terminal);
        // Dropped with the command's end. A thread that slept on would keep the connection, which QEMU looks at each time it wakes.
        let (_running, ended) = mpsc::channel::<()>();
        if let Some(limit) = limit {
            let timed_out = Arc::clone(&timed_out);
            std::thread::spawn(move || {
                if ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                    timed_out.store(true, Ordering::Release);
                    let _ = send(&outlet, Kind::Kill, &[]); // the command may end in this moment
                }
            });
        }
        let exit = follow(&mut connection, streams.stdout, streams.stderr).with_context(|| {
            format!(
                "run {:?} in the lab, {:.1} s after its start",
                command.argv,
                start.elapsed().as_secs_f32()
            )
        })?;
        Ok(if timed_out.load(Ordering::Acquire) && exit == Exit::Signal(9) {
            Exit::Code(TIMED_OUT)
        } else {
            exit
        })
    }

    /// Runs `command` with no input; what it printed, standard error after standard output.
    pub fn capture(self, argv: &[&str]) -> Result<(Exit, String)> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let command = Command { argv: argv.iter().map(ToString::to_string).collect(), ..Command::default() };
        let streams = Streams { stdin: Box::new(io::empty()), stdout: &mut stdout, stderr: &mut stderr };
        let exit = self.run(&command, streams, None)?;
        stdout.append(&mut stderr);
        Ok((exit, String::from_utf8_lossy(&stdout).into_owned()))
    }

    /// Copies a file or a folder into the lab. A file goes to the path `to`, or below it when that is a folder or
    /// ends in `/`; a folder's content goes into the folder `to`.
    pub fn put(self, from: &Path, to: &str) -> Result<()> {
        let metadata = fs::metadata(from).with_context(|| format!("look at {}", from.display()))?;
        let (script, stdin): (&str, Box<dyn Read + Send>) = if metadata.is_dir() {
            ("mkdir -p \"$1\" && exec tar -xf - -C \"$1\"", Box::new(Archive::of(from)?))
        } else {
            let file = File::open(from).with_context(|| format!("open {}", from.display()))?;
            // Into a new file: the old one may be a program that is running.
            let script = "to=$1; case $to in */) to=$to$2;; *) [ ! -d \"$to\" ] || to=$to/$2;; esac; \
                          mkdir -p \"$(dirname \"$to\")\" && cat >\"$to.part\" && chmod $3 \"$to.part\" && mv -f \"$to.part\" \"$to\"";
            (script, Box::new(file))
        };
        let name = from.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let mode = format!("{:o}", metadata.permissions().mode() & 0o7777);
        let argv = ["sh", "-c", script, "put", to, &name, &mode].map(String::from).to_vec();
        self.transfer(argv, stdin, &mut io::sink()).with_context(|| format!("put {} to {to}", from.display()))
    }

    /// Copies a file or a folder out of the lab. A file goes to `to` or, when that is a folder, into it; a folder's
    /// content goes into the folder `to`.
    pub fn get(self, from: &str, to: &Path) -> Result<()> {
        let context = || format!("get {from} to {}", to.display());
        let (exit, _) = self.capture(&["test", "-d", from])?;
        if exit == Exit::Code(0) {
            fs::create_dir_all(to).with_context(context)?;
            let mut tar = Process::new("tar")
                .args(["-xf", "-", "-C"])
                .arg(to)
                .stdin(Stdio::piped())
                .spawn()
                .context("start tar")?;
            let mut stdin = tar.stdin.take().expect("stdin is piped above");
            let argv = ["tar", "-cf", "-", "-C", from, "."].map(String::from).to_vec();
            self.transfer(argv, Box::new(io::empty()), &mut stdin).with_context(context)?;
            drop(stdin);
            let status = tar.wait().context("wait for tar")?;
            ensure!(status.success(), "{}: tar {status}", context());
            return Ok(());
        }
        let name = Path::new(from).file_name().context("no file name")?;
        let path = if to.is_dir() { to.join(name) } else { to.to_path_buf() };
        let mut file = File::create(&path).with_context(context)?;
        let argv = ["cat", "--", from].map(String::from).to_vec();
        self.transfer(argv, Box::new(io::empty()), &mut file).with_context(context)
    }

    /// Ends the machine in good order.
    pub fn power_off(self) -> Result<()> {
        Frame::write(&mut self.connect()?, Kind::PowerOff, &[]).context("send power-off")
    }

    fn transfer(self, argv: Vec<String>, stdin: Box<dyn Read + Send>, stdout: &mut dyn Write) -> Result<()> {
        let mut stderr = Vec::new();
        let command = Command { argv, ..Command::default() };
        let exit = self.run(&command, Streams { stdin, stdout, stderr: &mut stderr }, None)?;
        ensure!(exit == Exit::Code(0), "{}", String::from_utf8_lossy(&stderr).trim_end());
        Ok(())
    }

    fn frozen_after(self) -> Duration {
        if self.exact { FROZEN_AFTER_EXACT } else { FROZEN_AFTER }
    }

    fn connect(self) -> Result<TcpStream> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        let connection = TcpStream::connect(address).context("connect to the lab")?;
        connection.set_nodelay(true).context("switch off Nagle's algorithm")?;
        connection.set_read_timeout(Some(self.frozen_after())).context("set a read timeout")?;
        Ok(connection)
    }
}

/// Sends `input` until it ends, on a thread of its own: nobody waits for it once the command has ended.
fn feed(mut input: Box<dyn Read + Send>, outlet: &Arc<Mutex<TcpStream>>, terminal: Option<(u16, u16)>) {
    let outlet = Arc::clone(outlet);
    std::thread::spawn(move || {
        let mut buffer = vec![0; CHUNK];
        let mut size = terminal;
        loop {
            let length = match input.read(&mut buffer) {
                Ok(0) | Err(_) => break,
                Ok(length) => length,
            };
            if size.is_some() && size != super::terminal_size() {
                size = super::terminal_size();
                let (rows, columns) = size.unwrap_or_default();
                let payload = [rows.to_le_bytes(), columns.to_le_bytes()].concat();
                let _ = send(&outlet, Kind::Resize, &payload); // the next write tells whether anybody is there
            }
            if send(&outlet, Kind::Stdin, &buffer[..length]).is_err() {
                return;
            }
        }
        let _ = send(&outlet, Kind::StdinEof, &[]); // a command that has ended needs no end of input
    });
}

fn send(outlet: &Mutex<TcpStream>, kind: Kind, payload: &[u8]) -> io::Result<()> {
    Frame::write(&mut *outlet.lock().expect("no holder of this lock panics"), kind, payload)
}

/// Reads frames until the command's exit.
fn follow(connection: &mut TcpStream, stdout: &mut dyn Write, stderr: &mut dyn Write) -> Result<Exit> {
    let frozen_after = connection.read_timeout().context("read the timeout")?.unwrap_or_default();
    loop {
        let frame = match Frame::read(connection) {
            Ok(Some(frame)) => frame,
            Ok(None) => bail!("the lab machine went away"),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                bail!("the lab machine is frozen: no sign of life for {} s", frozen_after.as_secs())
            }
            Err(error) => return Err(error).context("the lab machine went away"),
        };
        match frame.kind {
            Kind::Stdout => pass_on(stdout, &frame.payload).context("write standard output")?,
            Kind::Stderr => pass_on(stderr, &frame.payload).context("write standard error")?,
            Kind::Beat => {}
            Kind::Exit => return Ok(Exit::decode(&frame.payload)?),
            Kind::Failed => {
                writeln!(stderr, "lab: {}", String::from_utf8_lossy(&frame.payload))
                    .context("write standard error")?;
                return Ok(Exit::Code(NOT_STARTED));
            }
            other => bail!("the lab machine sent {other:?}"),
        }
    }
}

fn pass_on(to: &mut dyn Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

/// A folder as a tar stream.
struct Archive {
    tar: std::process::Child,
}

impl Archive {
    fn of(folder: &Path) -> Result<Self> {
        let mut command = Process::new("tar");
        command.args(["--sparse", "-cf", "-", "-C"]).arg(folder).arg(".").stdout(Stdio::piped());
        Ok(Self { tar: command.spawn().context("start tar")? })
    }
}

impl Read for Archive {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let stream = self.tar.stdout.as_mut().expect("stdout is piped in `of`");
        let length = stream.read(buffer)?;
        if length == 0 {
            self.tar.wait()?;
        }
        Ok(length)
    }
}
