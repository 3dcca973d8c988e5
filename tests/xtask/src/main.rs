//! Set-up, lab, demo, tests and benchmarks of this workspace.

fn main() {}
