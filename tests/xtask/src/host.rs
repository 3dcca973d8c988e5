//! What this machine has.

use std::fs;

/// Whether `/dev/kvm` can run a Linux guest here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kvm {
    /// The processor virtualises and the device opens.
    Hardware,
    /// No device, or a software KVM behind it: that one emulates guest kernels and dies in a stock one.
    Absent,
}

/// Whether a KVM guest on this machine can have a KVM of its own.
pub fn nests() -> bool {
    let parameter =
        |module| fs::read_to_string(format!("/sys/module/{module}/parameters/nested")).unwrap_or_default();
    ["kvm_amd", "kvm_intel"].into_iter().any(|module| matches!(parameter(module).trim(), "1" | "Y"))
}

/// Looks; never assumes.
pub fn kvm() -> Kvm {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let virtualises = flags
        .lines()
        .find(|line| line.starts_with("flags"))
        .is_some_and(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"));
    let opens = fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if virtualises && opens { Kvm::Hardware } else { Kvm::Absent }
}

/// Memory that programs may still take without swapping, in MiB (proc(5), `MemAvailable`); 0 where that is unknown.
pub fn available_mib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}
