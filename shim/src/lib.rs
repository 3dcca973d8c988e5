//! The containerd shim for microVM sandboxes, and the operator's command line.
//!
//! ```text
//! containerd ── start ──> containerd-shim-ctvm-v2 start ── spawns ──> … serve  (one per pod)
//!            ── ttrpc ───────────────────────────────────────────────> service ─> sandbox ─┬─> vmm   (control socket)
//!            <─ events ─────────────────────────────────────────────── events              └─> agent (ttrpc, vsock)
//!            ── delete ─> containerd-shim-ctvm-v2 delete   when the shim died
//! ```
//!
//! See `README.md` beside this crate for the design: lifecycle, clean-up rules, limits and tests.

#![forbid(unsafe_code)]

pub mod agent;
pub mod args;
pub mod bootstrap;
pub mod cli;
pub mod clock;
pub mod config;
pub mod container;
pub mod delete;
mod dirs;
pub mod error;
pub mod events;
pub mod info;
pub mod logger;
pub mod paths;
pub mod pod_service;
pub mod ring;
pub mod sandbox;
pub mod serve;
pub mod service;
pub mod start;
pub mod streaming;
pub mod vmm;
pub mod watched;
