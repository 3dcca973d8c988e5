//! The image service from the outside: images made by the converter, read as a VMM reads them.

mod bucket;
mod client;
mod converted;
mod crash;
mod local;
mod registry;
mod remote;
mod room;
mod sample;
mod users;
