//! `ctvm`.

fn main() {}
