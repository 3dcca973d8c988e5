//! A guest's FUSE client, reduced to what tests say: one call, one answer. The server runs on a thread of its own, under
//! the filter that it has in the VMM.

#![expect(dead_code, reason = "each test binary uses its own part")]

use std::ffi::OsStr;
use std::fs::File;
use std::mem::size_of;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use crate::confine::confine;
use imagefs::wire::{self, *};
use imagefs::{FileServer, Limits, MountOptions};
use virtio::fs::FsServer;
use virtio::queue::{Reader, Writer};
use vm_memory::VolatileSlice;
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub const ROOT: u64 = 1;

/// Generous for tests, and below any machine's limit of descriptors.
pub const LIMITS: Limits = Limits { nodes: 4096, handles: 512 };

/// Errors are positive errno values.
pub type Result<T> = std::result::Result<T, i32>;

/// Calls a server.
#[derive(Debug)]
pub struct Client {
    pub server: Arc<FileServer>,
    pub uid: u32,
    pub gid: u32,
    requests: Sender<(Vec<u8>, usize)>,
    answers: Receiver<Vec<u8>>,
}

/// An open file or directory.
#[derive(Debug, Clone, Copy)]
pub struct Handle {
    pub node: u64,
    pub fh: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    pub name: String,
    pub ino: u64,
    pub off: u64,
    pub kind: u32,
    /// 0 for entries without a node.
    pub node: u64,
}

/// Opens a directory as the shim does.
pub fn directory(path: &Path) -> OwnedFd {
    File::open(path).unwrap().into()
}

fn serve(server: &FileServer, mut request: Vec<u8>, room: usize) -> Vec<u8> {
    let mut reply = vec![0xa5; room];
    // In two parts each, as a guest's buffers are.
    let slices = |bytes: &mut Vec<u8>| {
        let middle = bytes.len() / 3;
        let (first, second) = bytes.split_at_mut(middle);
        // SAFETY: both halves live in a vector that outlives the call, and nothing else touches them meanwhile.
        let slice = |part: &mut [u8]| unsafe { VolatileSlice::new(part.as_mut_ptr(), part.len()) };
        vec![slice(first), slice(second)]
    };
    let len = server.handle(Reader::new(slices(&mut request)), Writer::new(slices(&mut reply)));
    reply.truncate(len as usize);
    reply
}

impl Client {
    /// A server with nothing mounted, its session begun.
    pub fn new() -> Self {
        Self::with(LIMITS)
    }

    pub fn with(limits: Limits) -> Self {
        let client = Self::unstarted(limits);
        client.init().unwrap();
        client
    }

    pub fn unstarted(limits: Limits) -> Self {
        Self::of_server(Arc::new(FileServer::new(limits).unwrap()))
    }

    /// One more client of a server, with a thread of its own.
    pub fn of_server(server: Arc<FileServer>) -> Self {
        let (requests, to_serve) = channel::<(Vec<u8>, usize)>();
        let (answer, answers) = channel();
        let serving = server.clone();
        std::thread::spawn(move || {
            serving.enter_thread().unwrap();
            confine("fs");
            for (request, room) in to_serve {
                if answer.send(serve(&serving, request, room)).is_err() {
                    return;
                }
            }
        });
        Client { server, uid: 0, gid: 0, requests, answers }
    }

    /// A client with `path` mounted as `m`, and its node.
    pub fn of(path: &Path, options: MountOptions) -> (Self, u64) {
        let client = Self::new();
        client.server.mount("m", directory(path), options).unwrap();
        let node = client.lookup(ROOT, "m").unwrap().nodeid;
        (client, node)
    }

    /// Sends bytes as they are. Gives the answer as it came, cut to the length the server told.
    pub fn raw(&self, request: &[u8], room: usize) -> Vec<u8> {
        self.requests.send((request.to_vec(), room)).expect("the server's thread lives");
        self.answers.recv().expect("the server's thread lives")
    }

    /// Sends a request with these parts behind the header. Gives the body of the answer.
    pub fn call(&self, opcode: Opcode, node: u64, parts: &[&[u8]], room: usize) -> Result<Vec<u8>> {
        let body: Vec<u8> = parts.concat();
        let header = InHeader {
            len: u32::try_from(size_of::<InHeader>() + body.len()).unwrap(),
            opcode: opcode as u32,
            unique: 77,
            nodeid: node,
            uid: self.uid,
            gid: self.gid,
            pid: 1,
            ..InHeader::default()
        };
        let answer = self.raw(&[header.as_bytes(), &body].concat(), size_of::<OutHeader>() + room);
        let (header, body) = OutHeader::read_from_prefix(&answer).expect("an answer");
        assert_eq!((header.unique, header.len as usize), (77, answer.len()));
        if header.error == 0 {
            Ok(body.to_vec())
        } else {
            assert!(body.is_empty() && header.error < 0);
            Err(-header.error)
        }
    }

    pub fn ask<T: FromBytes>(&self, opcode: Opcode, node: u64, parts: &[&[u8]]) -> Result<T> {
        let body = self.call(opcode, node, parts, size_of::<T>())?;
        Ok(T::read_from_bytes(&body).expect("an answer of the right length"))
    }

    pub fn tell(&self, opcode: Opcode, node: u64, parts: &[&[u8]]) -> Result<()> {
        self.call(opcode, node, parts, 0).map(|body| assert!(body.is_empty()))
    }

    /// A request that has no answer.
    pub fn silent<T: IntoBytes + Immutable>(&self, opcode: Opcode, node: u64, body: &T) {
        let len = u32::try_from(size_of::<InHeader>() + size_of::<T>()).unwrap();
        let header = InHeader { len, opcode: opcode as u32, nodeid: node, ..InHeader::default() };
        assert!(self.raw(&[header.as_bytes(), body.as_bytes()].concat(), 0).is_empty());
    }

    pub fn init(&self) -> Result<InitOut> {
        let init = InitIn { major: 7, minor: 37, max_readahead: 131_072, flags: u32::MAX };
        self.ask(Opcode::Init, 0, &[init.as_bytes(), &[0; 48]])
    }

    pub fn lookup(&self, parent: u64, name: &str) -> Result<EntryOut> {
        self.ask(Opcode::Lookup, parent, &[&text(name)])
    }

    pub fn walk(&self, from: u64, path: &str) -> Result<EntryOut> {
        let mut found = Err(libc::ENOENT);
        let mut node = from;
        for name in path.split('/') {
            let entry = self.lookup(node, name)?;
            node = entry.nodeid;
            found = Ok(entry);
        }
        found
    }

    pub fn forget(&self, node: u64, count: u64) {
        self.silent(Opcode::Forget, node, &ForgetIn { nlookup: count });
    }

    pub fn getattr(&self, node: u64, fh: Option<u64>) -> Result<Attr> {
        let flags = if fh.is_some() { GETATTR_FH } else { 0 };
        let ask = GetattrIn { flags, dummy: 0, fh: fh.unwrap_or(0) };
        self.ask::<AttrOut>(Opcode::Getattr, node, &[ask.as_bytes()]).map(|out| out.attr)
    }

    pub fn setattr(&self, node: u64, set: &SetattrIn) -> Result<Attr> {
        self.ask::<AttrOut>(Opcode::Setattr, node, &[set.as_bytes()]).map(|out| out.attr)
    }

    pub fn chmod(&self, node: u64, mode: u32) -> Result<Attr> {
        self.setattr(node, &SetattrIn { valid: fattr::MODE, mode, ..SetattrIn::default() })
    }

    pub fn truncate(&self, node: u64, size: u64) -> Result<Attr> {
        self.setattr(node, &SetattrIn { valid: fattr::SIZE, size, ..SetattrIn::default() })
    }

    pub fn create(&self, parent: u64, name: &str, mode: u32, flags: i32) -> Result<(EntryOut, Handle)> {
        let ask =
            CreateIn { flags: flags.cast_unsigned(), mode: mode | libc::S_IFREG, ..CreateIn::default() };
        let room = size_of::<EntryOut>() + size_of::<OpenOut>();
        let body = self.call(Opcode::Create, parent, &[ask.as_bytes(), &text(name)], room)?;
        let (entry, open) = EntryOut::read_from_prefix(&body).unwrap();
        let fh = OpenOut::read_from_bytes(open).unwrap().fh;
        Ok((entry, Handle { node: entry.nodeid, fh }))
    }

    pub fn open(&self, node: u64, flags: i32) -> Result<Handle> {
        let ask = OpenIn { flags: flags.cast_unsigned(), open_flags: 0 };
        let out: OpenOut = self.ask(Opcode::Open, node, &[ask.as_bytes()])?;
        Ok(Handle { node, fh: out.fh })
    }

    pub fn opendir(&self, node: u64) -> Result<Handle> {
        let out: OpenOut = self.ask(Opcode::Opendir, node, &[OpenIn::default().as_bytes()])?;
        Ok(Handle { node, fh: out.fh })
    }

    pub fn release(&self, handle: Handle) -> Result<()> {
        let ask = ReleaseIn { fh: handle.fh, ..ReleaseIn::default() };
        self.tell(Opcode::Release, handle.node, &[ask.as_bytes()])
    }

    pub fn read(&self, handle: Handle, offset: u64, size: u32) -> Result<Vec<u8>> {
        let ask = ReadIn { fh: handle.fh, offset, size, ..ReadIn::default() };
        self.call(Opcode::Read, handle.node, &[ask.as_bytes()], size as usize)
    }

    pub fn write(&self, handle: Handle, offset: u64, data: &[u8]) -> Result<u32> {
        self.write_with(handle, offset, data, 0, 0)
    }

    pub fn write_with(
        &self,
        handle: Handle,
        offset: u64,
        data: &[u8],
        write_flags: u32,
        flags: i32,
    ) -> Result<u32> {
        let size = u32::try_from(data.len()).unwrap();
        let flags = flags.cast_unsigned();
        let ask = WriteIn { fh: handle.fh, offset, size, write_flags, flags, ..WriteIn::default() };
        self.ask::<WriteOut>(Opcode::Write, handle.node, &[ask.as_bytes(), data]).map(|out| out.size)
    }

    pub fn mkdir(&self, parent: u64, name: &str, mode: u32) -> Result<EntryOut> {
        self.ask(Opcode::Mkdir, parent, &[MkdirIn { mode, umask: 0 }.as_bytes(), &text(name)])
    }

    pub fn mknod(&self, parent: u64, name: &str, mode: u32, rdev: u32) -> Result<EntryOut> {
        let ask = MknodIn { mode, rdev, ..MknodIn::default() };
        self.ask(Opcode::Mknod, parent, &[ask.as_bytes(), &text(name)])
    }

    pub fn symlink(&self, parent: u64, name: &str, target: &str) -> Result<EntryOut> {
        self.ask(Opcode::Symlink, parent, &[&text(name), &text(target)])
    }

    pub fn readlink(&self, node: u64) -> Result<String> {
        self.call(Opcode::Readlink, node, &[], 4096).map(|text| String::from_utf8(text).unwrap())
    }

    pub fn link(&self, node: u64, parent: u64, name: &str) -> Result<EntryOut> {
        self.ask(Opcode::Link, parent, &[LinkIn { oldnodeid: node }.as_bytes(), &text(name)])
    }

    pub fn unlink(&self, parent: u64, name: &str) -> Result<()> {
        self.tell(Opcode::Unlink, parent, &[&text(name)])
    }

    pub fn rmdir(&self, parent: u64, name: &str) -> Result<()> {
        self.tell(Opcode::Rmdir, parent, &[&text(name)])
    }

    pub fn rename(&self, from: (u64, &str), to: (u64, &str), flags: u32) -> Result<()> {
        let ask = Rename2In { newdir: to.0, flags, padding: 0 };
        self.tell(Opcode::Rename2, from.0, &[ask.as_bytes(), &text(from.1), &text(to.1)])
    }

    pub fn setxattr(&self, node: u64, name: &str, value: &[u8]) -> Result<()> {
        let ask = SetxattrIn { size: u32::try_from(value.len()).unwrap(), flags: 0 };
        self.tell(Opcode::Setxattr, node, &[ask.as_bytes(), &text(name), value])
    }

    pub fn getxattr(&self, node: u64, name: &str, size: u32) -> Result<Vec<u8>> {
        let ask = GetxattrIn { size, padding: 0 };
        self.call(Opcode::Getxattr, node, &[ask.as_bytes(), &text(name)], size.max(8) as usize)
    }

    pub fn listxattr(&self, node: u64, size: u32) -> Result<Vec<u8>> {
        self.call(
            Opcode::Listxattr,
            node,
            &[GetxattrIn { size, padding: 0 }.as_bytes()],
            size.max(8) as usize,
        )
    }

    /// One page of a listing.
    pub fn page(&self, handle: Handle, offset: u64, size: u32, plus: bool) -> Result<Vec<DirEntry>> {
        let ask = ReadIn { fh: handle.fh, offset, size, ..ReadIn::default() };
        let opcode = if plus { Opcode::Readdirplus } else { Opcode::Readdir };
        let body = self.call(opcode, handle.node, &[ask.as_bytes()], size as usize)?;
        assert!(body.len() <= size as usize);
        let mut rest = body.as_slice();
        let mut entries = Vec::new();
        while !rest.is_empty() {
            let mut node = 0;
            if plus {
                let entry;
                (entry, rest) = EntryOut::read_from_prefix(rest).unwrap();
                node = entry.nodeid;
            }
            let (dirent, behind) = Dirent::read_from_prefix(rest).unwrap();
            let name = OsStr::from_bytes(&behind[..dirent.namelen as usize]).to_str().unwrap().to_owned();
            entries.push(DirEntry { name, ino: dirent.ino, off: dirent.off, kind: dirent.kind, node });
            rest = &behind[(dirent.namelen as usize).next_multiple_of(8)..];
        }
        Ok(entries)
    }

    /// The whole listing, by pages of 4 KiB as Linux asks for them.
    pub fn list(&self, node: u64, plus: bool) -> Result<Vec<DirEntry>> {
        let handle = self.opendir(node)?;
        let mut all: Vec<DirEntry> = Vec::new();
        loop {
            let page = self.page(handle, all.last().map_or(0, |entry| entry.off), 4096, plus)?;
            if page.is_empty() {
                break;
            }
            all.extend(page);
        }
        self.release(handle)?;
        Ok(all)
    }

    pub fn count(&self, name: &str) -> u64 {
        self.server.metrics().iter().find(|(known, _)| *known == name).unwrap().1
    }
}

/// A string as it lies in a request.
pub fn text(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

/// Everything that the protocol can ask for.
pub fn opcodes() -> &'static [Opcode] {
    wire::Opcode::ALL
}
