//! Requests and their replies.

use serde::{Deserialize, Serialize};

use crate::hotplug::{Attached, DeviceName, NewDevice};
use crate::resize::{Resized, Vcpus};
use crate::{ApiError, BlobConfig, Event, FdIndex, Stats, Timeline, VmConfig};

/// One request of the owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Chosen by the owner; names the reply.
    pub id: u64,
    /// What to do.
    pub op: Op,
}

/// An operation on the VM. "Legal" names the states of `vmm`'s lifecycle in which it is accepted; in any other it
/// fails with [`crate::ErrorCode::FailedPrecondition`] and changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Op {
    /// Check the configuration, make the VM, load the kernel. Legal once, first.
    Configure(Box<VmConfig>),
    /// Let the vCPUs run. Legal when configured. Replies [`Reply::Booted`].
    Boot,
    /// Stop all vCPUs and devices between two instructions. Legal when running; paused already succeeds.
    Pause,
    /// Go on after `Pause`. Legal when paused; running already succeeds.
    Resume,
    /// Add a device. Legal when configured, and on a running VM, whose kernel is told over the upcall channel. Replies
    /// [`Reply::Attached`] when the guest's driver has it. An error means that the guest has not got it, or has not said
    /// so: where it may have it all the same, the device is *parked*, that is taken away as soon as the guest has given it
    /// up, and the error says so. It can be detached like any other meanwhile. One attach, detach or resize is under way at
    /// a time; [`crate::config::MAX_WAITING`] wait.
    Attach {
        /// The device.
        device: NewDevice,
        /// How long it may take on a running VM, waiting for its turn and for a guest that still boots included, in
        /// milliseconds, 1 to [`crate::hotplug::MAX_PLUG_MS`].
        timeout_ms: u32,
    },
    /// Take a device away. Legal when running, over the upcall channel; devices of the boot can go, too. Replies
    /// [`Reply::Done`] when the guest has given it up and nothing of it is left here: what was written to a disk is
    /// durable then. An error means that it stays, and that it can be detached later.
    Detach {
        /// Which.
        device: DeviceName,
        /// As for `Attach`.
        timeout_ms: u32,
    },
    /// Give an image a new connection to the image service, after [`Event::ImageLost`]. Reads that wait go on. Legal from
    /// `Configure` to the end.
    ImageChannel {
        /// [`crate::DiskConfig::id`] of the disk.
        disk: String,
        /// The connection on which the image was opened again.
        channel: FdIndex,
        /// Its blobs' cache files, in the same order and of the same sizes as before. They take the old ones' place.
        blobs: Vec<BlobConfig>,
    },
    /// Show a host directory in a file share. Legal from `Configure` to the end; needs [`VmConfig::fs`], or a share that was
    /// attached.
    FsMount {
        /// Tag of the share; that of [`VmConfig::fs`] when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        share: Option<String>,
        /// Name of the directory in the share's root: 1 to 255 bytes, no `/`, not `.` or `..`.
        at: String,
        /// The directory (`O_PATH` will do). Nothing above it can be reached through it.
        dir: FdIndex,
        /// The guest may not write below it.
        #[serde(default)]
        read_only: bool,
        /// How far the guest may trust what it remembers of it.
        #[serde(default)]
        cache: FsCache,
        /// It is a layer of an overlay that the guest mounts with `userxattr`: the guest's marks for opaque directories are
        /// those of the host's overlays.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        layer: bool,
    },
    /// Take a directory out of the share. Files that the guest holds open stay readable until it closes them.
    FsUnmount {
        /// The share given to `FsMount`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        share: Option<String>,
        /// The name given to `FsMount`.
        at: String,
    },
    /// Dial a port of the guest. Replies [`Reply::Connected`] when the guest accepted. Legal when running.
    VsockConnect {
        /// Guest port.
        port: u32,
        /// How long to wait for the guest, in milliseconds, 1 to 60,000.
        timeout_ms: u32,
    },
    /// Grow or shrink the VM, over the upcall channel. Legal when running. Replies [`Reply::Resized`], however far it
    /// came; an error means that nothing was tried. One resize is under way at a time, one waits, and a later one takes
    /// its place.
    Resize {
        /// Which vCPUs shall be online; as they are when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        vcpus: Option<Vcpus>,
        /// How much memory the guest shall have, in MiB: a multiple of 2, from the size at boot to
        /// [`crate::MemoryConfig::max_mib`]; as it is when absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        memory_mib: Option<u32>,
        /// How long it may take, waiting for its turn and for a guest that still boots included, in milliseconds, 1 to
        /// [`crate::resize::MAX_RESIZE_MS`].
        timeout_ms: u32,
    },
    /// Ask the guest to do without this much of its memory, which goes back to the host, or, by less than last time, to have
    /// some of it again. Legal from `Configure` to the end; needs [`VmConfig::balloon`]. The reply says that the guest is
    /// asked: it gives as it can, and takes pages back by itself rather than kill a process. `Stats` tells how far it is:
    /// `target_bytes` and `actual_bytes` of the device `balloon`.
    Balloon {
        /// Size of the balloon in MiB: 0 to [`crate::MemoryConfig::max_mib`].
        mib: u32,
    },
    /// Counters. Legal in every state.
    Stats,
    /// Flush disks, stop, exit. Legal in every state. The reply comes before [`Event::Exiting`].
    Shutdown,
}

/// For how long a guest may believe what it was told about a host directory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FsCache {
    /// The host writes too: names and attributes count for a second, contents from open to open.
    #[default]
    Shared,
    /// The host writes too, and the guest sees it at once: nothing counts.
    Live,
    /// Only this guest writes, through this mount alone: everything counts, file contents stay in guest memory.
    Exclusive,
}

/// What the VMM sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Message {
    /// The one answer to a request.
    Reply {
        /// [`Request::id`]; 0 where the request could not be read so far.
        id: u64,
        /// How it ended.
        outcome: Outcome,
    },
    /// Something happened.
    Event(Event),
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Done.
    Ok(Reply),
    /// Not done; nothing changed.
    Err(ApiError),
}

/// What a successful operation answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Reply {
    /// Nothing to say.
    Done,
    /// The vCPUs run.
    Booted {
        /// When each stage ended.
        timeline: Timeline,
    },
    /// The guest accepted the connection.
    Connected {
        /// A connected stream socket.
        socket: FdIndex,
    },
    /// Counters.
    Stats(Box<Stats>),
    /// A resize has ended.
    Resized(Resized),
    /// A device has been added.
    Attached(Attached),
}
