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
