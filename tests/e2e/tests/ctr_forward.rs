//! Port-forward as containerd does it: enter the pod's network namespace, dial `localhost`, reach the container.
#![cfg(feature = "lab")]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd as _;
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::command::{LIMIT, wait_until};
use e2e::{Containerd, Netns};

/// One containerd for all tests of this file.
static CONTAINERD: LazyLock<Containerd> = LazyLock::new(|| Containerd::start().expect("containerd starts"));

/// A container that runs `script` in a namespace of its own, with what a test does to it from there.
fn with_server(name: &str, script: &str, test: impl FnOnce(&Netns) -> Result<()>) -> Result<()> {
    let namespace = Netns::make(name)?;
    let options = ["-d", "--with-ns", &namespace.option()];
    CONTAINERD.run(&options, name, &["sh", "-c", script])?.ok()?;
    let outcome = test(&namespace);
    CONTAINERD.remove(name)?;
    outcome
}

/// Dials an address of the namespace's loopback, with a limit on every wait.
fn dial(address: &str) -> Result<TcpStream> {
    let connection = TcpStream::connect(address).with_context(|| format!("dialling {address}"))?;
    connection.set_read_timeout(Some(LIMIT))?;
    connection.set_write_timeout(Some(LIMIT))?;
    Ok(connection)
}

/// What a server answers to a request for its one page.
fn page(mut connection: TcpStream) -> Result<String> {
    connection.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Waits until what listens behind `address` answers: the container's server starts when it does.
fn wait_for_answer(namespace: &Netns, address: &str) -> Result<()> {
    wait_until(&format!("{address} answers"), || {
        let answered = namespace.within(|| Ok(dial(address).and_then(page)));
        Ok(answered?.is_ok_and(|answer| answer.ends_with("hello from the pod\n")))
    })
}

/// A script that serves one page at each of these addresses, and then `more`.
fn pages(addresses: &[&str], more: &str) -> String {
    let mut script = "mkdir /dev/shm/w && echo hello from the pod > /dev/shm/w/index.html".to_owned();
    for address in addresses {
        script += &format!(" && httpd -p {address} -h /dev/shm/w");
    }
    format!("{script} && {more}")
}

#[test]
fn forward_reaches_servers_on_any_address_by_both_families() -> Result<()> {
    let script = pages(&["0.0.0.0:80", "127.0.0.1:8081", "[::1]:8082"], "sleep 1000");
    with_server("forward-any", &script, |namespace| {
        // Whatever family a client comes by, the server's is found.
        for port in [80, 8081, 8082] {
            wait_for_answer(namespace, &format!("127.0.0.1:{port}"))?;
            wait_for_answer(namespace, &format!("[::1]:{port}"))?;
        }
        Ok(())
    })
}

#[test]
fn forwarded_bytes_pass_both_ways_to_their_ends() -> Result<()> {
    const SIZE: usize = 12 << 20;
    with_server("forward-bytes", "nc -ll -p 7 -e cat", |namespace| {
        for (address, shift) in [("127.0.0.1:7", 0), ("[::1]:7", 100)] {
            let data: Vec<u8> = (0..251_u8).cycle().skip(shift).take(SIZE).collect();
            let mut got = Vec::new();
            wait_until("the server echoes", || {
                got.clear();
                let exchanged = namespace.within(|| Ok(echo(address, &data, &mut got)))?;
                // Nobody listens yet: cut off before anything came back.
                ensure!(exchanged.is_ok() || got.is_empty(), "{exchanged:?} after {} bytes", got.len());
                Ok(exchanged.is_ok())
            })?;
            ensure!(got.len() == SIZE, "{address}: {} of {SIZE} bytes came back", got.len());
            ensure!(got == data, "{address}: bytes changed on the way to the container and back");
        }
        Ok(())
    })
}

/// Sends `data`, ends that direction, and reads what comes back until the other one ends.
fn echo(address: &str, data: &[u8], got: &mut Vec<u8>) -> Result<()> {
    let connection = dial(address)?;
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| -> Result<()> {
            (&connection).write_all(data)?;
            Ok(connection.shutdown(Shutdown::Write)?)
        });
        let read = (&connection).read_to_end(got);
        sender.join().expect("no panic")?;
        read?;
        Ok(())
    })
}

#[test]
fn forward_to_a_port_without_a_server_is_reset() -> Result<()> {
    with_server("forward-none", &pages(&["127.0.0.1:80"], "sleep 1000"), |namespace| {
        wait_for_answer(namespace, "127.0.0.1:80")?;
        for address in ["127.0.0.1:81", "[::1]:81"] {
            // The reset may be there before connect() has returned, which says so then.
            let bytes = namespace.within(|| {
                Ok(TcpStream::connect(address).and_then(|mut connection| connection.read(&mut [0])))
            })?;
            let error = bytes.expect_err("nobody listens there");
            ensure!(error.kind() == std::io::ErrorKind::ConnectionReset, "{address}: {error}");
        }
        // And an address that is not the loopback's is refused as before.
        namespace.run("ip address add 10.98.0.1/32 dev lo")?;
        let refused = namespace.within(|| Ok(TcpStream::connect("10.98.0.1:80")))?;
        let error = refused.expect_err("nobody listens there");
        ensure!(error.kind() == std::io::ErrorKind::ConnectionRefused, "{error}");
        wait_for_answer(namespace, "127.0.0.1:80")
    })
}

#[test]
fn fifty_connections_are_forwarded_at_once() -> Result<()> {
    with_server("forward-fifty", &pages(&["80"], "sleep 1000"), |namespace| {
        wait_for_answer(namespace, "127.0.0.1:80")?;
        let answers = namespace.within(|| {
            let address = |i| if i % 2 == 0 { "127.0.0.1:80" } else { "[::1]:80" };
            let connections: Vec<_> = (0..50).map(|i| dial(address(i))).collect::<Result<_>>()?;
            // All are open before the first is asked for anything.
            std::thread::sleep(Duration::from_millis(100));
            let asked: Vec<_> =
                connections.into_iter().map(|connection| std::thread::spawn(|| page(connection))).collect();
            Ok(asked.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Vec<_>>())
        })?;
        for (i, answer) in answers.into_iter().enumerate() {
            let answer = answer.with_context(|| format!("connection {i}"))?;
            ensure!(answer.ends_with("hello from the pod\n"), "connection {i}: {answer}");
        }
        Ok(())
    })
}

/// Connections to port 7 in the container, as its own kernel knows them.
fn connections_inside(id: &str, exec: &str) -> Result<usize> {
    let table = CONTAINERD.exec(id, exec, &["netstat", "-tn"])?.ok()?;
    Ok(table.lines().filter(|line| line.contains(":7 ")).count())
}

#[test]
fn a_forwarded_connection_ends_with_its_client() -> Result<()> {
    // A server that neither speaks nor listens to the end of its input.
    with_server("forward-silent", "nc -ll -p 7 -e sleep 1000", |namespace| {
        let mut held = Vec::new();
        let mut looked = 0;
        let mut inside = || {
            looked += 1;
            connections_inside("forward-silent", &format!("look-{looked}"))
        };
        wait_until("a connection in the container", || {
            held.extend(namespace.within(|| dial("127.0.0.1:7")).ok());
            Ok(inside()? > 0)
        })?;
        for client in held {
            let abort = libc::linger { l_onoff: 1, l_linger: 0 };
            let size = libc::socklen_t::try_from(size_of_val(&abort))?;
            let (level, name) = (libc::SOL_SOCKET, libc::SO_LINGER);
            // SAFETY: setsockopt reads `size` bytes of `abort`, which lives here, and `client` is open.
            let done =
                unsafe { libc::setsockopt(client.as_raw_fd(), level, name, (&raw const abort).cast(), size) };
            ensure!(done == 0, "setsockopt: {}", std::io::Error::last_os_error());
        }
        wait_until("none is left in the container", || Ok(inside()? == 0))
    })
}

#[test]
fn a_forwarded_connection_ends_with_its_server() -> Result<()> {
    with_server("forward-ends", "nc -ll -p 7 -e cat", |namespace| {
        let mut connection = None;
        wait_until("the server echoes", || {
            let Ok(mut dialled) = namespace.within(|| dial("127.0.0.1:7")) else { return Ok(false) };
            let mut byte = [0];
            let echoed = dialled.write_all(b"x").and_then(|()| dialled.read_exact(&mut byte)).is_ok();
            connection = Some(dialled);
            Ok(echoed)
        })?;
        let mut connection = connection.expect("the last one that was dialled");
        CONTAINERD.kill_task("forward-ends")?;
        // The server's end is either: its kernel closes the connection, or the VM is gone before it does.
        match connection.read(&mut [0]) {
            Ok(0) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(()),
            other => anyhow::bail!("neither end nor reset: {other:?}"),
        }
    })
}
