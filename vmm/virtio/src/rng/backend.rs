//! Where the bytes come from.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

/// Up to this many bytes, `getrandom` gives all or fails: it is not interrupted (getrandom(2)).
pub const CHUNK: usize = 256;

/// Fills `bytes`. Fails instead of waiting, which can only be before the host's pool was first filled.
pub fn fill(bytes: &mut [u8; CHUNK]) -> io::Result<()> {
    let count = getrandom(bytes, GetRandomFlags::NONBLOCK)?;
    if count == CHUNK { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}
