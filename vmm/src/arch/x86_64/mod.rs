//! An x86-64 guest that boots without firmware: no ACPI, no PCI, no BIOS calls.

pub mod boot;
mod bzimage;
pub mod cpuid;
mod elf;
pub mod kernel;
pub mod layout;
pub mod mptable;
pub mod msr;
pub mod regs;
