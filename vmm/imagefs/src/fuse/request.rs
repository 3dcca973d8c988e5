//! Taking a request apart.

use std::ffi::CStr;

use rustix::io::Errno;
use virtio::queue::Reader;
use zerocopy::{FromBytes, IntoBytes};

use super::wire::{InHeader, Opcode};
use crate::share::{Name, Result};
use crate::thread::Caller;

/// Longest text after the fixed part of a request: an attribute's name and its value (`XATTR_SIZE_MAX`), with room
/// for their NULs. Names and link texts are shorter.
const MAX_TEXT: usize = 65_536 + 256 + 2;

/// A request whose header has been read.
#[derive(Debug)]
pub struct Request<'m> {
    /// What the guest wants.
    pub opcode: Opcode,
    /// The node that it is about.
    pub node: u64,
    /// Who wants it.
    pub caller: Caller,
    /// What follows the header.
    rest: Reader<'m>,
}

impl<'m> Request<'m> {
    /// Checks a header against what follows it.
    pub fn new(header: &InHeader, rest: Reader<'m>) -> Result<Self> {
        let opcode = Opcode::from_wire(header.opcode).ok_or(Errno::NOSYS)?;
        let len = (header.len as usize).checked_sub(size_of::<InHeader>()).ok_or(Errno::INVAL)?;
        if len > rest.left() {
            return Err(Errno::INVAL);
        }
        let caller = Caller { uid: header.uid, gid: header.gid };
        Ok(Request { opcode, node: header.nodeid, caller, rest })
    }

    /// The next fixed part.
    pub fn take<T: FromBytes + IntoBytes>(&mut self) -> Result<T> {
        self.rest.read_obj().map_err(|_| Errno::INVAL)
    }

    /// What follows, to be written to a file.
    pub fn data(&mut self) -> &mut Reader<'m> {
        &mut self.rest
    }

    /// What follows, as text and names. Read once: the guest can change it under our hands.
    pub fn text(&mut self) -> Result<Text> {
        let mut bytes = vec![0; self.rest.left().min(MAX_TEXT + 1)];
        if bytes.len() > MAX_TEXT {
            return Err(Errno::TOOBIG);
        }
        self.rest.read_exact(&mut bytes).map_err(|_| Errno::INVAL)?;
        Ok(Text { bytes, taken: 0 })
    }
}

/// Strings with a NUL behind each, one after the other.
#[derive(Debug)]
pub struct Text {
    bytes: Vec<u8>,
    taken: usize,
}

impl Text {
    /// The next string.
    pub fn string(&mut self) -> Result<std::ops::Range<usize>> {
        let string = CStr::from_bytes_until_nul(&self.bytes[self.taken..]).map_err(|_| Errno::INVAL)?;
        let range = self.taken..self.taken + string.to_bytes_with_nul().len();
        self.taken = range.end;
        Ok(range)
    }

    /// The string that [`Text::string`] found.
    pub fn get(&self, range: std::ops::Range<usize>) -> &CStr {
        CStr::from_bytes_with_nul(&self.bytes[range]).expect("a range of `string` ends with its only NUL")
    }

    /// What is left.
    pub fn rest(&self) -> &[u8] {
        &self.bytes[self.taken..]
    }

    /// The next string as the only one.
    pub fn only_string(&mut self) -> Result<&CStr> {
        let range = self.string()?;
        Ok(self.get(range))
    }

    /// The next string as the name of a directory entry.
    pub fn only_name(&mut self) -> Result<Name<'_>> {
        Name::check(self.only_string()?)
    }

    /// The next two strings.
    pub fn two_strings(&mut self) -> Result<(&CStr, &CStr)> {
        let (first, second) = (self.string()?, self.string()?);
        Ok((self.get(first), self.get(second)))
    }
}
