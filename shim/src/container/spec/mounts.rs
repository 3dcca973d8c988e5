//! The mounts of a container: binds of host files become shares, the rest the guest's runtime makes by itself.

use super::{Bind, GuestSpec, IdMapped, Place, SHM, SpecError, field, object, strings, text};
use crate::container::users;

/// Kinds of mount that the guest's runtime makes by itself.
const GUEST_KINDS: [&str; 8] =
    ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "hugetlbfs"];

impl GuestSpec {
    pub(super) fn rewrite_mounts(&mut self, place: Place<'_>) -> Result<(), SpecError> {
        let Place { id, share_path, users: own_users, .. } = place;
        let Some(mounts) = self.config.get_mut("mounts") else { return Ok(()) };
        let mounts = mounts.as_array_mut().ok_or_else(|| field("mounts", "a list"))?;
        for (position, mount) in mounts.iter_mut().enumerate() {
            let mount = object(mount, "mounts[]")?;
            let destination = text(mount, "destination")
                .ok_or_else(|| field(&format!("mounts[{position}].destination"), "text"))?;
            let kind = text(mount, "type").unwrap_or_default();
            let options = strings(mount, "options");
            let mappings = users::take(mount);
            let is_bind = matches!(kind.as_str(), "bind" | "rbind")
                || options.iter().any(|o| o == "bind" || o == "rbind");
            if !is_bind {
                if mappings.is_some() {
                    let why = format!("is of type {kind:?}; a bind can be one");
                    return Err(SpecError::IdMapped { destination, why });
                }
                if GUEST_KINDS.contains(&kind.as_str()) {
                    continue;
                }
                return Err(SpecError::MountKind { kind, destination });
            }
            let source = text(mount, "source")
                .filter(|s| !s.is_empty())
                .ok_or_else(|| field(&format!("mounts[{position}].source"), "a path"))?;
            if destination == SHM {
                // A host's tmpfs over a file share would be neither shared memory nor quick: `set_shm_size` replaces it.
                self.shm = Some((position, source.into()));
                continue;
            }
            let mut kept = Vec::new();
            let (mut read_only, mut live, mut shifted, mut recursive) = (false, false, false, false);
            for option in options {
                match option.as_str() {
                    "ro" | "rro" => {
                        read_only = true;
                        kept.push("ro".to_owned());
                    }
                    // From the host to the guest, the file share does it; the other way there is none.
                    "slave" | "rslave" => live = true,
                    "shared" | "rshared" => {
                        live = true;
                        self.warnings.push(format!(
                            "mount propagation {option:?} at {destination:?}: what the container mounts stays in the guest"
                        ));
                    }
                    "z" | "Z" => {}
                    "idmap" => shifted = true,
                    "ridmap" => (shifted, recursive) = (true, true),
                    o if ["uidmap=", "gidmap=", "idmap="].iter().any(|p| o.starts_with(p)) => {
                        return Err(SpecError::MountOption { option, destination });
                    }
                    _ => kept.push(option),
                }
            }
            let maps = match mappings {
                Some((uids, gids)) => Some(users::maps(&uids, &gids).map_err(|e| e.to_string())),
                // Without a map of its own it has the container's.
                None if shifted => Some(
                    own_users
                        .cloned()
                        .ok_or_else(|| "has no map, and the container no users of its own".into()),
                ),
                None => None,
            };
            let maps = maps
                .transpose()
                .map_err(|why| SpecError::IdMapped { destination: destination.clone(), why })?;
            let map = maps.map(|maps| IdMapped { maps, recursive });
            if live && map.is_some() {
                live = false;
                kept.push("rprivate".to_owned());
                self.warnings.push(format!(
                    "the id-mapped mount at {destination:?}: what the host mounts below it later is not seen"
                ));
            }
            if live {
                kept.push("rprivate".to_owned());
            }
            // A colon is in no container's id, so no container's root has this name.
            let share = format!("{id}:mnt{}", self.binds.len());
            mount.insert("type".into(), "bind".into());
            mount.insert("source".into(), format!("{share_path}/{share}").into());
            mount.insert("options".into(), kept.into());
            self.binds.push(Bind { source: source.into(), share, read_only, live, map });
            self.positions.push(position);
        }
        Ok(())
    }
}
