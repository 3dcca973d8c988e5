//! The `ctvm.agent.v1.Sandbox` service: the guest as a whole. Generated from `proto/sandbox.proto`, which is the
//! authority on the meaning of every field.

pub use generated::sandbox::*;
pub use generated::sandbox_ttrpc::{Sandbox, SandboxClient, create_sandbox};

#[allow(warnings, clippy::all, clippy::pedantic, clippy::restriction)]
mod generated {
    pub mod sandbox {
        include!(concat!(env!("OUT_DIR"), "/sandbox.rs"));
    }
    pub mod sandbox_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/sandbox_ttrpc.rs"));
    }
}
