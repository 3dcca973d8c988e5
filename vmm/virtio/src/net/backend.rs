//! The tap behind the device: one descriptor for each queue pair, and one to wait for all of them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::{c_int, c_uint, ifreq};
use rustix::event::epoll::{self, EventFlags};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

use super::HEADER;

/// A descriptor cannot be used as tap.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Something else, or one that is attached to no interface.
    #[error("descriptor {index} is no tap")]
    NoTap {
        /// Position among the device's taps.
        index: usize,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Attached with other flags than are needed.
    #[error("tap {name} is attached without {missing}")]
    Mode {
        /// Interface.
        name: String,
        /// The flag of `TUNSETIFF`.
        missing: &'static str,
    },
    /// Queues of several interfaces.
    #[error("descriptor {index} is a queue of tap {name}, the first one of {first}")]
    Other {
        /// Position among the device's taps.
        index: usize,
        /// Its interface.
        name: String,
        /// The first one's interface.
        first: String,
    },
    /// It could not be prepared.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

#[derive(Debug)]
struct Tap {
    fd: OwnedFd,
    watched: EventFlags,
    ended: bool,
}

/// The queues of one tap.
#[derive(Debug)]
pub struct Taps {
    taps: Vec<Tap>,
    epoll: OwnedFd,
    /// Not for sockets, in tests.
    knows_offloads: bool,
    offloads: c_uint,
}

impl Taps {
    /// Takes the queues of one tap, one for each queue pair, attached with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, and with
    /// `IFF_MULTI_QUEUE` if there are several. They become non-blocking for all who share the open files; the tap's header
    /// gets 12 bytes, and all offloads are turned off until a driver asks for them.
    pub fn new(fds: Vec<OwnedFd>) -> Result<Self, TapError> {
        let mut first = None;
        let several = fds.len() > 1;
        for (index, fd) in fds.iter().enumerate() {
            let (name, flags) = interface(fd.as_fd()).map_err(|source| TapError::NoTap { index, source })?;
            let needed = [
                (libc::IFF_TAP, "IFF_TAP"),
                (libc::IFF_NO_PI, "IFF_NO_PI"),
                (libc::IFF_VNET_HDR, "IFF_VNET_HDR"),
                (if several { libc::IFF_MULTI_QUEUE } else { 0 }, "IFF_MULTI_QUEUE"),
            ];
            if let Some((_, missing)) = needed.iter().find(|(flag, _)| flags & flag != *flag) {
                return Err(TapError::Mode { name, missing });
            }
            match &first {
                None => first = Some(name),
                Some(first) if *first != name => {
                    return Err(TapError::Other { index, name, first: first.clone() });
                }
                Some(_) => {}
            }
            let size = c_int::try_from(HEADER).expect("12");
            set_header_size(fd.as_fd(), size).map_err(host("set the size of a tap's header"))?;
        }
        let mut taps = Self::watch_none(fds, true)?;
        taps.set_offloads(0).map_err(host("turn a tap's offloads off"))?;
        Ok(taps)
    }

    /// Sockets that keep messages apart in the place of taps, for tests: each message is header and frame.
    #[cfg(any(test, feature = "testing"))]
    pub fn of_sockets(fds: Vec<OwnedFd>) -> Result<Self, TapError> {
        Self::watch_none(fds, false)
    }

    fn watch_none(fds: Vec<OwnedFd>, knows_offloads: bool) -> Result<Self, TapError> {
        for fd in &fds {
            let flags = fcntl_getfl(fd).map_err(|e| host("look at a tap")(e.into()))?;
            fcntl_setfl(fd, flags | OFlags::NONBLOCK)
                .map_err(|e| host("make a tap non-blocking")(e.into()))?;
        }
        let taps = fds.into_iter().map(|fd| Tap { fd, watched: EventFlags::empty(), ended: false }).collect();
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|e| host("make an epoll instance for taps")(e.into()))?;
        Ok(Taps { taps, epoll, knows_offloads, offloads: 0 })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.taps.len()
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.taps.is_empty()
    }

    /// Readable when a tap is ready for what it is watched for.
    pub(super) fn epoll(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// The descriptor of one.
    pub(super) fn fd(&self, index: usize) -> BorrowedFd<'_> {
        self.taps[index].fd.as_fd()
    }

    /// Whether one is watched for frames.
    pub(super) fn waits_for_frames(&self, index: usize) -> bool {
        self.taps[index].watched.contains(EventFlags::IN)
    }

    /// Whether one is watched for room.
    pub(super) fn waits_for_room(&self, index: usize) -> bool {
        self.taps[index].watched.contains(EventFlags::OUT)
    }

    /// Watches one for frames, or does not.
    pub(super) fn want_frames(&mut self, index: usize, wanted: bool) {
        self.watch(index, EventFlags::IN, wanted);
    }

    /// Watches one for room for frames, or does not.
    pub(super) fn want_room(&mut self, index: usize, wanted: bool) {
        self.watch(index, EventFlags::OUT, wanted);
    }

    /// Nothing comes from it any more, and it would only keep us busy.
    pub(super) fn end(&mut self, index: usize) {
        self.watch(index, EventFlags::all(), false);
        self.taps[index].ended = true;
    }

    /// Watches none.
    pub(super) fn quiet(&mut self) {
        for index in 0..self.len() {
            self.watch(index, EventFlags::all(), false);
        }
    }

    /// Leaves to the guest what it said it can do: checksums, and segments up to 64 KiB (`TUNSETOFFLOAD`).
    pub(super) fn set_offloads_for(&mut self, features: u64) -> io::Result<()> {
        let has = |bit: u32| features & 1 << bit != 0;
        let mut offloads = 0;
        // 5.1.3.1: the others require checksums.
        if has(VIRTIO_NET_F_GUEST_CSUM) {
            offloads |= libc::TUN_F_CSUM;
            offloads |= if has(VIRTIO_NET_F_GUEST_TSO4) { libc::TUN_F_TSO4 } else { 0 };
            offloads |= if has(VIRTIO_NET_F_GUEST_TSO6) { libc::TUN_F_TSO6 } else { 0 };
        }
        self.set_offloads(offloads)
    }

    /// What was set last.
    #[cfg(test)]
    pub(super) fn offloads(&self) -> c_uint {
        self.offloads
    }

    fn set_offloads(&mut self, offloads: c_uint) -> io::Result<()> {
        // They belong to the interface, whichever queue they are set by.
        if let Some(first) = self.taps.first().filter(|_| self.knows_offloads) {
            set_offloads(first.fd.as_fd(), offloads)?;
        }
        self.offloads = offloads;
        Ok(())
    }

    fn watch(&mut self, index: usize, what: EventFlags, wanted: bool) {
        let Taps { taps, epoll, .. } = self;
        let tap = &mut taps[index];
        let mut watched = tap.watched;
        watched.set(what, wanted && !tap.ended);
        if watched == tap.watched {
            return;
        }
        let data = epoll::EventData::new_u64(0);
        let done = if tap.watched.is_empty() {
            epoll::add(epoll, &tap.fd, data, watched)
        } else if watched.is_empty() {
            // Not just for nothing: a tap whose interface is gone is always ready.
            epoll::delete(epoll, &tap.fd)
        } else {
            epoll::modify(epoll, &tap.fd, data, watched)
        };
        match done {
            Ok(()) => tap.watched = watched,
            Err(e) => log::warn!("tap {index} cannot be watched: {e}"),
        }
    }
}

fn host(what: &'static str) -> impl Fn(io::Error) -> TapError {
    move |source| TapError::Host { what, source }
}

// The calls below are why this module needs `unsafe`: nobody has safe ones for taps.

/// Name and flags of the interface that a tap is attached to.
fn interface(tap: BorrowedFd<'_>) -> io::Result<(String, c_int)> {
    // SAFETY: `ifreq` is plain old data, for which zeros are valid.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes an `ifreq`, which `request` is and which lives during the call.
    answer(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })?;
    // SAFETY: TUNGETIFF has set this field; and any bytes are valid integers.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let name = request.ifr_name.iter().take_while(|c| **c != 0).map(|c| char::from(c.to_ne_bytes()[0]));
    Ok((name.collect(), flags.into()))
}

fn set_header_size(tap: BorrowedFd<'_>, size: c_int) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads an `int`, which `size` is and which lives during the call.
    answer(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) })
}

fn set_offloads(tap: BorrowedFd<'_>, offloads: c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of ours.
    answer(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) })
}

fn answer(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn what_is_no_tap_is_refused() {
        let null = File::open("/dev/null").unwrap();
        let error = Taps::new(vec![null.into()]).unwrap_err();
        assert_eq!(error.to_string(), "descriptor 0 is no tap");
        // A tap that is attached to nothing, where the machine has them.
        if let Ok(unattached) = File::options().read(true).write(true).open("/dev/net/tun") {
            let error = Taps::new(vec![unattached.into()]).unwrap_err();
            assert_eq!(error.to_string(), "descriptor 0 is no tap");
        }
    }

    #[test]
    fn segments_are_left_to_the_guest_only_with_checksums() {
        let (csum, tso4, tso6) =
            (1 << VIRTIO_NET_F_GUEST_CSUM, 1 << VIRTIO_NET_F_GUEST_TSO4, 1 << VIRTIO_NET_F_GUEST_TSO6);
        let mut taps = Taps::of_sockets(vec![]).unwrap();
        for (features, offloads) in
            [(0, 0), (tso4 | tso6, 0), (csum, 1), (csum | tso4, 3), (csum | tso4 | tso6, 7)]
        {
            taps.set_offloads_for(features).unwrap();
            assert_eq!(taps.offloads(), offloads);
        }
    }
}
