//! A minimal KVM monitor: one process, one microVM.
