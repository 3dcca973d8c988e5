//! `ctvm image` and `ctvm snapshotter`: hand over to the programs that know images, which lie beside this one. What they bring (HTTP, TLS, the Nydus builder)
//! is not in here.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use clap::{Args, Subcommand};

use crate::cli::Failure;

/// What to do with images. Each takes its own options: see its `--help`.
#[derive(Debug, Clone, Subcommand)]
pub enum Image {
    /// Make a Nydus image of an OCI image
    Convert(Rest),
    /// Make a Nydus image of a folder
    Folder(Rest),
    /// Fetch and verify all of a Nydus image
    Check(Rest),
    /// Say what was fetched, from where, and how long VMs waited
    Stat(Rest),
    /// Serve image chunks to the VMs of this node
    Serve(Rest),
    /// Verify every chunk in the node's cache
    Scrub(Rest),
}

/// What is handed over as it is.
#[derive(Debug, Clone, Args)]
#[command(disable_help_flag = true)]
pub struct Rest {
    /// Options and names
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub arguments: Vec<OsString>,
}

/// Becomes the program, if it can.
///
/// # Errors
/// [`Failure::File`] where there is no such program.
pub fn run(image: Image) -> Failure {
    match image {
        Image::Convert(rest) => become_("ctvm-convert", Some("convert"), rest),
        Image::Folder(rest) => become_("ctvm-convert", Some("folder"), rest),
        Image::Check(rest) => become_("ctvm-convert", Some("check"), rest),
        Image::Stat(rest) => become_("ctvm-images", Some("stat"), rest),
        Image::Serve(rest) => become_("ctvm-images", Some("serve"), rest),
        Image::Scrub(rest) => become_("ctvm-images", Some("scrub"), rest),
    }
}

/// The same for `ctvm snapshotter`.
///
/// # Errors
/// As [`run`].
pub fn snapshotter(rest: Rest) -> Failure {
    become_("ctvm-snapshotter", None, rest)
}

fn become_(program: &str, command: Option<&str>, rest: Rest) -> Failure {
    let path = beside(program).unwrap_or_else(|_| program.into());
    let source = Command::new(&path).args(command).args(rest.arguments).exec();
    Failure::File { what: "start", path, source }
}

fn beside(program: &str) -> io::Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name(program))
}
