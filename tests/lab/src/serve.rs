//! Accepts connections, one thread each, below a PID 1 that only reaps.

use std::fs::OpenOptions;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream};

use anyhow::{Context, Result, bail};
use lab_protocol::{Command, Frame, Kind, PORT, READY};

/// Forks: the child serves, the parent reaps until the child ends. Returns only on failure.
pub fn fork_and_reap() -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).context("listen for commands")?;
    // SAFETY: `lab-init` has started no thread yet (`bring_up` runs tools to their end and uses none), so the child
    // may go on to use any function.
    match unsafe { libc::fork() } {
        -1 => bail!("fork: {}", std::io::Error::last_os_error()),
        0 => accept(&listener),
        server => reap(server),
    }
}

fn reap(server: i32) -> Result<()> {
    loop {
        let mut status = 0;
        // SAFETY: `status` is a live i32 for the kernel to write to.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if pid == server {
            bail!("the server ended, wait status {status:#x}");
        }
        if pid < 0 && std::io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            bail!("waitpid: {}", std::io::Error::last_os_error());
        }
    }
}

fn accept(listener: &TcpListener) -> Result<()> {
    announce().context("announce readiness on the second serial port")?;
    loop {
        let (connection, _) = listener.accept().context("accept")?;
        std::thread::spawn(move || {
            if let Err(error) = serve(connection) {
                eprintln!("lab-init: {error:#}");
            }
        });
    }
}

fn announce() -> Result<()> {
    // Raw: the line discipline would turn the line's end into two bytes.
    let mut port = OpenOptions::new().write(true).read(true).open("/dev/ttyS1")?;
    let mut settings = rustix::termios::tcgetattr(&port)?;
    settings.make_raw();
    rustix::termios::tcsetattr(&port, rustix::termios::OptionalActions::Now, &settings)?;
    writeln!(port, "{READY}")?;
    Ok(())
}

fn serve(mut connection: TcpStream) -> Result<()> {
    connection.set_nodelay(true).context("switch off Nagle's algorithm")?;
    let Some(first) = Frame::read(&mut connection).context("read the first frame")? else {
        return Ok(());
    };
    match first.kind {
        Kind::Exec => {
            let command = Command::decode(&first.payload).context("read the command")?;
            crate::run::command(&command, &connection)
        }
        Kind::PowerOff => crate::boot::power_off(),
        other => bail!("a connection starts with Exec or PowerOff, not {other:?}"),
    }
}
