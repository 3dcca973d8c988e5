//! `cargo xtask demo`: a container from an image made on the spot, run by a real containerd in a microVM of ours.

use std::io;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use lab_protocol::{Command, Exit};
use serde_json::Value;

use crate::cache::Cache;
use crate::container_image::NAME;
use crate::lab::client::{Client, Streams};
use crate::lab::machine::{Machine, Shape};
use crate::product::{IN_LAB, Product, TIMELINES};
use crate::steps::step;

/// What the container runs. Its exit code is one that nothing else would give.
const SCRIPT: &str = "echo \"hello from process $$ of container $HOSTNAME\"; . /etc/os-release; \
    echo \"image: $PRETTY_NAME\"; echo \"kernel: $(uname -r)\"; \
    grep MemTotal /proc/meminfo; echo \"CPUs: $(nproc)\"; exit 42";
const EXIT_CODE: u8 = 42;

const NAMESPACE: &str = "demo";
const CONTAINER: &str = "hello";

/// Options of `xtask demo`.
#[derive(Debug, Args)]
pub struct Options {
    /// From a Nydus image in a local registry, which is not downloaded
    #[arg(long)]
    nydus: bool,
}

/// Runs the demonstration; it fails unless the container's exit code came back.
pub fn main(cache: &Cache, options: &Options) -> Result<u8> {
    let product = Product::build(cache)?;
    let machine = step("start the lab", || {
        Machine::start(cache, &Shape { product: Some(product), ..Shape::default() })
    })?;
    let show = if options.nydus { nydus } else { plain };
    show(machine.client()).inspect_err(|_| {
        machine.show_console();
        let _ = print(machine.client(), "tail -n 40 /run/containerd.log >&2"); // the lab may be what failed
    })?;
    Ok(0)
}

fn plain(client: Client) -> Result<()> {
    step("start containerd in the lab", || {
        let start = format!(
            "export PATH={IN_LAB}/bin:$PATH; containerd >/run/containerd.log 2>&1 & \
             until ctr version >/dev/null 2>&1; do kill -0 $! || exit 1; sleep 0.1; done"
        );
        ensure!(print(client, &start)? == 0, "containerd did not start");
        Ok(())
    })?;
    step("import the image", || {
        let import = format!("ctr --namespace {NAMESPACE} images import {IN_LAB}/share/image.tar");
        ensure!(print(client, &import)? == 0, "the image was not imported");
        Ok(())
    })?;
    let run = format!(
        "ctr --namespace {NAMESPACE} run --rm --runtime io.containerd.ctvm.v2 {NAME} {CONTAINER} sh -c '{SCRIPT}'"
    );
    run_it(client, &run)
}

/// The services of a node, as an operator starts them, with a registry beside them. containerd 2.1 tells its snapshotter the
/// image's name when `ctr` pulls, if it is said to want it.
const NODE: &str = r#"
mkdir -p /var/tmp/node && cd /var/tmp/node
cat >registry.yml <<END
version: 0.1
log: {level: warn}
storage: {filesystem: {rootdirectory: /var/tmp/node/registry}}
http: {addr: 127.0.0.1:5000}
END
cat >containerd.toml <<END
version = 2
root = "/var/tmp/node/containerd"
[proxy_plugins.ctvm]
  type = "snapshot"
  address = "/run/ctvm/snapshotter.sock"
  [proxy_plugins.ctvm.exports]
    enable_remote_snapshot_annotations = "true"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/amd64"
  snapshotter = "ctvm"
END
docker-registry serve registry.yml >registry.log 2>&1 &
ctvm image serve --root /var/tmp/node/cache >images.log 2>&1 &
ctvm snapshotter --plain-http 127.0.0.1:5000 --root /var/tmp/node/snapshots >snapshots.log 2>&1 &
containerd --config containerd.toml >/run/containerd.log 2>&1 &
until ctr version >/dev/null 2>&1 && [ -S /run/ctvm/snapshotter.sock ]; do kill -0 $! || exit 1; sleep 0.1; done
"#;

/// The image of the demonstration as a Nydus image in a registry.
const NYDUS_NAME: &str = "127.0.0.1:5000/demo:nydus";

fn nydus(client: Client) -> Result<()> {
    let path = format!("export PATH={IN_LAB}/bin:/opt/containerd/2.1/usr/bin:$PATH;");
    step("start registry, image service, snapshotter and containerd in the lab", || {
        ensure!(print(client, &format!("{path}{NODE}"))? == 0, "the node's services did not start");
        Ok(())
    })?;
    step("convert the image into the registry", || {
        let convert = format!(
            "{path} mkdir /var/tmp/oci && tar -xf {IN_LAB}/share/image.tar -C /var/tmp/oci && \
             ctvm image convert oci:/var/tmp/oci:{NAME} http://{NYDUS_NAME}"
        );
        ensure!(print(client, &convert)? == 0, "the image was not converted");
        Ok(())
    })?;
    step("pull it", || {
        let pull = format!(
            "{path} ctr --namespace {NAMESPACE} images pull --plain-http --snapshotter ctvm {NYDUS_NAME}"
        );
        ensure!(print(client, &pull)? == 0, "the image was not pulled");
        Ok(())
    })?;
    let stat = format!("{path} ctvm image stat --root /var/tmp/node/cache");
    println!("fetched before the container is started:");
    print(client, &stat)?;
    let run = format!(
        "{path} ctr --namespace {NAMESPACE} run --rm --snapshotter ctvm --runtime io.containerd.ctvm.v2 {NYDUS_NAME} \
         {CONTAINER} sh -c '{SCRIPT}'"
    );
    run_it(client, &run)?;
    println!("\nfetched for it:");
    print(client, &stat).map(drop)
}

/// Runs a command that starts the container, and shows what came of it.
fn run_it(client: Client, run: &str) -> Result<()> {
    println!("$ {run}");
    let code = print(client, run)?;
    println!("exit code: {code}");
    let (_, host_kernel) = client.capture(&["uname", "-r"])?;
    println!("host's kernel: {}", host_kernel.trim());
    println!("\nboot timeline (ms since the shim's start, lab's clock):");
    let (exit, text) = client.capture(&["cat", &format!("{TIMELINES}/{NAMESPACE}-{CONTAINER}.json")])?;
    ensure!(exit == Exit::Code(0), "the shim left no timeline: {text}");
    for line in timeline(&text)? {
        println!("{line}");
    }
    if code != EXIT_CODE {
        bail!("the container's exit code is {code}, not {EXIT_CODE}");
    }
    Ok(())
}

/// Runs a shell line in the lab with its output shown; its exit code.
fn print(client: Client, line: &str) -> Result<u8> {
    let command = Command { argv: vec!["sh".into(), "-c".into(), line.into()], ..Command::default() };
    let (mut stdout, mut stderr) = (io::stdout(), io::stderr());
    let streams = Streams { stdin: Box::new(io::empty()), stdout: &mut stdout, stderr: &mut stderr };
    Ok(client.run(&command, streams, Some(Duration::from_secs(300)))?.shell_code())
}

/// Lines of a table from the shim's list of stages, `[[name, microseconds of the monotonic clock], …]`.
fn timeline(text: &str) -> Result<Vec<String>> {
    let stages: Vec<(String, u64)> = serde_json::from_str::<Value>(text)
        .and_then(serde_json::from_value)
        .context("read the shim's timeline")?;
    let begin = stages.first().context("a timeline without stages")?.1;
    let mut before = begin;
    let mut lines = Vec::new();
    for (name, at) in stages {
        let ms = |us: u64| Duration::from_micros(us).as_secs_f64() * 1000.0;
        lines.push(format!(
            "  {name:<24} {:>10.1}  (+{:.1})",
            ms(at.saturating_sub(begin)),
            ms(at.saturating_sub(before))
        ));
        before = at;
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeline_counts_from_its_first_stage() {
        let lines = timeline(r#"[["shim start", 1000], ["vmm exec", 3500], ["exited", 13500]]"#).unwrap();
        assert!(lines[1].contains("2.5  (+2.5)"), "{lines:?}");
        assert!(lines[2].contains("12.5  (+10.0)"), "{lines:?}");
        assert!(timeline("[]").is_err());
    }
}
