//! From a transmit queue to a tap (virtio 1.2, 5.1.6.2).

use std::io;
use std::os::fd::BorrowedFd;

use super::{BUDGET_BYTES, BUDGET_FRAMES, HEADER, NetMetrics};
use crate::GuestMemory;
use crate::queue::{Queue, Reader};
use crate::rate::GUEST_ERRORS;

/// Shortest frame that a tap takes: two addresses and a type.
const SHORTEST: usize = HEADER + 14;
/// Longest frame: what no segment of 64 KiB reaches, whatever is before it.
const LONGEST: usize = HEADER + 65_562;

/// Why a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// The driver will say when there is more.
    All,
    /// There may be more, for another turn.
    More,
    /// The tap has no room. The frame waits in the queue.
    Full,
}

/// Sends frames of `queue`. Each is sent whole or not at all.
pub fn transmit(
    tap: BorrowedFd<'_>,
    queue: &mut Queue,
    memory: &GuestMemory,
    metrics: &mut NetMetrics,
) -> Sent {
    let (mut frames, mut bytes) = (0, 0);
    let sent = loop {
        if frames == BUDGET_FRAMES || bytes >= BUDGET_BYTES {
            break Sent::More;
        }
        let Some(chain) = queue.pop(memory) else { break Sent::All };
        let head = chain.head();
        let (readable, writable) = chain.lens();
        frames += 1;
        if writable > 0 || !(SHORTEST..=LONGEST).contains(&readable) {
            metrics.tx_malformed += 1;
            GUEST_ERRORS.warn(format_args!(
                "net: chain {head} is no frame: {readable} bytes to read, must be {SHORTEST} to {LONGEST}; {writable} to write"
            ));
        } else if !send(tap, chain.split().0, metrics) {
            queue.undo_pop();
            metrics.tx_waits += 1;
            break Sent::Full;
        }
        bytes += readable;
        queue.push_used(memory, head, 0);
    };
    queue.notify(memory);
    sent
}

/// Sends one frame. False if it must wait.
fn send(tap: BorrowedFd<'_>, mut frame: Reader<'_>, metrics: &mut NetMetrics) -> bool {
    let len = frame.left();
    match frame.write_to(tap, len) {
        Ok(taken) if taken == len => {
            metrics.tx_frames += 1;
            metrics.tx_bytes += (len - HEADER) as u64;
        }
        Ok(taken) => {
            metrics.host_errors += 1;
            GUEST_ERRORS.warn(format_args!("net: the tap took {taken} of {len} bytes"));
        }
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return false,
        Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
            metrics.tx_refused += 1;
            GUEST_ERRORS.warn(format_args!("net: the tap refuses a frame of {len} bytes"));
        }
        // As when the host has taken its interface down.
        Err(e) => {
            metrics.host_errors += 1;
            GUEST_ERRORS.warn(format_args!("net: send a frame: {e}"));
        }
    }
    true
}
