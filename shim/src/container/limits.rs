//! A container's limits as they are set in the guest, as far as they say how large the VM must be.

use crate::config::size::Need;

use super::overview::OverviewResources;

/// What is set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// In bytes.
    memory: Option<i64>,
    /// In microseconds each period.
    quota: Option<i64>,
    /// In microseconds.
    period: Option<i64>,
    /// The last of the CPUs that it may use, where somebody said which.
    pub last_cpu: Option<u8>,
}

impl Limits {
    /// What is set after an update: what is absent, zero or empty in it stays as it is, as the agent has it, and a
    /// negative number takes a limit away.
    #[must_use]
    pub fn changed(self, by: &OverviewResources) -> Limits {
        let given = |number: Option<i64>| number.filter(|number| *number != 0);
        let period = by.cpu.period.and_then(|us| i64::try_from(us).ok());
        Limits {
            memory: given(by.memory.limit).or(self.memory),
            quota: given(by.cpu.quota).or(self.quota),
            period: given(period).or(self.period),
            last_cpu: last(&by.cpu.cpus).or(self.last_cpu),
        }
    }

    /// What the container needs of its VM.
    pub fn need(&self) -> Need {
        Need::of(self.memory, self.quota, self.period)
    }

    /// Without the CPUs that it may use: those of a configuration are the host's.
    #[must_use]
    pub fn without_cpus(self) -> Limits {
        Limits { last_cpu: None, ..self }
    }
}

/// The highest number in a list such as `0-2,7`; none in one that is empty or no list, which the agent refuses.
fn last(list: &str) -> Option<u8> {
    let numbers: Option<Vec<u8>> = list.split([',', '-']).map(|number| number.trim().parse().ok()).collect();
    numbers?.into_iter().max()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resources(json: &str) -> OverviewResources {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn an_update_changes_what_it_names() {
        let all = r#"{"memory":{"limit":1048576},"cpu":{"quota":50000,"period":50000,"cpus":"0-1,3"}}"#;
        let limits = Limits::default().changed(&resources(all));
        assert_eq!(limits.need(), Need { memory: Some(1 << 20), cpu: Some(1_000_000) });
        assert_eq!(limits.last_cpu, Some(3));
        let same =
            limits.changed(&resources(r#"{"memory":{"limit":0},"cpu":{"shares":5,"quota":0,"cpus":""}}"#));
        assert_eq!(same, limits);
        let quota = limits.changed(&resources(r#"{"cpu":{"quota":150000,"cpus":"0"}}"#));
        assert_eq!((quota.need().cpu, quota.last_cpu), (Some(3_000_000), Some(0)), "the period stays");
        let none = limits.changed(&resources(r#"{"memory":{"limit":-1},"cpu":{"quota":-1}}"#));
        assert_eq!(none.need(), Need::default());
        assert_eq!(limits.without_cpus().last_cpu, None);
    }

    #[test]
    fn lists_of_cpus_have_a_last_one() {
        assert_eq!(["0", "0-2,7", "7,0-2"].map(last), [Some(0), Some(7), Some(7)]);
        assert_eq!(["", "x", "0-300", "0,"].map(last), [None; 4]);
    }
}
