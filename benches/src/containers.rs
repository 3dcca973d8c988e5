//! Group `run`: `ctr run` of a container that exits at once, by stage, and the shim's memory beside it.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use benches::rows::Row;
use benches::subject::now_us;
use benches::{memory as process, timeline};
use e2e::Containerd;
use e2e::containerd::pids_of;

/// Runs the group.
pub fn group(runs: usize) -> Result<Vec<Row>> {
    std::fs::create_dir_all(timeline::FOLDER)?;
    let containerd = Containerd::start()?;
    let mut total = Vec::new();
    let mut runc = Vec::new();
    let mut stages: BTreeMap<(usize, String), Vec<f64>> = BTreeMap::new();
    for round in 0..=runs {
        let id = format!("bench-{round}");
        let begin = now_us();
        containerd.run(&["--rm"], &id, &["true"])?.ok()?;
        let ms = (now_us() - begin) as f64 / 1000.0;
        let begin = now_us();
        let mut peer = containerd.ctr();
        peer.args(["run", "--rm", e2e::IMAGE, &format!("runc-{round}"), "true"]);
        e2e::run(&mut peer)?.ok()?;
        let peer_ms = (now_us() - begin) as f64 / 1000.0;
        eprintln!("run round {round}: ctvm {ms} ms, runc {peer_ms} ms");
        if round == 0 {
            continue;
        }
        total.push(ms);
        runc.push(peer_ms);
        // The first stage is where the others count from.
        for (position, (stage, ms)) in timeline::read("test", &id)?.into_iter().enumerate().skip(1) {
            stages.entry((position, stage)).or_default().push(ms);
        }
    }
    let mut rows: Vec<Row> = stages
        .into_iter()
        .filter_map(|((_, stage), values)| {
            Row::of("run", format!("shim start to {stage}"), "ctvm", "ms", values)
        })
        .collect();
    rows.extend(Row::of("run", "ctr run --rm … true", "ctvm", "ms", total));
    rows.extend(Row::of("run", "ctr run --rm … true", "runc (no VM)", "ms", runc));
    Ok(rows)
}

/// Memory of shim and VMM under a running container: part of group `memory`.
pub fn memory(runs: usize) -> Result<Vec<Row>> {
    let containerd = Containerd::start()?;
    let mut pss = Vec::new();
    let mut anonymous = Vec::new();
    for round in 0..runs {
        let id = format!("idle-{round}");
        containerd.run(&["-d"], &id, &["sleep", "1000"])?.ok()?;
        let pid = *pids_of("containerd-shim-ctvm-v2")?.first().context("no shim runs")?;
        let shim = process::footprint(u32::try_from(pid)?, 0)?;
        pss.push(shim.own_pss as f64);
        anonymous.push(shim.own_anonymous as f64);
        containerd.remove(&id)?;
    }
    let rows = [
        Row::of("memory", "shim, PSS", "ctvm", "KiB", pss).map(|r| r.budget(2560.0)),
        Row::of("memory", "shim, anonymous", "ctvm", "KiB", anonymous),
    ];
    Ok(rows.into_iter().flatten().collect())
}
