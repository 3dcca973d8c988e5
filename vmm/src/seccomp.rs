//! System call filters, one for each kind of thread. The lists are data, `seccomp/*.json`; `build.rs` compiles them.
//!
//! Threads inherit the filter of the thread that makes them, so the main thread confines itself last.

mod breach;

use std::sync::OnceLock;

pub use breach::report_breaches;
use seccompiler::{apply_filter, sock_filter};

include!(concat!(env!("OUT_DIR"), "/filters.rs"));

/// What happens to a call that is not on the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The process ends, and says which call it was.
    Enforce,
    /// The call is carried out; the host's kernel writes it to its log.
    Log,
    /// There are no filters.
    Off,
}

impl Mode {
    /// The mode called `name`.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "enforce" => Some(Mode::Enforce),
            "log" => Some(Mode::Log),
            "off" => Some(Mode::Off),
            _ => None,
        }
    }
}

/// A kind of thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The main thread.
    Vmm,
    /// A vCPU's.
    Vcpu,
    /// The file server's.
    Fs,
    /// That of disks that are images.
    Image,
    /// The one that makes devices while the VM runs.
    Plug,
}

static MODE: OnceLock<Mode> = OnceLock::new();

/// Sets the mode of all filters to come. Without it they are enforced.
pub fn set_mode(mode: Mode) {
    // The first one holds.
    let _ = MODE.set(mode);
}

impl Role {
    /// Name of its list.
    fn list(self) -> &'static str {
        match self {
            Role::Vmm => "vmm",
            Role::Vcpu => "vcpu",
            Role::Fs => "fs",
            Role::Image => "image",
            Role::Plug => "plug",
        }
    }
}

/// Confines the calling thread for good.
pub fn confine(role: Role) -> Result<(), seccompiler::Error> {
    let filter: &[sock_filter] = match (MODE.get().copied().unwrap_or(Mode::Enforce), role) {
        (Mode::Off, _) => return Ok(()),
        (Mode::Enforce, Role::Vmm) => &VMM_ENFORCE,
        (Mode::Enforce, Role::Vcpu) => &VCPU_ENFORCE,
        (Mode::Enforce, Role::Fs) => &FS_ENFORCE,
        (Mode::Enforce, Role::Image) => &IMAGE_ENFORCE,
        (Mode::Enforce, Role::Plug) => &PLUG_ENFORCE,
        (Mode::Log, Role::Vmm) => &VMM_LOG,
        (Mode::Log, Role::Vcpu) => &VCPU_LOG,
        (Mode::Log, Role::Fs) => &FS_LOG,
        (Mode::Log, Role::Image) => &IMAGE_LOG,
        (Mode::Log, Role::Plug) => &PLUG_LOG,
    };
    breach::name_list(role.list());
    apply_filter(filter)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const ALLOW: u32 = 0x7fff_0000;
    const TRAP: u32 = 0x0003_0000;
    const LOG: u32 = 0x7ffc_0000;
    const X86_64: u32 = 0xc000_003e;

    /// What a filter says of a call: the kernel's interpreter, as far as our filters use it.
    fn verdict(filter: &[sock_filter], arch: u32, call: libc::c_long, args: &[u64]) -> u32 {
        let mut data = Vec::new();
        data.extend(u32::try_from(call).unwrap().to_le_bytes());
        data.extend(arch.to_le_bytes());
        data.extend(0u64.to_le_bytes());
        for arg in args.iter().chain(&[0; 6]).take(6) {
            data.extend(arg.to_le_bytes());
        }
        let (mut at, mut word) = (0, 0u32);
        loop {
            let op = &filter[at];
            at += 1;
            let (yes, no) = (usize::from(op.jt), usize::from(op.jf));
            match op.code {
                0x20 => {
                    let from = usize::try_from(op.k).unwrap();
                    word = u32::from_le_bytes(data[from..from + 4].try_into().unwrap());
                }
                0x54 => word &= op.k,
                0x05 => at += usize::try_from(op.k).unwrap(),
                0x15 => at += if word == op.k { yes } else { no },
                0x35 => at += if word >= op.k { yes } else { no },
                0x06 => return op.k,
                code => panic!("instruction {code:#x} is not one the filters use"),
            }
        }
    }

    fn enforced(filter: &[sock_filter], call: libc::c_long, args: &[u64]) -> bool {
        match verdict(filter, X86_64, call, args) {
            ALLOW => true,
            TRAP => false,
            other => panic!("{other:#x}"),
        }
    }

    #[test]
    fn what_is_listed_is_allowed_and_nothing_else() {
        let lists = [
            (&VMM_ENFORCE[..], &VMM_LOG[..], include_str!("../seccomp/vmm.json")),
            (&VCPU_ENFORCE, &VCPU_LOG, include_str!("../seccomp/vcpu.json")),
            (&FS_ENFORCE, &FS_LOG, include_str!("../seccomp/fs.json")),
            (&IMAGE_ENFORCE, &IMAGE_LOG, include_str!("../seccomp/image.json")),
        ];
        for (enforce, log, rules) in lists {
            let rules: Vec<serde_json::Value> = serde_json::from_str(rules).unwrap();
            let names = |asked: bool| {
                let rules = rules.iter().filter(|rule| !asked || rule.get("args").is_none());
                rules.map(|rule| rule["syscall"].as_str().unwrap()).collect::<BTreeSet<_>>().len()
            };
            // Calls with conditions may be allowed with all arguments zero, or not.
            let allowed = (0..1024).filter(|call| enforced(enforce, *call, &[])).count();
            assert!((names(true)..=names(false)).contains(&allowed), "{allowed}");
            for call in 0..1024 {
                let logged = verdict(log, X86_64, call, &[]);
                assert_eq!(logged, if enforced(enforce, call, &[]) { ALLOW } else { LOG });
            }
            for call in [libc::SYS_write, libc::SYS_futex, libc::SYS_exit_group, libc::SYS_rt_sigreturn] {
                assert!(enforced(enforce, call, &[]), "{call}");
            }
            for call in
                [libc::SYS_execve, libc::SYS_open, libc::SYS_socket, libc::SYS_clone3, libc::SYS_ptrace]
            {
                assert!(!enforced(enforce, call, &[]), "{call}");
            }
        }
    }

    #[test]
    fn arguments_count() {
        let executable = [0, 4096, u64::from(libc::PROT_EXEC.unsigned_abs()), 0];
        for filter in [&VMM_ENFORCE[..], &VCPU_ENFORCE, &FS_ENFORCE, &IMAGE_ENFORCE] {
            assert!(enforced(filter, libc::SYS_mmap, &[0, 4096, 3]));
            assert!(!enforced(filter, libc::SYS_mmap, &executable));
            assert!(!enforced(filter, libc::SYS_mprotect, &executable));
        }
        for (advice, allowed) in [(libc::MADV_DONTNEED, true), (libc::MADV_HUGEPAGE, false)] {
            let args = [0, 4096, u64::from(advice.unsigned_abs())];
            assert_eq!(enforced(&VMM_ENFORCE, libc::SYS_madvise, &args), allowed);
        }
        const KVM_RUN: u64 = 0xae80;
        const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
        assert!(enforced(&VCPU_ENFORCE, libc::SYS_ioctl, &[9, KVM_RUN]));
        assert!(!enforced(&VCPU_ENFORCE, libc::SYS_ioctl, &[9, KVM_SET_USER_MEMORY_REGION]));
        assert!(!enforced(&VMM_ENFORCE, libc::SYS_ioctl, &[9, KVM_RUN]));
        assert!(enforced(&VCPU_ENFORCE, libc::SYS_ioctl, &[9, libc::TUNSETOFFLOAD]));
        for call in [libc::TUNSETIFF, libc::TUNSETVNETHDRSZ, libc::TUNSETPERSIST] {
            assert!(!enforced(&VCPU_ENFORCE, libc::SYS_ioctl, &[9, call]));
            assert!(!enforced(&VMM_ENFORCE, libc::SYS_ioctl, &[9, call]));
        }
    }

    /// The thread that makes devices may what its own children may, and little more.
    #[test]
    fn who_makes_threads_may_all_that_they_may() {
        const THREAD: u64 = 0x3d_0f00;
        const FAILS_WITH_ENOSYS: u32 = 0x0005_0000 | libc::ENOSYS.unsigned_abs();
        for call in 0..1024 {
            assert!(!enforced(&FS_ENFORCE, call, &[]) || enforced(&PLUG_ENFORCE, call, &[]), "{call}");
        }
        for mode in [libc::S_IFREG, libc::S_IFIFO, libc::S_IFSOCK, libc::S_IFCHR, libc::S_IFBLK] {
            let args = [0, 0, mode.into(), 0];
            let may = |filter| enforced(filter, libc::SYS_mknodat, &args);
            assert_eq!(may(&PLUG_ENFORCE[..]), may(&FS_ENFORCE[..]), "{mode:o}");
        }
        assert_eq!(verdict(&PLUG_ENFORCE, X86_64, libc::SYS_clone3, &[]), FAILS_WITH_ENOSYS);
        assert!(enforced(&PLUG_ENFORCE, libc::SYS_clone, &[THREAD]));
        for flags in [0, 17, THREAD | libc::CLONE_NEWUSER.unsigned_abs() as u64] {
            assert!(!enforced(&PLUG_ENFORCE, libc::SYS_clone, &[flags]), "{flags:#x}");
        }
        const KVM_IOEVENTFD: u64 = 0x4040_ae79;
        const KVM_IRQFD: u64 = 0x4020_ae76;
        const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
        assert!(!enforced(&VMM_ENFORCE, libc::SYS_ioctl, &[9, KVM_SET_USER_MEMORY_REGION]));
        assert!(enforced(&PLUG_ENFORCE, libc::SYS_ioctl, &[9, KVM_SET_USER_MEMORY_REGION]));
        for call in [KVM_IOEVENTFD, KVM_IRQFD, libc::TUNGETIFF, libc::TUNSETVNETHDRSZ, libc::TUNSETOFFLOAD] {
            assert!(enforced(&PLUG_ENFORCE, libc::SYS_ioctl, &[9, call]));
            assert!(!enforced(&VMM_ENFORCE, libc::SYS_ioctl, &[9, call]));
        }
        for call in [libc::TUNSETIFF, libc::TUNSETPERSIST] {
            assert!(!enforced(&PLUG_ENFORCE, libc::SYS_ioctl, &[9, call]));
        }
        for call in [
            libc::SYS_execve,
            libc::SYS_open,
            libc::SYS_socket,
            libc::SYS_ptrace,
            libc::SYS_setns,
            libc::SYS_mount,
        ] {
            assert!(!enforced(&PLUG_ENFORCE, call, &[]), "{call}");
        }
    }

    #[test]
    fn another_architecture_ends_the_process() {
        const KILL_PROCESS: u32 = 0x8000_0000;
        const I386: u32 = 0x4000_0003;
        assert_eq!(verdict(&VCPU_ENFORCE, I386, libc::SYS_write, &[]), KILL_PROCESS);
        // The x32 numbers of our own architecture are on no list.
        assert_eq!(verdict(&VCPU_ENFORCE, X86_64, libc::SYS_write | 0x4000_0000, &[]), TRAP);
    }
}
