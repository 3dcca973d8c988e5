//! The device: configuration, activation, pause and resume, and a new connection to the image service.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use virtio::blk::{QUEUE_SIZE, config_space};
use virtio::device::{ActivateError, Activation, VirtioDevice, read_config_bytes};
use virtio::queue::QueueState;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::IntoBytes;

use super::ImageState;
use super::channel::{Channel, ChannelError};
use super::fetches::Fetches;
use super::files::{BlobFile, Files, FilesError, check_blobs};
use super::metrics::Metrics;
use super::serving::{Backing, ID_LEN, Serving};
use super::thread::{ImageThread, Key};

/// How long the main loop may stand still for a turn of the thread to end. Who asked for that is told to come again.
const PATIENCE: Duration = Duration::from_millis(100);

/// A new connection is not taken.
#[derive(Debug, thiserror::Error)]
pub enum RebindError {
    /// It is none.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The files with it are others.
    #[error(transparent)]
    Files(#[from] FilesError),
}

/// What the thread has to say to the main loop: that the connection was lost.
#[derive(Debug)]
pub struct News {
    event: EventFd,
    lost: AtomicBool,
}

impl News {
    fn new() -> io::Result<Self> {
        Ok(News { event: EventFd::new(EFD_NONBLOCK)?, lost: AtomicBool::new(false) })
    }

    /// The connection was lost.
    pub fn tell(&self) {
        self.lost.store(true, Ordering::SeqCst);
        // Fails only when it is raised already.
        let _ = self.event.write(1);
    }
}

/// The disk of an image.
#[derive(Debug)]
pub struct ImageDisk {
    phase: Phase,
    thread: Arc<ImageThread>,
    key: Key,
    sectors: u64,
    blob_sizes: Vec<u64>,
    metrics: Arc<Metrics>,
    news: Arc<News>,
}

#[derive(Debug)]
enum Phase {
    Inactive(Box<Backing>),
    /// With the thread.
    Active,
    Paused(Box<Serving>),
    /// The thread died, and the disk with it.
    Gone,
}

impl ImageDisk {
    /// A disk of `files`, whose bytes come by `channel`, served by `thread`. `id` is the serial number that the guest sees, of
    /// 20 bytes at most; what is longer is cut off. A read fails that has waited for `patience`.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(
        files: Files,
        channel: Channel,
        id: &str,
        patience: Duration,
        thread: Arc<ImageThread>,
    ) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let (sectors, blob_sizes) = (files.sectors(), files.blob_sizes());
        let backing = backing(files, channel, id, patience)?;
        let (metrics, news) = (Arc::clone(&backing.metrics), Arc::clone(&backing.news));
        let phase = Phase::Inactive(Box::new(backing));
        let key = NEXT.fetch_add(1, Ordering::Relaxed);
        Ok(ImageDisk { phase, thread, key, sectors, blob_sizes, metrics, news })
    }

    /// Goes on with another connection to the image service, and with other cache files of the same blobs.
    ///
    /// # Errors
    /// [`RebindError`]; nothing has changed then.
    pub fn rebind(&mut self, channel: OwnedFd, blobs: Vec<BlobFile>) -> Result<(), RebindError> {
        let channel = Channel::new(channel)?;
        check_blobs(&blobs, &self.blob_sizes)?;
        match &mut self.phase {
            Phase::Inactive(backing) => backing.rebind(channel, blobs),
            Phase::Active => self.thread.rebind(self.key, channel, blobs),
            Phase::Paused(serving) => serving.rebind(channel, blobs),
            Phase::Gone => {}
        }
        Ok(())
    }

    /// Whether the connection was lost since the last call.
    pub fn take_lost(&self) -> bool {
        self.news.lost.swap(false, Ordering::SeqCst)
    }

    fn take_backing(&mut self) -> Result<Backing, ActivateError> {
        if self.thread.is_dead() {
            self.phase = Phase::Gone;
        }
        match std::mem::replace(&mut self.phase, Phase::Gone) {
            Phase::Inactive(backing) => Ok(*backing),
            Phase::Paused(serving) => Ok(serving.into_backing()),
            Phase::Active | Phase::Gone => Err(Self::error("the thread that serves it has died".to_owned())),
        }
    }

    fn error(reason: String) -> ActivateError {
        ActivateError { device: Self::NAME, reason }
    }
}

fn backing(files: Files, channel: Channel, id: &str, patience: Duration) -> io::Result<Backing> {
    let mut padded = [0; ID_LEN];
    for (place, byte) in padded.iter_mut().zip(id.bytes()) {
        *place = byte;
    }
    let (metrics, news) = (Arc::new(Metrics::default()), Arc::new(News::new()?));
    Ok(Backing { files, fetches: Fetches::new(channel), id: padded, patience, metrics, news })
}

/// A disk in use without a thread, for fuzzing: each call of what comes back is a turn of the thread. It tells how many
/// requests wait.
///
/// # Errors
/// As [`ImageDisk::new`].
#[cfg(feature = "testing")]
pub fn turns(
    files: Files,
    channel: Channel,
    patience: Duration,
    activation: Activation,
) -> io::Result<impl FnMut() -> usize> {
    let mut serving = Serving::new(backing(files, channel, "fuzz", patience)?, activation);
    Ok(move || {
        serving.look();
        serving.turn();
        serving.heads().len()
    })
}

impl VirtioDevice for ImageDisk {
    type State = ImageState;

    const NAME: &'static str = "image";
    const ID: u32 = VIRTIO_ID_BLOCK;
    const OWN_THREADS: bool = true;

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let bits = [VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_RO];
        bits.into_iter().map(|bit| 1 << bit).sum()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(config_space(self.sectors, 1).as_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if activation.queues.len() != 1 {
            return Err(Self::error(format!("{} queues, it has one", activation.queues.len())));
        }
        let serving = Serving::new(self.take_backing()?, activation);
        self.thread.serve(self.key, Box::new(serving));
        self.phase = Phase::Active;
        Ok(())
    }

    fn on_queue(&mut self, _index: usize) {}

    fn backend(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: `news` owns the descriptor, and is borrowed for as long as the result.
        Some(unsafe { BorrowedFd::borrow_raw(self.news.event.as_raw_fd()) })
    }

    fn on_backend(&mut self) {
        // Empty when a call was spurious. What it is about is for `take_lost` to tell.
        let _ = self.news.event.read();
    }

    /// Blocks until the thread has finished the turn it is at.
    fn pause(&mut self) {
        if matches!(self.phase, Phase::Active) {
            self.phase = self.thread.release(self.key).map_or(Phase::Gone, Phase::Paused);
        }
    }

    fn resume(&mut self) {
        match std::mem::replace(&mut self.phase, Phase::Active) {
            Phase::Paused(serving) => self.thread.serve(self.key, serving),
            other => self.phase = other,
        }
    }

    fn queues(&self) -> Vec<QueueState> {
        match &self.phase {
            Phase::Paused(serving) => vec![serving.queue()],
            _ => vec![QueueState::unused(QUEUE_SIZE)],
        }
    }

    fn save(&self) -> ImageState {
        let waiting = match &self.phase {
            Phase::Paused(serving) => serving.heads(),
            _ => Vec::new(),
        };
        ImageState { sectors: self.sectors, waiting }
    }

    fn restore(&mut self, state: &ImageState, activation: Option<Activation>) -> Result<(), ActivateError> {
        if state.sectors != self.sectors {
            let reason =
                format!("saved was a disk of {} sectors, this one has {}", state.sectors, self.sectors);
            return Err(Self::error(reason));
        }
        let Some(activation) = activation else { return Ok(()) };
        if activation.queues.len() != 1 {
            return Err(Self::error(format!("{} queues, it has one", activation.queues.len())));
        }
        let serving = Serving::restored(self.take_backing()?, activation, &state.waiting);
        self.phase = Phase::Paused(Box::new(serving));
        Ok(())
    }

    /// Blocks until the thread has finished the turn it is at.
    fn reset(&mut self) {
        self.pause();
        if let Ok(backing) = self.take_backing() {
            self.phase = Phase::Inactive(Box::new(backing));
        }
    }

    fn while_still<T>(&mut self, task: impl FnOnce() -> T) -> Option<T> {
        if !matches!(self.phase, Phase::Active) {
            return Some(task());
        }
        let serving = self.thread.try_release(self.key, PATIENCE)?;
        let done = task();
        self.thread.serve(self.key, serving);
        Some(done)
    }

    fn metrics(&self) -> Vec<(&'static str, u64)> {
        self.metrics.list()
    }
}
