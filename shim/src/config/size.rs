//! How large a pod's VM is: the one rule from limits to a size, for the boot and for every change after it.
//!
//! | of | what the limits come to | without a limit |
//! | --- | --- | --- |
//! | vCPUs | the sum of quota/period, rounded up to whole vCPUs, 1 at least | [`Config::vcpus`](super::Config::vcpus) |
//! | memory | the sum, rounded up to MiB, and the overhead; rounded up to 2 MiB | [`Config::memory_mib`](super::Config::memory_mib) |
//!
//! The sum is over the pod's containers, or what CRI said of the pod when it was made, whichever is more: containers
//! come one after another, and the pod was promised room for all. Where CRI said nothing, the VM is never smaller than
//! it is without a limit. Shares are weights and ask for nothing, and neither does a set of CPUs: it names what is
//! there.

use vmm_api::config::{MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB};

/// The kernel's own period where none is given, in microseconds (cgroup v2, `cpu.max`).
const PERIOD_US: u64 = 100_000;

/// A VM's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// vCPUs.
    pub vcpus: u8,
    /// Memory, in MiB, a multiple of 2.
    pub memory_mib: u32,
}

impl Size {
    /// The smaller of each.
    pub fn min(self, other: Size) -> Size {
        Size { vcpus: self.vcpus.min(other.vcpus), memory_mib: self.memory_mib.min(other.memory_mib) }
    }

    /// The larger of each.
    pub fn max(self, other: Size) -> Size {
        Size { vcpus: self.vcpus.max(other.vcpus), memory_mib: self.memory_mib.max(other.memory_mib) }
    }
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} vCPUs and {} MiB", self.vcpus, self.memory_mib)
    }
}

/// What a container, or a pod, may use at most.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Need {
    /// In bytes.
    pub memory: Option<u64>,
    /// In millionths of a CPU.
    pub cpu: Option<u64>,
}

impl Need {
    /// From limits as OCI and CRI say them: bytes, and microseconds. None, 0 and below are no limit.
    pub fn of(memory: Option<i64>, quota: Option<i64>, period: Option<i64>) -> Self {
        let positive = |number: Option<i64>| {
            number.and_then(|number| u64::try_from(number).ok()).filter(|number| *number > 0)
        };
        let period = positive(period).unwrap_or(PERIOD_US);
        let cpu = positive(quota).map(|quota| quota.saturating_mul(1_000_000) / period);
        Need { memory: positive(memory), cpu }
    }

    fn plus(self, other: Need) -> Need {
        let plus = |a: Option<u64>, b: Option<u64>| match (a, b) {
            (Some(a), Some(b)) => Some(a.saturating_add(b)),
            (a, b) => a.or(b),
        };
        Need { memory: plus(self.memory, other.memory), cpu: plus(self.cpu, other.cpu) }
    }

    /// What a sum comes to when one of its parts is another. A sum that there is not stays so.
    fn moved(self, from: Need, to: Need) -> Need {
        let moved = |sum: Option<u64>, from: Option<u64>, to: Option<u64>| {
            let rest = sum?.saturating_sub(from.unwrap_or(0));
            Some(rest.saturating_add(to.unwrap_or(0))).filter(|sum| *sum > 0)
        };
        Need { memory: moved(self.memory, from.memory, to.memory), cpu: moved(self.cpu, from.cpu, to.cpu) }
    }
}

/// From limits to sizes, for one pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizing {
    /// Without a limit.
    pub base: Size,
    /// The most; at least what the pod was promised, where the operator has not said otherwise.
    pub max: Size,
    /// Memory beyond the limits, in MiB.
    pub overhead_memory_mib: u32,
    /// What the pod was promised when it was made.
    pub promised: Need,
}

impl Sizing {
    /// The size that a pod with these containers should have. The maximum is not looked at.
    pub fn size(&self, containers: impl IntoIterator<Item = Need>) -> Size {
        let sum = containers.into_iter().fold(Need::default(), Need::plus);
        let vcpus = match self.promised.cpu {
            Some(promised) => vcpus(promised.max(sum.cpu.unwrap_or(0))),
            None => self.base.vcpus.max(sum.cpu.map_or(0, vcpus)),
        };
        let memory_mib = match self.promised.memory {
            Some(promised) => self.memory_mib(promised.max(sum.memory.unwrap_or(0))),
            None => self.base.memory_mib.max(sum.memory.map_or(0, |bytes| self.memory_mib(bytes))),
        };
        Size { vcpus, memory_mib }
    }

    /// The size at first.
    pub fn first(&self) -> Size {
        self.size([]).min(self.max)
    }

    /// A container's limits were changed, and the promise with them.
    pub fn moved(&mut self, from: Need, to: Need) {
        self.promised = self.promised.moved(from, to);
    }

    fn memory_mib(&self, bytes: u64) -> u32 {
        let mib = u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX);
        let mib = mib.saturating_add(self.overhead_memory_mib).clamp(MIN_MEMORY_MIB, MAX_MEMORY_MIB);
        mib.next_multiple_of(2)
    }
}

fn vcpus(millionths: u64) -> u8 {
    let cpus = millionths.div_ceil(1_000_000).clamp(1, u64::from(MAX_VCPUS));
    u8::try_from(cpus).expect("clamped to a u8")
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: i64 = 1 << 20;

    fn sizing(promised: Need) -> Sizing {
        let base = Size { vcpus: 2, memory_mib: 256 };
        let max = Size { vcpus: 8, memory_mib: 4096 };
        Sizing { base, max, overhead_memory_mib: 64, promised }
    }

    fn need(mib: i64, quota: i64) -> Need {
        Need::of(Some(mib * MIB), Some(quota), Some(100_000))
    }

    fn size(vcpus: u8, memory_mib: u32) -> Size {
        Size { vcpus, memory_mib }
    }

    #[test]
    fn parts_of_cpus_are_summed_before_they_are_rounded() {
        let pod = sizing(Need::default());
        assert_eq!(pod.size([need(100, 150_000), need(100, 140_000)]), size(3, 264));
        assert_eq!(pod.size([need(100, 150_000), need(100, 150_001)]), size(4, 264));
        let third = Need::of(None, Some(10_000), Some(30_000));
        assert_eq!(sizing(third).size([third, third, third]).vcpus, 1, "three thirds are one");
        assert_eq!(Need::of(None, Some(200_000), None).cpu, Some(2_000_000), "the kernel's period");
        assert_eq!(Need::of(Some(-1), Some(0), Some(100)), Need::default());
    }

    #[test]
    fn without_a_promise_it_is_never_below_the_size_without_limits() {
        let pod = sizing(Need::default());
        assert_eq!(pod.first(), size(2, 256));
        assert_eq!(pod.size([need(32, 50_000)]), size(2, 256));
        assert_eq!(pod.size([need(255, 50_000), Need::default()]), size(2, 320));
        assert_eq!(pod.size([need(0, 9_000_000), need(i64::MAX / MIB, 0)]), size(32, MAX_MEMORY_MIB));
    }

    #[test]
    fn a_promise_holds_before_its_containers_come_and_follows_their_changes() {
        let mut pod = sizing(need(300, 200_000));
        assert_eq!(pod.first(), size(2, 364));
        let web = need(100, 100_000);
        assert_eq!(pod.size([web]), size(2, 364), "the second is still to come");
        let larger = need(200, 150_000);
        pod.moved(web, larger);
        assert_eq!(pod.size([larger]), size(3, 464));
        pod.moved(larger, need(10, 10_000));
        assert_eq!(pod.size([need(10, 10_000)]), size(2, 274));
        pod.moved(need(210, 110_000), need(0, 0));
        assert_eq!(pod.size([]), size(2, 256), "a pod without limits is as large as one that never had any");
        assert_eq!(sizing(need(9000, 3_200_000)).first(), size(8, 4096), "the maximum");
    }
}
