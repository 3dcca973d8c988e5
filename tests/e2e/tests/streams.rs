//! Standard streams through containerd, shim, vsock and agent: every byte, in order, and no more memory than a window.
#![cfg(feature = "lab")]

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;
use std::sync::LazyLock;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};
use e2e::Containerd;
use e2e::containerd::{SHIM, pids_of};

/// One containerd for all tests of this file.
static CONTAINERD: LazyLock<Containerd> = LazyLock::new(|| Containerd::start().expect("containerd starts"));

#[test]
fn sixty_four_mib_go_in_and_out_byte_for_byte() -> Result<()> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let input: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .take((64 << 20) / 8)
    .flatten()
    .collect();
    let output = CONTAINERD.run_with_input("cat", &["cat"], input.clone())?;
    assert_eq!(output.code, 0, "{}", output.errors());
    assert_eq!(output.stdout.len(), input.len());
    assert!(output.stdout == input, "bytes changed on the way");
    assert!(output.stderr.is_empty(), "{}", output.errors());
    Ok(())
}

/// Anonymous memory of the one process with this name, KiB; for a VMM its guest's memory is in it, which is the same
/// all along once the guest has touched it.
fn anonymous_kib(name: &str) -> Result<u64> {
    let pid = *pids_of(name)?.first().with_context(|| format!("no process {name}"))?;
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line =
        rollup.lines().find_map(|line| line.strip_prefix("Anonymous:")).context("no Anonymous line")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

#[test]
fn a_gibibyte_goes_through_stdout_and_waits_for_a_slow_reader() -> Result<()> {
    const BLOCK: usize = 16 << 20;
    const BLOCKS: usize = 64;
    /// What shim and VMM may hold for a stream whose reader sleeps; the guest has 256 MiB for the rest of the 1,024.
    const WINDOW_KIB: u64 = 4096;

    let script = format!(
        "head -c {BLOCK} /dev/urandom > /dev/shm/block; sha256sum < /dev/shm/block >&2; i=0; \
         while [ $i -lt {BLOCKS} ]; do cat /dev/shm/block; i=$((i+1)); done"
    );
    let mut ctr = CONTAINERD.run_command(&["--rm"], "gibibyte", &["sh", "-c", &script]);
    let mut ctr = ctr.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut stdout = ctr.stdout.take().expect("stdout is piped");
    let mut first = vec![0; BLOCK];
    stdout.read_exact(&mut first)?;

    let before = [anonymous_kib(SHIM)?, anonymous_kib("ctvm-vmm")?];
    sleep(Duration::from_secs(5)); // nobody reads: everything on the way fills up to its bound
    let after = [anonymous_kib(SHIM)?, anonymous_kib("ctvm-vmm")?];
    assert!(after[0] <= before[0] + WINDOW_KIB, "shim: {before:?} to {after:?} KiB");
    // The guest's own memory grows by 2 MiB pages as the kernel there touches it.
    assert!(after[1] <= before[1] + 8 * WINDOW_KIB, "VMM and guest: {before:?} to {after:?} KiB");

    let mut block = vec![0; BLOCK];
    for number in 1..BLOCKS {
        stdout.read_exact(&mut block).with_context(|| format!("block {number}"))?;
        assert!(block == first, "bytes changed in block {number}");
    }
    assert_eq!(stdout.read(&mut block)?, 0, "more came than was written");
    let mut stderr = String::new();
    ctr.stderr.take().expect("stderr is piped").read_to_string(&mut stderr)?;
    assert_eq!(ctr.wait()?.code(), Some(0), "{stderr}");
    let sum = e2e::run_with_input(&mut std::process::Command::new("sha256sum"), first)?.ok()?;
    assert_eq!(stderr.trim(), sum);
    Ok(())
}

#[test]
fn output_of_a_container_goes_to_a_file_or_a_logger() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let log = folder.path().join("logs/both");
    let uri = format!("file://{}", log.display());
    for n in 1..=2 {
        let script = format!("echo out-{n}; exit {n}");
        let options = ["--rm", "--log-uri", &uri];
        let finished = CONTAINERD.run(&options, &format!("to-file-{n}"), &["sh", "-c", &script])?;
        assert_eq!((finished.code, finished.text().as_str()), (n, ""), "{}", finished.errors());
    }
    assert_eq!(fs::read_to_string(&log)?, "out-1\nout-2\n");

    let logger = folder.path().join("logger");
    let script = "#!/bin/sh\n\
                  echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID $*\" > \"$2/args\"\n\
                  exec 5>&-\n\
                  cat <&4 > \"$2/err\" &\n\
                  cat <&3 4<&- > \"$2/out\"\n\
                  wait\n";
    fs::write(&logger, script)?;
    fs::set_permissions(&logger, fs::Permissions::from_mode(0o755))?;
    let uri = format!("binary://{}?to={}", logger.display(), folder.path().display());
    let script = "seq 1 100000; echo to-stderr >&2; exit 7";
    let finished = CONTAINERD.run(&["--rm", "--log-uri", &uri], "to-logger", &["sh", "-c", script])?;
    assert_eq!(finished.code, 7, "{}", finished.errors());
    let read = |name: &str| fs::read_to_string(folder.path().join(name));
    assert_eq!(read("args")?.trim_end(), format!("test/to-logger to {}", folder.path().display()));
    let expected: Vec<String> = (1..=100_000).map(|n| n.to_string()).collect();
    assert!(read("out")?.lines().eq(expected.iter()), "it has ended, with all of it");
    assert_eq!(read("err")?, "to-stderr\n");

    // By the second kind it has to say that it is ready.
    let uri = uri.replace("binary://", "binary-v2://");
    let finished = CONTAINERD.run(&["--rm", "--log-uri", &uri], "silent-logger", &["true"])?;
    assert_ne!(finished.code, 0);
    assert!(finished.errors().contains("did not say that it is ready"), "{}", finished.errors());
    let ready = fs::read_to_string(&logger)?.replace("exec 5>&-", "printf x >&5; exec 5>&-");
    fs::write(&logger, ready)?;
    let script = "echo again; exit 7";
    let finished = CONTAINERD.run(&["--rm", "--log-uri", &uri], "ready-logger", &["sh", "-c", script])?;
    assert_eq!((finished.code, read("out")?.as_str()), (7, "again\n"), "{}", finished.errors());
    Ok(())
}
