//! Model-specific registers that differ from KVM's reset state.

use kvm_bindings::{Msrs, kvm_msr_entry};

/// `IA32_MISC_ENABLE`; bit 0: fast string operations.
const MISC_ENABLE: u32 = 0x1a0;
/// `IA32_MTRR_DEF_TYPE`; bit 11: MTRRs on, type 6: write-back. A kernel that finds them off takes the firmware to be
/// broken and turns the page attribute table off.
const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ON: u64 = 1 << 11;
const WRITE_BACK: u64 = 6;

/// What every vCPU starts with.
pub fn at_boot() -> Msrs {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    Msrs::from_entries(&[entry(MISC_ENABLE, 1), entry(MTRR_DEF_TYPE, MTRR_ON | WRITE_BACK)])
        .expect("two entries are few")
}
