//! What it costs a VM that it can have images: their thread, and the disk of one.

use std::fs;

use anyhow::Result;
use benches::memory::footprint;
use benches::rows::Row;
use benches::subject::{MEMORY_MIB, READY, Root, Started, start_ctvm_with};
use e2e::image_service::{Image, Service};

use super::GROUP;

/// What a VM has of images.
#[derive(Debug, Clone, Copy)]
enum Has {
    Nothing,
    Thread,
    Disk,
}

const ALL: [(Has, &str); 3] = [
    (Has::Nothing, "VM without images"),
    (Has::Thread, "with their thread"),
    (Has::Disk, "with one as a disk"),
];

/// Figures of one kind of VM.
#[derive(Debug, Default)]
struct Figures {
    running_ms: Vec<f64>,
    ready_ms: Vec<f64>,
    threads: Vec<f64>,
    pss_kib: Vec<f64>,
    anonymous_kib: Vec<f64>,
}

/// Runs the part.
pub fn measure(runs: usize) -> Result<Vec<Row>> {
    let image = Image::new(&[0; 64 << 10], vec![vec![0; 1 << 20]])?;
    let mut all: [Figures; ALL.len()] = Default::default();
    for round in 0..=runs {
        for ((has, _), figures) in ALL.into_iter().zip(&mut all) {
            let mut discarded = Figures::default();
            // The first round reads everything from disk.
            start(has, &image, if round == 0 { &mut discarded } else { figures })?;
        }
    }
    let mut rows = Vec::new();
    for (what, unit, values) in [
        ("VM: exec to vCPU runs", "ms", (|figures| &figures.running_ms) as fn(&Figures) -> &Vec<f64>),
        ("VM: exec to agent ready", "ms", |figures| &figures.ready_ms),
        ("VMM: threads", "threads", |figures| &figures.threads),
        ("VMM: PSS less guest memory", "KiB", |figures| &figures.pss_kib),
        ("VMM: anonymous", "KiB", |figures| &figures.anonymous_kib),
    ] {
        for ((_, subject), figures) in ALL.into_iter().zip(&all) {
            rows.extend(Row::of(GROUP, what, subject, unit, values(figures).clone()));
        }
    }
    Ok(rows)
}

fn start(has: Has, image: &Image, figures: &mut Figures) -> Result<()> {
    let mut service = None;
    let mut vm = boot(has, image, &mut service)?;
    let since_exec = |vm: &Started, us: u64| us.saturating_sub(vm.exec_us) as f64 / 1000.0;
    if let Some(timeline) = vm.timeline {
        figures.running_ms.push(since_exec(&vm, timeline.running_us));
    }
    let ready = vm.wait_for_mark(READY)?;
    figures.ready_ms.push(since_exec(&vm, ready));
    // What the agent does after it said that it is ready.
    std::thread::sleep(std::time::Duration::from_millis(500));
    let pid = vm.vmm.id();
    figures.threads.push(fs::read_dir(format!("/proc/{pid}/task"))?.count() as f64);
    let memory = footprint(pid, u64::from(MEMORY_MIB) * 1024 - 4096)?;
    figures.pss_kib.push(memory.own_pss as f64);
    figures.anonymous_kib.push(memory.own_anonymous as f64);
    Ok(())
}

/// A VM, and the service of its disk in `service`.
fn boot(has: Has, image: &Image, service: &mut Option<Service>) -> Result<Started> {
    start_ctvm_with(Root::Disk, |config, give| {
        match has {
            Has::Nothing => {}
            Has::Thread => config.images = true,
            Has::Disk => {
                let (disk, its_service) = image.disk_config("image", 60_000, give)?;
                config.disks.push(disk);
                *service = Some(its_service);
            }
        }
        Ok(())
    })
}
