//! What end-to-end tests stand on: a real containerd, the products as they ship, and a census of everything that
//! could be left behind.
//!
//! The tests run as root in the lab machine, where `cargo xtask test` puts what they need below [`BIN`] and
//! [`SHARE`]. They use the host's clock only for bounds on waiting, never for verdicts.

pub mod api;
pub mod census;
pub mod command;
pub mod containerd;
pub mod events;
pub mod image_reader;
pub mod image_service;
pub mod layer;
pub mod link;
pub mod loop_device;
pub mod netns;
pub mod node;
pub mod oci;
pub mod service;
pub mod small_fs;
pub mod tap;
pub mod tiny;
pub mod vm;
pub mod wire;

pub use api::Status;
pub use census::Census;
pub use command::{Finished, md5, run, run_with_input};
pub use containerd::{Containerd, Setup};
pub use events::Events;
pub use link::Link;
pub use loop_device::LoopDevice;
pub use netns::Netns;
pub use service::Service;
pub use small_fs::SmallFs;
pub use tap::Tap;
pub use wire::Wire;

/// Where the product's binaries are in the lab machine.
pub const BIN: &str = "/opt/ctvm/bin";
/// Where guest kernel, guest image and the test container image are in the lab machine.
pub const SHARE: &str = "/opt/ctvm/share";
/// Name of the container image in `SHARE/image.tar`.
pub const IMAGE: &str = "ctvm.local/demo:latest";

/// Whether guests have a kernel that looks for its own mistakes: `cargo xtask test --debug-kernel`. Then what it finds fails
/// the test.
pub fn debug_kernel() -> bool {
    std::env::var_os("CTVM_DEBUG_KERNEL").is_some()
}

/// How long a guest may take over what takes others `usual`: several times as long with such a kernel.
pub fn patience(usual: std::time::Duration) -> std::time::Duration {
    usual * if debug_kernel() { 4 } else { 1 }
}

/// Whether there is time for as much as the lab can hold: `cargo xtask test --long`.
pub fn long() -> bool {
    std::env::var_os("CTVM_LONG").is_some()
}
