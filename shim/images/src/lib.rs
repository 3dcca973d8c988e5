//! The node's image service: images start before they are downloaded. `shim/images/README.md` has the design.

#![forbid(unsafe_code)]

pub mod cache;
pub mod codec;
pub mod config;
pub mod fetch;
pub mod logger;
pub mod rafs;
pub mod service;
pub mod source;
pub mod stats;
pub mod zran;
