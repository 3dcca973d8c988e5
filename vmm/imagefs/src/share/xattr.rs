//! Extended attributes that mean the same on both sides.
//!
//! | name | | why |
//! | --- | --- | --- |
//! | `user.*` | yes | data |
//! | `security.capability` | yes | packages ship programs with file capabilities; the guest's kernel honours them |
//! | other `security.*` | no | labels of the host's policy (SELinux, IMA), not of the guest's |
//! | `trusted.*` | no | the host's overlayfs would follow `trusted.overlay.*` that a guest wrote into a layer |
//! | `system.posix_acl_*` | no | the guest's kernel would store access lists and not enforce them |
//!
//! In a layer of an overlay (`MountOptions::layer`) `user.overlay.opaque` is the host's `trusted.overlay.opaque`, of one byte at
//! most: it hides what is below a directory, and leads nowhere. What else the guest's overlay keeps there means nothing on the host.
//!
//! What is refused fails with `EOPNOTSUPP`, as on a file system without such attributes, and is not listed.

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, OFlags, XattrFlags};
use rustix::io::Errno;

use super::{ROOT, Result, Share};

/// Largest value (`XATTR_SIZE_MAX`) and list (`XATTR_LIST_MAX`).
const MAX: usize = 65_536;

fn is_shown(name: &[u8]) -> bool {
    name == b"security.capability" || (name.starts_with(b"user.") && name.len() > 5)
}

/// What an overlay with `userxattr` calls its attributes.
const GUESTS: &[u8] = b"user.overlay.";
/// What marks a directory as opaque, in the guest and on the host.
const GUESTS_OPAQUE: &CStr = c"user.overlay.opaque";
const HOSTS_OPAQUE: &CStr = c"trusted.overlay.opaque";
/// What the guest's overlay keeps besides, which means nothing to the host's. Not every file system has `user` attributes.
const KEPT: &[u8] = b"trusted.ctvm.overlay.";

/// The host's name of an attribute.
fn check(name: &CStr, is_layer: bool) -> Result<Cow<'_, CStr>> {
    let bytes = name.to_bytes();
    if !is_shown(bytes) {
        return Err(Errno::OPNOTSUPP);
    }
    match bytes.strip_prefix(GUESTS).filter(|_| is_layer) {
        None => Ok(name.into()),
        Some(_) if name == GUESTS_OPAQUE => Ok(HOSTS_OPAQUE.into()),
        Some(rest) => CString::new([KEPT, rest].concat()).map(Cow::Owned).map_err(|_| Errno::INVAL),
    }
}

/// The guest's name of one of the host's attributes, each with a NUL behind it, if it is shown.
fn shown(name: &[u8], is_layer: bool) -> Option<Cow<'_, [u8]>> {
    let bare = name.strip_suffix(b"\0")?;
    if is_layer {
        if bare == HOSTS_OPAQUE.to_bytes() {
            return Some(GUESTS_OPAQUE.to_bytes_with_nul().into());
        }
        if let Some(rest) = name.strip_prefix(KEPT) {
            return Some([GUESTS, rest].concat().into());
        }
        if bare.starts_with(GUESTS) {
            return None;
        }
    }
    is_shown(bare).then_some(name.into())
}

impl Share {
    /// The value of an attribute.
    pub fn xattr(&self, node: u64, name: &CStr) -> Result<Vec<u8>> {
        let name = check(name, self.is_layer(node)?)?;
        let file = self.attribute_holder(node)?.ok_or(Errno::NODATA)?;
        grow(rustix::fs::fgetxattr_query(&file, &*name)?, |value| rustix::fs::fgetxattr(&file, &*name, value))
    }

    /// Names of the attributes shown, each with a NUL behind it.
    pub fn xattrs(&self, node: u64) -> Result<Vec<u8>> {
        let Some(file) = self.attribute_holder(node)? else { return Ok(Vec::new()) };
        let names = grow(rustix::fs::flistxattr_query(&file)?, |names| rustix::fs::flistxattr(&file, names))?;
        let is_layer = self.is_layer(node)?;
        let shown = names.split_inclusive(|&byte| byte == 0).filter_map(|name| shown(name, is_layer));
        Ok(shown.flat_map(Cow::into_owned).collect())
    }

    /// Sets an attribute; `flags` as in setxattr(2).
    pub fn set_xattr(&self, node: u64, name: &CStr, value: &[u8], flags: u32) -> Result<()> {
        let is_layer = self.writable(node)?.mount.options.layer;
        let name = check(name, is_layer)?;
        if *name == *HOSTS_OPAQUE && value.len() > 1 {
            return Err(Errno::INVAL);
        }
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let file = self.attribute_holder(node)?.ok_or(Errno::PERM)?;
        rustix::fs::fsetxattr(&file, &*name, value, flags)
    }

    /// Removes an attribute.
    pub fn remove_xattr(&self, node: u64, name: &CStr) -> Result<()> {
        let is_layer = self.writable(node)?.mount.options.layer;
        let name = check(name, is_layer)?;
        let file = self.attribute_holder(node)?.ok_or(Errno::NODATA)?;
        rustix::fs::fremovexattr(&file, &*name)
    }

    fn is_layer(&self, node: u64) -> Result<bool> {
        if node == ROOT {
            return Ok(false);
        }
        Ok(self.nodes.get(node)?.mount.options.layer)
    }

    /// The node, opened, as attributes cannot be read through `O_PATH`. `None` for what cannot have attributes that
    /// are shown: only files and directories can.
    fn attribute_holder(&self, node: u64) -> Result<Option<OwnedFd>> {
        if node == ROOT {
            return Ok(None);
        }
        let node = self.nodes.get(node)?;
        match node.kind {
            FileType::RegularFile | FileType::Directory => self.reopen(&*node, OFlags::RDONLY).map(Some),
            _ => Ok(None),
        }
    }
}

/// Reads what has been said to be `len` bytes long, and may have become longer meanwhile.
fn grow(mut len: usize, read: impl Fn(&mut [u8]) -> Result<usize>) -> Result<Vec<u8>> {
    loop {
        let mut bytes = vec![0; len.clamp(1, MAX)];
        match read(&mut bytes) {
            Ok(got) => {
                bytes.truncate(got);
                return Ok(bytes);
            }
            Err(Errno::RANGE) if len < MAX => len = MAX,
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_opaque_is_so_on_both_sides_of_a_layer() {
        let hosts = |name, is_layer| check(name, is_layer).map(Cow::into_owned);
        assert_eq!(hosts(GUESTS_OPAQUE, true), Ok(HOSTS_OPAQUE.to_owned()));
        assert_eq!(hosts(GUESTS_OPAQUE, false), Ok(GUESTS_OPAQUE.to_owned()));
        assert_eq!(hosts(c"user.overlay.origin", true), Ok(c"trusted.ctvm.overlay.origin".to_owned()));
        assert_eq!(hosts(c"user.x", true), Ok(c"user.x".to_owned()));
        for name in [HOSTS_OPAQUE, c"trusted.overlay.redirect", c"trusted.ctvm.overlay.origin"] {
            assert_eq!(hosts(name, true), Err(Errno::OPNOTSUPP));
        }
        let guests = |name: &'static [u8], is_layer| shown(name, is_layer).map(Cow::into_owned);
        let opaque = b"user.overlay.opaque\0";
        assert_eq!(guests(b"trusted.overlay.opaque\0", true), Some(opaque.to_vec()));
        assert_eq!(guests(b"trusted.overlay.opaque\0", false), None);
        assert_eq!((guests(opaque, true), guests(opaque, false)), (None, Some(opaque.to_vec())));
        let origin = b"user.overlay.origin\0".to_vec();
        assert_eq!(guests(b"trusted.ctvm.overlay.origin\0", true), Some(origin));
        for name in [&b"trusted.ctvm.overlay.origin\0"[..], b"trusted.overlay.origin\0", b"user.x"] {
            assert_eq!(guests(name, false), None);
        }
        assert_eq!(guests(b"user.x\0", true), Some(b"user.x\0".to_vec()));
    }

    #[test]
    fn what_is_shown() {
        for name in ["user.x", "user.overlay.opaque", "security.capability"] {
            assert!(is_shown(name.as_bytes()), "{name}");
        }
        let hidden =
            ["", "user.", "user", "security.selinux", "security.capability2", "trusted.overlay.redirect"];
        for name in hidden.iter().chain(&["system.posix_acl_access", "USER.x"]) {
            assert!(!is_shown(name.as_bytes()), "{name}");
        }
    }
}
