//! A containerd proxy plugin of type `snapshot` that knows Nydus images.
//!
//! Ordinary layers are unpacked and stacked with overlayfs. Layers of a Nydus image whose blobs the image service fetches as they
//! are read are said to be there already, so that containerd does not download them; only the image's bootstrap is unpacked. A
//! container of such an image gets the mount that runtimes for VMs expect (`fuse.nydus-overlayfs`).
//!
//! ```text
//! containerd ── gRPC ──> service ──> store (what there is)
//!                           └──────> mounts ──> nydus (what containers of Nydus images get)
//! ```
//!
//! Contract: containerd's `core/snapshots/snapshotter.go` and `docs/remote-snapshotter.md`. Not here: blobs and their caches (the image
//! service's), and mounting (the shim's and the agent's).

#![forbid(unsafe_code)]

pub mod error;
pub mod filter;
pub mod mounts;
pub mod nydus;
pub mod remap;
pub mod service;
pub mod snapshot;
pub mod store;

/// Messages and service of `proto/snapshots.proto`.
pub mod api {
    tonic::include_proto!("containerd.services.snapshots.v1");
}
