//! A pod from its start to its end, by what CRI asks for, and by the shim's own stages.

use std::time::Instant;

use anyhow::{Context, Result};
use benches::rows::Row;
use benches::timeline;
use cri::{Cri, Pod};

use crate::{CTVM, CTVM_POD, Handler, RUNC};

const HANDLERS: [Handler; 3] = [CTVM, CTVM_POD, RUNC];

const STEPS: [&str; 4] = [
    "RunPodSandbox",
    "CreateContainer, StartContainer",
    "ExecSync of true",
    "StopPodSandbox, RemovePodSandbox",
];

/// Runs the part.
pub fn measure(cri: &Cri, runs: usize) -> Result<Vec<Row>> {
    let mut steps = [const { [const { Vec::new() }; HANDLERS.len()] }; STEPS.len()];
    let mut stages: Vec<(String, Vec<f64>)> = Vec::new();
    for round in 0..=runs {
        for (place, handler) in HANDLERS.into_iter().enumerate() {
            let (took, pod) = live(cri, handler).with_context(|| handler.name)?;
            eprintln!("life, round {round}: {} {took:?} ms", handler.subject);
            // The first round reads everything from disk.
            if round == 0 {
                continue;
            }
            for (values, ms) in steps.iter_mut().zip(took) {
                values[place].push(ms);
            }
            if handler == CTVM {
                add_stages(&mut stages, timeline::read("k8s.io", &pod)?);
            }
        }
    }
    let mut rows = Vec::new();
    for (step, of_handlers) in STEPS.into_iter().zip(steps) {
        for (handler, values) in HANDLERS.into_iter().zip(of_handlers) {
            rows.extend(Row::of("pods", step, handler.subject, "ms", values));
        }
    }
    for (stage, values) in stages {
        rows.extend(Row::of("pods", format!("pod's shim start to {stage}"), CTVM.subject, "ms", values));
    }
    Ok(rows)
}

/// The life of one pod: ms of each step, and the pod's id.
fn live(cri: &Cri, handler: Handler) -> Result<([f64; STEPS.len()], String)> {
    let mut last = Instant::now();
    let mut lap = || {
        let took = last.elapsed();
        last = Instant::now();
        took.as_secs_f64() * 1000.0
    };
    let pod = Pod::run(cri, handler.name)?;
    let run = lap();
    let container = pod.start(&pod.container(&["sleep", "1000"]))?;
    let start = lap();
    cri.exec(&container, &["true"], 0)?.ok()?;
    let exec = lap();
    // Not by `Pod::end`, which makes sure that it is gone by the same calls once more.
    cri.stop_pod(&pod.id)?;
    cri.remove_pod(&pod.id)?;
    let end = lap();
    Ok(([run, start, exec, end], pod.id.clone()))
}

/// Adds what one shim reached until its pod ran. The first stage is where the others count from.
fn add_stages(stages: &mut Vec<(String, Vec<f64>)>, timeline: Vec<(String, f64)>) {
    // Those of the other container have its id in parentheses.
    let of_pod = timeline.into_iter().skip(1).filter(|(name, _)| !name.contains('(') && name != "exited");
    for (name, ms) in of_pod {
        match stages.iter_mut().find(|(known, _)| *known == name) {
            Some((_, values)) => values.push(ms),
            None => stages.push((name, vec![ms])),
        }
    }
}
