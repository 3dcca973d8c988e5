//! `ctvm resize`: another size for a VM that runs.

use std::io::Write as _;
use std::time::{Duration, Instant};

use clap::Args;
use vmm_api::resize::MAX_RESIZE_MS;
use vmm_api::{Ending, Reached, Resized};

use crate::cli::Failure;
use crate::cli::node::{self, NodeError};
use crate::cli::run::memory_mib;
use crate::cli::table::table;

/// How much longer than the resize its answer may take: the shim's own patience with the VMM, and a little.
const SLACK: Duration = Duration::from_secs(15);

/// Which sandbox, and how large.
#[derive(Debug, Clone, Args)]
pub struct Resize {
    /// Its id, or enough of it to be the only one; NAMESPACE/ID where it is in several
    pub sandbox: String,
    /// vCPUs that its guest shall have online
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..), required_unless_present = "memory")]
    pub cpus: Option<u8>,
    /// Memory that it shall have, in MiB or with a suffix: 512, 512M, 3G
    #[arg(long, value_name = "MIB", value_parser = memory_mib)]
    pub memory: Option<u32>,
    /// Seconds that it may take
    #[arg(long, value_name = "SECONDS", default_value_t = 30,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_RESIZE_MS / 1000)))]
    pub timeout: u32,
}

/// Has it done, and prints what came of it. Says whether it is all that was asked for.
///
/// # Errors
/// See [`Failure`].
pub fn run(options: &Resize) -> Result<bool, Failure> {
    let found = node::find(&options.sandbox)?;
    let begun = Instant::now();
    let patience = Duration::from_secs(options.timeout.into()) + SLACK;
    let answer = found.post(&target(options), patience)?;
    let resized: Resized = match answer.is_ok {
        true => serde_json::from_str(&answer.body).map_err(|e| NodeError::Answer {
            id: found.full_name(),
            text: format!("{:?}: {e}", answer.body),
        })?,
        false => return Err(Failure::NotResized(answer.body.trim().to_owned())),
    };
    let text = report(&resized, begun.elapsed());
    let written = std::io::stdout().write_all(text.as_bytes());
    written.map_err(|source| Failure::Local { what: "standard output", source })?;
    Ok(resized.ending == Ending::Done)
}

fn target(options: &Resize) -> String {
    let mut target = format!("/resize?timeout_ms={}", options.timeout * 1000);
    if let Some(cpus) = options.cpus {
        target.push_str(&format!("&vcpus={cpus}"));
    }
    if let Some(mib) = options.memory {
        target.push_str(&format!("&memory_mib={mib}"));
    }
    target
}

fn report(resized: &Resized, took: Duration) -> String {
    let row = |what: &str, unit: &str, number: Option<Reached>| {
        number.map(|Reached { asked, reached }| {
            let reached = reached.map_or_else(|| "unknown".to_owned(), |n| format!("{n}{unit}"));
            [what.to_owned(), format!("{asked}{unit}"), reached]
        })
    };
    let rows = [row("vCPUs", "", resized.vcpus), row("memory", " MiB", resized.memory_mib)];
    let rows: Vec<_> = rows.into_iter().flatten().collect();
    let detail = match resized.detail.as_str() {
        "" => String::new(),
        detail => format!(": {}", detail.replace(char::is_control, " ")),
    };
    let ms = took.as_micros() / 100;
    format!(
        "{}{} after {}.{} ms{detail}\n",
        table(["", "ASKED", "REACHED"], &rows),
        resized.ending.name(),
        ms / 10,
        ms % 10
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asked_and_reached_are_told_and_how_it_ended() {
        let reached = |asked, reached| Some(Reached { asked, reached });
        let resized = Resized {
            ending: Ending::Partial,
            vcpus: reached(4, Some(3)),
            memory_mib: reached(512, None),
            detail: "CPU 3:\nno memory".into(),
        };
        assert_eq!(
            report(&resized, Duration::from_micros(12_345)),
            "        ASKED    REACHED\nvCPUs   4        3\nmemory  512 MiB  unknown\n\
             partial after 12.3 ms: CPU 3: no memory\n"
        );
        let done = Resized { ending: Ending::Done, memory_mib: None, detail: String::new(), ..resized };
        assert_eq!(report(&done, Duration::ZERO).lines().last(), Some("done after 0.0 ms"));
    }

    #[test]
    fn what_is_asked_becomes_a_query() {
        let options = Resize { sandbox: "web".into(), cpus: Some(2), memory: Some(512), timeout: 5 };
        assert_eq!(target(&options), "/resize?timeout_ms=5000&vcpus=2&memory_mib=512");
        assert_eq!(target(&Resize { cpus: None, ..options }), "/resize?timeout_ms=5000&memory_mib=512");
    }
}
