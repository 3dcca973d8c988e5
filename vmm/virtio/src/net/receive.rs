//! From a tap to a receive queue (virtio 1.2, 5.1.6.3 and 5.1.6.4).

use std::io;
use std::os::fd::BorrowedFd;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_MRG_RXBUF,
};

use super::{BUDGET_BYTES, BUDGET_FRAMES, ETHERNET, HEADER, LONGEST, NetMetrics};
use crate::GuestMemory;
use crate::queue::{Queue, Room};
use crate::rate::GUEST_ERRORS;

/// Place of `num_buffers` in the header (virtio 1.2, 5.1.6). The tap leaves it out.
const NUM_BUFFERS: usize = 10;

/// What a driver agreed to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rules {
    /// A frame may lie in several chains.
    merge: bool,
    /// Bytes of the longest frame with its header that can come.
    longest: usize,
}

impl Rules {
    /// Those of these features.
    pub fn new(features: u64, mtu: u16) -> Self {
        let has = |bit: u32| features & 1 << bit != 0;
        let segments =
            has(VIRTIO_NET_F_GUEST_CSUM) && (has(VIRTIO_NET_F_GUEST_TSO4) || has(VIRTIO_NET_F_GUEST_TSO6));
        let plain = HEADER + ETHERNET + usize::from(mtu);
        Rules {
            merge: has(VIRTIO_NET_F_MRG_RXBUF),
            longest: if segments { LONGEST.max(plain) } else { plain },
        }
    }
}

/// Why a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// The tap has no frame now.
    All,
    /// There may be more, for another turn.
    More,
    /// The driver will say when there are buffers.
    NoBuffers,
    /// The tap has none now and never will.
    Ended,
}

/// Gives frames of the tap to the driver.
///
/// With merged buffers no frame is taken before there is room for the longest that can come, so that none is lost while the
/// driver is about to offer more; a driver whose whole queue has less room than that is given what fits.
pub fn receive(
    tap: BorrowedFd<'_>,
    queue: &mut Queue,
    memory: &GuestMemory,
    rules: Rules,
    metrics: &mut NetMetrics,
) -> Received {
    let mut room = Room::default();
    let (mut frames, mut bytes) = (0, 0);
    let received = loop {
        if frames == BUDGET_FRAMES || bytes >= BUDGET_BYTES {
            break Received::More;
        }
        if !gather(&mut room, queue, memory, rules) {
            break Received::NoBuffers;
        }
        frames += 1;
        match room.receive(tap) {
            Ok(Some(0)) => break Received::Ended,
            Ok(Some(len @ HEADER..)) => {
                give(&mut room, queue, memory, len);
                metrics.rx_frames += 1;
                metrics.rx_bytes += (len - HEADER) as u64;
                bytes += len;
            }
            Ok(Some(_)) => metrics.host_errors += 1,
            Ok(None) => {
                metrics.rx_too_long += 1;
                GUEST_ERRORS
                    .warn(format_args!("net: frame lost, longer than {} bytes of buffers", room.bytes()));
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break Received::All,
            // The tap has lost a frame, and goes on.
            Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::OutOfMemory) => {
                metrics.host_errors += 1;
            }
            Err(e) => {
                metrics.host_errors += 1;
                log::warn!("net: no more frames from the tap: {e}");
                break Received::Ended;
            }
        }
    };
    for _ in 0..room.chains() {
        queue.undo_pop();
    }
    queue.notify(memory);
    received
}

/// Pops chains until there is room for the next frame. False if the driver must offer more first.
fn gather<'m>(room: &mut Room<'m>, queue: &mut Queue, memory: &'m GuestMemory, rules: Rules) -> bool {
    loop {
        let enough = match room.chains() {
            0 => false,
            chains if rules.merge => {
                room.bytes() >= rules.longest || room.is_full() || chains >= usize::from(queue.size())
            }
            _ => true,
        };
        if enough {
            return true;
        }
        let Some(chain) = queue.pop(memory) else { return false };
        let (readable, writable) = chain.lens();
        // 5.1.6.3.1: there is room for a header at least.
        if readable > 0 || writable < HEADER {
            queue.break_off(format_args!(
                "receive buffer {} of {writable} bytes to write and {readable} to read",
                chain.head()
            ));
            return false;
        }
        room.push(chain);
    }
}

/// Gives the frame at the front of the room to the driver.
fn give(room: &mut Room<'_>, queue: &mut Queue, memory: &GuestMemory, len: usize) {
    let chains = u16::try_from(room.chains_of(len)).expect("no more than the queue is long");
    room.write_at(NUM_BUFFERS, &chains.to_le_bytes());
    queue.push_used_together(memory, &room.take(len));
}
