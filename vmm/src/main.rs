//! `ctvm-vmm`: the monitor process.

fn main() {}
