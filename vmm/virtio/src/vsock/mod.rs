//! Stream sockets between guest and host (virtio 1.2, 5.10), in user space.
//!
//! There is no socket path and no global context id on the host: each connection is a socket pair, of which one end
//! stays here and the other one is handed to whoever owns the VM, as a descriptor.
//!
//! ```text
//!          guest                        this device                            owner of the VM
//!   connect(2, port) ── REQUEST ──> port allowed? socket pair ── Accepted{socket} ──> uses the socket
//!                   <── RESPONSE ──
//!   accept()        <── REQUEST ─── socket pair  <─────────────────────── connect(port, request)
//!                   ── RESPONSE ──>              ── Connected{request, socket} ──> uses the socket
//! ```
//!
//! Bytes are never copied through our memory, save those of the guest which the host does not take at once: they
//! wait in a [`backlog`], whose size is the credit that the guest was given. Bytes of the host are read only when the
//! guest has both credit and buffers for them. So either side can be stopped by the other, and neither can fill our
//! memory.
//!
//! [`connection`] is the state machine of one connection, [`table`] holds all of them, [`exchange`] is what stands
//! between them and the queues, [`device`] is the virtio side. `vmm/docs/vsock.md` has the numbers.
//!
//! Not here: datagrams, `SOCK_SEQPACKET`, connections between guests, other context ids of the host than 2.

mod backlog;
mod connection;
mod credit;
mod device;
mod exchange;
mod metrics;
mod packet;
mod socket;
mod state;
mod table;
#[cfg(test)]
mod tests;
mod to_guest;

pub use device::{Vsock, VsockError};
pub use exchange::{ConnectError, Refusal, VsockEvent};
pub use state::VsockState;
pub use table::{Full, MAX_CONNECTIONS};
