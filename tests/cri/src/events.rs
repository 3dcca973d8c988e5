//! What containerd publishes, followed from a moment on.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result};
use e2e::Containerd;
use e2e::command::wait_at_most;
use serde_json::Value;

/// A running `ctr events`; ends when dropped.
#[derive(Debug)]
pub struct Events {
    ctr: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Events {
    /// Follows a daemon's events until it ends.
    pub fn follow(containerd: &Containerd) -> Result<Events> {
        let mut command = containerd.ctr();
        command.arg("events").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut ctr = command.spawn().context("starting ctr events")?;
        let output = BufReader::new(ctr.stdout.take().expect("stdout is piped"));
        let lines = Arc::new(Mutex::new(Vec::new()));
        let heard = lines.clone();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                heard.lock().expect("no code panics while it holds this lock").push(line);
            }
        });
        let events = Events { ctr, lines };
        events.wait_until_heard(containerd)?;
        Ok(events)
    }

    /// Causes events until one arrives: there is no other sign that the subscription has begun.
    fn wait_until_heard(&self, containerd: &Containerd) -> Result<()> {
        const LABEL: &str = "ctvm.local/heard";
        wait_at_most(Duration::from_secs(60), "containerd's events arrive", || {
            for value in ["1", ""] {
                let label = format!("{LABEL}={value}");
                e2e::run(containerd.ctr().args(["images", "label", e2e::IMAGE, &label]))?.ok()?;
            }
            Ok(!self.lines.lock().expect("no code panics while it holds this lock").is_empty())
        })
    }

    /// Exit codes of the ends of a container's first process that were told so far.
    pub fn exits(&self, container: &str) -> Vec<i64> {
        let lines = self.lines.lock().expect("no code panics while it holds this lock");
        // DATE TIME ZONE ZONE NAMESPACE TOPIC JSON
        let exits = lines.iter().filter_map(|line| line.split_once(" /tasks/exit ")?.1.parse::<Value>().ok());
        exits
            .filter(|exit| exit["container_id"] == container && exit["id"] == container)
            .map(|exit| exit["exit_status"].as_i64().unwrap_or(0))
            .collect()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // Both fail only when it has ended already, with its daemon.
        let _ = self.ctr.kill();
        let _ = self.ctr.wait();
    }
}
