//! A minimal KVM monitor: one process, one microVM.
//!
//! `main -> monitor -> {control, vm::{builder, lifecycle}} -> {vcpu, devices} -> kvm`. The design page is
//! `vmm/README.md`.

pub mod arch;
pub mod bus;
pub mod bus_error;
pub mod clock;
pub mod config;
pub mod control;
pub mod devices;
pub mod dials;
pub mod error;
pub mod event_loop;
pub mod kvm;
pub mod legacy;
pub mod log;
pub mod memory;
pub mod monitor;
pub mod seccomp;
pub mod upcall;
mod vcpu;
pub mod vm;
