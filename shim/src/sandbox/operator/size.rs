//! How large a VM is and how its resizes went, as metrics.

use vmm_api::{Ending, Stats};

use super::counters::Counts;
use super::exposition::{Exposition, Kind, seconds};
use super::status::Status;
use crate::sandbox::resize::By;

/// Writes them: of the monitor's own count where it answered, else as far as the shim knows.
pub fn write(to: &mut Exposition, status: &Status, stats: Option<&Stats>, counts: &Counts) {
    let bytes = |mib: u32| u64::from(mib) << 20;
    let told = stats.and_then(|stats| stats.size);
    let vcpus = told.map_or(status.vcpus, |size| size.vcpus);
    let memory = told.map(|size| size.memory_mib).or(status.memory_mib);
    if let Some(vcpus) = vcpus {
        to.gauge(
            "ctvm_vcpus",
            "vCPUs that the guest has online; absent where it has not said.",
            u32::from(vcpus),
        );
    }
    to.gauge("ctvm_vcpus_requested", "vCPUs last asked for.", u32::from(status.vcpus_asked));
    to.gauge("ctvm_vcpus_max", "The most vCPUs.", u32::from(status.vcpus_max));
    if let Some(mib) = memory {
        let help = "Guest memory of the VM; absent where the guest has not said.";
        to.gauge("ctvm_guest_memory_configured_bytes", help, bytes(mib));
    }
    let help = "Guest memory last asked for.";
    to.gauge("ctvm_guest_memory_requested_bytes", help, bytes(status.memory_asked_mib));
    to.gauge("ctvm_guest_memory_max_bytes", "The most guest memory.", bytes(status.memory_max_mib));
    if let Some(size) = told {
        let help = "1 if the guest's kernel has opened the upcall channel, so that a resize can begin.";
        to.gauge("ctvm_upcall_up", help, size.upcall);
    }
    let help =
        "Resizes asked for, by who wanted them: boot, create, update, delete (of a container), operator.";
    let mut family = to.family("ctvm_resize_requests_total", Kind::Counter, help);
    for by in By::ALL {
        family.sample(&[("by", by.as_str())], counts.resizes.get(&by).copied().unwrap_or(0));
    }
    if let Some(stats) = stats {
        results(to, stats);
        plugs(to, stats);
        let given_back = stats.devices.values().filter_map(|counters| counters.get("bytes_given_back"));
        let help = "Guest memory that was unplugged and given back to the host, since the boot.";
        to.counter("ctvm_guest_memory_given_back_bytes_total", help, given_back.sum::<u64>());
    }
}

fn results(to: &mut Exposition, stats: &Stats) {
    let help = "Resizes that have ended, by how: done, partial, refused, replaced, timed_out, reset.";
    let mut family = to.family("ctvm_resizes_total", Kind::Counter, help);
    for ending in Ending::ALL {
        let count = stats.resizes.get(ending.name()).copied().unwrap_or(0);
        family.sample(&[("result", ending.name())], count);
    }
    let buckets = buckets(stats);
    if let (false, Some(sum), Some(count)) =
        (buckets.is_empty(), stats.resizes.get("sum_us"), stats.resizes.get("count"))
    {
        let buckets: Vec<_> = buckets.into_iter().map(|(us, count)| (seconds(us), count)).collect();
        let help = "Time that resizes took, from the moment that the guest had a say.";
        to.histogram("ctvm_resize_duration_seconds", help, &buckets, seconds(*sum), *count);
    }
}

/// The one of the monitor's counters of devices that goes up and down.
const PARKED: &str = "parked";

fn plugs(to: &mut Exposition, stats: &Stats) {
    let help = "Devices attached to and detached from the running VM, by how it ended: attached, detached, refused, \
        timed_out, reset.";
    let mut family = to.family("ctvm_device_plugs_total", Kind::Counter, help);
    // By the monitor's names, which has one counter that only goes up for each end.
    for (result, count) in stats.plugs.iter().filter(|(name, _)| *name != PARKED) {
        family.sample(&[("result", result)], *count);
    }
    let help = "Devices that the guest may still have and that go as soon as it has given them up.";
    to.gauge("ctvm_devices_parked", help, stats.plugs.get(PARKED).copied().unwrap_or(0));
}

/// `le_N_us` as pairs of N and its count, by N.
fn buckets(stats: &Stats) -> Vec<(u64, u64)> {
    let bound = |name: &str| name.strip_prefix("le_")?.strip_suffix("_us")?.parse().ok();
    let mut buckets: Vec<_> =
        stats.resizes.iter().filter_map(|(name, count)| Some((bound(name)?, *count))).collect();
    buckets.sort_unstable();
    buckets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_in_the_order_of_numbers() {
        let names = ["le_1000_us", "le_250_us", "le_10000_us", "done", "sum_us", "le_x_us"];
        let resizes = (1..).zip(names).map(|(n, name)| (name.to_owned(), n)).collect();
        let stats = Stats { resizes, ..Stats::default() };
        assert_eq!(buckets(&stats), [(250, 2), (1000, 1), (10_000, 3)]);
    }
}
