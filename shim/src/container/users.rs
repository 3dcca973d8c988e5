//! Users of a container that are not those of the host: the maps of its user namespace, as containerd writes them.
//!
//! The VM's kernel makes the namespace; ids pass through the file share as they are, so a map means the same there as here.

use agent_api::users::{IdMap, IdMapError, IdMaps, IdRange};
use serde_json::{Map, Value};

/// One of `linux.uidMappings`, in OCI's words.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(default)]
pub struct IdMapping {
    /// The first inside.
    #[serde(rename = "containerID")]
    pub inside: u32,
    /// The first outside.
    #[serde(rename = "hostID")]
    pub outside: u32,
    /// How many.
    #[serde(rename = "size")]
    pub count: u32,
}

impl From<IdMapping> for IdRange {
    fn from(IdMapping { inside, outside, count }: IdMapping) -> Self {
        IdRange { inside, outside, count }
    }
}

/// Maps of users and groups.
///
/// # Errors
/// [`IdMapError`] for what the kernel would not take.
pub fn maps(uids: &[IdMapping], gids: &[IdMapping]) -> Result<IdMaps, IdMapError> {
    let map = |mappings: &[IdMapping]| IdMap::new(mappings.iter().copied().map(IdRange::from));
    Ok(IdMaps { uids: map(uids)?, gids: map(gids)? })
}

/// The maps of a user namespace in which there is a root.
///
/// # Errors
/// The same, and [`IdMapError::NoRoot`].
pub fn namespace(uids: &[IdMapping], gids: &[IdMapping]) -> Result<IdMaps, IdMapError> {
    maps(uids, gids)?.with_root()
}

/// Takes `uidMappings` and `gidMappings` out of an object; none if it has neither. What is no list of mappings is an
/// empty one.
pub fn take(object: &mut Map<String, Value>) -> Option<(Vec<IdMapping>, Vec<IdMapping>)> {
    let mut list =
        |name| object.remove(name).filter(|value| value.as_array().is_none_or(|list| !list.is_empty()));
    let (uids, gids) = (list("uidMappings"), list("gidMappings"));
    if uids.is_none() && gids.is_none() {
        return None;
    }
    let read =
        |list: Option<Value>| list.and_then(|list| serde_json::from_value(list).ok()).unwrap_or_default();
    Some((read(uids), read(gids)))
}

/// A map as mount options have it: `0:100000:65536`, several with commas between them.
pub fn option(text: &str) -> Option<IdMap> {
    let ranges = text.split(',').map(|range| {
        let mut numbers = range.split(':').map(|number| number.parse().ok());
        let range = IdRange { inside: numbers.next()??, outside: numbers.next()??, count: numbers.next()?? };
        numbers.next().is_none().then_some(range)
    });
    IdMap::new(ranges.collect::<Option<Vec<_>>>()?).ok()
}

/// `uidmap=` and `gidmap=` of a mount, as they are found among its options.
#[derive(Debug, Default)]
pub struct MountMaps {
    uids: Option<IdMap>,
    gids: Option<IdMap>,
}

/// An option that should be a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotAMap;

impl MountMaps {
    /// Takes an option, and says whether it is one of the two.
    ///
    /// # Errors
    /// [`NotAMap`] for one of them with what is no map.
    pub fn take(&mut self, text: &str) -> Result<bool, NotAMap> {
        let (place, map) = match (text.strip_prefix("uidmap="), text.strip_prefix("gidmap=")) {
            (Some(map), _) => (&mut self.uids, map),
            (_, Some(map)) => (&mut self.gids, map),
            (None, None) => return Ok(false),
        };
        *place = Some(option(map).ok_or(NotAMap)?);
        Ok(true)
    }

    /// Both, or none.
    ///
    /// # Errors
    /// The names of the one that is there and the one that is not.
    pub fn both(self) -> Result<Option<IdMaps>, (&'static str, &'static str)> {
        match (self.uids, self.gids) {
            (Some(uids), Some(gids)) => Ok(Some(IdMaps { uids, gids })),
            (None, None) => Ok(None),
            (Some(_), None) => Err(("uidmap", "gidmap")),
            (None, Some(_)) => Err(("gidmap", "uidmap")),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn mount_options_are_maps() {
        let map = option("0:100000:65536,65536:0:1").unwrap();
        assert_eq!((map.outside(1), map.outside(65_536)), (Some(100_001), Some(0)));
        for wrong in ["", "0", "0:1", "0:1:2:3", "0:1:0", "0:-1:5", "0:1:5,", "a:b:c", "0:1:5,4:9:1"] {
            assert_eq!(option(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn mappings_are_taken_out() {
        let mapping = json!([{"containerID": 0, "hostID": 7, "size": 9}]);
        let mut mount = json!({"source": "x", "uidMappings": mapping, "gidMappings": mapping});
        let (uids, gids) = take(mount.as_object_mut().unwrap()).unwrap();
        assert_eq!(uids, [IdMapping { inside: 0, outside: 7, count: 9 }]);
        assert_eq!((uids, mount.as_object().unwrap().len()), (gids, 1));
        assert_eq!(take(json!({"uidMappings": []}).as_object_mut().unwrap()), None);
        let wrong = take(json!({"uidMappings": "all"}).as_object_mut().unwrap()).unwrap();
        assert_eq!(maps(&wrong.0, &wrong.1), Err(IdMapError::Ranges(0)));
    }

    #[test]
    fn a_namespace_needs_a_root_and_a_mount_does_not() {
        let mapping = [IdMapping { inside: 1, outside: 1, count: 5 }];
        assert!(maps(&mapping, &mapping).is_ok());
        assert_eq!(namespace(&mapping, &mapping), Err(IdMapError::NoRoot));
    }
}
