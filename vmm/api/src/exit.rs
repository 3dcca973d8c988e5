//! Exit statuses of the VMM process, besides those of [`crate::ExitReason::exit_status`].

/// The arguments are wrong.
pub const USAGE: u8 = 2;
/// Descriptor 3 is not a control socket.
pub const NO_CONTROL_SOCKET: u8 = 20;
/// The host has no `/dev/kvm`.
pub const NO_KVM: u8 = 21;
/// `/dev/kvm` may not be opened.
pub const KVM_PERMISSION: u8 = 22;
/// The host's KVM lacks something, or failed.
pub const KVM_UNUSABLE: u8 = 23;
/// The owner left after a refused configuration.
pub const REFUSED: u8 = 24;
/// A thread made a system call that is not on its list.
pub const SECCOMP: u8 = 31;

/// The host could not give a page of guest memory that a thread of the VMM touched (SIGBUS): a file that is shown to the guest was cut
/// short or cannot be read, or memory is broken.
pub const NO_PAGE: u8 = 32;

/// What a status of this list means; `None` for any other.
pub fn describe(status: u8) -> Option<&'static str> {
    Some(match status {
        USAGE => "wrong arguments",
        NO_CONTROL_SOCKET => "descriptor 3 is not a control socket",
        NO_KVM => "the host has no /dev/kvm",
        KVM_PERMISSION => "no permission to open /dev/kvm",
        KVM_UNUSABLE => "the host's KVM cannot be used",
        REFUSED => "the configuration was refused",
        SECCOMP => "a system call outside the filter",
        NO_PAGE => {
            "a page of the guest's memory cannot be had: a file of an image was cut short or cannot be read"
        }
        _ => return None,
    })
}
