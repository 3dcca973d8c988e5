//! What a pod changes in the configuration: its limits size the VM, its annotations change what the operator allows.
//!
//! A limit is the sum over the pod's containers, which CRI knows beforehand and passes in the sandbox's annotations; a
//! container without a pod brings its own. [`size`](super::size) makes a size of it.

use serde::Deserialize;

use super::size::Need;
use super::{Config, ConfigError};
use crate::container::overview::{Overview, Role};

/// Beginning of our annotations.
const OURS: &str = "io.ctvm.";

/// A value that an annotation can change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tunable {
    /// [`Config::vcpus`].
    Vcpus,
    /// [`Config::memory_mib`].
    MemoryMib,
    /// [`Config::cmdline`], added to the operator's.
    Cmdline,
    /// [`Config::hugepages`].
    Hugepages,
    /// [`Config::prefault`].
    Prefault,
    /// [`Config::max_vcpus`].
    MaxVcpus,
    /// [`Config::max_memory_mib`].
    MaxMemoryMib,
    /// [`Config::image_dax`].
    ImageDax,
}

/// Each value with its name, which `io.ctvm.` makes an annotation of, and Kata's name for the same thing, if it has one.
const TUNABLES: [(Tunable, &str, &str); 8] = [
    (Tunable::Vcpus, "vcpus", "io.katacontainers.config.hypervisor.default_vcpus"),
    (Tunable::MemoryMib, "memory_mib", "io.katacontainers.config.hypervisor.default_memory"),
    (Tunable::Cmdline, "cmdline", "io.katacontainers.config.hypervisor.kernel_params"),
    (Tunable::Hugepages, "hugepages", "io.katacontainers.config.hypervisor.enable_hugepages"),
    (Tunable::Prefault, "prefault", "io.katacontainers.config.hypervisor.enable_mem_prealloc"),
    (Tunable::MaxVcpus, "max_vcpus", "io.katacontainers.config.hypervisor.default_maxvcpus"),
    (Tunable::MaxMemoryMib, "max_memory_mib", "io.katacontainers.config.hypervisor.default_maxmemory"),
    (Tunable::ImageDax, "image_dax", ""),
];

impl Config {
    /// Takes what a pod needs and asks for.
    ///
    /// # Errors
    /// [`ConfigError::Value`] for what is out of range or of the wrong kind, [`ConfigError::Forbidden`] for an
    /// annotation that is not on the operator's list, [`ConfigError::Unknown`] for one of ours that does not exist.
    pub fn fit_to_pod(&mut self, overview: &Overview) -> Result<(), ConfigError> {
        self.promised = promised(overview);
        self.apply_annotations(overview)?;
        self.check("annotation")
    }

    fn apply_annotations(&mut self, overview: &Overview) -> Result<(), ConfigError> {
        for (name, value) in &overview.annotations {
            let known = TUNABLES
                .iter()
                .find(|(_, ours, kata)| name.strip_prefix(OURS) == Some(*ours) || name == kata);
            match known {
                Some(&(tunable, key, _)) if self.annotations.contains(&tunable) => {
                    self.set(tunable, key, value.trim())?;
                }
                Some(&(_, option, _)) => return Err(ConfigError::Forbidden { name: name.clone(), option }),
                None if name.starts_with(OURS) => {
                    let known: Vec<_> = TUNABLES.iter().map(|(_, key, _)| format!("{OURS}{key}")).collect();
                    return Err(ConfigError::Unknown { name: name.clone(), known: known.join(", ") });
                }
                None => {}
            }
        }
        Ok(())
    }

    fn set(&mut self, tunable: Tunable, key: &'static str, value: &str) -> Result<(), ConfigError> {
        let wrong = |limit: &str| ConfigError::Value {
            place: "annotation".into(),
            key,
            value: format!("{value:?}"),
            limit: limit.into(),
        };
        let flag = || value.parse::<bool>().map_err(|_| wrong("true or false"));
        match tunable {
            // Kata's is a decimal fraction.
            Tunable::Vcpus => {
                let whole = value.strip_suffix(".0").unwrap_or(value);
                self.vcpus = whole.parse().map_err(|_| wrong("a whole number in range"))?;
                // Said by name, it is what the pod wants whatever its limits come to.
                self.promised.cpu = None;
            }
            Tunable::MemoryMib => {
                self.memory_mib = value.parse().map_err(|_| wrong("a whole number in range"))?;
                self.promised.memory = None;
            }
            Tunable::MaxVcpus => {
                self.max_vcpus = value.parse().map_err(|_| wrong("a whole number in range"))?;
            }
            Tunable::MaxMemoryMib => {
                self.max_memory_mib = value.parse().map_err(|_| wrong("a whole number in range"))?;
            }
            Tunable::Cmdline => self.cmdline = format!("{} {value}", self.cmdline).trim().to_owned(),
            Tunable::Hugepages => self.hugepages = flag()?,
            Tunable::Prefault => self.prefault = flag()?,
            Tunable::ImageDax => self.image_dax = flag()?,
        }
        Ok(())
    }
}

/// What the pod was promised: by CRI, or by its one container's configuration.
fn promised(overview: &Overview) -> Need {
    match overview.role() {
        // Its own resources are those of a container that does nothing.
        Role::Pod => {
            let number = |name: &str| {
                let value = overview.annotations.get(&format!("io.kubernetes.cri.sandbox-{name}"))?;
                value.parse::<i64>().ok()
            };
            Need::of(number("memory"), number("cpu-quota"), number("cpu-period"))
        }
        Role::Single | Role::Member => overview.linux.resources.limits().need(),
    }
}

#[cfg(test)]
mod tests {
    use vmm_api::config::MAX_MEMORY_MIB;

    use super::*;
    use crate::config::size::Size;

    fn fit(config: &mut Config, json: &str) -> Result<(u8, u32), ConfigError> {
        config.fit_to_pod(&Overview::parse(json.as_bytes()).unwrap())?;
        let Size { vcpus, memory_mib } = config.sizing().first();
        Ok((vcpus, memory_mib))
    }

    fn annotated(name: &str, value: &str) -> String {
        format!(r#"{{"annotations":{{"{name}":"{value}"}}}}"#)
    }

    #[test]
    fn a_pods_limits_size_its_vm() {
        let pod = |annotations: &str| {
            let json = format!(
                r#"{{"annotations":{{"io.kubernetes.cri.container-type":"sandbox"{annotations}}},
                    "linux":{{"resources":{{"memory":{{"limit":1}},"cpu":{{"quota":1,"period":1}}}}}}}}"#
            );
            fit(&mut Config::default(), &json).unwrap()
        };
        assert_eq!(pod(""), (1, 256));
        let memory = r#","io.kubernetes.cri.sandbox-memory":"524288001""#;
        assert_eq!(pod(memory), (1, 566), "501 MiB, rounded up to pages of 2 MiB");
        let cpu = r#","io.kubernetes.cri.sandbox-cpu-quota":"250000","io.kubernetes.cri.sandbox-cpu-period":"100000""#;
        assert_eq!(pod(cpu), (3, 256));
        let none = r#","io.kubernetes.cri.sandbox-cpu-quota":"-1","io.kubernetes.cri.sandbox-memory":"0""#;
        assert_eq!(pod(none), (1, 256));
        let huge = r#","io.kubernetes.cri.sandbox-memory":"9223372036854775807""#;
        assert_eq!(pod(huge).1, MAX_MEMORY_MIB);
    }

    #[test]
    fn a_container_without_a_pod_brings_its_own_limits() {
        let json = r#"{"linux":{"resources":{"memory":{"limit":33554432},"cpu":{"quota":200000}}}}"#;
        assert_eq!(fit(&mut Config::default(), json).unwrap(), (2, 96));
    }

    #[test]
    fn annotations_of_ours_and_of_kata_change_the_size() {
        let mut config = Config::default();
        fit(&mut config, &annotated("io.ctvm.vcpus", "2")).unwrap();
        let kata = "io.katacontainers.config.hypervisor.default_memory";
        assert_eq!(fit(&mut config, &annotated(kata, "512")).unwrap(), (2, 512));
        let error = fit(&mut config, &annotated(kata, "lots")).unwrap_err();
        assert!(error.to_string().contains("\"lots\""), "{error}");
        fit(&mut config, &annotated(kata, "8")).unwrap_err();
        let fraction = "io.katacontainers.config.hypervisor.default_vcpus";
        assert_eq!(fit(&mut Config::default(), &annotated(fraction, "4.0")).unwrap(), (4, 256));
        let both = r#"{"annotations":{"io.ctvm.vcpus":"2"},
            "linux":{"resources":{"memory":{"limit":33554432},"cpu":{"quota":400000}}}}"#;
        assert_eq!(fit(&mut Config::default(), both).unwrap(), (2, 96), "what is said by name counts");
    }

    #[test]
    fn annotations_change_how_far_a_pod_can_grow() {
        let mut config = Config::parse("annotations = [\"max_vcpus\", \"max_memory_mib\"]", "x").unwrap();
        fit(&mut config, &annotated("io.ctvm.max_vcpus", "12")).unwrap();
        let kata = "io.katacontainers.config.hypervisor.default_maxmemory";
        fit(&mut config, &annotated(kata, "2048")).unwrap();
        assert_eq!(config.sizing().max, Size { vcpus: 12, memory_mib: 2048 });
        let kata = "io.katacontainers.config.hypervisor.default_maxvcpus";
        fit(&mut config, &annotated(kata, "6")).unwrap();
        assert_eq!(config.sizing().max.vcpus, 6);
        let error = fit(&mut config, &annotated(kata, "64")).unwrap_err().to_string();
        assert!(error.contains("max_vcpus is 64, must be 0 to 32"), "{error}");
        let mut config = Config::parse("max_vcpus = 4", "x").unwrap();
        let error = fit(&mut config, &annotated("io.ctvm.vcpus", "5")).unwrap_err().to_string();
        assert!(error.contains("vcpus is 5, must be 1 to 4"), "{error}");
        let error = fit(&mut Config::default(), &annotated(kata, "6")).unwrap_err().to_string();
        assert!(error.contains("add \"max_vcpus\" to `annotations`"), "{error}");
    }

    #[test]
    fn annotations_need_the_operators_leave() {
        let asked = annotated("io.ctvm.cmdline", "nosmt");
        let error = fit(&mut Config::default(), &asked).unwrap_err().to_string();
        assert!(error.contains("\"io.ctvm.cmdline\" is not allowed: add \"cmdline\""), "{error}");
        let mut config = Config::parse("annotations = [\"cmdline\"]\ncmdline = \"debug\"", "x").unwrap();
        fit(&mut config, &asked).unwrap();
        assert_eq!(config.cmdline, "debug nosmt");
        fit(&mut config, &annotated("io.ctvm.vcpus", "2")).unwrap_err();
        let error = fit(&mut Config::default(), &annotated("io.ctvm.cpus", "2")).unwrap_err().to_string();
        assert!(error.contains("\"io.ctvm.cpus\" is not known; known are io.ctvm.vcpus"), "{error}");
        fit(&mut Config::default(), &annotated("io.katacontainers.config.runtime.x", "2")).unwrap();
    }
}
