//! Connections to the loopback of the pod's network namespace, which the shim hands to the agent.

use std::fs::{self, File};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::daemon::{
    Daemon, Netns, create_request, ctx, delete, eventually, kill_request, shutdown, start_request, wait,
};
use crate::{fake, is_root};

/// As many as the shim forwards at once.
const MAX_CONNECTIONS: usize = 256;
/// Patience with one read.
const LIMIT: Duration = Duration::from_secs(60);

/// A network namespace that can be steered.
struct Steered(Netns);

impl std::ops::Deref for Steered {
    type Target = Netns;

    fn deref(&self) -> &Netns {
        &self.0
    }
}

impl Steered {
    /// Nothing where there is none.
    fn make() -> Option<Steered> {
        if !is_root() {
            return None;
        }
        if let Err(e) = sk_lookup::probe() {
            eprintln!("not run: {e}: {}", e.source);
            return None;
        }
        Some(Steered(Netns::make()))
    }

    /// Dials an address in it.
    fn dial(&self, address: &str) -> std::io::Result<TcpStream> {
        let namespace = File::open(self.path())?;
        let address: SocketAddr = address.parse().unwrap();
        let thread = std::thread::spawn(move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            TcpStream::connect(address)
        });
        let connection = thread.join().unwrap()?;
        connection.set_read_timeout(Some(LIMIT))?;
        Ok(connection)
    }

    /// The shim opens the door when the guest is up, beside everything else.
    async fn opened(&self) {
        eventually("somebody listens", || self.dial("127.0.0.1:7").is_ok()).await;
    }
}

/// A bundle whose container sleeps in `namespace`.
fn make_bundle(daemon: &Daemon, namespace: &Steered) {
    daemon.make_bundle("web", &["sleep"], None);
    let file = daemon.bundle("web").join("config.json");
    let mut spec: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    let network = namespaces.iter_mut().find(|namespace| namespace["type"] == "network").unwrap();
    network["path"] = namespace.path().into();
    fs::write(file, spec.to_string()).unwrap();
}

/// A running container in `namespace`.
async fn started(daemon: &Daemon, namespace: &Steered) -> agent_api::task::TaskClient {
    make_bundle(daemon, namespace);
    let task = daemon.connect("web").await;
    task.create(ctx(), &create_request(daemon, "web")).await.unwrap();
    task.start(ctx(), &start_request("web", "")).await.unwrap();
    namespace.opened().await;
    task
}

/// Ends it, regularly.
async fn end(daemon: &Daemon, task: agent_api::task::TaskClient) {
    task.kill(ctx(), &kill_request("web", 9)).await.unwrap();
    wait(&task, "web", "").await;
    delete(&task, "web", "").await.unwrap();
    shutdown(&task, "web").await;
    drop(task);
    daemon.nothing_left().await;
}

#[tokio::test]
async fn a_connection_reaches_the_port_that_was_dialled_and_a_refused_one_is_reset() {
    let Some(namespace) = Steered::make() else { return };
    let daemon = Daemon::new("").await;
    let task = started(&daemon, &namespace).await;
    for (address, seen) in
        [("127.0.0.1:7", "7 false\n"), ("127.0.0.1:65535", "65535 false\n"), ("[::1]:7", "7 true\n")]
    {
        let mut connection = namespace.dial(address).unwrap();
        connection.write_all(b"question").unwrap();
        connection.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        connection.read_to_string(&mut text).unwrap();
        assert_eq!(text, format!("{seen}question"), "{address}");
    }
    let mut refused = namespace.dial(&format!("127.0.0.1:{}", fake::REFUSED_PORT)).unwrap();
    assert_eq!(refused.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    end(&daemon, task).await;
    let nobody = namespace.dial("127.0.0.1:7").unwrap_err();
    assert_eq!(nobody.kind(), ErrorKind::ConnectionRefused);
}

#[tokio::test]
async fn connections_are_bounded_and_end_with_the_vm() {
    let Some(namespace) = Steered::make() else { return };
    let daemon = Daemon::new("").await;
    let task = started(&daemon, &namespace).await;
    let mut line = [0; 8];
    let greeted = |connection: &mut TcpStream, line: &mut [u8; 8]| connection.read_exact(line);
    let mut held = Vec::new();
    // The one that found the door open may still be on its way out.
    eventually("so many are forwarded at once", || {
        let mut connection = namespace.dial("127.0.0.1:7").unwrap();
        if greeted(&mut connection, &mut line).is_ok() {
            held.push(connection);
        }
        held.len() == MAX_CONNECTIONS
    })
    .await;
    let mut beyond = namespace.dial("127.0.0.1:7").unwrap();
    assert_eq!(beyond.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    // One that goes makes room.
    drop(held.pop());
    eventually("there is room again", || {
        let mut connection = namespace.dial("127.0.0.1:7").unwrap();
        greeted(&mut connection, &mut line).is_ok()
    })
    .await;
    end(&daemon, task).await;
    for mut connection in held {
        let end = connection.read(&mut [0]);
        assert!(matches!(&end, Ok(0)) || end.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset));
    }
}
