//! `ctvm image`: hands over to the programs that know images, which lie beside this one. What they bring (HTTP, TLS, the Nydus builder)
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
    let (program, command, rest) = match image {
        Image::Convert(rest) => ("ctvm-convert", "convert", rest),
        Image::Folder(rest) => ("ctvm-convert", "folder", rest),
        Image::Check(rest) => ("ctvm-convert", "check", rest),
        Image::Stat(rest) => ("ctvm-images", "stat", rest),
        Image::Serve(rest) => ("ctvm-images", "serve", rest),
    };
    let path = beside(program).unwrap_or_else(|_| program.into());
    let source = Command::new(&path).arg(command).args(rest.arguments).exec();
    Failure::File { what: "start", path, source }
}

fn beside(program: &str) -> io::Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name(program))
}
