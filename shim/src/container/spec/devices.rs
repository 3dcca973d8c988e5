//! `linux.devices` of a configuration: what the guest gets of them.

use agent_api::DISK_MAJOR;
use serde_json::{Map, Value};

use super::{GuestSpec, SpecError, field};
use crate::container::devices::{Device, Fate, HostDisk, Rule};

/// Block devices that become disks, each with its position in the list that is left.
pub(super) type Disks = Vec<(usize, HostDisk)>;

/// Leaves what the guest can have.
pub(super) fn rewrite(
    linux: &mut Map<String, Value>,
    warnings: &mut Vec<String>,
) -> Result<Disks, SpecError> {
    let rules = linux.get("resources").and_then(|resources| resources.get("devices"));
    let rules: Vec<Rule> = typed(rules, "linux.resources.devices")?;
    let devices: Vec<Device> = typed(linux.get("devices"), "linux.devices")?;
    let (mut kept, mut disks) = (Vec::new(), Vec::new());
    let values = linux.remove("devices").and_then(|devices| devices.as_array().cloned()).unwrap_or_default();
    for (device, value) in devices.iter().zip(values) {
        match device.fate(&rules)? {
            Fate::LeftOut => continue,
            Fate::Guests => {}
            Fate::Disk(disk) => disks.push((kept.len(), disk)),
        }
        kept.push(value);
    }
    if kept.len() < devices.len() {
        let count = devices.len() - kept.len();
        warnings.push(format!("{count} device(s) of the host are left out: it has all of the guest's"));
    }
    if !kept.is_empty() {
        linux.insert("devices".into(), kept.into());
    }
    Ok(disks)
}

/// A list that may be missing.
fn typed<T: serde::de::DeserializeOwned>(list: Option<&Value>, name: &str) -> Result<Vec<T>, SpecError> {
    let Some(list) = list.filter(|list| !list.is_null()) else { return Ok(Vec::new()) };
    serde::Deserialize::deserialize(list).map_err(|_| field(name, "a list of devices"))
}

impl GuestSpec {
    /// Says which disk of the VM block device `index` of [`GuestSpec::disks`] is.
    pub fn set_disk(&mut self, index: usize, number: u32) {
        let device = &mut self.config["linux"]["devices"][self.disk_positions[index]];
        device["major"] = DISK_MAJOR.into();
        device["minor"] = number.into();
    }
}
