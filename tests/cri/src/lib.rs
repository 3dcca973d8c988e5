//! containerd as Kubernetes drives it: a client for CRI, and the cases of cri-tools' validation suite that walk
//! through a runtime with it.
//!
//! Everything here blocks: a case is a sequence of calls, and several cases run on several threads.

pub mod cases;
pub mod client;
pub mod daemon;
pub mod harm;
pub mod image_node;
pub mod pod;
pub mod report;
pub mod websocket;

pub use client::Cri;
pub use daemon::Daemon;
pub use image_node::ImageNode;
pub use pod::Pod;
