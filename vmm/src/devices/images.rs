//! Disks that are images: their thread, and their connections to the image service.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use imagefs::image::{BlobFile, Channel, Files, ImageDisk, ImageThread};

use vmm_api::DeviceName;

use super::make::{At, Slot};
use super::{Device, DeviceError, Devices, Host, lock, threads};
use crate::config;
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
        let config::Image { channel, blobs, wait } = image;
        let thread = self.images.clone().ok_or(NoThread).map_err(DeviceError::refused(&at.name))?;
        let channel = Channel::new(channel).map_err(DeviceError::refused(&at.name))?;
        let files = Files::new(bootstrap, blobs).map_err(DeviceError::refused(&at.name))?;
        let failed = |source| DeviceError::Host { device: at.name.clone(), source };
        let disk = ImageDisk::new(files, channel, id, wait, thread).map_err(failed)?;
        self.connect(at, disk, Device::Image)
    }
}

impl Devices {
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
