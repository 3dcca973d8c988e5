//! From the start of a pull to the first line of the container's output, on a node that has nothing of the image.

use anyhow::{Context, Result};
use benches::rows::Row;
use benches::subject::now_us;

use super::link::{NO_LIMIT, SPEEDS, Speed};
use super::node::{NYDUS, Node, OCI, RUNC, Way};
use super::picture::{PULL, TOTAL};
use super::{GROUP, IMAGES, Image, MIB, SMALL};

const WAYS: [Way; 3] = [NYDUS, OCI, RUNC];

/// What one start took.
#[derive(Debug, Clone, Copy)]
struct Start {
    pull_ms: f64,
    total_ms: f64,
    /// Of all CPUs.
    busy_ms: f64,
    bytes: f64,
}

/// Figures of one image and speed, by the place in [`WAYS`].
type Starts = [Vec<Start>; WAYS.len()];

/// Runs the part.
pub fn measure(node: &mut Node, runs: usize, long: bool) -> Result<Vec<Row>> {
    // The programs of the node are in memory from here on.
    node.link.set(NO_LIMIT)?;
    round(node, &SMALL, 0, &mut Starts::default())?;
    let mut rows = Vec::new();
    for image in IMAGES.iter().filter(|image| long || !image.long) {
        let mut all = Starts::default();
        for speed in SPEEDS {
            node.link.set(speed)?;
            let mut starts = Starts::default();
            for number in 0..(runs / image.runs_a_start).max(1) {
                round(node, image, number, &mut starts)
                    .with_context(|| format!("{}, {}", image.name, speed.name))?;
                let last = starts.each_ref().map(|of_way| of_way.last().map(|start| start.total_ms.round()));
                eprintln!("nydus, start: {}, {}, round {number}: {last:?} ms", image.name, speed.name);
            }
            rows.extend(times(image, speed, &starts));
            all.iter_mut().zip(starts).for_each(|(all, starts)| all.extend(starts));
        }
        for (way, starts) in WAYS.into_iter().zip(&all) {
            let values = |what: fn(&Start) -> f64| starts.iter().map(what).collect();
            let name = format!("{}: CPU time to first output", image.name);
            rows.extend(Row::of(GROUP, name, way.subject, "ms", values(|start| start.busy_ms)));
            let name = format!("{}: over the link to first output", image.name);
            rows.extend(Row::of(GROUP, name, way.subject, "MiB", values(|start| start.bytes / MIB)));
        }
    }
    Ok(rows)
}

fn times(image: &Image, speed: Speed, starts: &Starts) -> Vec<Row> {
    let mut rows = Vec::new();
    for (what, value) in
        [(TOTAL, (|start| start.total_ms) as fn(&Start) -> f64), (PULL, |start| start.pull_ms)]
    {
        for (way, starts) in WAYS.into_iter().zip(starts) {
            let name = format!("{}, {}: {what}", image.name, speed.name);
            rows.extend(Row::of(GROUP, name, way.subject, "ms", starts.iter().map(value).collect()));
        }
    }
    rows
}

/// One start of each way. The two that unpack the image share one pull: what is read of it is in memory for both, as it was
/// just written.
fn round(node: &mut Node, image: &Image, number: usize, starts: &mut Starts) -> Result<()> {
    let pulled = pull(node, image, NYDUS)?;
    starts[0].push(run(node, image, NYDUS, pulled)?);
    node.forget(image.repository, NYDUS)?;
    let pulled = pull(node, image, OCI)?;
    for place in if number.is_multiple_of(2) { [1, 2] } else { [2, 1] } {
        starts[place].push(run(node, image, WAYS[place], pulled)?);
    }
    node.forget(image.repository, OCI)
}

/// A pull: all of it but the container's start.
fn pull(node: &Node, image: &Image, way: Way) -> Result<Start> {
    let (begin, busy, received) = (now_us(), busy_ms()?, node.link.received()?);
    node.pull(image.repository, way)?;
    let pull_ms = ms_since(begin, now_us());
    let (busy_ms, bytes) = (busy_ms()? - busy, (node.link.received()? - received) as f64);
    Ok(Start { pull_ms, total_ms: pull_ms, busy_ms, bytes })
}

/// The same with a container's start behind it.
fn run(node: &Node, image: &Image, way: Way, pulled: Start) -> Result<Start> {
    let (begin, busy, received) = (now_us(), busy_ms()?, node.link.received()?);
    let (end, bytes) = node.first_output(image.repository, way, "start", image.command)?;
    // The container's end is in it, which is short.
    let busy = busy_ms()? - busy;
    Ok(Start {
        total_ms: pulled.total_ms + ms_since(begin, end),
        busy_ms: pulled.busy_ms + busy,
        bytes: pulled.bytes + (bytes - received) as f64,
        ..pulled
    })
}

fn ms_since(begin_us: u64, end_us: u64) -> f64 {
    end_us.saturating_sub(begin_us) as f64 / 1000.0
}

/// What all CPUs together have not been idle since the machine started.
fn busy_ms() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/uptime")?;
    let cpus = std::thread::available_parallelism()?.get();
    parse_busy(&text, cpus).with_context(|| format!("/proc/uptime holds {text:?}"))
}

fn parse_busy(uptime: &str, cpus: usize) -> Option<f64> {
    let (up, idle) = uptime.trim().split_once(' ')?;
    Some((up.parse::<f64>().ok()? * cpus as f64 - idle.parse::<f64>().ok()?) * 1000.0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn busy_is_what_no_cpu_was_idle() {
        assert_eq!(super::parse_busy("100.50 150.25\n", 2), Some(50_750.0));
        assert_eq!(super::parse_busy("", 2), None);
    }
}
