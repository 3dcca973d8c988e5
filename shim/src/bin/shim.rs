//! `containerd-shim-ctvm-v2`: what containerd runs.

use std::io::Write as _;
use std::process::ExitCode;

use shim::args::{Action, Args};
use shim::{delete, info, serve, start};

fn main() -> ExitCode {
    match run() {
        Ok(answer) => {
            // containerd sees an answer that is cut short as one that it cannot read.
            let written = std::io::stdout().write_all(&answer);
            if written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(e) => {
            eprintln!("containerd-shim-ctvm-v2: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<Vec<u8>> {
    let args = Args::parse(std::env::args().skip(1))?;
    match args.action {
        Action::Start => start::run(&args),
        Action::Delete => delete::run(&args),
        Action::Serve => serve::run(&args).map(|()| Vec::new()),
        Action::Version => Ok(info::version().into_bytes()),
        Action::Info => Ok(info::runtime_info()),
    }
}
