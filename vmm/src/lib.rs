//! A minimal KVM monitor: one process, one microVM.

pub mod arch;
pub mod bus;
pub mod kvm;
pub mod legacy;
pub mod memory;
pub mod vcpu;
