//! A VM's images: how it has them, and how long reads of them waited for their bytes.

use std::collections::BTreeMap;

use vmm_api::Stats;

use super::exposition::{Exposition, Kind, seconds};
use crate::sandbox::images::{By, Images};

/// How many images a VM has of each kind. Nothing, when it has none.
pub fn count(to: &mut Exposition, images: &Images) {
    let counts = [By::Disk, By::Memory].map(|by| (by, images.count(by)));
    if counts.iter().all(|(_, count)| *count == 0) {
        return;
    }
    let help = "Nydus images of the sandbox: disks, and memory that sandboxes share.";
    let mut family = to.family("ctvm_images", Kind::Gauge, help);
    for (by, count) in counts {
        family.sample(&[("by", by.name())], count);
    }
}

/// Adds up the images of a VM. Nothing, when it has none.
pub fn describe(to: &mut Exposition, stats: &Stats) {
    let all =
        |counter: &str| stats.devices.values().filter_map(|counters| counters.get(counter)).sum::<u64>();
    let bound = |name: &str| name.strip_prefix("wait_le_")?.strip_suffix("_us")?.parse().ok();
    let names = stats.devices.values().flat_map(|counters| counters.keys());
    let buckets: BTreeMap<u64, u64> = names.filter_map(|name| Some((bound(name)?, all(name)))).collect();
    if buckets.is_empty() {
        return;
    }
    let buckets: Vec<_> = buckets.into_iter().map(|(us, count)| (seconds(us), count)).collect();
    let help = "Time that reads of images waited for bytes that had to come first.";
    to.histogram("ctvm_image_wait_seconds", help, &buckets, seconds(all("wait_sum_us")), all("wait_count"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(stats: &Stats) -> String {
        let mut to = Exposition::new(&[]);
        describe(&mut to, stats);
        to.finish()
    }

    #[test]
    fn the_images_of_a_vm_are_added_up() {
        let mut stats = Stats::default();
        let disk = [("reads", 9)].map(|(name, count)| (name.to_owned(), count));
        stats.devices.insert("blk0".into(), disk.into());
        assert!(!text(&stats).contains("ctvm_image_wait_seconds"));
        for (name, fast) in [("blk1", 2), ("blk3", 1)] {
            let image = [
                ("wait_le_1000_us", fast),
                ("wait_le_250_us", 1),
                ("wait_sum_us", 4_000_000),
                ("wait_count", 5),
            ];
            let image = image.map(|(name, count)| (name.to_owned(), count));
            stats.devices.insert(name.into(), image.into());
        }
        let text = text(&stats);
        for line in ["_bucket{le=\"0.00025\"} 2", "_bucket{le=\"0.001\"} 3", "_sum 8", "_count 10"] {
            assert!(text.contains(&format!("ctvm_image_wait_seconds{line}\n")), "{line} is not in {text}");
        }
    }
}
