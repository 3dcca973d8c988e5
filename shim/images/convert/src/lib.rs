//! Makes Nydus images: of a folder, and of an OCI image in a registry or a layout folder. `shim/images/README.md` has the design.

#![forbid(unsafe_code)]

pub mod check;
pub mod convert;
pub mod files;
pub mod layout;
pub mod name;
pub mod oci;
pub mod progress;
pub mod rafs;
pub mod remote;
pub mod store;
pub mod tar;
pub mod values;
