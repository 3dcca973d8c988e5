//! PID 1 of the lab machine: runs commands for xtask.

fn main() {}
