//! Port-forward as containerd does it: connections that are dialled to the loopback of the pod's network namespace on
//! the host reach the servers on the guest's loopback.
//!
//! ```text
//!  host: pod's network namespace                       shim                                  guest
//!    containerd ── 127.0.0.1:80 ──> sk_lookup ──> listener ── relay ── vsock stream ──> agent ──> 127.0.0.1:80
//!                  [::1]:80                       (door)                                         [::1]:80
//! ```
//!
//! containerd enters the namespace and dials `localhost`, first by IPv4, then by IPv6. Each connection is accepted
//! before anybody knows whether the guest has a server on that port, since the kernel does the accepting; so the agent
//! tries both families, and a port without a server shows as a reset.
//!
//! All of it lives by descriptors of this process and ends with the VM or with the process: there is nothing to clean
//! up. A host that cannot do it (Linux before 5.9, no BPF) runs the pod without it, and the log says so.

mod door;
mod relay;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent_api::sandbox::ForwardRequest;
use rustix::net::sockopt::{
    set_socket_keepalive, set_socket_linger, set_tcp_keepidle, set_tcp_keepintvl, set_tcp_nodelay,
};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use self::door::Door;
use crate::error::chain;
use crate::sandbox::aside;
use crate::sandbox::boot::Vm;
use crate::sandbox::complaints::Complaints;

/// Most connections at once. Each is one of the VMM's 1,024 vsock connections, which the containers' streams need as
/// well, and two descriptors here and in the guest, where a process may have 1,024 by default.
const MAX_CONNECTIONS: usize = 256;
/// How many are being opened at once: as long as they have not said their id, the streams of all share 64 places.
const MAX_OPENING: usize = 16;
/// How long one may take to be opened, waiting for its turn included.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);
/// A client that closed its end looks like one that half-closed it, until its kernel is asked.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// Pause after an `accept` that failed, for want of descriptors most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Forwards connections into the VM from the namespace at `namespace` until the VM ends.
pub async fn serve(vm: Arc<Vm>, namespace: PathBuf) {
    let begun = Instant::now();
    let door = match aside(move || Door::open(&namespace)).await {
        Ok(door) => door,
        Err(e) => {
            log::warn!("no port-forward into this pod: {}", chain(&e));
            return;
        }
    };
    let families = if door.has_ipv6() { "IPv4 and IPv6" } else { "IPv4" };
    log::debug!("port-forward is ready ({families}), made in {:?}", begun.elapsed());
    tokio::select! {
        () = forward_all(&door, &vm) => {}
        _ = vm.vmm.exited() => {}
    }
}

/// Connections end with this future.
async fn forward_all(door: &Door, vm: &Arc<Vm>) {
    let mut connections = JoinSet::new();
    let opening = Arc::new(Semaphore::new(MAX_OPENING));
    let mut complaints = Complaints::about("port-forward: a connection was closed");
    loop {
        let accepted = door.accept().await;
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok(client) if connections.len() < MAX_CONNECTIONS => {
                connections.spawn(forward(client, vm.clone(), opening.clone()));
            }
            Ok(client) => {
                // What cannot be set says that the client is gone.
                let _ = set_socket_linger(&client, Some(Duration::ZERO));
                complaints.note(format_args!("there are {MAX_CONNECTIONS} already"));
            }
            Err(e) => {
                complaints.note(format_args!("{e}"));
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// One connection, from its acceptance to its end.
async fn forward(client: TcpStream, vm: Arc<Vm>, opening: Arc<Semaphore>) {
    let Ok(dialled) = client.local_addr() else { return };
    if let Err(e) = try_forward(client, dialled, &vm, &opening).await {
        log::debug!("connection to {dialled}: {}", chain(&e));
    }
}

async fn try_forward(
    client: TcpStream,
    dialled: std::net::SocketAddr,
    vm: &Vm,
    opening: &Semaphore,
) -> Result<(), ForwardError> {
    prepare(&client).map_err(ForwardError::Broken)?;
    let stream = tokio::time::timeout(OPEN_TIMEOUT, async {
        let _turn = opening.acquire().await.expect("the semaphore is never closed");
        let expected = vm.streams.expect();
        let request = ForwardRequest {
            port: dialled.port().into(),
            ipv6: dialled.is_ipv6(),
            stream: expected.id.0,
            ..ForwardRequest::default()
        };
        vm.agent.forward(&request).await?;
        expected.connection(OPEN_TIMEOUT).await.ok_or(ForwardError::Late)
    });
    let stream = stream.await.map_err(|_| ForwardError::Late)??;
    relay::relay(client, stream).await.map_err(ForwardError::Broken)
}

/// However the connection ends before its time, the client sees a reset, not the end of what was sent.
fn prepare(client: &TcpStream) -> std::io::Result<()> {
    set_socket_linger(client, Some(Duration::ZERO))?;
    set_tcp_nodelay(client, true)?;
    set_socket_keepalive(client, true)?;
    set_tcp_keepidle(client, KEEPALIVE_IDLE)?;
    set_tcp_keepintvl(client, KEEPALIVE_INTERVAL)?;
    Ok(())
}

/// Why a connection was closed.
#[derive(Debug, thiserror::Error)]
enum ForwardError {
    /// The agent did not connect it: most often, nobody listens.
    #[error(transparent)]
    Agent(#[from] crate::agent::AgentError),
    /// The guest did not open its stream.
    #[error("not connected within {OPEN_TIMEOUT:?}")]
    Late,
    /// Either side broke.
    #[error("cut off")]
    Broken(#[source] std::io::Error),
}
