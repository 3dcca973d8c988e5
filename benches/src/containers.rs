//! Group `run`: `ctr run` of a container that exits at once, by stage, and the shim's memory beside it.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use e2e::Containerd;
use e2e::containerd::pids_of;

use crate::rows::Row;
use crate::subject::now_us;

/// Where the shim leaves a copy of each sandbox' timeline (`timeline_dir` in the lab's configuration).
const TIMELINES: &str = "/var/tmp/ctvm-timelines";

/// Runs the group.
pub fn group(runs: usize) -> Result<Vec<Row>> {
    std::fs::create_dir_all(TIMELINES)?;
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
        for (position, (stage, ms)) in timeline(&id)?.into_iter().enumerate().skip(1) {
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
pub fn memory() -> Result<Vec<Row>> {
    let containerd = Containerd::start()?;
    let mut pss = Vec::new();
    let mut anonymous = Vec::new();
    for round in 0..3 {
        let id = format!("idle-{round}");
        containerd.run(&["-d"], &id, &["sleep", "1000"])?.ok()?;
        containerd.wait_for(&id, "RUNNING")?;
        let pid = *pids_of("containerd-shim-ctvm-v2")?.first().context("no shim runs")?;
        let shim = crate::memory::footprint(u32::try_from(pid)?, 0)?;
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

/// Stages of one sandbox, ms since its shim started, in order.
fn timeline(id: &str) -> Result<Vec<(String, f64)>> {
    let path = Path::new(TIMELINES).join(format!("test-{id}.json"));
    let text = std::fs::read_to_string(&path).with_context(|| format!("timeline {}", path.display()))?;
    let stages: Vec<(String, u64)> = serde_json::from_str(&text)?;
    let begin = stages.first().context("a timeline without stages")?.1;
    Ok(stages.into_iter().map(|(name, us)| (name, us.saturating_sub(begin) as f64 / 1000.0)).collect())
}
