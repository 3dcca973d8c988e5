//! The operator's configuration: one TOML file, every key optional.
//!
//! Order: the runtime options' `ConfigPath` or inline body, else `$CTVM_CONFIG`, else `/etc/ctvm/config.toml` where
//! it exists, else the defaults below. What a pod asks for then changes the few values that [`pod`] names.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use vmm_api::config::{MAX_CMDLINE, MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB};

pub mod pod;

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
    /// Which of these values a pod's annotations may change: `vcpus`, `memory_mib`, `cmdline`, `hugepages`, `prefault`.
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
    /// Longest times to wait.
    pub timeouts: Timeouts,
}

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
            annotations: vec![pod::Tunable::Vcpus, pod::Tunable::MemoryMib],
            cmdline: String::new(),
            hugepages: false,
            prefault: false,
            fs_threads: 1,
            host_cgroup: true,
            log_level: LogLevel::Info,
            timeline_dir: None,
            timeouts: Timeouts::default(),
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

    fn check(&self, place: &str) -> Result<(), ConfigError> {
        let wrong = |key, value: String, limit: String| ConfigError::Value {
            place: place.to_owned(),
            key,
            value,
            limit,
        };
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return Err(wrong("vcpus", self.vcpus.to_string(), format!("1 to {MAX_VCPUS}")));
        }
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&self.memory_mib) || !self.memory_mib.is_multiple_of(2)
        {
            let limit = format!("{MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}, a multiple of 2");
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
        ] {
            if value == 0 || value > MAX_TIMEOUT_MS {
                return Err(wrong(key, value.to_string(), format!("1 to {MAX_TIMEOUT_MS}")));
            }
        }
        Ok(())
    }
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
        assert!(error(&format!("cmdline = \"{}\"", "x".repeat(2000))).contains("cmdline is 2000 bytes long"));
    }

    #[test]
    fn a_named_file_must_exist() {
        let e = Config::load(Some("/nonexistent/x.toml".as_ref())).unwrap_err();
        assert!(matches!(e, ConfigError::Read { .. }), "{e}");
    }
}
