//! `cargo xtask demo`: a container from an image made on the spot, run by a real containerd in a microVM of ours.

use std::io;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
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

/// Runs the demonstration; it fails unless the container's exit code came back.
pub fn main(cache: &Cache) -> Result<u8> {
    let product = Product::build(cache)?;
    let machine = step("start the lab", || {
        Machine::start(cache, &Shape { product: Some(product), ..Shape::default() })
    })?;
    show(machine.client()).inspect_err(|_| {
        machine.show_console();
        let _ = print(machine.client(), "tail -n 40 /run/containerd.log >&2"); // the lab may be what failed
    })?;
    Ok(0)
}

fn show(client: Client) -> Result<()> {
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
    println!("$ {run}");
    let code = print(client, &run)?;
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
