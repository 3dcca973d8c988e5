//! When each stage of a sandbox's life was reached, in microseconds of `CLOCK_MONOTONIC`.
//!
//! The file is a JSON list of pairs, `[["shim start", 1000], …]`, in order of time. It is written to the state
//! directory, which goes with the sandbox; to `timeline_dir`, if that is configured, where it stays; and at the end
//! as one line to the log.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::clock;

/// Name of the file in the state directory.
const FILE: &str = "timeline.json";
/// Where the clock of a start begins.
pub const SHIM_START: &str = "shim start";
/// Stages kept; a pod with very many containers keeps its first ones.
const MAX_STAGES: usize = 256;

/// The stages of one sandbox.
#[derive(Debug)]
pub struct Timeline {
    stages: Mutex<Vec<(String, u64)>>,
    files: Vec<PathBuf>,
}

impl Timeline {
    /// A timeline for sandbox `id`, kept in `state_dir` and, where one is configured, in `timeline_dir`.
    pub fn new(state_dir: &Path, timeline_dir: Option<&Path>, namespace: &str, id: &str) -> Self {
        let copy = timeline_dir.map(|dir| dir.join(format!("{namespace}-{id}.json")));
        let files = std::iter::once(state_dir.join(FILE)).chain(copy).collect();
        Timeline { stages: Mutex::default(), files }
    }

    /// The stage is reached now.
    pub fn reached(&self, stage: &str) {
        self.reached_at(stage, clock::monotonic_us());
    }

    /// The stage was reached then. Zero means that nobody knows when, and is left out.
    pub fn reached_at(&self, stage: &str, at_us: u64) {
        let mut stages = self.stages.lock().expect("no code panics while it holds this lock");
        if at_us == 0 || stages.len() >= MAX_STAGES {
            return;
        }
        let position = stages.partition_point(|(_, at)| *at <= at_us);
        stages.insert(position, (stage.to_owned(), at_us));
    }

    /// What was reached so far, in order of time.
    pub fn stages(&self) -> Vec<(String, u64)> {
        self.stages.lock().expect("no code panics while it holds this lock").clone()
    }

    /// As JSON.
    pub fn to_json(&self) -> String {
        let stages = self.stages.lock().expect("no code panics while it holds this lock");
        serde_json::to_string(&*stages).expect("strings and numbers serialise")
    }

    /// Writes the files. Failures are logged: a timeline is not worth a container.
    pub fn save(&self) {
        let json = self.to_json();
        for file in &self.files {
            let made = file.parent().map_or(Ok(()), std::fs::create_dir_all);
            if let Err(e) = made.and_then(|()| std::fs::write(file, &json)) {
                log::warn!("timeline {}: {e}", file.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_in_order_of_time_whenever_they_are_told() {
        let root = tempfile::tempdir().unwrap();
        let (state, kept) = (root.path().join("state"), root.path().join("kept"));
        let timeline = Timeline::new(&state, Some(&kept), "default", "web");
        timeline.reached_at("agent ready", 300);
        timeline.reached_at("shim start", 100);
        timeline.reached_at("unknown", 0);
        timeline.reached_at("kernel", 200);
        timeline.save();
        let text = std::fs::read_to_string(kept.join("default-web.json")).unwrap();
        assert_eq!(text, r#"[["shim start",100],["kernel",200],["agent ready",300]]"#);
        assert_eq!(std::fs::read_to_string(state.join(FILE)).unwrap(), text);
    }
}
