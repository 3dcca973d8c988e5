//! The file server behind virtio-fs.
