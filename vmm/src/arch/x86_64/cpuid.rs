//! What the guest's CPUID instruction answers: what the host's KVM supports, less what this VMM does not offer, plus
//! a topology of one socket with one thread a core.
//!
//! Leaf and bit numbers: Intel SDM vol. 2A, "CPUID"; AMD APM vol. 3, appendix E; KVM's own leaves: Linux,
//! Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const FEATURES: u32 = 1;
const CACHES: u32 = 4;
const MONITOR_LEAF: u32 = 5;
const POWER: u32 = 6;
const EXTENDED_FEATURES: u32 = 7;
const PERFORMANCE: u32 = 0xa;
const TOPOLOGY: u32 = 0xb;
const SGX: u32 = 0x12;
const TRACE: u32 = 0x14;
const TOPOLOGY_V2: u32 = 0x1f;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_SVM: u32 = 0x8000_000a;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const AMD_PERFORMANCE: u32 = 0x8000_0022;

/// Leaf 1, ECX.
const MONITOR: u32 = 1 << 3;
const VMX: u32 = 1 << 5;
const PERF_CAPABILITIES: u32 = 1 << 15;
const X2APIC: u32 = 1 << 21;
/// KVM does not list it: it depends on the in-kernel local APIC, which every VM of ours has.
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: more than one logical processor in the package.
const HTT: u32 = 1 << 28;
/// Leaf 6, EAX: the local APIC timer runs in all power states. With it and [`TSC_DEADLINE`] Linux needs no PIT and
/// skips 100 ms of timer calibration.
const ARAT: u32 = 1 << 2;
/// Leaf 7, EBX.
const SGX_BIT: u32 = 1 << 2;
const TRACE_BIT: u32 = 1 << 25;
/// Leaf 0x8000_0001, ECX.
const CMP_LEGACY: u32 = 1 << 1;
const SVM: u32 = 1 << 2;
const PERFCTR_CORE: u32 = 1 << 23;
const PERFCTR_NB: u32 = 1 << 24;
const PERFCTR_LLC: u32 = 1 << 28;

/// The answers for one VM; each vCPU's differ from it by its APIC id only.
#[derive(Debug, Clone)]
pub struct Answers {
    entries: Vec<kvm_cpuid_entry2>,
}

impl Answers {
    /// Takes what KVM supports and makes it a package of `vcpus` cores.
    pub fn new(supported: &CpuId, vcpus: u8) -> Self {
        let mut entries: Vec<_> = supported
            .as_slice()
            .iter()
            .filter(|e| !matches!(e.function, TOPOLOGY | TOPOLOGY_V2))
            .copied()
            .collect();
        let highest = entries.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
        if highest >= TOPOLOGY {
            entries.extend(topology(vcpus));
        }
        for entry in &mut entries {
            adapt(entry, vcpus);
        }
        Answers { entries }
    }

    /// EAX and EDX of leaf 1: signature and features, for the MP table.
    pub fn signature(&self) -> (u32, u32) {
        self.entries.iter().find(|e| e.function == FEATURES).map_or((0, 0), |e| (e.eax, e.edx))
    }

    /// Bits of a physical address (leaf 0x8000_0008, EAX 7:0); 36 where it is not said, as every processor with long mode has.
    pub fn address_bits(&self) -> u32 {
        let sizes = self.entries.iter().find(|e| e.function == AMD_SIZES);
        sizes.map(|e| e.eax & 0xff).filter(|bits| *bits > 0).unwrap_or(36)
    }

    /// The answers on vCPU `index`, whose APIC id is the same number.
    pub fn of_vcpu(&self, index: u8) -> CpuId {
        let id = u32::from(index);
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            match entry.function {
                FEATURES => entry.ebx = entry.ebx & 0x00ff_ffff | id << 24,
                TOPOLOGY => entry.edx = id,
                AMD_TOPOLOGY => {
                    entry.eax = id;
                    // One thread in this core; its number.
                    entry.ebx = id & 0xff;
                    // Node 0 of one.
                    entry.ecx = 0;
                }
                _ => {}
            }
        }
        CpuId::from_entries(&entries).expect("as many as KVM gave, which fitted, and two")
    }
}

/// Levels of leaf 0xb: one thread a core; all cores in the package.
fn topology(vcpus: u8) -> [kvm_cpuid_entry2; 2] {
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    let level = |index, kind: u32, shift, count| kvm_cpuid_entry2 {
        function: TOPOLOGY,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        ..Default::default()
    };
    [level(0, THREAD, 0, 1), level(1, CORE, id_bits(vcpus), vcpus.into())]
}

/// Bits of an APIC id that tell `vcpus` cores apart.
fn id_bits(vcpus: u8) -> u32 {
    u32::from(vcpus).next_power_of_two().trailing_zeros()
}

fn adapt(entry: &mut kvm_cpuid_entry2, vcpus: u8) {
    let many = vcpus > 1;
    let ids = 1u32 << id_bits(vcpus);
    match entry.function {
        FEATURES => {
            entry.ecx &= !(MONITOR | VMX | PERF_CAPABILITIES);
            entry.ecx |= HYPERVISOR | TSC_DEADLINE | X2APIC;
            entry.edx = entry.edx & !HTT | if many { HTT } else { 0 };
            entry.ebx = entry.ebx & 0xff00_ffff | ids << 16;
        }
        CACHES if entry.eax & 0x1f != 0 => {
            share_cache(entry, ids);
            entry.eax = entry.eax & 0x03ff_ffff | (ids - 1) << 26;
        }
        AMD_CACHES if entry.eax & 0x1f != 0 => share_cache(entry, ids),
        MONITOR_LEAF | PERFORMANCE | SGX | TRACE | AMD_SVM | AMD_PERFORMANCE => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        POWER => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (ARAT, 0, 0, 0),
        EXTENDED_FEATURES if entry.index == 0 => entry.ebx &= !(SGX_BIT | TRACE_BIT),
        AMD_FEATURES => {
            entry.ecx &= !(SVM | PERFCTR_CORE | PERFCTR_NB | PERFCTR_LLC | CMP_LEGACY);
            entry.ecx |= if many { CMP_LEGACY } else { 0 };
        }
        AMD_SIZES => entry.ecx = (u32::from(vcpus) - 1) | (id_bits(vcpus) << 12),
        _ => {}
    }
}

/// EAX[25:14] of a cache leaf: first and second level belong to one core, the third to all.
fn share_cache(entry: &mut kvm_cpuid_entry2, ids: u32) {
    let level = entry.eax >> 5 & 7;
    let sharing = if level >= 3 { ids - 1 } else { 0 };
    entry.eax = entry.eax & !(0xfff << 14) | sharing << 14;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ..Default::default() }
    }

    fn answers(entries: &[kvm_cpuid_entry2], vcpus: u8, index: u8) -> Vec<kvm_cpuid_entry2> {
        let supported = CpuId::from_entries(entries).unwrap();
        Answers::new(&supported, vcpus).of_vcpu(index).as_slice().to_vec()
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn a_guest_needs_no_pit_and_sees_no_virtualisation() {
        let mut features = leaf(1, 0);
        features.ecx = VMX | MONITOR;
        let mut amd = leaf(AMD_FEATURES, 0);
        amd.ecx = SVM | PERFCTR_CORE | 1 << 22;
        let mut svm = leaf(AMD_SVM, 0);
        svm.edx = 0xff;
        let answers = answers(&[features, leaf(6, 0), amd, svm], 1, 0);
        assert_eq!(find(&answers, 1, 0).ecx, HYPERVISOR | TSC_DEADLINE | X2APIC);
        assert_eq!(find(&answers, 6, 0).eax, ARAT);
        assert_eq!(find(&answers, AMD_FEATURES, 0).ecx, 1 << 22);
        assert_eq!(find(&answers, AMD_SVM, 0).edx, 0);
    }

    #[test]
    fn every_place_that_tells_a_core_agrees() {
        let mut highest = leaf(0, 0);
        highest.eax = 0xd;
        let given = [highest, leaf(1, 0), leaf(0xb, 0), leaf(AMD_SIZES, 0), leaf(AMD_TOPOLOGY, 0)];
        let answers = answers(&given, 3, 2);
        let features = find(&answers, 1, 0);
        assert_eq!((features.ebx >> 24, features.ebx >> 16 & 0xff), (2, 4));
        assert_eq!(features.edx & HTT, HTT);
        let core = find(&answers, TOPOLOGY, 1);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (2, 3, 0x201, 2));
        assert_eq!(find(&answers, TOPOLOGY, 0).eax, 0);
        assert_eq!(find(&answers, AMD_SIZES, 0).ecx, 2 << 12 | 2);
        assert_eq!(find(&answers, AMD_TOPOLOGY, 0).eax, 2);
    }

    #[test]
    fn a_host_without_the_topology_leaf_gets_none() {
        let mut highest = leaf(0, 0);
        highest.eax = 7;
        assert!(answers(&[highest], 2, 0).iter().all(|e| e.function != TOPOLOGY));
    }

    #[test]
    fn only_the_last_level_cache_is_shared() {
        let mut first = leaf(4, 0);
        first.eax = 1 << 5 | 1 | 0xfff << 14 | 0x3f << 26;
        let mut third = leaf(4, 3);
        third.eax = 3 << 5 | 1;
        let answers = answers(&[first, third], 4, 0);
        assert_eq!(find(&answers, 4, 0).eax, 1 << 5 | 1 | 3 << 26);
        assert_eq!(find(&answers, 4, 3).eax, 3 << 5 | 1 | 3 << 14 | 3 << 26);
    }

    #[test]
    fn one_core_is_no_package_of_many() {
        let answers = answers(&[leaf(1, 0), leaf(AMD_SIZES, 0)], 1, 0);
        assert_eq!(find(&answers, 1, 0).edx & HTT, 0);
        assert_eq!(find(&answers, AMD_SIZES, 0).ecx, 0);
    }
}
