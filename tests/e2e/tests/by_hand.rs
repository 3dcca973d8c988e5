//! VMs without containerd: `ctvm run` as an operator types it, how it fails, and what `ctvm check` says of a host.
#![cfg(feature = "lab")]

use std::fs;
use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use e2e::command::wait_until;
use e2e::containerd::kill_9;
use e2e::vm::make_root;
use e2e::{BIN, SHARE, run};

type Words<'a> = &'a [&'a str];

/// A host without KVM, as far as what runs in it can see.
const WITHOUT_DEVICES: [&str; 6] = [
    "unshare",
    "--mount",
    "sh",
    "-c",
    "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && exec \"$@\"",
    "sh",
];

fn ctvm(words: &[&str]) -> Command {
    // Beyond all that a VM here takes.
    let mut command = Command::new("timeout");
    command.arg("200").arg(Path::new(BIN).join("ctvm")).args(words);
    command
}

fn kernel() -> String {
    format!("{SHARE}/vmlinux")
}

/// Starts `ctvm run` with its console in pipes.
fn start(command: &mut Command) -> Result<(Child, Console)> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("starting {command:?}"))?;
    let output = child.stdout.take().context("stdout is piped")?;
    Ok((child, Console(BufReader::new(output).lines())))
}

/// What a guest says on its console.
struct Console(Lines<BufReader<ChildStdout>>);

impl Console {
    /// Its lines up to `last`.
    fn until(&mut self, last: &str) -> Result<Vec<String>> {
        let mut seen = Vec::new();
        for line in &mut self.0 {
            seen.push(line?.trim_end().to_owned());
            if seen.last().is_some_and(|line| line == last) {
                return Ok(seen);
            }
        }
        bail!("the console ended before {last:?}: {seen:#?}")
    }
}

#[test]
fn a_vm_has_what_was_asked_for_and_its_console_is_here() -> Result<()> {
    let folder = tempfile::tempdir_in("/var/tmp")?;
    let script = "echo cpus=$(grep -c ^processor /proc/cpuinfo)\n\
                  echo mem_kib=$(awk '/MemTotal/ {print $2}' /proc/meminfo)\n\
                  echo disk=$(head -c 5 /dev/vdb)\n\
                  printf there | dd of=/dev/vdb conv=notrunc,fsync 2>/dev/null\n\
                  for disk in a b c; do blockdev --getro /dev/vd$disk; done | tr '\\n' ' '; echo\n\
                  echo ready\n\
                  read -r -t 60 line; echo heard=$line\n";
    let root = make_root(folder.path(), script, &[])?;
    let disk = |name: &str| -> Result<PathBuf> {
        let path = folder.path().join(name);
        fs::write(&path, [b"hello".as_slice(), &[0; 4091]].concat())?;
        Ok(path)
    };
    let (written, kept) = (disk("written")?, disk("kept")?);
    let mut command = ctvm(&["run", "--kernel", &kernel(), "--cpus", "2", "--memory", "128M"]);
    command.arg("--rootfs").arg(root).arg("--disk").arg(&written);
    command.arg("--disk").arg(format!("{}:ro", kept.display()));
    let (mut child, mut console) = start(&mut command)?;
    let seen = console.until("ready")?;
    let has = |line: &str| seen.iter().any(|seen| seen == line);
    ensure!(has("cpus=2") && has("disk=hello") && has("1 0 1"), "{seen:#?}");
    let memory = seen.iter().find_map(|line| line.strip_prefix("mem_kib=")).context("memory is said")?;
    ensure!((100 << 10..128 << 10).contains(&memory.parse::<u32>()?), "{memory} KiB of 128 MiB");
    child.stdin.as_mut().context("stdin is piped")?.write_all(b"words\n")?;
    console.until("heard=words")?;
    let ended = child.wait_with_output()?;
    ensure!(ended.status.success() && ended.stderr.is_empty(), "{ended:?}");
    ensure!(fs::read(written)?.starts_with(b"there"), "what the guest wrote is in the file");
    ensure!(fs::read(kept)?.starts_with(b"hello"), "a disk that is read-only is as before");
    Ok(())
}

#[test]
fn our_own_image_boots_by_hand_and_ends_with_its_owner() -> Result<()> {
    let image = format!("{SHARE}/rootfs.erofs");
    let words = ["run", "--kernel", &kernel(), "--rootfs", &image, "--cmdline", "ctvm_mark=1"];
    // Nothing in between: whose end it is about is this process.
    let mut command = Command::new(Path::new(BIN).join("ctvm"));
    let (mut child, mut console) = start(command.args(words))?;
    console.until("CTVM-READY")?;
    let pid = child.id();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let vmm: i32 = children.trim().parse().with_context(|| format!("one child in {children:?}"))?;
    kill_9(i32::try_from(pid)?)?;
    child.wait()?;
    wait_until("the VMM has ended", || Ok(!Path::new(&format!("/proc/{vmm}")).exists()))
}

#[test]
fn each_failure_is_one_line_with_a_status_of_its_class() -> Result<()> {
    let kernel = &kernel();
    let text = "/etc/hostname";
    fs::write("/proc/sys/vm/nr_hugepages", "0")?;
    let nobody: Words = &["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    // Around it, its options, its status, what it says.
    let cases: [(Words, Words, i32, Words); 9] = [
        (&[], &["--kernel", "/no/kernel"], 3, &["/no/kernel", "No such file"]),
        (&[], &["--kernel", "/opt"], 3, &["/opt", "directory"]),
        (&[], &["--kernel", kernel, "--disk", "/no/disk"], 3, &["disk /no/disk"]),
        (&[], &["--kernel", text], 4, &["neither an ELF vmlinux nor a bzImage"]),
        (&[], &["--kernel", kernel, "--memory", "32"], 2, &["32 MiB", "64"]),
        (&[], &["--kernel", kernel, "--cpus", "33"], 2, &["33", "1..=32"]),
        (&WITHOUT_DEVICES, &["--kernel", kernel], 5, &["/dev/kvm"]),
        (nobody, &["--kernel", kernel], 5, &["/dev/kvm", "ermission"]),
        (&[], &["--kernel", kernel, "--hugepages"], 6, &["huge"]),
    ];
    for (around, words, status, said) in cases {
        let program = format!("{BIN}/ctvm");
        let mut all = around.to_vec();
        all.extend([&program, "run"]);
        all.extend(words);
        let ended = run(Command::new(all[0]).args(&all[1..]))?;
        let errors = ended.errors();
        ensure!(ended.code == status, "{words:?} ended with {}: {errors}", ended.code);
        // What is wrong with a command line is followed by how to get help.
        let line = errors.lines().next().unwrap_or_default();
        ensure!(status == 2 || errors.lines().count() == 1, "{words:?}: {errors}");
        ensure!(said.iter().all(|word| line.contains(word)), "{words:?}: {errors}");
    }
    Ok(())
}

#[test]
fn a_kernel_that_panics_is_told_with_its_last_words() -> Result<()> {
    let ended = run(&mut ctvm(&["run", "--kernel", &kernel()]))?;
    ensure!(ended.code == 11, "{ended:?}");
    ensure!(ended.errors().contains("Unable to mount root fs"), "{}", ended.errors());
    Ok(())
}

#[test]
fn check_says_what_the_host_has_and_what_to_do_about_what_it_lacks() -> Result<()> {
    let path = format!("{BIN}:{}", std::env::var("PATH")?);
    let here = run(ctvm(&["check"]).env("PATH", &path))?;
    let table = here.text();
    ensure!(here.code == 0 && !table.contains("FAIL"), "{table}");
    for good in ["ok    kvm            /dev/kvm opens", "vmlinux (ELF)", "rootfs.erofs (EROFS)"] {
        ensure!(table.contains(good), "no {good:?} in\n{table}");
    }
    let [program, rest @ ..] = WITHOUT_DEVICES;
    let mut command = Command::new(program);
    command.args(rest).arg(Path::new(BIN).join("ctvm")).arg("check").env("PATH", &path);
    let lacking = run(&mut command)?;
    let table = lacking.text();
    ensure!(lacking.code == 1, "{lacking:?}");
    for said in ["FAIL  kvm", "there is no /dev/kvm", "-> load kvm_intel or kvm_amd", "see FAIL above"] {
        ensure!(table.contains(said), "no {said:?} in\n{table}");
    }
    Ok(())
}
