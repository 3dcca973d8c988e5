//! `cargo xtask lab`: a machine with a real nested KVM, and commands in it. Design page: `tests/README.md`.

pub mod client;
pub mod image;
pub mod machine;
pub mod qemu;

use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use lab_protocol::{Command, Exit};

use self::client::{Client, Streams};
use self::machine::{Machine, Shape};
use crate::cache::{Cache, lock};
use crate::host::{self, Kvm};
use crate::product::{self, Product};
use crate::steps::step;

/// Options of `xtask lab`.
#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own on the command line")]
pub struct Options {
    /// Start a lab that stays, and return; commands with the same --name then use it
    #[arg(long)]
    up: bool,
    /// End the lab that --up started
    #[arg(long)]
    down: bool,
    /// Say whether a lab is up, and show the end of its console
    #[arg(long)]
    status: bool,
    /// Which lab, when there are several
    #[arg(long, default_value = "default")]
    name: String,
    /// Copy a file, or a folder's content, into the lab first
    #[arg(long, value_name = "LOCAL:REMOTE")]
    put: Vec<String>,
    /// Copy a file, or a folder's content, out of the lab last
    #[arg(long, value_name = "REMOTE:LOCAL")]
    get: Vec<String>,
    /// Count instructions as time, on one CPU: figures repeat to about 1 %
    #[arg(long)]
    exact: bool,
    /// Build ctvm and show it in the lab at /opt/ctvm, the shim's configuration at /etc/ctvm
    #[arg(long)]
    product: bool,
    /// Run the command on this machine itself, where its KVM can boot a guest
    #[arg(long)]
    host: bool,
    /// Look around: a shell on a terminal
    #[arg(long)]
    shell: bool,
    /// CPUs of the lab machine
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Memory of the lab machine
    #[arg(long, default_value_t = 6144)]
    memory_mib: u32,
    /// Kill the command after this many seconds (exit code 124)
    #[arg(long)]
    timeout: Option<u64>,
    /// Add to the command's environment
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Working directory of the command
    #[arg(long, default_value = "")]
    cwd: String,
    /// The command
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Does what the options say; the result is this process's exit code.
pub fn main(cache: &Cache, options: &Options) -> Result<u8> {
    if options.host {
        return on_host(options);
    }
    let shape = || -> Result<Shape> {
        let product = if options.product { Some(Product::build(cache)?) } else { None };
        Ok(Shape { cpus: options.cpus, memory_mib: options.memory_mib, exact: options.exact, product })
    };
    if options.down {
        let _lock = name_lock(cache, &options.name)?;
        let stopped = Machine::stop(cache, &options.name)?;
        eprintln!("lab {}: {}", options.name, if stopped { "ended" } else { "was not up" });
        return Ok(0);
    }
    if options.up {
        let _lock = name_lock(cache, &options.name)?;
        if Machine::find(cache, &options.name)?.is_some() {
            eprintln!("lab {}: is up already", options.name);
        } else {
            let shape = shape()?;
            step("start the lab", || Machine::start_to_stay(cache, &shape, &options.name).map(drop))?;
        }
    }
    if options.status {
        let found = Machine::find(cache, &options.name)?;
        eprintln!("lab {}: {}", options.name, if found.is_some() { "up" } else { "not up" });
        found.as_ref().inspect(|machine| machine.show_console());
        return Ok(u8::from(found.is_none()));
    }
    let asked =
        options.shell || !options.command.is_empty() || !options.put.is_empty() || !options.get.is_empty();
    if !asked {
        ensure!(
            options.up,
            "nothing to do: give a command after `--`, or --up, --shell, --put, --get, --down, --status"
        );
        return Ok(0);
    }
    let machine = match Machine::find(cache, &options.name)? {
        Some(machine) => {
            let agrees = !options.exact || machine.client().is_exact();
            ensure!(
                agrees,
                "lab {} is up without --exact: give another --name, or --down first",
                options.name
            );
            if options.product && !options.up {
                let product = Product::build(cache)?;
                step("put the product into the lab", || {
                    machine.client().put(product.folder(), product::IN_LAB)
                })?;
            }
            machine
        }
        None => {
            let shape = shape()?;
            step("start the lab", || Machine::start(cache, &shape))?
        }
    };
    work(machine.client(), options).inspect_err(|_| machine.show_console())
}

fn work(client: Client, options: &Options) -> Result<u8> {
    for pair in &options.put {
        let (local, remote) = pair.split_once(':').with_context(|| format!("--put {pair}: no `:`"))?;
        client.put(Path::new(local), remote)?;
    }
    let exit = if options.shell {
        shell(client, options)?
    } else if options.command.is_empty() {
        Exit::Code(0)
    } else {
        let command = Command {
            argv: options.command.clone(),
            env: options.env.clone(),
            cwd: options.cwd.clone(),
            ..Command::default()
        };
        let (mut stdout, mut stderr) = (io::stdout(), io::stderr());
        let streams = Streams { stdin: Box::new(io::stdin()), stdout: &mut stdout, stderr: &mut stderr };
        client.run(&command, streams, options.timeout.map(Duration::from_secs))?
    };
    for pair in &options.get {
        let (remote, local) = pair.split_once(':').with_context(|| format!("--get {pair}: no `:`"))?;
        client.get(remote, Path::new(local))?;
    }
    Ok(exit.shell_code())
}

fn on_host(options: &Options) -> Result<u8> {
    let kvm = host::kvm();
    ensure!(kvm == Kvm::Hardware, "--host: this machine has no vmx or svm, or its /dev/kvm does not open");
    let (program, args) = options.command.split_first().context("--host needs a command after `--`")?;
    let mut command = std::process::Command::new(program);
    command.args(args).envs(options.env.iter().filter_map(|pair| pair.split_once('=')));
    if !options.cwd.is_empty() {
        command.current_dir(&options.cwd);
    }
    let status = command.status().with_context(|| format!("start {program}"))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

fn shell(client: Client, options: &Options) -> Result<Exit> {
    let Some(size) = terminal_size() else { bail!("--shell needs a terminal") };
    let argv =
        if options.command.is_empty() { vec!["bash".into(), "-l".into()] } else { options.command.clone() };
    let command = Command {
        argv,
        env: options.env.clone(),
        cwd: options.cwd.clone(),
        terminal: Some(size),
        ..Command::default()
    };
    let before = rustix::termios::tcgetattr(io::stdin()).context("read the terminal's settings")?;
    let mut raw = before.clone();
    raw.make_raw();
    let set = |settings: &rustix::termios::Termios| {
        rustix::termios::tcsetattr(io::stdin(), rustix::termios::OptionalActions::Now, settings)
    };
    set(&raw).context("make the terminal raw")?;
    let (mut stdout, mut stderr) = (io::stdout(), io::stderr());
    let streams = Streams { stdin: Box::new(io::stdin()), stdout: &mut stdout, stderr: &mut stderr };
    let exit = client.run(&command, streams, None);
    set(&before).context("restore the terminal")?;
    exit
}

/// Rows and columns of this process's terminal.
fn terminal_size() -> Option<(u16, u16)> {
    let size = rustix::termios::tcgetwinsize(io::stdin()).ok()?;
    Some((size.ws_row, size.ws_col))
}

fn name_lock(cache: &Cache, name: &str) -> Result<std::fs::File> {
    lock(&cache.folder("run")?.join(format!(".{name}.lock")))
}
