//! The ids of a user namespace: which of the containers' users and groups are which of the guest's, and of the host's,
//! since the file share passes ids on as they are.

use std::fmt::{self, Write as _};

use crate::sandbox;

/// Most ranges of a map (`UID_GID_MAP_MAX_EXTENTS` of the kernel).
pub const MAX_RANGES: usize = 340;

/// Ids that follow each other inside and outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// The first inside.
    pub inside: u32,
    /// The first outside.
    pub outside: u32,
    /// How many.
    pub count: u32,
}

/// A map of users or of groups that the kernel can take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMap(Vec<IdRange>);

/// The maps of a user namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMaps {
    /// Of users.
    pub uids: IdMap,
    /// Of groups.
    pub gids: IdMap,
}

/// What is no map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdMapError {
    /// None, or too many.
    Ranges(usize),
    /// Without ids, or beyond the last one that there is.
    Range(IdRange),
    /// Two that have an id in common, inside or outside.
    Overlap(IdRange, IdRange),
    /// The containers' root is nobody.
    NoRoot,
}

impl fmt::Display for IdRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.inside, self.outside, self.count)
    }
}

impl fmt::Display for IdMapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ranges(count) => write!(f, "a map of {count} ranges, must be 1 to {MAX_RANGES}"),
            Self::Range(range) => {
                write!(f, "range {range} of a map has no ids, or ids above {}", u32::MAX - 1)
            }
            Self::Overlap(one, other) => write!(f, "ranges {one} and {other} of a map have ids in common"),
            Self::NoRoot => f.write_str("a map has no place for id 0 of the container"),
        }
    }
}

impl std::error::Error for IdMapError {}

impl IdRange {
    /// One past the last id of each side; the last id of all is no id (`(uid_t) -1`).
    fn ends(self) -> Option<(u32, u32)> {
        let end = |first: u32| first.checked_add(self.count);
        Some((end(self.inside)?, end(self.outside)?)).filter(|_| self.count > 0)
    }

    fn overlaps(self, other: Self) -> bool {
        let meet = |a: u32, b: u32| a < b.saturating_add(other.count) && b < a.saturating_add(self.count);
        meet(self.inside, other.inside) || meet(self.outside, other.outside)
    }
}

impl IdMap {
    /// Checks a map.
    ///
    /// # Errors
    /// See [`IdMapError`].
    pub fn new(ranges: impl IntoIterator<Item = IdRange>) -> Result<Self, IdMapError> {
        let ranges: Vec<IdRange> = ranges.into_iter().take(MAX_RANGES + 1).collect();
        if !(1..=MAX_RANGES).contains(&ranges.len()) {
            return Err(IdMapError::Ranges(ranges.len()));
        }
        for (at, range) in ranges.iter().enumerate() {
            range.ends().ok_or(IdMapError::Range(*range))?;
            if let Some(other) = ranges[..at].iter().find(|other| other.overlaps(*range)) {
                return Err(IdMapError::Overlap(*other, *range));
            }
        }
        Ok(Self(ranges))
    }

    /// What the container's `id` is outside, if it is somebody.
    pub fn outside(&self, id: u32) -> Option<u32> {
        self.0.iter().find_map(|range| {
            let offset = id.checked_sub(range.inside).filter(|offset| *offset < range.count)?;
            range.outside.checked_add(offset)
        })
    }

    /// Its ranges.
    pub fn ranges(&self) -> &[IdRange] {
        &self.0
    }

    /// As `/proc/PID/uid_map` takes it, at once.
    pub fn to_file(&self) -> String {
        self.0.iter().fold(String::new(), |mut text, IdRange { inside, outside, count }| {
            writeln!(text, "{inside} {outside} {count}").expect("writing to a String cannot fail");
            text
        })
    }
}

impl IdMaps {
    /// The same, if the containers' root has a place in both.
    ///
    /// # Errors
    /// [`IdMapError::NoRoot`].
    pub fn with_root(self) -> Result<Self, IdMapError> {
        let has_root = self.uids.outside(0).is_some() && self.gids.outside(0).is_some();
        if has_root { Ok(self) } else { Err(IdMapError::NoRoot) }
    }
}

impl From<&sandbox::IdRange> for IdRange {
    fn from(range: &sandbox::IdRange) -> Self {
        IdRange { inside: range.inside, outside: range.outside, count: range.count }
    }
}

impl TryFrom<&sandbox::UserNamespace> for IdMaps {
    type Error = IdMapError;

    fn try_from(users: &sandbox::UserNamespace) -> Result<Self, IdMapError> {
        let map = |ranges: &[sandbox::IdRange]| IdMap::new(ranges.iter().map(IdRange::from));
        IdMaps { uids: map(&users.uids)?, gids: map(&users.gids)? }.with_root()
    }
}

impl From<&IdMaps> for sandbox::UserNamespace {
    fn from(maps: &IdMaps) -> Self {
        let ranges = |map: &IdMap| {
            let range = |range: &IdRange| sandbox::IdRange {
                inside: range.inside,
                outside: range.outside,
                count: range.count,
                ..Default::default()
            };
            map.ranges().iter().map(range).collect()
        };
        sandbox::UserNamespace { uids: ranges(&maps.uids), gids: ranges(&maps.gids), ..Default::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(inside: u32, outside: u32, count: u32) -> IdRange {
        IdRange { inside, outside, count }
    }

    #[test]
    fn ids_are_found_in_their_range() {
        let map = IdMap::new([range(0, 100_000, 1000), range(1000, 0, 1), range(2000, 200_000, 10)]).unwrap();
        let ids = [0, 999, 1000, 1001, 2009, 2010, u32::MAX].map(|id| map.outside(id));
        assert_eq!(ids, [Some(100_000), Some(100_999), Some(0), None, Some(200_009), None, None]);
        assert_eq!(map.to_file(), "0 100000 1000\n1000 0 1\n2000 200000 10\n");
    }

    #[test]
    fn what_the_kernel_would_not_take_is_said() {
        let refused = |ranges: &[IdRange]| IdMap::new(ranges.iter().copied()).unwrap_err();
        assert_eq!(refused(&[]), IdMapError::Ranges(0));
        let many: Vec<_> = (0..1000).map(|n| range(n, n, 1)).collect();
        assert_eq!(refused(&many), IdMapError::Ranges(MAX_RANGES + 1));
        for wrong in [range(0, 1, 0), range(0, 1, u32::MAX), range(1, 0, u32::MAX), range(u32::MAX, 0, 1)] {
            assert_eq!(refused(&[wrong]), IdMapError::Range(wrong));
        }
        assert!(IdMap::new([range(0, 0, u32::MAX)]).is_ok(), "as the first namespace has it");
        let (one, inside, outside) = (range(0, 100, 10), range(9, 500, 1), range(20, 109, 1));
        assert_eq!(refused(&[one, inside]), IdMapError::Overlap(one, inside));
        assert_eq!(refused(&[outside, one]), IdMapError::Overlap(outside, one));
        assert_eq!(
            refused(&[range(0, 1, 0)]).to_string(),
            "range 0:1:0 of a map has no ids, or ids above 4294967294"
        );
    }

    #[test]
    fn maps_come_back_from_a_request() {
        let maps = IdMaps {
            uids: IdMap::new([range(0, 100_000, 65_536)]).unwrap(),
            gids: IdMap::new([range(0, 300_000, 65_536)]).unwrap(),
        };
        let mut request = sandbox::UserNamespace::from(&maps);
        assert_eq!(IdMaps::try_from(&request), Ok(maps));
        request.gids[0].inside = 1;
        assert_eq!(IdMaps::try_from(&request), Err(IdMapError::NoRoot));
        request.gids.clear();
        assert_eq!(IdMaps::try_from(&request), Err(IdMapError::Ranges(0)));
    }
}
