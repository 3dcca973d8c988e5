//! What a vCPU and its memory hold when the guest's first instruction runs.

pub mod x86_64;
