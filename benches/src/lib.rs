//! What both benchmark programs stand on: figures as rows, a process' memory, the VMMs under measurement, the shim's
//! timelines.

pub mod memory;
pub mod rows;
pub mod subject;
pub mod timeline;
