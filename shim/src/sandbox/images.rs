//! Images whose bytes come as they are read: opened at the node's image service, given to the VM as disks, mounted by the
//! agent.
//!
//! ```text
//! Create ── OpenRequest ──> image service        (vmm_api::image)
//!        <─ bootstrap, cache files ─
//!        ── Attach: those and the connection ──> VMM ── Fetch … ──> image service
//!        ── rootfs: image on disk N, overlay ──> agent
//! ImageLost ── the same OpenRequest, with back-off ──> image service
//!           ── ImageChannel ──> VMM
//! ```
//!
//! The connection is the lease on the image's bytes in the cache; the VMM holds it. When the service goes away, what the
//! guest reads waits in the VMM while the image is opened again here: containers notice nothing but time.
//!
//! An image of which all is in the cache can be memory of the VM in place of a disk (`image_dax`, `vmm/docs/pmem.md`). Then
//! there is nothing to wait for, and no connection.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_api::task::Mount;
use agent_api::{SHARE_PATH, disk_serial, image};
use tokio::sync::mpsc;
use vmm_api::frame::FrameError;
use vmm_api::image::OpenRequest;
use vmm_api::{Attached, DeviceName, ErrorCode, FdIndex, NewDevice, Op, Reply};

use crate::container::image::{ImageRoot, Upper};
use crate::error::chain;
use crate::sandbox::Sandbox;
use crate::sandbox::boot::Vm;
use crate::sandbox::images::service::{Opened, open};
use crate::vmm::VmmError;

mod service;

/// How long to wait before an image is opened again at a service that is away, at first and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// An image cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Nobody is there.
    #[error(
        "no image service at {path}: start it on this node with `ctvm-images serve`, or name its socket by `image_service` in the runtime's configuration"
    )]
    Absent {
        /// Where it should be.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The connection failed.
    #[error("image service at {path}")]
    Connection {
        /// Where it is.
        path: PathBuf,
        /// How.
        #[source]
        source: FrameError,
    },
    /// It did not answer.
    #[error("the image service at {path} did not answer within {after:?}")]
    Deadline {
        /// Where it is.
        path: PathBuf,
        /// How long it had.
        after: Duration,
    },
    /// It cannot open the image.
    #[error("the image service cannot open {bootstrap}: {reason}")]
    Refused {
        /// The image.
        bootstrap: PathBuf,
        /// What it said.
        reason: String,
    },
    /// An answer that cannot be one.
    #[error("the image service's answer: {reason}")]
    Answer {
        /// What is wrong with it.
        reason: String,
    },
    /// A guest mounts an EROFS, whatever the image is.
    #[error(
        "the image service hands {bootstrap} out as RAFS {version}, must be 6, an EROFS: is it of another release?"
    )]
    Version {
        /// The image.
        bootstrap: PathBuf,
        /// What it is.
        version: u8,
    },
    /// The VMM, or the guest, does not take it.
    #[error("image {bootstrap} as {by} of the VM")]
    Attach {
        /// The image.
        bootstrap: PathBuf,
        /// How.
        by: By,
        /// What it said.
        #[source]
        source: VmmError,
    },
    /// More than a VM can have.
    #[error("{count} disks, a VM has {limit} for images and block devices")]
    TooMany {
        /// How many there would be.
        count: usize,
        /// How many there can be.
        limit: usize,
    },
}

/// How a VM has an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// As a disk, whose bytes come as they are read.
    Disk,
    /// As memory, which is the page cache of the host.
    Memory,
}

impl By {
    /// As a word.
    pub fn name(self) -> &'static str {
        match self {
            By::Disk => "disk",
            By::Memory => "memory",
        }
    }
}

impl std::fmt::Display for By {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            By::Disk => "a disk",
            By::Memory => "memory",
        })
    }
}

/// An image that a VM has.
#[derive(Debug)]
struct Image {
    container: String,
    /// What is needed to open it again.
    request: OpenRequest,
    by: By,
    bytes: u64,
}

/// A VM's images, by the serial numbers of their disks.
#[derive(Debug, Default)]
pub struct Images(Mutex<HashMap<String, Image>>);

impl Images {
    fn add(&self, serial: String, image: Image) {
        self.lock().insert(serial, image);
    }

    /// Forgets the images of a container; the serial numbers of their disks.
    pub fn forget(&self, container: &str) -> Vec<String> {
        self.lock().extract_if(|_, image| image.container == container).map(|(serial, _)| serial).collect()
    }

    fn request(&self, serial: &str) -> Option<OpenRequest> {
        self.lock().get(serial).map(|image| image.request.clone())
    }

    /// How many there are of a kind.
    pub fn count(&self, by: By) -> u64 {
        self.lock().values().filter(|image| image.by == by).count() as u64
    }

    /// How the VM has the image of a container.
    pub fn of(&self, container: &str) -> Option<By> {
        self.lock().values().find(|image| image.container == container).map(|image| image.by)
    }

    /// How much of the guest's addresses are images.
    fn memory_bytes(&self) -> u64 {
        self.lock().values().filter(|image| image.by == By::Memory).map(|image| image.bytes).sum()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Image>> {
        self.0.lock().expect("no code panics while it holds this lock")
    }
}

/// Bytes of memory for each byte of which a guest's kernel has one in its account of it (`struct page`, 64 bytes for 4 KiB).
const ACCOUNT: u64 = 64;
/// Which part of a guest's memory the account of its images may be: a sixteenth.
const MOST_ACCOUNT: u64 = 16;

/// Where the guest has the root directory of a container that is an image.
pub fn root_path(container: &str) -> String {
    format!("{}/{container}", image::ROOT_PATH)
}

/// Name in the file share of the directory with the writable layer, and of the layers over the image.
pub fn upper_share(container: &str) -> String {
    format!("{container}-upper")
}

/// See [`upper_share`].
pub fn layer_share(container: &str, layer: usize) -> String {
    format!("{container}-layer-{layer}")
}

impl Sandbox {
    /// Opens a container's image and gives it to the VM; the mounts for the agent.
    ///
    /// # Errors
    /// [`OpenError`].
    pub(super) async fn add_image(
        &self,
        vm: &Vm,
        container: &str,
        root: &ImageRoot,
    ) -> Result<Vec<Mount>, OpenError> {
        let request = OpenRequest::Open {
            bootstrap: root.bootstrap.clone(),
            config: root.config.clone(),
            look: self.config.image_dax,
        };
        let opened = open(&self.config.image_service, &request, self.config.timeouts.image()).await?;
        let bytes = opened.bytes()?;
        let (by, serial, attached) =
            self.attach_either_way(vm, container, &opened, bytes, &root.bootstrap).await?;
        log::info!(container:%; "image {}: {by} of {} MiB", root.bootstrap.display(), bytes >> 20);
        let image = Image { container: container.to_owned(), request, by, bytes };
        vm.images.add(serial.clone(), image);
        let lower = format!("{}/{container}", image::LOWER_PATH);
        let overlay = overlay(container, root, &lower);
        let target = if overlay.is_some() { lower } else { root_path(container) };
        let image = opened.mount(&attached, &serial, target, root.maps.is_some())?;
        Ok(std::iter::once(image).chain(overlay).collect())
    }

    /// Gives an image to the VM, as memory where that can be; its serial number, and what came of it.
    async fn attach_either_way(
        &self,
        vm: &Vm,
        container: &str,
        opened: &Opened,
        bytes: u64,
        bootstrap: &Path,
    ) -> Result<(By, String, Attached), OpenError> {
        if self.config.image_dax {
            let reason = match self.why_disk(vm, opened, bytes) {
                Some(reason) => reason,
                None => match self.attach_image(vm, opened, bootstrap, By::Memory).await {
                    Err(error) if is_refusal(&error) => chain(&error),
                    attached => return attached.map(|(serial, attached)| (By::Memory, serial, attached)),
                },
            };
            log::info!(container:%; "image {} becomes a disk: {reason}", bootstrap.display());
        }
        let (serial, attached) = self.attach_image(vm, opened, bootstrap, By::Disk).await?;
        Ok((By::Disk, serial, attached))
    }

    /// Why an image cannot be memory; nothing if it can.
    fn why_disk(&self, vm: &Vm, opened: &Opened, bytes: u64) -> Option<String> {
        if !opened.is_ready() {
            return Some("not all of it is in the cache".to_owned());
        }
        let memory = u64::from(self.resizer.now().memory_mib.unwrap_or(vm.boot.memory_mib)) << 20;
        let most = memory / MOST_ACCOUNT * ACCOUNT;
        let all = vm.images.memory_bytes().saturating_add(bytes);
        (all > most).then(|| {
            format!(
                "the guest's kernel would need {} MiB for its account of it, of {} MiB",
                all.div_ceil(ACCOUNT) >> 20,
                memory >> 20
            )
        })
    }

    async fn attach_image(
        &self,
        vm: &Vm,
        opened: &Opened,
        bootstrap: &Path,
        by: By,
    ) -> Result<(String, Attached), OpenError> {
        let mut disks = vm.disks.lock().await;
        let number = disks.next_number().map_err(|limit| OpenError::TooMany { count: limit + 1, limit })?;
        let serial = disk_serial(number);
        let (disk, fds) = opened.disk(&serial, 0, by);
        let attach = Op::Attach { device: NewDevice::Disk(disk), timeout_ms: self.plug_ms() };
        let failed = |source| OpenError::Attach { bootstrap: bootstrap.to_owned(), by, source };
        match vm.vmm.call(attach, &fds, self.plug_limit()).await.map_err(failed)? {
            (Reply::Attached(attached), _) => {
                disks.add_image(number);
                Ok((serial, attached))
            }
            _ => Err(failed(VmmError::Answer { op: "attach" })),
        }
    }

    /// Takes a container's images away from the VM. Its mounts in the guest are gone.
    pub(super) async fn detach_images(&self, vm: &Vm, container: &str) {
        for serial in vm.images.forget(container) {
            let detach = Op::Detach { device: DeviceName::Disk(serial.clone()), timeout_ms: self.plug_ms() };
            match vm.vmm.call(detach, &[], self.plug_limit()).await {
                Ok(_) => vm.disks.lock().await.remove_image(&serial),
                // It stays, and keeps its number, until the VM ends.
                Err(e) => log::warn!(container:%; "taking disk {serial} away: {}", chain(&e)),
            }
        }
    }

    /// Opens images again whose connection was lost, until the VM ends.
    pub(super) async fn reopen_images(
        self: Arc<Self>,
        vm: Arc<Vm>,
        mut lost: mpsc::UnboundedReceiver<String>,
    ) {
        while let Some(serial) = lost.recv().await {
            log::warn!("disk {serial} has lost the image service: its image is opened again");
            // Each by itself: one that cannot be opened any more holds up no other.
            tokio::spawn(self.clone().reopen_image(vm.clone(), serial));
        }
    }

    async fn reopen_image(self: Arc<Self>, vm: Arc<Vm>, serial: String) {
        let (mut pause, longest) = BACK_OFF;
        let mut said = String::new();
        // Until its container is deleted.
        while let Some(request) = vm.images.request(&serial)
            && vm.vmm.exit().is_none()
        {
            match self.reconnect_image(&vm, &serial, &request).await {
                Ok(()) => return log::info!("disk {serial} has its image again"),
                Err(error) => {
                    let error = chain(&*error);
                    // Once for each reason, however long it takes.
                    if error != said {
                        log::warn!("disk {serial}: {error}");
                        said = error;
                    }
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(longest);
        }
    }

    async fn reconnect_image(
        &self,
        vm: &Vm,
        serial: &str,
        request: &OpenRequest,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let opened = open(&self.config.image_service, request, self.config.timeouts.image()).await?;
        let (blobs, fds) = opened.parts(0);
        let op = Op::ImageChannel { disk: serial.to_owned(), channel: FdIndex(0), blobs };
        vm.vmm.call(op, &fds, self.config.timeouts.vmm()).await?;
        Ok(())
    }
}

/// Whether the VMM or the guest has said no, and has nothing of it.
fn is_refusal(error: &OpenError) -> bool {
    let OpenError::Attach { source: VmmError::Refused { source, .. }, .. } = error else { return false };
    matches!(
        source.code,
        ErrorCode::FailedPrecondition
            | ErrorCode::InvalidArgument
            | ErrorCode::ResourceExhausted
            | ErrorCode::Internal
    )
}

/// The overlay over an image that the guest has mounted at `lower`; none if there is nothing to lie over it.
fn overlay(container: &str, root: &ImageRoot, lower: &str) -> Option<Mount> {
    let share = |name: &str| format!("{SHARE_PATH}/{name}");
    let layers = (0..root.layers.len()).map(|layer| share(&layer_share(container, layer)));
    let lowers: Vec<String> = layers.chain([lower.to_owned()]).collect();
    let mut options = vec![format!("lowerdir={}", lowers.join(":"))];
    match &root.upper {
        Some(Upper { upper, work, .. }) => {
            let parent = share(&upper_share(container));
            options.push(format!("upperdir={parent}/{}", upper.display()));
            options.push(format!("workdir={parent}/{}", work.display()));
        }
        None if root.layers.is_empty() => return None,
        None => options.push("ro".to_owned()),
    }
    // The file share has no `trusted` attributes; its layers have marks for opaque directories in their place.
    options.extend(["userxattr", "index=off", "xino=off"].map(str::to_owned));
    if root.volatile {
        options.push("volatile".to_owned());
    }
    let (type_, source) = ("overlay".to_owned(), "overlay".to_owned());
    Some(Mount { type_, source, options, ..Mount::default() })
}

#[cfg(test)]
mod tests;
