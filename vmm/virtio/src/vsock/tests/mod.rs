//! The device with a fake driver on one side and real sockets on the other.

mod contract;
mod lifecycle;
mod malformed;
mod model;
mod peer;
mod streams;

/// Bytes that tell their position: two streams of different seeds, or one shifted, do not look alike.
fn pattern(seed: u64, from: usize, len: usize) -> Vec<u8> {
    (from..from + len)
        .map(|at| {
            let mixed = (at as u64 ^ seed << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            mixed.to_be_bytes()[0]
        })
        .collect()
}
