//! Devices of a container (`linux.devices`), and what becomes of each in a VM.
//!
//! | device | becomes |
//! | --- | --- |
//! | one that every Linux has: null, zero, random, tty, fuse, … | the guest's own of that number; the agent says if it has none |
//! | block device | a disk of the VM, of whatever number the guest gives it |
//! | any other | refused, by its path |
//! | one that no rule names, where a rule allows all: a privileged container is given all of the host's | left out, the first kind apart |

use serde::Deserialize;

/// Character devices that a container may ask for by number: (major, minor), the latter `None` for all.
const OF_A_KERNEL: [(i64, Option<i64>); 4] = [(1, None), (5, None), (10, Some(200)), (10, Some(229))];

/// Those of them that every guest has, however it was built.
const OF_EVERY_GUEST: [(i64, i64); 10] =
    [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (1, 11), (5, 0), (5, 1), (5, 2), (10, 229)];

/// One of `linux.devices`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Device {
    /// In the container.
    pub path: String,
    /// `b`, `c`, `u` or `p`.
    #[serde(rename = "type")]
    pub kind: String,
    /// On the host.
    pub major: i64,
    /// On the host.
    pub minor: i64,
}

/// One of `linux.resources.devices`. Later ones count more.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Rule {
    /// Allow or deny.
    pub allow: bool,
    /// `b`, `c`, or `a` for both, which nothing means as well.
    #[serde(rename = "type")]
    pub kind: String,
    /// None and -1 for all.
    pub major: Option<i64>,
    /// None and -1 for all.
    pub minor: Option<i64>,
    /// Of `r`, `w` and `m`; nothing for all.
    pub access: String,
}

/// A block device of the host for a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostDisk {
    /// In the container.
    pub path: String,
    /// On the host.
    pub major: u32,
    /// On the host.
    pub minor: u32,
    /// No rule lets the container write.
    pub read_only: bool,
}

/// What becomes of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It is the guest's own.
    Guests,
    /// It becomes a disk.
    Disk(HostDisk),
    /// Nobody asked for it in particular.
    LeftOut,
}

/// A device that cannot be had in a VM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "config.json: device {path:?} ({kind} {major}:{minor}) is the host's: in a VM there are block devices, and of the others those of the guest's kernel (null, zero, full, random, urandom, tty, ptmx, fuse, net/tun)"
)]
pub struct DeviceError {
    path: String,
    kind: String,
    major: i64,
    minor: i64,
}

impl Rule {
    fn is_of_kind(&self, kind: &str) -> bool {
        matches!(self.kind.as_str(), "" | "a") || self.kind == kind
    }

    fn covers(&self, device: &Device) -> bool {
        let fits = |rule: Option<i64>, number| rule.is_none_or(|rule| rule == -1 || rule == number);
        self.is_of_kind(device.rule_kind())
            && fits(self.major, device.major)
            && fits(self.minor, device.minor)
    }

    fn is_about(&self, device: &Device) -> bool {
        self.allow
            && self.kind == device.rule_kind()
            && (self.major, self.minor) == (Some(device.major), Some(device.minor))
    }

    fn allows_all(&self) -> bool {
        let all = |rule: Option<i64>| rule.is_none_or(|rule| rule == -1);
        self.allow && matches!(self.kind.as_str(), "" | "a") && all(self.major) && all(self.minor)
    }
}

impl Device {
    /// Unbuffered is another word for a character device.
    fn rule_kind(&self) -> &str {
        if self.kind == "u" { "c" } else { &self.kind }
    }

    /// What becomes of it.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub fn fate(&self, rules: &[Rule]) -> Result<Fate, DeviceError> {
        let (major, minor) = (self.major, self.minor);
        let is_one_of_all =
            rules.iter().any(Rule::allows_all) && !rules.iter().any(|rule| rule.is_about(self));
        let is_char = self.rule_kind() == "c";
        if is_one_of_all {
            let is_guests = is_char && OF_EVERY_GUEST.contains(&(major, minor));
            return Ok(if is_guests { Fate::Guests } else { Fate::LeftOut });
        }
        let of_a_kernel = |&(m, n): &(i64, Option<i64>)| m == major && n.is_none_or(|n| n == minor);
        if is_char && OF_A_KERNEL.iter().any(of_a_kernel) {
            return Ok(Fate::Guests);
        }
        if self.kind == "b"
            && let (Ok(major), Ok(minor)) = (major.try_into(), minor.try_into())
        {
            let read_only = !self.may_be_written(rules);
            return Ok(Fate::Disk(HostDisk { path: self.path.clone(), major, minor, read_only }));
        }
        Err(DeviceError { path: self.path.clone(), kind: self.kind.clone(), major, minor })
    }

    /// Without rules nobody limits it.
    fn may_be_written(&self, rules: &[Rule]) -> bool {
        let about_writing =
            |rule: &&Rule| (rule.access.is_empty() || rule.access.contains('w')) && rule.covers(self);
        rules.iter().rfind(about_writing).is_none_or(|rule| rule.allow)
    }
}

/// The block devices among `devices`.
///
/// # Errors
/// [`DeviceError`] for the first that cannot be had.
pub fn disks(devices: &[Device], rules: &[Rule]) -> Result<Vec<HostDisk>, DeviceError> {
    let mut disks = Vec::new();
    for device in devices {
        if let Fate::Disk(disk) = device.fate(rules)? {
            disks.push(disk);
        }
    }
    Ok(disks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(kind: &str, major: i64, minor: i64) -> Device {
        Device { path: "/dev/x".into(), kind: kind.into(), major, minor }
    }

    fn rules(json: &str) -> Vec<Rule> {
        serde_json::from_str(json).unwrap()
    }

    const DENY: &str = r#"{"allow":false,"access":"rwm"}"#;

    #[test]
    fn a_block_device_is_a_disk_with_the_access_of_its_rule() {
        let read_only = |json: &str| match device("b", 7, 3).fate(&rules(json)).unwrap() {
            Fate::Disk(disk) => {
                assert_eq!((disk.path.as_str(), disk.major, disk.minor), ("/dev/x", 7, 3));
                disk.read_only
            }
            other => panic!("{other:?}"),
        };
        assert!(!read_only("[]"));
        let rule = |access: &str| {
            format!(r#"[{DENY},{{"allow":true,"type":"b","major":7,"minor":3,"access":"{access}"}}]"#)
        };
        assert!(!read_only(&rule("rwm")) && !read_only(&rule("rw")) && read_only(&rule("rm")));
        assert!(!read_only(r#"[{"allow":true,"type":"b","major":7,"minor":-1,"access":"w"}]"#));
        assert!(read_only(&format!("[{DENY}]")), "denied and named all the same, as runc would have it");
    }

    #[test]
    fn what_a_kernel_has_is_the_guests() {
        for (major, minor) in [(1, 3), (1, 1), (5, 2), (10, 200), (10, 229)] {
            assert_eq!(device("c", major, minor).fate(&[]), Ok(Fate::Guests), "{major}:{minor}");
        }
        assert_eq!(device("u", 1, 5).fate(&[]), Ok(Fate::Guests));
    }

    #[test]
    fn other_devices_of_the_host_are_refused_by_path() {
        for other in [device("c", 10, 232), device("c", 226, 0), device("p", 0, 0), device("b", -1, 0)] {
            let error = other.fate(&rules(&format!("[{DENY}]"))).unwrap_err().to_string();
            let numbers = format!("device \"/dev/x\" ({} {}:{})", other.kind, other.major, other.minor);
            assert!(error.contains(&numbers), "{error}");
        }
    }

    #[test]
    fn a_privileged_container_has_the_guests_devices() {
        let all = rules(r#"[{"allow":true,"access":"rwm"}]"#);
        assert_eq!(device("b", 8, 0).fate(&all), Ok(Fate::LeftOut));
        assert_eq!(device("c", 10, 232).fate(&all), Ok(Fate::LeftOut));
        assert_eq!(device("c", 10, 200).fate(&all), Ok(Fate::LeftOut), "a guest may have none");
        assert_eq!(device("c", 10, 229).fate(&all), Ok(Fate::Guests));
        // One that is asked for besides is asked for.
        let named = rules(
            r#"[{"allow":true,"access":"rwm"},{"allow":true,"type":"b","major":8,"minor":0,"access":"rwm"}]"#,
        );
        assert!(matches!(device("b", 8, 0).fate(&named), Ok(Fate::Disk(_))));
        assert!(device("c", 10, 232).fate(&named).is_ok());
    }
}
