//! `ctvm-convert`: makes Nydus images.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use convert::rafs::{self, Options};

/// Make a Nydus image
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    /// Of this folder's files, instead of an OCI image
    #[arg(long, value_name = "DIR")]
    folder: PathBuf,
    /// Folder for image.boot and blobs/
    destination: PathBuf,
    /// RAFS version: 6 is a block device in the guest, 5 a file system
    #[arg(long, default_value_t = 6)]
    fs_version: u8,
    /// none, lz4_block, gzip or zstd
    #[arg(long, default_value = "zstd")]
    compressor: String,
    /// Bytes of a chunk
    #[arg(long, default_value_t = 1 << 20)]
    chunk_size: u32,
    /// Bootstrap of an image whose chunks are there already
    #[arg(long, value_name = "BOOTSTRAP")]
    parent: Option<PathBuf>,
    /// Read paths to fetch ahead from standard input, one a line
    #[arg(long)]
    prefetch: bool,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ctvm-convert: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    let Arguments { folder, destination, fs_version, compressor, chunk_size, parent, prefetch } = arguments;
    let options = Options { version: fs_version, compressor, chunk_size, parent, prefetch };
    std::fs::create_dir_all(&destination)?;
    let built =
        rafs::build_folder(&folder, &destination.join("image.boot"), &destination.join("blobs"), &options)?;
    println!("{}", built.bootstrap.display());
    Ok(())
}
