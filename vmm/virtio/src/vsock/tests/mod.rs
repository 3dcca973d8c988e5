//! The device with a fake driver on one side and real sockets on the other.

mod contract;
mod lifecycle;
mod malformed;
mod model;
mod peer;
mod streams;
mod throughput;

/// Bytes that tell their position: two streams of different seeds, or one shifted, do not look alike.
fn pattern(seed: u64, from: usize, len: usize) -> Vec<u8> {
    let word = |at: u64| (at ^ seed << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).to_le_bytes();
    let mut bytes = Vec::with_capacity(len + 16);
    for at in from / 8..(from + len).div_ceil(8) {
        bytes.extend_from_slice(&word(at as u64));
    }
    bytes.drain(..from % 8);
    bytes.truncate(len);
    bytes
}
