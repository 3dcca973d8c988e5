//! Runs one command for one connection: streams, terminal, exit, and the kill when the connection is lost.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};
use lab_protocol::{CHUNK, Command, Exit, Frame, Kind};
use rustix::process::{Pid, Signal, kill_process_group};

/// Where commands are looked up.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The way back to `xtask`, shared by the threads that have something to say.
type Outlet = Arc<Mutex<TcpStream>>;

/// Runs `command` until it ends or the connection does. A command that cannot be started is told to the other side.
pub fn command(command: &Command, connection: &TcpStream) -> Result<()> {
    let outlet: Outlet = Arc::new(Mutex::new(connection.try_clone().context("clone the connection")?));
    let running = match start(command) {
        Ok(running) => running,
        Err(error) => {
            return send(&outlet, Kind::Failed, format!("{error:#}").as_bytes()).context("tell the failure");
        }
    };
    let result =
        attend(running, &outlet, connection.try_clone().context("clone the connection")?, command.beat_ms);
    let _ = connection.shutdown(Shutdown::Both); // ends the thread that reads from it; it may be closed already
    result
}

/// A started command and our ends of its streams.
struct Running {
    child: Child,
    input: Option<File>,
    /// Terminal to resize, when it has one.
    terminal: Option<File>,
    /// What it writes, with the frame kind to send it as.
    outputs: Vec<(File, Kind)>,
}

fn start(command: &Command) -> Result<Running> {
    let (program, args) = command.argv.split_first().expect("`Command::decode` refuses an empty argv");
    let mut process = std::process::Command::new(program);
    process
        .args(args)
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", "/root")
        .env("LANG", "C.UTF-8")
        .env("TERM", "xterm")
        .envs(command.env.iter().filter_map(|pair| pair.split_once('=')))
        .current_dir(if command.cwd.is_empty() { "/root" } else { &command.cwd });
    let terminal = match command.terminal {
        Some(size) => Some(open_terminal(size, &mut process).context("open a terminal")?),
        None => {
            process.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            None
        }
    };
    let has_terminal = terminal.is_some();
    // SAFETY: between fork and exec only setsid and ioctl are called, both async-signal-safe; nothing is allocated.
    unsafe {
        process.pre_exec(move || {
            rustix::process::setsid()?;
            if has_terminal {
                rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
            }
            Ok(())
        });
    }
    let mut child = process.spawn().with_context(|| format!("start {program}"))?;
    drop(process); // closes our copies of the terminal's far end: its end is seen when the command's copies close
    let mut outputs = Vec::new();
    let input = if let Some(terminal) = &terminal {
        outputs.push((terminal.try_clone().context("clone the terminal")?, Kind::Stdout));
        Some(terminal.try_clone().context("clone the terminal")?)
    } else {
        outputs.extend(child.stdout.take().map(|stream| (File::from(OwnedFd::from(stream)), Kind::Stdout)));
        outputs.extend(child.stderr.take().map(|stream| (File::from(OwnedFd::from(stream)), Kind::Stderr)));
        child.stdin.take().map(|stream| File::from(OwnedFd::from(stream)))
    };
    Ok(Running { child, input, terminal, outputs })
}

/// Gives `process` a new terminal and returns our end of it.
fn open_terminal(size: (u16, u16), process: &mut std::process::Command) -> Result<File> {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let near = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&near)?;
    unlockpt(&near)?;
    let name = ptsname(&near, Vec::new())?;
    let far = File::options().read(true).write(true).open(name.to_str().context("terminal name")?)?;
    resize(&near, size)?;
    process.stdin(far.try_clone()?).stdout(far.try_clone()?).stderr(far);
    Ok(File::from(near))
}

fn resize(terminal: impl AsFd, (rows, columns): (u16, u16)) -> Result<()> {
    let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(terminal, size).context("resize the terminal")
}

/// Moves bytes until the command has ended and its output is out, then sends its exit.
fn attend(mut running: Running, outlet: &Outlet, connection: TcpStream, beat_ms: u32) -> Result<()> {
    let group = Pid::from_child(&running.child); // it is its session's and group's leader, by setsid
    let pumps: Vec<Pump> =
        running.outputs.drain(..).map(|(stream, kind)| Pump::start(stream, kind, outlet)).collect();
    let (input, terminal) = (running.input.take(), running.terminal.take());
    let ended = Arc::new(AtomicBool::new(false));
    let follower_ended = Arc::clone(&ended);
    std::thread::spawn(move || {
        follow(connection, input, terminal.as_ref(), group);
        // The connection was lost under a running command. What an ended one left behind stays: a daemon, say.
        if !follower_ended.load(Ordering::Acquire) {
            kill(group);
        }
    });
    let (stop, stopped) = mpsc::channel::<()>();
    if beat_ms > 0 {
        let outlet = Arc::clone(outlet);
        std::thread::spawn(move || beat(&outlet, &stopped, beat_ms, group));
    }
    let status = running.child.wait().context("wait for the command")?;
    ended.store(true, Ordering::Release);
    for pump in &pumps {
        pump.finish();
    }
    drop(stop);
    let exit = match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code.to_le_bytes()[0]),
        (None, signal) => Exit::Signal(signal.unwrap_or(0).to_le_bytes()[0]),
    };
    send(outlet, Kind::Exit, &exit.encode()).context("send the exit")
}

/// Does what the other side says until it is gone.
fn follow(mut connection: TcpStream, mut input: Option<File>, terminal: Option<&File>, group: Pid) {
    while let Ok(Some(frame)) = Frame::read(&mut connection) {
        match (frame.kind, &frame.payload[..]) {
            // A command that closed its input does not care about the rest.
            (Kind::Stdin, bytes) => {
                input = input.filter(|mut stream| stream.write_all(bytes).is_ok());
            }
            (Kind::StdinEof, _) if terminal.is_none() => input = None,
            (Kind::Resize, &[a, b, c, d]) => {
                if let Some(terminal) = terminal {
                    let _ = resize(terminal, (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))); // cosmetic
                }
            }
            (Kind::Kill, _) => kill(group),
            _ => {}
        }
    }
}

/// Tells the other side that this machine lives, and notices when nobody listens any more (`follow` cannot while
/// it is blocked on a command that does not read its input).
fn beat(outlet: &Outlet, stopped: &mpsc::Receiver<()>, beat_ms: u32, group: Pid) {
    while stopped.recv_timeout(Duration::from_millis(beat_ms.into())) == Err(RecvTimeoutError::Timeout) {
        if send(outlet, Kind::Beat, &[]).is_err() {
            kill(group);
            return;
        }
    }
}

fn kill(group: Pid) {
    let _ = kill_process_group(group, Signal::KILL); // it may have ended already
}

fn send(outlet: &Outlet, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let mut connection = outlet.lock().expect("no holder of this lock panics");
    Frame::write(&mut *connection, kind, payload)
}

/// One output stream on its way out.
struct Pump {
    stream: File,
    /// A piece was read and is not sent yet.
    busy: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
}

impl Pump {
    fn start(stream: File, kind: Kind, outlet: &Outlet) -> Self {
        let pump = Self {
            stream: stream.try_clone().expect("a descriptor more is within the limit"),
            busy: Arc::default(),
            ended: Arc::default(),
        };
        let (busy, ended, outlet) = (Arc::clone(&pump.busy), Arc::clone(&pump.ended), Arc::clone(outlet));
        std::thread::spawn(move || {
            copy(stream, kind, &outlet, &busy);
            ended.store(true, Ordering::Release);
        });
        pump
    }

    /// Returns once everything is out that the ended command wrote. A background process that still holds the
    /// stream is not waited for: when the stream stays empty for a moment, that is the end.
    fn finish(&self) {
        let mut quiet = 0;
        while !self.ended.load(Ordering::Acquire) && quiet < 10 {
            let waiting = rustix::io::ioctl_fionread(&self.stream).unwrap_or(0);
            let moving = waiting > 0 || self.busy.load(Ordering::Acquire);
            quiet = if moving { 0 } else { quiet + 1 };
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn copy(mut stream: File, kind: Kind, outlet: &Outlet, busy: &AtomicBool) {
    let mut buffer = vec![0; CHUNK];
    // A terminal's near end gives EIO once its far end is closed: the end as well.
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        busy.store(true, Ordering::Release);
        let sent = send(outlet, kind, &buffer[..length]);
        busy.store(false, Ordering::Release);
        if sent.is_err() {
            return;
        }
    }
}
