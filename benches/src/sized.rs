//! What sizes cost a start: more that may come, and a VM that boots small and grows beside one that boots at its size. By the
//! shim's own timeline, under containerd.

use std::fs;

use anyhow::{Context, Result};
use benches::rows::Row;
use benches::{memory, timeline};
use e2e::Containerd;
use e2e::containerd::pids_of;

/// Name, keys and tables of the shim's configuration.
const CASES: [(&str, &str, &str); 6] = [
    ("1 vCPU, 128 MiB", "max_vcpus = 1\nmemory_mib = 128", ""),
    ("1 vCPU, 128 MiB, 7 vCPUs may come", "max_vcpus = 8\nmemory_mib = 128", ""),
    ("1 vCPU, 128 MiB, 1 GiB may come", "max_vcpus = 1\nmemory_mib = 128\nmax_memory_mib = 1152", ""),
    ("4 vCPUs, 1 GiB", "vcpus = 4\nmemory_mib = 1024", "[resize]\nboot_small = \"no\"\n"),
    (
        "4 vCPUs, 1 GiB, booted with 1 vCPU",
        "vcpus = 4\nmemory_mib = 1024",
        "[resize]\nboot_small = \"vcpus\"\n",
    ),
    ("4 vCPUs, 1 GiB, booted small", "vcpus = 4\nmemory_mib = 1024", "[resize]\nboot_small = \"all\"\n"),
];

/// Rows of the group `resize`.
pub fn group(runs: usize) -> Result<Vec<Row>> {
    fs::create_dir_all(timeline::FOLDER)?;
    let containerd = Containerd::start()?;
    let usual = fs::read_to_string("/etc/ctvm/config.toml")?;
    let mut values = vec![[vec![], vec![], vec![]]; CASES.len()];
    for round in 0..=runs {
        for (case, (name, keys, tables)) in CASES.iter().enumerate() {
            let id = format!("sized-{round}-{case}");
            let config = containerd.folder().join("sized.toml");
            fs::write(&config, format!("{keys}\n{usual}\n{tables}"))?;
            let config = config.display().to_string();
            containerd.run(&["-d", "--runtime-config-path", &config], &id, &["sleep", "1000"])?.ok()?;
            let stages = timeline::read("test", &id)?;
            let stage = |name: &str| -> Result<f64> {
                let found = stages.iter().find(|(stage, _)| stage == name);
                Ok(found.with_context(|| format!("no stage {name:?} in {stages:?}"))?.1)
            };
            let vmm = *pids_of("ctvm-vmm")?.first().context("no VMM runs")?;
            let guest = memory::footprint(u32::try_from(vmm)?, 64 << 10)?;
            let figures =
                [stage("agent ready")?, stage("container running")?, guest.guest_rss as f64 / 1024.0];
            eprintln!("{name}, round {round}: {figures:?}");
            containerd.remove(&id)?;
            if round > 0 {
                for (values, figure) in values[case].iter_mut().zip(figures) {
                    values.push(figure);
                }
            }
        }
    }
    let cases = CASES.iter().zip(values).flat_map(|((name, ..), [agent, running, resident])| {
        let row =
            |figure: &str, unit, values| Row::of("resize", format!("{name}: {figure}"), "ctvm", unit, values);
        [
            row("shim start to agent ready", "ms", agent),
            row("shim start to container running", "ms", running),
            row("guest memory resident", "MiB", resident),
        ]
    });
    Ok(cases.flatten().collect())
}
