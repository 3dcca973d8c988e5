//! Steers every new TCP connection to a network namespace's loopback, whatever its port, to one listening socket.
//!
//! ```text
//!  connect(127.0.0.1:8080) ── SYN ──> sk_lookup program ── slot 0 ──> listener on 127.0.0.1
//!  connect([::1]:53)       ── SYN ──>   of the namespace ── slot 1 ──> listener on ::1
//! ```
//!
//! The kernel asks a BPF program of type `sk_lookup` (Linux 5.9, bpf(2), the kernel's
//! Documentation/bpf/prog_sk_lookup.rst) which socket a packet without a connection is for, before it looks for a
//! listener itself. What is accepted has the address and the port that were dialled. The program has two dozen
//! instructions, written by hand in `program.rs`, so that neither a compiler nor a library is needed for it.
//!
//! A program cannot ask whether a port has a listener of its own (no helper for that is open to it), so a namespace
//! that is steered has no other TCP server on its loopback. Nothing is left when the [`Steering`] is dropped, or its
//! process dies: program, map and link live by descriptors alone.
//!
//! A package of its own since it takes bpf(2), and everything else of the shim forbids `unsafe`.

mod program;
mod sys;

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

/// Slot of the IPv4 listener in the map of sockets.
const V4: u32 = 0;
/// Slot of the IPv6 listener.
const V6: u32 = 1;

/// What the kernel did not do.
#[derive(Debug, thiserror::Error)]
#[error("sk_lookup: {step}")]
pub struct SteeringError {
    /// What was tried.
    pub step: &'static str,
    /// What bpf(2) says (`EINVAL`: it does not know it, Linux 5.9 does; `EPERM`: it takes CAP_BPF and CAP_NET_ADMIN).
    #[source]
    pub source: io::Error,
}

impl SteeringError {
    fn at(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| SteeringError { step, source }
    }
}

/// A namespace's loopback, steered for as long as this lives.
#[derive(Debug)]
pub struct Steering {
    /// It holds the program, which holds the map.
    _link: OwnedFd,
}

impl Steering {
    /// Steers what comes to 127.0.0.0/8 of `namespace` to `v4`, and what comes to `::1` to `v6`: listening TCP sockets
    /// of that namespace. Without one for its family a connection is left to the kernel.
    ///
    /// # Errors
    /// See [`SteeringError`].
    pub fn attach(
        namespace: BorrowedFd<'_>,
        v4: BorrowedFd<'_>,
        v6: Option<BorrowedFd<'_>>,
    ) -> Result<Self, SteeringError> {
        let (map, program) = load()?;
        sys::put_socket(map.as_fd(), V4, v4)
            .map_err(SteeringError::at("put the IPv4 listener in the map"))?;
        if let Some(v6) = v6 {
            sys::put_socket(map.as_fd(), V6, v6)
                .map_err(SteeringError::at("put the IPv6 listener in the map"))?;
        }
        let link = sys::attach(program.as_fd(), namespace)
            .map_err(SteeringError::at("attach the program to the namespace"))?;
        Ok(Steering { _link: link })
    }
}

/// Finds out whether this kernel lets this process steer: loads the program and lets it go.
///
/// # Errors
/// See [`SteeringError`].
pub fn probe() -> Result<(), SteeringError> {
    load().map(drop)
}

/// The map of listeners and the program that looks into it.
fn load() -> Result<(OwnedFd, OwnedFd), SteeringError> {
    let map = sys::socket_map(2).map_err(SteeringError::at("make a map of sockets"))?;
    let instructions = program::assemble(map.as_raw_fd());
    let program = sys::load(&instructions).map_err(SteeringError::at("load the program"))?;
    Ok((map, program))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read as _, Write as _};
    use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
    use std::os::fd::AsFd as _;

    use super::*;

    /// Makes a namespace for the calling thread, its loopback up; nothing where that is not allowed.
    fn enter_a_namespace() -> Option<File> {
        // SAFETY: unshare takes flags; CLONE_NEWNET changes the calling thread alone, which is the test's own.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            eprintln!("not run: no network namespace ({})", io::Error::last_os_error());
            return None;
        }
        let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
        if !up.is_ok_and(|status| status.success()) {
            eprintln!("not run: `ip` does not set the loopback up");
            return None;
        }
        Some(File::open("/proc/thread-self/ns/net").unwrap())
    }

    fn attached(namespace: &File, v4: &TcpListener, v6: Option<&TcpListener>) -> Option<Steering> {
        match Steering::attach(namespace.as_fd(), v4.as_fd(), v6.map(|v6| v6.as_fd())) {
            Err(e) if [Some(libc::EPERM), Some(libc::EINVAL)].contains(&e.source.raw_os_error()) => {
                eprintln!("not run: {e}: {}", e.source);
                None
            }
            steering => Some(steering.unwrap()),
        }
    }

    #[test]
    fn every_port_of_the_loopback_leads_to_the_listener_and_only_while_it_is_steered() {
        let Some(namespace) = enter_a_namespace() else { return };
        let v4 = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let v6 = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).ok();
        let Some(steering) = attached(&namespace, &v4, v6.as_ref()) else { return };
        let dialled = |listener: &TcpListener, address: &str| {
            let mut client = TcpStream::connect(address).unwrap();
            let (mut server, from) = listener.accept().unwrap();
            assert_eq!(from, client.local_addr().unwrap());
            assert_eq!(server.local_addr().unwrap().to_string(), address);
            client.write_all(b"question").unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
            let mut text = String::new();
            server.read_to_string(&mut text).unwrap();
            assert_eq!(text, "question");
        };
        for address in ["127.0.0.1:1", "127.0.0.1:8080", "127.1.2.3:65535"] {
            dialled(&v4, address);
        }
        if let Some(v6) = &v6 {
            dialled(v6, "[::1]:443");
        }
        drop(steering);
        let refused = TcpStream::connect("127.0.0.1:8080").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }
    /// A probe to the port of a client that is no more is steered as well. The answer has to be a reset all the same.
    #[test]
    fn keepalive_finds_out_that_a_client_is_gone() {
        let Some(namespace) = enter_a_namespace() else { return };
        let v4 = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let Some(_steering) = attached(&namespace, &v4, None) else { return };
        // How long a closed socket is kept for its peer to close too, seconds.
        if std::fs::write("/proc/sys/net/ipv4/tcp_fin_timeout", "1").is_err() {
            eprintln!("not run: the namespace's limits cannot be set");
            return;
        }
        let client = TcpStream::connect("127.0.0.1:8080").unwrap();
        let (server, _) = v4.accept().unwrap();
        let options = [
            (libc::SOL_SOCKET, libc::SO_KEEPALIVE),
            (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE),
            (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL),
        ];
        for (level, name) in options {
            let (one, size) = (1_i32, libc::socklen_t::try_from(size_of::<i32>()).unwrap());
            // SAFETY: setsockopt reads `size` bytes of `one`, which lives here.
            let done =
                unsafe { libc::setsockopt(server.as_raw_fd(), level, name, (&raw const one).cast(), size) };
            assert_eq!(done, 0);
        }
        drop(client);
        let since = std::time::Instant::now();
        while server.take_error().unwrap().is_none() {
            assert!(since.elapsed() < std::time::Duration::from_secs(30), "it takes the client to be there");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}
