//! Group `boot`: from exec of the VMM to the guest's PID 1 and to the agent being ready, by stage.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use benches::memory::{Footprint, footprint};
use e2e::SHARE;
use e2e::vm::pack_initrd;

use crate::exits::Exits;
use benches::rows::Row;
use benches::subject::{MEMORY_MIB, READY, Root, Subject};

/// The agent's first act.
const INIT: &str = "CTVM-INIT";

/// When each stage of one start ended, ms since exec. The stages between exec and `init` are our own VMM's.
#[derive(Debug, Default, Clone)]
pub struct Start {
    /// Stage name to its end.
    pub ends: Vec<(&'static str, f64)>,
}

impl Start {
    fn end_of(&self, stage: &str) -> Option<f64> {
        self.ends.iter().find(|(name, _)| *name == stage).map(|(_, end)| *end)
    }
}

/// Times one start.
pub fn start(subject: Subject) -> Result<Start> {
    let mut vm = subject.start(Root::Disk)?;
    let exec_us = vm.exec_us;
    let since_exec = |us: u64| us.saturating_sub(exec_us) as f64 / 1000.0;
    let init = vm.wait_for_mark(INIT)?;
    let ready = vm.wait_for_mark(READY)?;
    let mut ends = Vec::new();
    if let Some(t) = vm.timeline {
        ends.push(("exec", since_exec(t.main_us)));
        ends.push(("KVM set-up", since_exec(t.kvm_ready_us)));
        ends.push(("kernel loaded", since_exec(t.loaded_us)));
        ends.push(("vCPU runs", since_exec(t.running_us)));
    }
    ends.push(("PID 1", since_exec(init)));
    ends.push(("agent ready", since_exec(ready)));
    Ok(Start { ends })
}

/// Exits to user space from exec to PID 1.
pub fn exits(subject: Subject, root: Root<'_>) -> Result<usize> {
    let exits = Exits::count()?;
    let mut vm = subject.start(root)?;
    vm.wait_for_mark(INIT)?;
    exits.stop()
}

/// One start of each subject, by name.
pub type Pictures = Vec<(String, Start)>;

/// Runs the group. Also gives the first counted start of each subject, for the picture.
pub fn group(runs: usize) -> Result<(Vec<Row>, Pictures)> {
    let mut starts: Vec<(Subject, Vec<Start>)> = Subject::ALL.map(|s| (s, Vec::new())).into();
    for round in 0..=runs {
        for (subject, kept) in &mut starts {
            let start = start(*subject)?;
            eprintln!("boot round {round} {}: {:?}", subject.name()?, start.ends);
            // The first round reads everything from disk: it warms up and is not counted.
            if round > 0 {
                kept.push(start);
            }
        }
    }
    let folder = tempfile::tempdir_in("/var/tmp")?;
    let initrd = marking_initrd(folder.path())?;
    let no_disk = Root::Initrd(&initrd);
    let mut rows = Vec::new();
    let mut pictures = Vec::new();
    for (subject, starts) in &starts {
        let name = subject.name()?;
        for (stage, _) in &starts[0].ends {
            let values = starts.iter().filter_map(|s| s.end_of(stage)).collect();
            let row = Row::of("boot", format!("exec to {stage}"), name, "ms", values);
            let limit = match (*subject, *stage) {
                (Subject::Ctvm, "vCPU runs") => Some(10.0),
                (Subject::Ctvm, "PID 1") => Some(35.0),
                (Subject::Ctvm, "agent ready") => Some(45.0),
                _ => None,
            };
            rows.extend(row.map(|r| if let Some(limit) = limit { r.budget(limit) } else { r }));
        }
        pictures.push((name.to_owned(), starts[0].clone()));
        let count =
            |root| (0..runs).map(|_| exits(*subject, root).map(|n| n as f64)).collect::<Result<Vec<_>>>();
        let row = Row::of("boot", "exits to user space until PID 1, no disk", name, "exits", count(no_disk)?);
        rows.extend(row.map(|r| if *subject == Subject::Ctvm { r.budget(200.0) } else { r }));
        rows.extend(Row::of("boot", "exits to user space until PID 1", name, "exits", count(Root::Disk)?));
    }
    rows.extend(quick_moves(runs)?);
    Ok((rows, pictures))
}

/// A root in memory whose first process says so and waits.
fn marking_initrd(folder: &Path) -> Result<PathBuf> {
    let tree = folder.join("tree");
    fs::create_dir_all(tree.join("bin"))?;
    fs::copy(Path::new(SHARE).join("busybox"), tree.join("bin/sh"))?;
    fs::write(tree.join("init"), format!("#!/bin/sh\necho {INIT}\nread -r forever\n"))?;
    fs::set_permissions(tree.join("init"), fs::Permissions::from_mode(0o755))?;
    pack_initrd(&tree, folder)
}

/// The same starts on a host that does not wait when a process changes its control group, as the kernel thread does
/// that KVM makes for each VM.
fn quick_moves(runs: usize) -> Result<Vec<Row>> {
    let remount = |option: &str| {
        // With a source named, mount(8) does not add the options that are there.
        let options = format!("remount,{option}");
        let mount = ["-t", "cgroup2", "-o", &options, "cgroup2", "/sys/fs/cgroup"];
        e2e::run(Command::new("mount").args(mount))?.ok().map(drop)
    };
    remount("favordynmods")?;
    let mut rows = Vec::new();
    for (subject, starts) in in_turn(runs, start)? {
        for stage in ["vCPU runs", "PID 1", "agent ready"] {
            let values = starts.iter().filter_map(|s| s.end_of(stage)).collect();
            rows.extend(Row::of(
                "boot",
                format!("exec to {stage}, favordynmods"),
                subject.name()?,
                "ms",
                values,
            ));
        }
    }
    remount("rw")?;
    Ok(rows)
}

/// What `measure` gives of each subject, which take turns.
fn in_turn<T>(runs: usize, measure: impl Fn(Subject) -> Result<T>) -> Result<Vec<(Subject, Vec<T>)>> {
    let mut kept: Vec<_> = Subject::ALL.map(|subject| (subject, Vec::new())).into();
    for _ in 0..runs {
        for (subject, values) in &mut kept {
            values.push(measure(*subject)?);
        }
    }
    Ok(kept)
}

/// Memory of a VM that has come up and does nothing: group `memory`.
pub fn memory(runs: usize) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (subject, footprints) in in_turn(runs, idle_footprint)? {
        let all =
            |of: fn(&Footprint) -> u64| footprints.iter().map(|footprint| of(footprint) as f64).collect();
        let guest = footprints.iter().map(|footprint| footprint.guest_rss as f64 / 1024.0).collect();
        let name = subject.name()?;
        let ours = subject == Subject::Ctvm;
        let limited = |row: Option<Row>, limit: f64| row.map(|r| if ours { r.budget(limit) } else { r });
        let pss = Row::of("memory", "VMM, PSS less guest memory", name, "KiB", all(|f| f.own_pss));
        rows.extend(limited(pss, 1536.0));
        rows.extend(Row::of("memory", "VMM, anonymous", name, "KiB", all(|f| f.own_anonymous)));
        rows.extend(limited(Row::of("memory", "guest memory, idle", name, "MiB", guest), 16.0));
    }
    Ok(rows)
}

fn idle_footprint(subject: Subject) -> Result<Footprint> {
    let mut vm = subject.start(Root::Disk)?;
    vm.wait_for_mark(READY)?;
    // What the agent does after it said that it is ready.
    std::thread::sleep(Duration::from_millis(500));
    footprint(vm.vmm.id(), u64::from(MEMORY_MIB) * 1024 - 4096)
}
