//! One FUSE request at a time: take it apart, ask the share, answer.
//!
//! A request that makes no sense is answered with `EINVAL` and counted; one this server does not know with `ENOSYS`,
//! which the guest's kernel remembers for the rest of the session. That is a way to say "never ask again", and used
//! as such (`flush`, `access`, `syncfs`).

mod messages;
mod reply;
mod request;
pub mod wire;

use rustix::io::Errno;
use virtio::queue::{Reader, Writer};
use virtio::rate::GUEST_ERRORS;
use wire::*;

use crate::metrics::Metrics;
use crate::share::{Name, OpenFlags, Result, SetAttr, Share, Time, WriteFlags};
use reply::{Page, Reply};
use request::Request;

/// What is agreed upon with every guest that offers it. Each with its reason on the design page.
const FEATURES: u64 = init::ASYNC_READ
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::MAX_PAGES
    | init::CACHE_SYMLINKS
    | init::HANDLE_KILLPRIV_V2;

/// Requests that the guest may send without anyone waiting for them (read ahead, direct I/O).
const MAX_BACKGROUND: u16 = 64;

/// Serves one request. Tells how many bytes of `room` hold the answer, from the start.
pub fn serve(share: &Share, metrics: &Metrics, mut request: Reader<'_>, room: Writer<'_>) -> u32 {
    let Ok(header) = request.read_obj::<InHeader>() else {
        metrics.malformed();
        GUEST_ERRORS.warn(format_args!("file request of less than {} bytes", size_of::<InHeader>()));
        return 0;
    };
    metrics.request();
    let silent = Opcode::from_wire(header.opcode).is_some_and(Opcode::is_silent);
    let reply = if silent { None } else { Reply::new(room) };
    let Some(mut reply) = reply else {
        if !silent {
            metrics.malformed();
            GUEST_ERRORS.warn(format_args!("file request {} has no room for an answer", header.opcode));
        } else if let Err(e) = Request::new(&header, request).and_then(|request| forget(share, request)) {
            metrics.malformed();
            GUEST_ERRORS.warn(format_args!("file request {} of {} bytes: {e}", header.opcode, header.len));
        }
        return 0;
    };
    let outcome = Request::new(&header, request).and_then(|request| dispatch(share, request, &mut reply));
    metrics.outcome(&outcome);
    reply.finish(header.unique, outcome)
}

/// Requests without an answer.
fn forget(share: &Share, mut request: Request<'_>) -> Result<()> {
    match request.opcode {
        Opcode::Forget => {
            let ForgetIn { nlookup } = request.take()?;
            share.forget(request.node, nlookup);
        }
        Opcode::BatchForget => {
            let BatchForgetIn { count, .. } = request.take()?;
            for _ in 0..count {
                let ForgetOne { nodeid, nlookup } = request.take()?;
                share.forget(nodeid, nlookup);
            }
        }
        // Nothing waits here so long that it could be interrupted.
        _ => {}
    }
    Ok(())
}

fn dispatch(share: &Share, mut request: Request<'_>, reply: &mut Reply<'_>) -> Result<()> {
    match request.opcode {
        Opcode::Init => start(share, request, reply),
        Opcode::Destroy => {
            share.reset();
            Ok(())
        }
        Opcode::Lookup => {
            let entry = share.lookup(request.node, request.text()?.only_name()?)?;
            reply.put(&EntryOut::from(&entry)).inspect_err(|_| share.forget(entry.node, 1))
        }
        Opcode::Getattr => {
            let GetattrIn { flags, fh, .. } = request.take()?;
            let handle = (flags & GETATTR_FH != 0).then_some(fh);
            reply.put(&AttrOut::from(&share.attr(request.node, handle)?))
        }
        Opcode::Setattr => {
            let change = set_attr(&request.take()?);
            reply.put(&AttrOut::from(&share.set_attr(request.node, &change)?))
        }
        Opcode::Statfs => {
            let stat = share.stat_fs(request.node)?;
            let root = StatfsOut { bsize: 4096, frsize: 4096, namelen: 255, ..StatfsOut::default() };
            reply.put(&stat.map_or(root, |stat| StatfsOut::from(&stat)))
        }
        Opcode::Symlink | Opcode::Mknod | Opcode::Mkdir | Opcode::Link | Opcode::Create => {
            make(share, request, reply)
        }
        Opcode::Unlink => share.remove(request.node, request.text()?.only_name()?, false),
        Opcode::Rmdir => share.remove(request.node, request.text()?.only_name()?, true),
        Opcode::Rename => {
            let RenameIn { newdir } = request.take()?;
            rename(share, request, newdir, 0)
        }
        Opcode::Rename2 => {
            let Rename2In { newdir, flags, .. } = request.take()?;
            rename(share, request, newdir, flags)
        }
        Opcode::Readlink => reply.put_bytes(&share.read_link(request.node)?),
        Opcode::Setxattr | Opcode::Getxattr | Opcode::Listxattr | Opcode::Removexattr => {
            xattr(share, request, reply)
        }
        Opcode::Opendir | Opcode::Readdir | Opcode::Readdirplus | Opcode::Releasedir | Opcode::Fsyncdir => {
            directory(share, request, reply)
        }
        Opcode::Ioctl => Err(Errno::NOTTY),
        // Closing writes nothing back that a write has not; the guest checks permissions by the mode; flushing a
        // whole file system of the host is not for a guest to ask.
        Opcode::Flush | Opcode::Access | Opcode::Syncfs => Err(Errno::NOSYS),
        _ => file(share, request, reply),
    }
}

/// `init`: a session starts, so nothing of an earlier one counts.
fn start(share: &Share, mut request: Request<'_>, reply: &mut Reply<'_>) -> Result<()> {
    let InitIn { major, minor, max_readahead, flags } = request.take()?;
    if major > MAJOR {
        // The guest tries again with the version told here.
        return reply.put(&InitOut { major: MAJOR, minor: MINOR, ..InitOut::default() });
    }
    if major < MAJOR || minor < MINOR_MIN {
        GUEST_ERRORS
            .warn(format_args!("the guest speaks FUSE {major}.{minor}, older than {MAJOR}.{MINOR_MIN}"));
        return Err(Errno::PROTO);
    }
    share.reset();
    let agreed = u32::try_from(u64::from(flags) & FEATURES).expect("no feature above bit 31 is offered");
    log::debug!("guest speaks FUSE {major}.{minor}, offers {flags:#x}, agreed {agreed:#x}");
    reply.put(&InitOut {
        major: MAJOR,
        minor: MINOR,
        max_readahead,
        flags: agreed,
        max_background: MAX_BACKGROUND,
        congestion_threshold: MAX_BACKGROUND / 4 * 3,
        max_write: MAX_DATA,
        time_gran: 1,
        max_pages: MAX_PAGES,
        ..InitOut::default()
    })
}

/// Requests that give a new name, and answer with its node.
fn make(share: &Share, mut request: Request<'_>, reply: &mut Reply<'_>) -> Result<()> {
    let (parent, caller) = (request.node, request.caller);
    let entry = match request.opcode {
        Opcode::Symlink => {
            let mut text = request.text()?;
            let (name, target) = text.two_strings()?;
            share.make_symlink(parent, Name::check(name)?, target, caller)?
        }
        Opcode::Mknod => {
            let MknodIn { mode, rdev, .. } = request.take()?;
            share.make_node(parent, request.text()?.only_name()?, mode, rdev, caller)?
        }
        Opcode::Mkdir => {
            let MkdirIn { mode, .. } = request.take()?;
            share.make_directory(parent, request.text()?.only_name()?, mode, caller)?
        }
        Opcode::Link => {
            let LinkIn { oldnodeid } = request.take()?;
            share.link(oldnodeid, parent, request.text()?.only_name()?)?
        }
        _ => {
            let CreateIn { flags, mode, open_flags, .. } = request.take()?;
            let flags = OpenFlags::new(flags, open_flags & OPEN_KILL_SUIDGID != 0)?;
            let (entry, opened) = share.create(parent, request.text()?.only_name()?, mode, flags, caller)?;
            let told =
                reply.put(&EntryOut::from(&entry)).and_then(|()| reply.put(&OpenOut::new(&opened, false)));
            return told.inspect_err(|_| {
                let _ = share.release(entry.node, opened.handle); // just opened
                share.forget(entry.node, 1);
            });
        }
    };
    reply.put(&EntryOut::from(&entry)).inspect_err(|_| share.forget(entry.node, 1))
}

fn rename(share: &Share, mut request: Request<'_>, to: u64, flags: u32) -> Result<()> {
    let mut text = request.text()?;
    let (old, new) = text.two_strings()?;
    share.rename((request.node, Name::check(old)?), (to, Name::check(new)?), flags)
}

/// Requests about open files.
fn file(share: &Share, mut request: Request<'_>, reply: &mut Reply<'_>) -> Result<()> {
    let node = request.node;
    match request.opcode {
        Opcode::Open => {
            let OpenIn { flags, open_flags } = request.take()?;
            let opened = share.open(node, OpenFlags::new(flags, open_flags & OPEN_KILL_SUIDGID != 0)?)?;
            reply.put(&OpenOut::new(&opened, false)).inspect_err(|_| {
                let _ = share.release(node, opened.handle); // just opened
            })
        }
        Opcode::Read => {
            let ReadIn { fh, offset, size, .. } = request.take()?;
            if size > MAX_DATA {
                return Err(Errno::INVAL);
            }
            share.read(node, fh, offset, size as usize, &mut reply.body).map(drop)
        }
        Opcode::Write => {
            let WriteIn { fh, offset, size, write_flags, flags, .. } = request.take()?;
            if size > MAX_DATA {
                return Err(Errno::INVAL);
            }
            let flags = WriteFlags {
                append: flags & libc::O_APPEND.cast_unsigned() != 0 && write_flags & WRITE_CACHE == 0,
                clear_set_id: write_flags & WRITE_KILL_SUIDGID != 0,
            };
            let written = share.write(node, fh, offset, size as usize, flags, request.data())?;
            reply.put(&WriteOut { size: u32::try_from(written).expect("at most `size`"), padding: 0 })
        }
        Opcode::Release => {
            let ReleaseIn { fh, .. } = request.take()?;
            share.release(node, fh)
        }
        Opcode::Fsync => {
            let FsyncIn { fh, flags, .. } = request.take()?;
            share.sync(node, fh, flags & FSYNC_FDATASYNC != 0)
        }
        Opcode::Fallocate => {
            let FallocateIn { fh, offset, length, mode, .. } = request.take()?;
            share.allocate(node, fh, mode, offset, length)
        }
        Opcode::Lseek => {
            let LseekIn { fh, offset, whence, .. } = request.take()?;
            reply.put(&LseekOut { offset: share.seek(node, fh, offset, whence)? })
        }
        Opcode::CopyFileRange => {
            let CopyFileRangeIn { fh_in, off_in, nodeid_out, fh_out, off_out, len, flags } =
                request.take()?;
            if flags != 0 {
                return Err(Errno::INVAL);
            }
            let copied = share.copy_range((node, fh_in, off_in), (nodeid_out, fh_out, off_out), len)?;
            reply.put(&WriteOut { size: u32::try_from(copied).expect("at most 2^30"), padding: 0 })
        }
        _ => Err(Errno::NOSYS),
    }
}

/// Requests about open directories.
fn directory(share: &Share, mut request: Request<'_>, reply: &mut Reply<'_>) -> Result<()> {
    let node = request.node;
    match request.opcode {
        Opcode::Opendir => {
            let opened = share.open_directory(node)?;
            reply.put(&OpenOut::new(&opened, true)).inspect_err(|_| {
                let _ = share.release(node, opened.handle); // just opened
            })
        }
        Opcode::Readdir | Opcode::Readdirplus => {
            let ReadIn { fh, offset, size, .. } = request.take()?;
            let mut page =
                Page::new(&mut reply.body, size.min(MAX_DATA), request.opcode == Opcode::Readdirplus);
            share.list(node, fh, offset, &mut page)
        }
        Opcode::Releasedir => {
            let ReleaseIn { fh, .. } = request.take()?;
            share.release(node, fh)
        }
        _ => {
            let FsyncIn { fh, flags, .. } = request.take()?;
            share.sync(node, fh, flags & FSYNC_FDATASYNC != 0)
        }
    }
}

/// Requests about extended attributes. A reader that gives no room asks for the length.
fn xattr(share: &Share, mut request: Request<'_>, reply: &mut Reply<'_>) -> Result<()> {
    let node = request.node;
    let (size, bytes) = match request.opcode {
        Opcode::Setxattr => {
            let SetxattrIn { size, flags } = request.take()?;
            let mut text = request.text()?;
            let name = text.string()?;
            let value = text.rest().get(..size as usize).ok_or(Errno::INVAL)?;
            return share.set_xattr(node, text.get(name), value, flags);
        }
        Opcode::Removexattr => return share.remove_xattr(node, request.text()?.only_string()?),
        Opcode::Getxattr => {
            let GetxattrIn { size, .. } = request.take()?;
            (size, share.xattr(node, request.text()?.only_string()?)?)
        }
        _ => {
            let GetxattrIn { size, .. } = request.take()?;
            (size, share.xattrs(node)?)
        }
    };
    if size == 0 {
        let size = u32::try_from(bytes.len()).expect("at most 64 KiB");
        return reply.put(&GetxattrOut { size, padding: 0 });
    }
    if bytes.len() > size as usize {
        return Err(Errno::RANGE);
    }
    reply.put_bytes(&bytes)
}

fn set_attr(wire: &SetattrIn) -> SetAttr {
    let given = |bit: u32| wire.valid & bit != 0;
    let time = |set: u32, now: u32, seconds: u64, nanoseconds: u32| match (given(now), given(set)) {
        (true, _) => Some(Time::Now),
        (false, true) => Some(Time::At(seconds.cast_signed(), nanoseconds)),
        (false, false) => None,
    };
    SetAttr {
        handle: given(fattr::FH).then_some(wire.fh),
        size: given(fattr::SIZE).then_some(wire.size),
        clear_set_id: given(fattr::KILL_SUIDGID),
        mode: given(fattr::MODE).then_some(wire.mode),
        uid: given(fattr::UID).then_some(wire.uid),
        gid: given(fattr::GID).then_some(wire.gid),
        accessed: time(fattr::ATIME, fattr::ATIME_NOW, wire.atime, wire.atimensec),
        modified: time(fattr::MTIME, fattr::MTIME_NOW, wire.mtime, wire.mtimensec),
    }
}
