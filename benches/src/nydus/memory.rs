//! What ten VMs of one image cost the host, and where each page of the image is.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use benches::memory::footprint;
use benches::rows::Row;
use e2e::containerd::pids_of;
use e2e::run;

use super::link::NO_LIMIT;
use super::node::{DAX, NYDUS, Node, OCI, Way};
use super::pages::resident_below;
use super::{GROUP, Image, MEDIUM, SMALL};

const VMS: usize = 10;
/// Of a container's VM unless something else is said: shim/README.md.
const GUEST_MIB: u64 = 256;
/// Serves nothing, and stays.
const SERVER: &[&str] = &["python3", "-c", "import http.server, time; time.sleep(1000000)"];
/// For what is done after a start.
const QUIET: Duration = Duration::from_secs(5);

/// Runs the part.
pub fn measure(node: &mut Node) -> Result<Vec<Row>> {
    node.link.set(NO_LIMIT)?;
    let mut rows = Vec::new();
    for way in [NYDUS, DAX, OCI] {
        let idle = vms(node, way, &SMALL, &["sleep", "1000000"], 1)?;
        let vms = vms(node, way, &MEDIUM, SERVER, VMS)?;
        let mut row = |what: &str, kib: f64| {
            rows.extend(Row::of(GROUP, format!("{VMS} VMs, {what}"), way.subject, "MiB", vec![kib / 1024.0]));
        };
        row("shims, PSS", vms.shims);
        row("VMMs, PSS less guest memory", vms.vmms);
        row("guest memory", vms.guests);
        row("image in the guests' page caches", vms.guest_cache - idle.guest_cache * VMS as f64);
        row("image in the host's page cache", vms.host_cache);
        if way == DAX {
            row("image as the VMMs have it mapped", vms.shown);
        }
        if way.is_nydus() {
            row("image service, PSS", vms.services[0]);
            row("snapshotter, PSS", vms.services[1]);
        }
    }
    Ok(rows)
}

/// KiB, all VMs together.
#[derive(Debug, Default)]
struct Memory {
    shims: f64,
    vmms: f64,
    guests: f64,
    shown: f64,
    guest_cache: f64,
    host_cache: f64,
    services: [f64; 2],
}

/// Runs containers of one image, each in its VM, beside each other, and looks.
fn vms(node: &mut Node, way: Way, image: &Image, command: &[&str], count: usize) -> Result<Memory> {
    node.pull_if_absent(image.repository, way)?;
    if way == DAX {
        // One of which not all is there is a disk.
        node.start_container(image.repository, NYDUS, &[], "first", &["sleep", "1000000"])?;
        node.fetch_all(image.repository)?;
        node.remove("first")?;
    }
    // What unpacking has left in memory is not what the containers need.
    run(&mut Command::new("sync"))?.ok()?;
    fs::write("/proc/sys/vm/drop_caches", "1").context("drop the page cache")?;
    let ids: Vec<String> = (0..count).map(|number| format!("memory-{number}")).collect();
    for id in &ids {
        node.start_container(image.repository, way, &[], id, command)?;
        std::thread::sleep(QUIET);
    }
    let mut memory = Memory::default();
    let (shims, vmms) = (pids_of("containerd-shim-ctvm-v2")?, pids_of("ctvm-vmm")?);
    ensure!(shims.len() == count && vmms.len() == count, "{} shims and {} VMMs", shims.len(), vmms.len());
    for (shim, vmm) in shims.into_iter().zip(vmms) {
        memory.shims += footprint(shim.try_into()?, 0)?.own_pss as f64;
        let vmm = footprint(vmm.try_into()?, GUEST_MIB * 1024 - 4096)?;
        ensure!(vmm.guest_rss > 0, "a VM has no memory of {GUEST_MIB} MiB");
        ensure!((vmm.shown_rss > 0) == (way == DAX), "{}: {vmm:?}", way.subject);
        memory.vmms += vmm.own_pss as f64;
        memory.guests += vmm.guest_rss as f64;
        memory.shown += vmm.shown_rss as f64;
    }
    for id in &ids {
        memory.guest_cache += page_cache_kib(&node.exec(id, &["cat", "/proc/meminfo"])?)?;
    }
    memory.host_cache = resident_below(&node.files(way))? as f64 / 1024.0;
    for (sum, pid) in memory.services.iter_mut().zip(node.services()?) {
        *sum = footprint(pid, 0)?.own_pss as f64;
    }
    eprintln!("nydus, memory: {count} of {} by {}: {memory:?}", image.name, way.subject);
    for id in &ids {
        node.remove(id)?;
    }
    node.forget(image.repository, way)?;
    Ok(memory)
}

/// Pages of files that a kernel has, with those of its block devices.
fn page_cache_kib(meminfo: &str) -> Result<f64> {
    let of = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.trim().trim_end_matches(" kB").trim().parse::<f64>().ok())
            .with_context(|| format!("no {name} in {meminfo:?}"))
    };
    // Files of a tmpfs are no image's.
    Ok(of("Cached:")? + of("Buffers:")? - of("Shmem:")?)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_page_cache_is_of_files() {
        let meminfo = "MemTotal: 100 kB\nBuffers:            20 kB\nCached:           300 kB\nSwapCached: 7 kB\nShmem:   50 kB\n";
        assert_eq!(super::page_cache_kib(meminfo).unwrap(), 270.0);
        assert!(super::page_cache_kib("Cached: 1 kB\n").is_err());
    }
}
