//! Images: disks with their thread and their connections to the image service, and such as are memory.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use imagefs::image::{BlobFile, Channel, Files, ImageDisk, ImageThread};

use virtio::pmem::{Pmem, PmemConfig};
use vmm_api::{DeviceName, MemoryRange};

use super::device::while_still;
use super::make::{At, Slot};
use super::{Device, DeviceError, DeviceKey, Devices, Host, lock, threads};
use crate::config;
use crate::memory::FilePart;
use crate::seccomp::Role;

/// A new connection cannot be given to a disk.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// There is no such disk.
    #[error("no disk {id:?} is an image")]
    NoImage {
        /// Serial number asked for.
        id: String,
    },
    /// The disk refuses it.
    #[error("disk {id:?}")]
    Refused {
        /// Its serial number.
        id: String,
        /// Why.
        #[source]
        source: imagefs::image::RebindError,
    },
}

impl Host {
    /// A disk that is an image.
    pub(super) fn image(
        &self,
        at: At,
        bootstrap: OwnedFd,
        image: config::Image,
        id: &str,
    ) -> Result<Slot, DeviceError> {
        let config::Image { channel, blobs, wait, dax: _ } = image;
        let thread = self.images.clone().ok_or(NoThread).map_err(DeviceError::refused(&at.name))?;
        let channel = Channel::new(channel).map_err(DeviceError::refused(&at.name))?;
        let files = Files::new(bootstrap, blobs).map_err(DeviceError::refused(&at.name))?;
        let failed = |source| DeviceError::Host { device: at.name.clone(), source };
        let disk = ImageDisk::new(files, channel, id, wait, thread).map_err(failed)?;
        self.connect(at, disk, Device::Image)
    }
}

impl Host {
    /// An image, all of which is in its files, as memory.
    pub(super) fn image_memory(
        &self,
        at: At,
        bootstrap: OwnedFd,
        image: config::Image,
    ) -> Result<Slot, DeviceError> {
        let window = self.files.as_ref().ok_or(NoWindow).map_err(DeviceError::refused(&at.name))?;
        let files = Files::new(bootstrap, image.blobs).map_err(DeviceError::refused(&at.name))?;
        let parts: Vec<_> =
            files.parts().map(|(file, part)| FilePart { file, at: part.start, len: part.bytes }).collect();
        let shown = window.show(&parts).map_err(DeviceError::refused(&at.name))?;
        let (slot, name) = (at.slot, at.name.clone());
        self.kvm
            .show_files(slot, &shown)
            .map_err(|source| DeviceError::Kvm { device: name.clone(), source })?;
        let place = shown.place();
        let config = PmemConfig { start: place.gpa, size: place.len, writes: Arc::clone(shown.writes()) };
        match self.connect(at, Pmem::new(config), Device::Pmem) {
            Ok(mut made) => {
                shown.publish();
                log::info!("{name}: an image of {} MiB, shown at {:#x}", place.len >> 20, place.gpa);
                made.shown = Some(shown);
                Ok(made)
            }
            Err(error) => {
                if let Err(error) = self.kvm.hide_files(slot, &shown) {
                    log::error!("take {name} away: {error}");
                    shown.stay();
                }
                Err(error)
            }
        }
    }
}

impl Devices {
    /// Where the image with this key is shown, if it is memory.
    pub fn image_memory(&self, key: DeviceKey) -> Option<MemoryRange> {
        let place = self.by_key(key)?.shown.as_ref()?.place();
        Some(MemoryRange { start: place.gpa, bytes: place.len })
    }

    /// Takes from devices what `slot` shows, before it is taken from the guest.
    pub(super) fn withdraw(&self, slot: &Slot) {
        let Some(shown) = &slot.shown else { return };
        shown.withdraw();
        let others = self.bystanders.lock().expect("nothing panics under this lock");
        if !while_still(&others, &mut || {}) {
            log::warn!(
                "{} stays mapped until the VM ends: the file server is at a long request",
                slot.at.name
            );
            shown.stay();
        }
    }

    /// Starts the thread that images need. Threads inherit filters, so this must come before the main thread has one.
    pub fn start_image_thread(&mut self) -> Result<(), DeviceError> {
        let failed = |source| DeviceError::Host { device: "image".to_owned(), source };
        let thread = ImageThread::new(threads::confined(Role::Image, &self.host.ends)).map_err(failed)?;
        self.host.images = Some(Arc::new(thread));
        Ok(())
    }

    /// Gives a disk a new connection to the image service.
    pub fn connect_image(
        &self,
        id: &str,
        channel: OwnedFd,
        blobs: Vec<BlobFile>,
    ) -> Result<(), ChannelError> {
        let name = DeviceName::Disk(id.to_owned());
        let image = self.slots().find_map(|slot| match &slot.device {
            Device::Image(shared) if slot.at.title.as_ref() == Some(&name) => Some(shared),
            _ => None,
        });
        let image = image.ok_or_else(|| ChannelError::NoImage { id: id.to_owned() })?;
        let rebound = lock(image).device_mut().rebind(channel, blobs);
        rebound.map_err(|source| ChannelError::Refused { id: id.to_owned(), source })
    }

    /// Serial number of the disk in `slot`, if it is an image whose connection was lost since the last call.
    pub fn take_lost_image(&self, slot: u16) -> Option<String> {
        let slot = self.slot(slot)?;
        let Device::Image(shared) = &slot.device else { return None };
        match &slot.at.title {
            Some(DeviceName::Disk(id)) if lock(shared).device().take_lost() => Some(id.clone()),
            _ => None,
        }
    }
}

/// An image for a VM that was not made for any.
#[derive(Debug, thiserror::Error)]
#[error("this VM was configured without a thread for images (`images`)")]
struct NoThread;

/// An image as memory, for a VM that has no addresses for it.
#[derive(Debug, thiserror::Error)]
#[error(
    "this VM has no guest addresses for images: it was configured without (`images`), or its memory takes them all"
)]
struct NoWindow;
