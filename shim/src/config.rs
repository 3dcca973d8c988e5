//! The operator's configuration: one TOML file, every key optional.
//!
//! Order: the runtime options' `ConfigPath` or inline body, else `$CTVM_CONFIG`, else `/etc/ctvm/config.toml` where
//! it exists, else the defaults below. What a pod asks for then changes the few values that [`pod`] names.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use vmm_api::config::{MAX_CMDLINE, MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB};
use vmm_api::resize::MAX_RESIZE_MS;

pub mod pod;
pub mod size;

use size::{Need, Size, Sizing};

/// Where the configuration is looked for when nothing names another place.
pub const DEFAULT_PATH: &str = "/etc/ctvm/config.toml";
/// Environment variable that names another place.
pub const PATH_ENV: &str = "CTVM_CONFIG";

/// What an operator can choose.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Guest kernel, an uncompressed `vmlinux` or a bzImage.
    pub kernel: PathBuf,
    /// Guest image, EROFS, with the agent as `/sbin/init`.
    pub image: PathBuf,
    /// The monitor's binary. Default: beside this one, else in `PATH`.
    pub vmm: Option<PathBuf>,
    /// vCPUs of a sandbox whose pod has no CPU limit.
    pub vcpus: u8,
    /// Memory of a sandbox whose pod has no memory limit, in MiB, a multiple of 2.
    pub memory_mib: u32,
    /// Memory of a sandbox beyond its pod's limit, in MiB: for the guest's kernel and agent.
    pub overhead_memory_mib: u32,
    /// Most vCPUs that a sandbox can have and grow to. 0: as many as the host has, [`AUTO_MAX_VCPUS`] at most, or what it
    /// has at first where that is more. Each costs the guest memory from the start.
    pub max_vcpus: u8,
    /// Most memory that a sandbox can have and grow to, in MiB, a multiple of 2. 0: what it has at first, and so it is with
    /// hugepages.
    pub max_memory_mib: u32,
    /// Which of these values a pod's annotations may change: `vcpus`, `memory_mib`, `max_vcpus`, `max_memory_mib`,
    /// `cmdline`, `hugepages`, `prefault`, `image_dax`.
    pub annotations: Vec<pod::Tunable>,
    /// Words to add to the guest kernel's command line.
    pub cmdline: String,
    /// Back guest memory with hugetlbfs pages.
    pub hugepages: bool,
    /// Populate guest memory before the guest starts.
    pub prefault: bool,
    /// Threads of the file server.
    pub fs_threads: u8,
    /// Put VMM and shim into the control group that the OCI spec names.
    pub host_cgroup: bool,
    /// `error`, `warn`, `info`, `debug` or `trace`.
    pub log_level: LogLevel,
    /// Also write each sandbox's timeline into this directory.
    pub timeline_dir: Option<PathBuf>,
    /// How a sandbox grows.
    pub resize: Resize,
    /// Socket of the node's image service.
    pub image_service: PathBuf,
    /// Give a VM an image as memory that all VMs share, in place of a disk, if all of it is in the image service's cache when
    /// its container is made.
    pub image_dax: bool,
    /// Longest times to wait.
    pub timeouts: Timeouts,
    /// What a pod's limits were when it was made. Not the operator's to say: [`Config::fit_to_pod`] reads it.
    #[serde(skip)]
    pub promised: Need,
}

/// How a sandbox grows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Resize {
    /// What a VM starts with less of than its pod needs, to grow to the pod's size while the guest boots.
    pub boot_small: BootSmall,
}

/// How a VM boots that is to be larger than the smallest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootSmall {
    /// At the pod's size.
    No,
    /// With one vCPU.
    #[default]
    Vcpus,
    /// With one vCPU and [`SMALL_MEMORY_MIB`].
    All,
}

/// Most vCPUs that a sandbox can grow to, where the operator has not said.
pub const AUTO_MAX_VCPUS: u8 = 8;
/// Memory that a sandbox starts with at most when it boots small, in MiB: what the guest needs for itself, and for the
/// tables of the memory that comes.
pub const SMALL_MEMORY_MIB: u32 = 128;

/// Longest times to wait, each in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timeouts {
    /// For an answer of the VMM.
    pub vmm_ms: u64,
    /// From the VM's first instruction to the agent's connection.
    pub boot_ms: u64,
    /// For an answer of the agent, save `Wait`.
    pub agent_ms: u64,
    /// For the VM to end by itself before it is killed.
    pub shutdown_ms: u64,
    /// For a process's output to arrive after its end, as long as some still comes.
    pub drain_ms: u64,
    /// The same, when nothing comes any more although the stream is still open.
    pub drain_quiet_ms: u64,
    /// For the guest to grow or to shrink.
    pub resize_ms: u64,
    /// For the image service to open an image.
    pub image_ms: u64,
}

/// `log::LevelFilter` as a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Only what was asked for and did not happen.
    Error,
    /// And what is wrong but was survived.
    Warn,
    /// And the steps of a sandbox's life.
    Info,
    /// And every call.
    Debug,
    /// And what only a developer can read.
    Trace,
}

impl From<LogLevel> for log::LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => Self::Error,
            LogLevel::Warn => Self::Warn,
            LogLevel::Info => Self::Info,
            LogLevel::Debug => Self::Debug,
            LogLevel::Trace => Self::Trace,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            kernel: "/usr/share/ctvm/vmlinux".into(),
            image: "/usr/share/ctvm/rootfs.erofs".into(),
            vmm: None,
            vcpus: 1,
            memory_mib: 256,
            overhead_memory_mib: 64,
            max_vcpus: 0,
            max_memory_mib: 0,
            annotations: vec![pod::Tunable::Vcpus, pod::Tunable::MemoryMib],
            cmdline: String::new(),
            hugepages: false,
            prefault: false,
            fs_threads: 1,
            host_cgroup: true,
            log_level: LogLevel::Info,
            timeline_dir: None,
            resize: Resize::default(),
            image_service: "/run/ctvm/images.sock".into(),
            image_dax: false,
            timeouts: Timeouts::default(),
            promised: Need::default(),
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            vmm_ms: 30_000,
            boot_ms: 60_000,
            agent_ms: 60_000,
            shutdown_ms: 1_000,
            drain_ms: 10_000,
            drain_quiet_ms: 1_000,
            resize_ms: 30_000,
            image_ms: 30_000,
        }
    }
}

impl Timeouts {
    /// [`Self::vmm_ms`].
    pub fn vmm(&self) -> Duration {
        Duration::from_millis(self.vmm_ms)
    }

    /// [`Self::boot_ms`].
    pub fn boot(&self) -> Duration {
        Duration::from_millis(self.boot_ms)
    }

    /// [`Self::agent_ms`].
    pub fn agent(&self) -> Duration {
        Duration::from_millis(self.agent_ms)
    }

    /// [`Self::shutdown_ms`].
    pub fn shutdown(&self) -> Duration {
        Duration::from_millis(self.shutdown_ms)
    }

    /// [`Self::drain_ms`].
    pub fn drain(&self) -> Duration {
        Duration::from_millis(self.drain_ms)
    }

    /// [`Self::drain_quiet_ms`].
    pub fn drain_quiet(&self) -> Duration {
        Duration::from_millis(self.drain_quiet_ms)
    }

    /// [`Self::resize_ms`].
    pub fn resize(&self) -> Duration {
        Duration::from_millis(self.resize_ms)
    }

    /// [`Self::image_ms`].
    pub fn image(&self) -> Duration {
        Duration::from_millis(self.image_ms)
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Not TOML, or not ours.
    #[error("configuration {place}, line {line}: {reason}")]
    Parse {
        /// File, or what else it came from.
        place: String,
        /// Line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// An annotation that the operator has not allowed.
    #[error(
        "annotation {name:?} is not allowed: add {option:?} to `annotations` in the runtime's configuration"
    )]
    Forbidden {
        /// The annotation.
        name: String,
        /// What it would change.
        option: &'static str,
    },
    /// An annotation under our name that means nothing.
    #[error("annotation {name:?} is not known; known are {known}")]
    Unknown {
        /// The annotation.
        name: String,
        /// All there are.
        known: String,
    },
    /// A value out of its range.
    #[error("configuration {place}: {key} is {value}, must be {limit}")]
    Value {
        /// File, or what else it came from.
        place: String,
        /// Which key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        limit: String,
    },
}

impl Config {
    /// Finds and reads the configuration; `named` comes from the runtime options.
    ///
    /// # Errors
    /// See [`ConfigError`]. A file that nobody named and that does not exist is no error.
    pub fn load(named: Option<&Path>) -> Result<Self, ConfigError> {
        let from_env = std::env::var_os(PATH_ENV).filter(|p| !p.is_empty()).map(PathBuf::from);
        let chosen = named.map(Path::to_owned).or(from_env);
        let optional = chosen.is_none();
        let path = chosen.unwrap_or_else(|| DEFAULT_PATH.into());
        match std::fs::read_to_string(&path) {
            Ok(text) => Self::parse(&text, &path.display().to_string()),
            Err(e) if optional && e.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read { path, source }),
        }
    }

    /// Reads a configuration; `place` names it in errors.
    ///
    /// # Errors
    /// [`ConfigError::Parse`] and [`ConfigError::Value`].
    pub fn parse(text: &str, place: &str) -> Result<Self, ConfigError> {
        let config: Config = toml::from_str(text).map_err(|e| {
            let at = e.span().map_or(0, |s| s.start.min(text.len()));
            ConfigError::Parse {
                place: place.to_owned(),
                line: text.as_bytes()[..at].iter().filter(|b| **b == b'\n').count() + 1,
                reason: e.message().lines().collect::<Vec<_>>().join("; "),
            }
        })?;
        config.check(place)?;
        Ok(config)
    }

    /// From limits to sizes of this configuration's sandbox.
    pub fn sizing(&self) -> Sizing {
        let base = Size { vcpus: self.vcpus, memory_mib: self.memory_mib };
        let unbounded = Size { vcpus: MAX_VCPUS, memory_mib: MAX_MEMORY_MIB };
        let mut sizing = Sizing {
            base,
            max: unbounded,
            overhead_memory_mib: self.overhead_memory_mib,
            promised: self.promised,
        };
        let first = sizing.first();
        sizing.max = Size {
            vcpus: match self.max_vcpus {
                0 => host_cpus().min(AUTO_MAX_VCPUS).max(first.vcpus),
                max => max,
            },
            memory_mib: match self.max_memory_mib {
                0 => first.memory_mib,
                max if self.hugepages => max.min(first.memory_mib),
                max => max,
            },
        };
        sizing
    }

    /// The size to boot with: that of the pod, unless it is to grow there.
    pub fn boot_size(&self) -> Size {
        let first = self.sizing().first();
        match self.resize.boot_small {
            BootSmall::No => first,
            // Pages of hugetlbfs do not come and go.
            BootSmall::All if !self.hugepages => first.min(Size { vcpus: 1, memory_mib: SMALL_MEMORY_MIB }),
            BootSmall::All | BootSmall::Vcpus => Size { vcpus: 1, ..first },
        }
    }

    fn check(&self, place: &str) -> Result<(), ConfigError> {
        let wrong = |key, value: String, limit: String| ConfigError::Value {
            place: place.to_owned(),
            key,
            value,
            limit,
        };
        if self.max_vcpus > MAX_VCPUS {
            return Err(wrong("max_vcpus", self.max_vcpus.to_string(), format!("0 to {MAX_VCPUS}")));
        }
        let max = if self.max_vcpus == 0 { MAX_VCPUS } else { self.max_vcpus };
        if !(1..=max).contains(&self.vcpus) {
            return Err(wrong("vcpus", self.vcpus.to_string(), format!("1 to {max}")));
        }
        let max = if self.max_memory_mib == 0 { MAX_MEMORY_MIB } else { self.max_memory_mib };
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&max) || !max.is_multiple_of(2) {
            let limit = format!("0 or {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}, a multiple of 2");
            return Err(wrong("max_memory_mib", max.to_string(), limit));
        }
        if !(MIN_MEMORY_MIB..=max).contains(&self.memory_mib) || !self.memory_mib.is_multiple_of(2) {
            let limit = format!("{MIN_MEMORY_MIB} to {max}, a multiple of 2");
            return Err(wrong("memory_mib", self.memory_mib.to_string(), limit));
        }
        if self.overhead_memory_mib > MAX_OVERHEAD_MIB {
            let limit = format!("0 to {MAX_OVERHEAD_MIB}");
            return Err(wrong("overhead_memory_mib", self.overhead_memory_mib.to_string(), limit));
        }
        if self.fs_threads == 0 || self.fs_threads > 4 {
            return Err(wrong("fs_threads", self.fs_threads.to_string(), "1 to 4".into()));
        }
        // The VMM adds its devices' words and checks the whole; this leaves it half.
        if self.cmdline.len() > MAX_CMDLINE / 2 || self.cmdline.contains(['\n', '\0']) {
            let limit = format!("one line of at most {} bytes", MAX_CMDLINE / 2);
            return Err(wrong("cmdline", format!("{} bytes long", self.cmdline.len()), limit));
        }
        let t = &self.timeouts;
        for (key, value) in [
            ("timeouts.vmm_ms", t.vmm_ms),
            ("timeouts.boot_ms", t.boot_ms),
            ("timeouts.agent_ms", t.agent_ms),
            ("timeouts.shutdown_ms", t.shutdown_ms),
            ("timeouts.drain_ms", t.drain_ms),
            ("timeouts.drain_quiet_ms", t.drain_quiet_ms),
            ("timeouts.image_ms", t.image_ms),
        ] {
            if value == 0 || value > MAX_TIMEOUT_MS {
                return Err(wrong(key, value.to_string(), format!("1 to {MAX_TIMEOUT_MS}")));
            }
        }
        if t.resize_ms == 0 || t.resize_ms > u64::from(MAX_RESIZE_MS) {
            let limit = format!("1 to {MAX_RESIZE_MS}");
            return Err(wrong("timeouts.resize_ms", t.resize_ms.to_string(), limit));
        }
        Ok(())
    }
}

/// CPUs that this process may use; the host's, as the shim is not bound to some of them.
fn host_cpus() -> u8 {
    let count = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u8::try_from(count).unwrap_or(u8::MAX)
}

/// Most memory beyond a pod's limit: more is a mistake in the unit.
const MAX_OVERHEAD_MIB: u32 = 16_384;

/// Longest of all times to wait, ten minutes.
const MAX_TIMEOUT_MS: u64 = 600_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        Config::parse(text, "/etc/ctvm/config.toml").unwrap_err().to_string()
    }

    #[test]
    fn an_empty_file_gives_the_defaults() {
        let config = Config::parse("", "x").unwrap();
        assert_eq!(config, Config::default());
        config.check("the defaults").unwrap();
    }

    #[test]
    fn keys_are_read() {
        let config = Config::parse("vcpus = 4\nmemory_mib = 512\n[timeouts]\nboot_ms = 5000\n", "x").unwrap();
        assert_eq!((config.vcpus, config.memory_mib, config.timeouts.boot_ms), (4, 512, 5000));
        assert_eq!(config.timeouts.vmm_ms, Timeouts::default().vmm_ms);
    }

    #[test]
    fn a_sandbox_can_grow_as_far_as_the_operator_says() {
        let config = Config::parse("max_vcpus = 4\nmax_memory_mib = 1024\n", "x").unwrap();
        assert_eq!(config.sizing().max, Size { vcpus: 4, memory_mib: 1024 });
        let auto = Config::parse("vcpus = 20\n", "x").unwrap().sizing();
        assert_eq!(auto.max, Size { vcpus: 20, memory_mib: 256 }, "never below what it has at first");
        let auto = Config::default().sizing().max.vcpus;
        assert!((1..=AUTO_MAX_VCPUS).contains(&auto), "{auto}");
    }

    #[test]
    fn one_that_boots_small_has_its_size_to_grow_to() {
        let small = |what: &str| {
            let text = format!("vcpus = 4\nmemory_mib = 512\n[resize]\nboot_small = {what:?}\n");
            Config::parse(&text, "x").unwrap()
        };
        assert_eq!(small("no").boot_size(), Size { vcpus: 4, memory_mib: 512 });
        assert_eq!(small("vcpus").boot_size(), Size { vcpus: 1, memory_mib: 512 });
        let config = small("all");
        assert_eq!(config.boot_size(), Size { vcpus: 1, memory_mib: SMALL_MEMORY_MIB });
        assert_eq!(config.sizing().first(), Size { vcpus: 4, memory_mib: 512 });
        let huge = Config { hugepages: true, ..config.clone() };
        assert_eq!(huge.boot_size(), Size { vcpus: 1, memory_mib: 512 });
        let tiny = Config { memory_mib: 64, ..config };
        assert_eq!(tiny.boot_size().memory_mib, 64);
    }

    #[test]
    fn errors_name_file_line_and_reason() {
        let e = error("vcpus = 1\nmemory = 256\n");
        assert!(e.starts_with("configuration /etc/ctvm/config.toml, line 2: unknown field `memory`"), "{e}");
        let e = error("vcpus = 1\n\nmemory_mib = \"big\"\n");
        assert!(e.contains("line 3: invalid type: string \"big\", expected u32"), "{e}");
        let e = error("vcpus = \n");
        assert!(e.contains("line 1"), "{e}");
        let e = error("[timeouts]\nboot = 1\n");
        assert!(e.contains("line 2: unknown field `boot`"), "{e}");
    }

    #[test]
    fn values_have_limits() {
        assert!(error("vcpus = 0").ends_with("vcpus is 0, must be 1 to 32"));
        assert!(error("memory_mib = 63").contains("memory_mib is 63, must be 64 to"));
        assert!(error("memory_mib = 65").contains("a multiple of 2"));
        assert!(error("fs_threads = 5").contains("must be 1 to 4"));
        assert!(error("[timeouts]\nboot_ms = 0").contains("timeouts.boot_ms is 0"));
        assert!(error("vcpus = 4\nmax_vcpus = 3").ends_with("vcpus is 4, must be 1 to 3"));
        assert!(error("max_vcpus = 33").ends_with("max_vcpus is 33, must be 0 to 32"));
        assert!(
            error("max_memory_mib = 128").contains("memory_mib is 256, must be 64 to 128, a multiple of 2")
        );
        assert!(error("max_memory_mib = 257").contains("max_memory_mib is 257, must be 0 or 64 to 1048576"));
        assert!(error("[timeouts]\nresize_ms = 300001").contains("resize_ms is 300001, must be 1 to 300000"));
        assert!(error("[resize]\nsmall = true").contains("unknown field `small`"));
        assert!(error(&format!("cmdline = \"{}\"", "x".repeat(2000))).contains("cmdline is 2000 bytes long"));
    }

    #[test]
    fn a_named_file_must_exist() {
        let e = Config::load(Some("/nonexistent/x.toml".as_ref())).unwrap_err();
        assert!(matches!(e, ConfigError::Read { .. }), "{e}");
    }
}
