//! PID 1 of the guest: runs containers for the shim.

fn main() {}
