//! Makes Nydus images: of a folder, and of an OCI image in a registry or a layout folder. `shim/images/README.md` has the design.

#![forbid(unsafe_code)]

pub mod files;
pub mod rafs;
