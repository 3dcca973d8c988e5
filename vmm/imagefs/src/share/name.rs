//! A name that is one step down and nothing else.

use std::ffi::CStr;

use rustix::io::Errno;

use super::Result;

/// Longest name in bytes (`NAME_MAX`).
const MAX: usize = 255;

/// The name of a directory entry: not empty, no `/`, neither `.` nor `..`, at most 255 bytes. Only a checked name
/// reaches a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name<'a>(&'a CStr);

impl<'a> Name<'a> {
    /// Checks a name that comes from a guest.
    pub fn check(name: &'a CStr) -> Result<Self> {
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            bytes if bytes.len() > MAX => Err(Errno::NAMETOOLONG),
            _ => Ok(Name(name)),
        }
    }

    /// The name, for a system call.
    pub fn as_cstr(self) -> &'a CStr {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use super::*;

    #[test]
    fn only_one_step_down() {
        for bad in ["", ".", "..", "/", "a/b", "../x", "x/", "/etc"] {
            assert_eq!(Name::check(&CString::new(bad).unwrap()), Err(Errno::INVAL), "{bad:?}");
        }
        for good in ["a", "...", "..a", " ", "\\", "\u{7f}\n", &"n".repeat(255)] {
            assert!(Name::check(&CString::new(good).unwrap()).is_ok(), "{good:?}");
        }
        assert_eq!(Name::check(&CString::new("n".repeat(256)).unwrap()), Err(Errno::NAMETOOLONG));
    }
}
