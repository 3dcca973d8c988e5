//! Being told of changes.

use std::fs;
use std::mem::MaybeUninit;
use std::path::Path;

use anyhow::{Result, ensure};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;

use crate::Operation;

pub const OPERATIONS: &[Operation] = &[("inotify", changes)];

fn changes(dir: &Path) -> Result<()> {
    let watcher = inotify::init(CreateFlags::NONBLOCK)?;
    inotify::add_watch(&watcher, dir, WatchFlags::ALL_EVENTS)?;
    fs::write(dir.join("f"), "x")?;
    fs::rename(dir.join("f"), dir.join("g"))?;
    fs::remove_file(dir.join("g"))?;
    let mut room = [MaybeUninit::uninit(); 4096];
    let mut reader = Reader::new(&watcher, &mut room);
    let mut seen = ReadFlags::empty();
    loop {
        match reader.next() {
            Ok(event) => seen |= event.events(),
            // All of them are there: they are caused by this process.
            Err(Errno::AGAIN) => break,
            Err(error) => return Err(error.into()),
        }
    }
    let wanted = ReadFlags::CREATE
        | ReadFlags::MODIFY
        | ReadFlags::CLOSE_WRITE
        | ReadFlags::MOVED_FROM
        | ReadFlags::MOVED_TO
        | ReadFlags::DELETE;
    ensure!(seen.contains(wanted), "seen: {seen:?}");
    Ok(())
}
