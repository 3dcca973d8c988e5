//! `ctvm check`: what this host has and lacks, and what to do about it.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::config::{self, Config};
use crate::vmm;

/// How one thing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// As it should be.
    Good,
    /// Sandboxes run, but something is not as good as it could be.
    Poor,
    /// No sandbox runs like this.
    Bad,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How it is.
    pub verdict: Verdict,
    /// What it is.
    pub subject: &'static str,
    /// What was found.
    pub found: String,
    /// What to do, where there is something to do.
    pub remedy: String,
}

fn good(subject: &'static str, found: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Good, subject, found: found.into(), remedy: String::new() }
}

fn poor(subject: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Poor, subject, found: found.into(), remedy: remedy.into() }
}

fn bad(subject: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { verdict: Verdict::Bad, subject, found: found.into(), remedy: remedy.into() }
}

/// Looks at everything.
pub fn findings() -> Vec<Finding> {
    let (config, configuration) = configuration();
    let mut all = vec![kvm(), processor(), configuration, monitor(&config)];
    all.push(guest_file("kernel", &config.kernel, kernel_kind, "cargo xtask kernel"));
    all.push(guest_file("image", &config.image, image_kind, "cargo xtask rootfs"));
    all.extend([shim_binary(), containerd(), cri_registration(), user(), mounts()]);
    all.extend([overlay(), taps(), port_forward(), control_groups()]);
    all.extend([memory(&config), huge_pages(&config)]);
    all
}

/// Prints the findings as a table; whether sandboxes can run here.
pub fn report(findings: &[Finding]) -> bool {
    for finding in findings {
        let word = match finding.verdict {
            Verdict::Good => "ok  ",
            Verdict::Poor => "warn",
            Verdict::Bad => "FAIL",
        };
        println!("{word}  {:<14} {}", finding.subject, finding.found);
        if !finding.remedy.is_empty() {
            println!("      {:<14} -> {}", "", finding.remedy);
        }
    }
    let worst = findings.iter().map(|f| f.verdict).max().unwrap_or(Verdict::Good);
    println!(
        "\n{}",
        match worst {
            Verdict::Good => "This host can run ctvm sandboxes.",
            Verdict::Poor => "This host can run ctvm sandboxes; see the warnings.",
            Verdict::Bad => "This host cannot run ctvm sandboxes yet; see FAIL above.",
        }
    );
    worst != Verdict::Bad
}

fn kvm() -> Finding {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => good("kvm", "/dev/kvm opens"),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => bad(
            "kvm",
            "there is no /dev/kvm",
            "load kvm_intel or kvm_amd; in a VM, have nested virtualization switched on for it",
        ),
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => bad(
            "kvm",
            "/dev/kvm may not be opened",
            "run as root, or join the group that owns it (often kvm)",
        ),
        Err(e) => bad("kvm", format!("/dev/kvm: {e}"), "see dmesg for what KVM says"),
    }
}

fn processor() -> Finding {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    match virtualization(&text) {
        Some(kind) => good("processor", kind),
        None => poor(
            "processor",
            "no vmx or svm flag: KVM, if there is any, works in software",
            "a Linux guest needs hardware virtualization; use the lab (cargo xtask lab) on this machine",
        ),
    }
}

/// The kind of hardware virtualization that cpuinfo tells of.
fn virtualization(cpuinfo: &str) -> Option<&'static str> {
    let flags = cpuinfo.lines().find_map(|l| l.strip_prefix("flags"))?;
    let has = |flag| flags.split_ascii_whitespace().any(|f| f == flag);
    match (has("vmx"), has("svm")) {
        (true, _) if has("ept") => Some("Intel VT-x with extended page tables"),
        (true, _) => Some("Intel VT-x"),
        (_, true) if has("npt") => Some("AMD SVM with nested page tables"),
        (_, true) => Some("AMD SVM"),
        _ => None,
    }
}

fn configuration() -> (Config, Finding) {
    let place = std::env::var(config::PATH_ENV).unwrap_or_else(|_| config::DEFAULT_PATH.into());
    match Config::load(None) {
        Ok(config) if Path::new(&place).exists() => (config, good("configuration", place)),
        Ok(config) => (config, good("configuration", format!("defaults ({place} does not exist)"))),
        Err(e) => (Config::default(), bad("configuration", crate::error::chain(&e), "correct that line")),
    }
}

fn monitor(config: &Config) -> Finding {
    match vmm::find_binary(config.vmm.as_deref()) {
        Ok(path) if is_executable(&path) => good("monitor", path.display().to_string()),
        Ok(path) => bad("monitor", format!("{} is not executable", path.display()), "chmod +x it"),
        Err(e) => bad(
            "monitor",
            e.to_string(),
            "install ctvm-vmm beside ctvm, or name it with vmm = in the configuration",
        ),
    }
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

fn guest_file(
    subject: &'static str,
    path: &Path,
    kind: fn(&File) -> Option<&'static str>,
    maker: &str,
) -> Finding {
    let remedy = format!("{maker} makes one; name it with {subject} = in the configuration");
    match File::open(path) {
        Err(e) => bad(subject, format!("{}: {e}", path.display()), remedy),
        Ok(file) => match kind(&file) {
            Some(kind) => good(subject, format!("{} ({kind})", path.display())),
            None => bad(subject, format!("{} is not a {subject} that boots", path.display()), remedy),
        },
    }
}

fn bytes_at<const N: usize>(file: &File, offset: u64) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    file.read_exact_at(&mut bytes, offset).ok()?;
    Some(bytes)
}

/// The form of a kernel: ELF, or a bzImage by the setup header's magic (Linux x86 boot protocol, "HdrS" at 0x202).
fn kernel_kind(file: &File) -> Option<&'static str> {
    if bytes_at(file, 0) == Some(*b"\x7fELF") {
        return Some("ELF");
    }
    (bytes_at(file, 0x202) == Some(*b"HdrS")).then_some("bzImage")
}

/// The form of an image: EROFS by its superblock's magic at 1024.
fn image_kind(file: &File) -> Option<&'static str> {
    (bytes_at(file, 1024) == Some(0xE0F5_E1E2_u32.to_le_bytes())).then_some("EROFS")
}

fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|p| is_executable(p))
}

fn shim_binary() -> Finding {
    const NAME: &str = "containerd-shim-ctvm-v2";
    match in_path(NAME) {
        Some(path) => good("shim", path.display().to_string()),
        None => bad(
            "shim",
            format!("{NAME} is not in PATH"),
            "install it where containerd's PATH leads, e.g. /usr/local/bin",
        ),
    }
}

fn containerd() -> Finding {
    let Some(path) = in_path("containerd") else {
        return poor("containerd", "not in PATH", "install it (1.6 or later); ctvm run works without");
    };
    let output = Command::new(&path).arg("--version").output();
    let version = output.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default();
    let running = Path::new("/run/containerd/containerd.sock").exists();
    let version = version.split_whitespace().nth(2).unwrap_or("of unknown version").to_owned();
    if running {
        good("containerd", format!("{} {version}, running", path.display()))
    } else {
        poor("containerd", format!("{} {version}, not running", path.display()), "systemctl start containerd")
    }
}

fn cri_registration() -> Finding {
    const FILE: &str = "/etc/containerd/config.toml";
    match std::fs::read_to_string(FILE) {
        Ok(text) if text.contains("io.containerd.ctvm.v2") => good("kubernetes", format!("registered in {FILE}")),
        _ => Finding {
            remedy: "for Kubernetes: [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.ctvm] runtime_type = \"io.containerd.ctvm.v2\"".into(),
            ..good("kubernetes", format!("not registered in {FILE}; ctr and nerdctl need no registration"))
        },
    }
}

fn user() -> Finding {
    if rustix::process::geteuid().is_root() {
        good("user", "root")
    } else {
        poor("user", "not root", "containerd and its shims run as root; the checks of mounts below need it")
    }
}

/// Detached mounts, which the container's root file system is handed over as (`open_tree(2)`, Linux 5.2).
fn mounts() -> Finding {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    match open_tree(CWD, "/", flags) {
        Ok(_) => good("mounts", "detached mounts work"),
        Err(rustix::io::Errno::PERM) => poor("mounts", "not tried: needs root", "run ctvm check as root"),
        Err(e) => bad("mounts", format!("open_tree: {e}"), "Linux 5.2 or later is needed"),
    }
}

fn overlay() -> Finding {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.lines().any(|l| l.trim_start_matches("nodev").trim() == "overlay") {
        good("overlay", "known to the kernel")
    } else {
        poor("overlay", "not loaded", "modprobe overlay; containerd's default snapshotter needs it")
    }
}

fn taps() -> Finding {
    match File::options().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => good("taps", "/dev/net/tun opens"),
        Err(e) => poor(
            "taps",
            format!("/dev/net/tun: {e}: a pod with network interfaces will not start"),
            "modprobe tun; the kernel's sch_ingress, cls_u32 and act_mirred are wanted, too",
        ),
    }
}

/// Steering connections to a pod's loopback into its VM (a BPF program of type `sk_lookup`, Linux 5.9).
fn port_forward() -> Finding {
    match sk_lookup::probe() {
        Ok(()) => good("port-forward", "the kernel steers connections by sk_lookup"),
        Err(e) if e.source.raw_os_error() == Some(rustix::io::Errno::PERM.raw_os_error()) => poor(
            "port-forward",
            "not tried: needs CAP_BPF and CAP_NET_ADMIN",
            "run ctvm check as root; a shim without them starts pods without port-forward",
        ),
        Err(e) => poor(
            "port-forward",
            format!("{}: pods start without it", crate::error::chain(&e)),
            "Linux 5.9 or later with CONFIG_BPF_SYSCALL is needed",
        ),
    }
}

fn control_groups() -> Finding {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        if favours_moves(&mounts) {
            good("cgroups", "version 2, quick to move processes")
        } else {
            poor(
                "cgroups",
                "version 2, slow to move processes",
                "each VM waits some 4 ms for that when it starts: mount -o remount,favordynmods /sys/fs/cgroup (Linux 6.0 or later)",
            )
        }
    } else {
        good("cgroups", "version 1 or hybrid")
    }
}

/// Whether moving a process between control groups waits for no grace period: KVM does so for each VM it makes.
fn favours_moves(mounts: &str) -> bool {
    let mut lines = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    lines.any(|words| match words[..] {
        [_, "/sys/fs/cgroup", "cgroup2", options, ..] => options.split(',').any(|o| o == "favordynmods"),
        _ => false,
    })
}

fn memory(config: &Config) -> Finding {
    let available = meminfo("MemAvailable").unwrap_or(0) / 1024;
    let needed = u64::from(config.memory_mib);
    if available >= needed {
        good("memory", format!("{available} MiB available; a sandbox is given {needed} MiB"))
    } else {
        bad(
            "memory",
            format!("{available} MiB available, a sandbox needs {needed}"),
            "free some, or lower memory_mib",
        )
    }
}

fn huge_pages(config: &Config) -> Finding {
    let free = meminfo("HugePages_Free").unwrap_or(0);
    if config.hugepages {
        let needed = u64::from(config.memory_mib / 2);
        return if free >= needed {
            good("huge pages", format!("{free} pages of 2 MiB free, a sandbox needs {needed}"))
        } else {
            let remedy = format!("sysctl vm.nr_hugepages={needed} or more, or hugepages = false");
            bad("huge pages", format!("{free} pages of 2 MiB free, a sandbox needs {needed}"), remedy)
        };
    }
    let thp = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    if thp.contains("[always]") || thp.contains("[madvise]") {
        good("huge pages", "transparent huge pages are given to who asks")
    } else {
        poor(
            "huge pages",
            "no transparent huge pages",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: guests start faster",
        )
    }
}

fn meminfo(key: &str) -> Option<u64> {
    let mut text = String::new();
    File::open("/proc/meminfo").ok()?.read_to_string(&mut text).ok()?;
    let line = text.lines().find(|l| l.strip_prefix(key).is_some_and(|rest| rest.starts_with(':')))?;
    line.split_ascii_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_whole_words() {
        assert_eq!(virtualization("flags\t\t: fpu svm npt"), Some("AMD SVM with nested page tables"));
        assert_eq!(virtualization("flags\t\t: fpu vmx"), Some("Intel VT-x"));
        assert_eq!(virtualization("flags\t\t: fpu vmx_nothing"), None);
        assert_eq!(virtualization(""), None);
    }

    #[test]
    fn kernels_and_images_are_known_by_their_magic() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, offset: usize, magic: &[u8]| {
            let mut bytes = vec![0; offset];
            bytes.extend(magic);
            std::fs::write(dir.path().join(name), bytes).unwrap();
            File::open(dir.path().join(name)).unwrap()
        };
        assert_eq!(kernel_kind(&file("elf", 0, b"\x7fELF\x02")), Some("ELF"));
        assert_eq!(kernel_kind(&file("bz", 0x202, b"HdrS")), Some("bzImage"));
        assert_eq!(kernel_kind(&file("empty", 0, b"")), None);
        assert_eq!(image_kind(&file("erofs", 1024, &[0xE2, 0xE1, 0xF5, 0xE0])), Some("EROFS"));
        assert_eq!(image_kind(&file("text", 0, b"hello")), None);
        let missing = guest_file("kernel", Path::new("/nonexistent/vmlinux"), kernel_kind, "make");
        assert_eq!(missing.verdict, Verdict::Bad);
        assert!(missing.found.contains("No such file"), "{missing:?}");
    }

    #[test]
    fn the_mount_says_how_quick_moves_are() {
        let line = |options| format!("x /y tmpfs rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 {options} 0 0\n");
        assert!(favours_moves(&line("rw,nsdelegate,favordynmods")));
        assert!(!favours_moves(&line("rw,nofavordynmods")));
        assert!(!favours_moves("cgroup2 /elsewhere cgroup2 rw,favordynmods 0 0\nshort"));
    }

    #[test]
    fn every_finding_that_is_not_good_says_what_to_do() {
        for finding in findings() {
            assert!(finding.verdict == Verdict::Good || !finding.remedy.is_empty(), "{finding:?}");
            assert!(!finding.found.is_empty(), "{finding:?}");
        }
    }
}
