//! Containers with users of their own: owners of files that are shifted.
//!
//! containerd says the maps in two labels, if it is told that the snapshotter has the capability `remap-ids`; else it changes owners
//! itself, file by file, which no Nydus image survives. What stands below the container's own layer is shifted by whoever mounts it,
//! who is told by `uidmap=` and `gidmap=`. The own layer is shown as it is, so its root has the shifted owner from the beginning.

use crate::error::SnapshotError;
use crate::snapshot::Labels;

/// Users, as `INSIDE:OUTSIDE:COUNT`, several with commas between them.
pub const UID_MAPPING: &str = "containerd.io/snapshot/uidmapping";
/// Groups.
pub const GID_MAPPING: &str = "containerd.io/snapshot/gidmapping";

/// The maps in labels, as mount options; none if there are none.
pub(crate) fn options(labels: &Labels) -> Vec<String> {
    let option = |name: &str, label| labels.get(label).map(|map| format!("{name}={map}"));
    option("uidmap", UID_MAPPING).into_iter().chain(option("gidmap", GID_MAPPING)).collect()
}

/// User and group outside who are root inside; none without maps.
///
/// # Errors
/// [`SnapshotError::Invalid`] for one map without the other, for what is no map, and for one without a root.
pub(crate) fn root(labels: &Labels) -> Result<Option<(u32, u32)>, SnapshotError> {
    let root = |label: &str, map: &str| {
        let wrong =
            || SnapshotError::Invalid(format!("label {label}: {map:?} is not a map of ids with a 0 inside"));
        outside_of_root(map).ok_or_else(wrong)
    };
    match (labels.get(UID_MAPPING), labels.get(GID_MAPPING)) {
        (None, None) => Ok(None),
        (Some(uids), Some(gids)) => Ok(Some((root(UID_MAPPING, uids)?, root(GID_MAPPING, gids)?))),
        _ => Err(SnapshotError::Invalid(format!(
            "one of the labels {UID_MAPPING} and {GID_MAPPING} without the other"
        ))),
    }
}

/// What 0 is outside. Everything else of the map is the mounter's to check.
fn outside_of_root(map: &str) -> Option<u32> {
    let mut found = None;
    for range in map.split(',') {
        let mut numbers = range.split(':').map(str::parse::<u32>);
        let (inside, outside, count) = (numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?);
        if numbers.next().is_some() || count == 0 {
            return None;
        }
        if inside == 0 {
            found = Some(outside);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_are_found_and_nonsense_is_refused() {
        let labels = |uids: &str, gids: &str| {
            Labels::from([
                (UID_MAPPING.to_owned(), uids.to_owned()),
                (GID_MAPPING.to_owned(), gids.to_owned()),
            ])
        };
        assert_eq!(root(&Labels::new()).unwrap(), None);
        let both = labels("0:100000:65536", "5:1:2,0:7:5");
        assert_eq!(root(&both).unwrap(), Some((100_000, 7)));
        assert_eq!(options(&both), ["uidmap=0:100000:65536", "gidmap=5:1:2,0:7:5"]);
        for wrong in ["", "0", "0:1", "0:1:0", "1:1:1", "0:1:2:3", "0:-1:1", "0:1:1,x", "0:4294967296:1"] {
            let error = root(&labels("0:1:1", wrong)).unwrap_err().to_string();
            assert!(error.contains("gidmapping") && error.contains(&format!("{wrong:?}")), "{error}");
        }
        let half = Labels::from([(UID_MAPPING.to_owned(), "0:1:1".to_owned())]);
        assert!(root(&half).unwrap_err().to_string().contains("without the other"));
    }
}
