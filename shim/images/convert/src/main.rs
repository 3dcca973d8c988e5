//! `ctvm-convert`: makes Nydus images, and checks them.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use convert::check::{Checked, check, check_folder};
use convert::convert::{Request, architecture, convert};
use convert::name::ImageName;
use convert::progress::size;
use convert::rafs::{self, Options};
use convert::remote::Credentials;
use images::config::Auth;

/// Make Nydus images, which start before they are downloaded, and check them
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, after_help = EXAMPLES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  ctvm image convert registry.example/app:1 registry.example/app:1-nydus
  With the chunks of the version before:
    ctvm image convert --parent registry.example/app:1-nydus registry.example/app:2 registry.example/app:2-nydus
  ctvm image convert http://localhost:5000/busybox:latest oci:/tmp/busybox
  ctvm image check registry.example/app:1-nydus

A name is HOST/REPOSITORY:TAG, with http:// before it where the registry speaks plain HTTP, or oci:FOLDER[:NAME] for a layout
folder. Credentials are those of --username and $CTVM_REGISTRY_PASSWORD, else Docker's (~/.docker/config.json).";

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a Nydus image of an OCI image
    Convert(Box<Convert>),
    /// Make a Nydus image of a folder, as image.boot and blobs/ in another
    Folder(Folder),
    /// Fetch and verify all of a Nydus image
    Check(Check),
}

#[derive(Debug, Args)]
struct Build {
    /// RAFS version: 6 is a block device in the guest, 5 a file system
    #[arg(long, default_value_t = 6)]
    fs_version: u8,
    /// none, lz4_block, gzip or zstd
    #[arg(long, default_value = "zstd")]
    compressor: String,
    /// Bytes of a chunk
    #[arg(long, default_value_t = 1 << 20)]
    chunk_size: u32,
    /// Read paths to fetch ahead from standard input, one a line
    #[arg(long)]
    prefetch: bool,
}

impl Build {
    fn options(&self, parent: Option<PathBuf>) -> Options {
        let compressor = self.compressor.clone();
        let (chunk_size, prefetch) = (self.chunk_size, self.prefetch);
        Options { version: self.fs_version, compressor, chunk_size, parent, prefetch }
    }
}

#[derive(Debug, Args)]
struct Registries {
    /// Name for the registries; its password is in $CTVM_REGISTRY_PASSWORD
    #[arg(long)]
    username: Option<String>,
    /// Certificates of an authority, PEM, besides the system's
    #[arg(long)]
    ca: Option<PathBuf>,
    /// Architecture where an image is for several
    #[arg(long, default_value = architecture())]
    arch: String,
}

impl Registries {
    fn credentials(&self) -> Result<Credentials> {
        let auth = match &self.username {
            None => None,
            Some(user) => {
                let password =
                    std::env::var("CTVM_REGISTRY_PASSWORD").context("no CTVM_REGISTRY_PASSWORD")?;
                Some(Auth::Basic { user: user.clone(), password })
            }
        };
        Ok(Credentials { auth, ca: self.ca.clone() })
    }
}

#[derive(Debug, Args)]
struct Convert {
    /// An OCI image
    source: ImageName,
    /// Name for the Nydus image
    destination: ImageName,
    /// A Nydus image whose chunks need not be stored again
    #[arg(long, value_name = "NAME")]
    parent: Option<ImageName>,
    /// Leave the layers as they are and make indexes over them (zran)
    #[arg(long)]
    reference: bool,
    #[command(flatten)]
    build: Build,
    #[command(flatten)]
    registries: Registries,
}

#[derive(Debug, Args)]
struct Folder {
    /// The folder
    folder: PathBuf,
    /// Folder for image.boot and blobs/
    destination: PathBuf,
    /// Bootstrap of an image whose chunks are there already
    #[arg(long, value_name = "BOOTSTRAP")]
    parent: Option<PathBuf>,
    #[command(flatten)]
    build: Build,
}

#[derive(Debug, Args)]
struct Check {
    /// A Nydus image, or a bootstrap with --blobs
    image: String,
    /// Folder of a bootstrap's blobs
    #[arg(long, value_name = "DIR")]
    blobs: Option<PathBuf>,
    #[command(flatten)]
    registries: Registries,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("ctvm-convert: {}", format!("{error:#}").replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match command {
        Command::Convert(command) => {
            let Convert { source, destination, parent, reference, build, registries } = *command;
            let request = Request {
                source,
                destination,
                parent,
                reference,
                options: build.options(None),
                credentials: registries.credentials()?,
                architecture: registries.arch,
            };
            Ok(runtime.block_on(convert(&request))?.to_string())
        }
        Command::Folder(Folder { folder, destination, parent, build }) => {
            std::fs::create_dir_all(&destination)
                .with_context(|| format!("make {}", destination.display()))?;
            let (bootstrap, blobs) = (destination.join("image.boot"), destination.join("blobs"));
            let built = rafs::build_folder(&folder, &bootstrap, &blobs, &build.options(parent))?;
            Ok(built.bootstrap.display().to_string())
        }
        Command::Check(Check { image, blobs, registries }) => {
            let checked = match blobs {
                Some(blobs) => check_folder(image.as_ref(), &blobs)?,
                None => {
                    let credentials = registries.credentials()?;
                    runtime.block_on(check(&image.parse()?, &registries.arch, &credentials))?
                }
            };
            let Checked { version, files, blobs, chunks, bytes } = checked;
            let bytes = size(bytes);
            Ok(format!("fine: version {version}, {files} files, {chunks} chunks in {blobs} blobs, {bytes}"))
        }
    }
}
