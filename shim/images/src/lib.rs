//! The node's image service: images start before they are downloaded. `shim/images/README.md` has the design.

#![forbid(unsafe_code)]

#[cfg(feature = "service")]
pub mod cache;
pub mod codec;
pub mod config;
#[cfg(feature = "service")]
pub mod fetch;
#[cfg(feature = "service")]
pub mod logger;
pub mod rafs;
#[cfg(feature = "service")]
pub mod service;
#[cfg(feature = "service")]
pub mod source;
#[cfg(feature = "service")]
pub mod stats;
pub mod table;
#[cfg(feature = "service")]
pub mod users;
pub mod zran;
