//! Tap interfaces, as a VMM wants them: frames with a virtio-net header, one descriptor a queue pair.
//!
//! A package of its own since it takes an ioctl, and everything else of the shim forbids `unsafe`.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// Where taps come from.
const DEVICE: &str = "/dev/net/tun";

/// Most queues of a tap (Linux' `MAX_TAP_QUEUES`).
pub const MAX_QUEUES: usize = 256;

/// Makes the tap `name` in the calling thread's network namespace, or attaches to a persistent one of that name, and
/// gives one descriptor for each of its `queues`. A tap that is not persistent ends with its last descriptor.
///
/// # Errors
/// `InvalidInput` for no queues or more than [`MAX_QUEUES`]; else those of [`attach`].
pub fn open(name: &str, queues: usize) -> io::Result<Vec<OwnedFd>> {
    if !(1..=MAX_QUEUES).contains(&queues) {
        let text = format!("a tap has 1 to {MAX_QUEUES} queues, not {queues}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
    (0..queues).map(|_| attach(name, flags)).collect()
}

/// Attaches to one queue of the interface `name`, made if need be, with these flags (`IFF_TAP` and the like, tun.txt of
/// the kernel's documentation).
///
/// # Errors
/// `InvalidInput` for a name that is empty, longer than 15 bytes, or holds a NUL; else what the kernel says (`EBUSY`:
/// somebody else has the interface; `EINVAL`: it is no interface of this kind).
pub fn attach(name: &str, flags: libc::c_int) -> io::Result<OwnedFd> {
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes.len() >= libc::IFNAMSIZ || bytes.contains(&0) {
        let text = format!("{name:?} is no interface name: 1 to {} bytes are wanted", libc::IFNAMSIZ - 1);
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let file = File::options().read(true).write(true).open(DEVICE)?;
    // SAFETY: `ifreq` is plain data for which all zeros are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).expect("tun flags fit in 16 bits");
    // SAFETY: `TUNSETIFF` reads and writes one `ifreq`; `request` is one, lives beyond the call, and its name ends
    // with a NUL since it is shorter than the field, as was checked.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(file.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_of_queues_are_checked() {
        for name in ["", "sixteen-bytes-xx", "nul\0"] {
            assert_eq!(open(name, 1).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{name:?}");
        }
        for queues in [0, 257] {
            let error = open("tap0", queues).unwrap_err();
            assert!(error.to_string().contains(&queues.to_string()), "{error}");
        }
    }
}
