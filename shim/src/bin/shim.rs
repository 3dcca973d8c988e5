//! `shim`.

fn main() {}
