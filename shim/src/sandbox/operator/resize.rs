//! `POST /resize?vcpus=N&memory_mib=N&timeout_ms=N`: has the VM another size, as its operator wants it.
//!
//! Answered with 200 and [`Resized`](vmm_api::Resized) in JSON whenever the guest, or the VMM, had a say; what cannot
//! be tried is a 4xx or 503 with a line of text.

use std::sync::Arc;
use std::time::Duration;

use ttrpc::Code;
use vmm_api::resize::MAX_RESIZE_MS;

use super::http::{JSON_TYPE, TEXT_TYPE};
use crate::error::TaskError;
use crate::sandbox::Sandbox;
use crate::sandbox::resize::{Change, ResizeError};

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Asked {
    change: Change,
    timeout_ms: Option<u32>,
}

/// Status, type and body of the answer, when there is one.
pub async fn answer(sandbox: &Arc<Sandbox>, query: &str) -> (&'static str, &'static str, String) {
    let asked = match parse(query) {
        Ok(asked) => asked,
        Err(text) => return ("400 Bad Request", TEXT_TYPE, text + "\n"),
    };
    let timeout = match asked.timeout_ms {
        Some(ms) => Duration::from_millis(ms.into()),
        None => sandbox.config.timeouts.resize(),
    };
    // Carried out to its end even if the operator goes away meanwhile, so that what came of it is noted.
    let (changing, change) = (sandbox.clone(), asked.change);
    let changed = tokio::spawn(async move { changing.resize(change, timeout).await }).await;
    match changed.unwrap_or_else(|e| Err(TaskError::Task(e.to_string()))) {
        Ok(resized) => {
            let body = serde_json::to_string(&resized).expect("our own types serialise");
            ("200 OK", JSON_TYPE, body)
        }
        Err(e) => (status(&e), TEXT_TYPE, e.chain() + "\n"),
    }
}

fn status(error: &TaskError) -> &'static str {
    match error {
        TaskError::Resize(ResizeError::Held { .. }) => "409 Conflict",
        other if other.code() == Code::INVALID_ARGUMENT => "400 Bad Request",
        _ => "503 Service Unavailable",
    }
}

fn parse(query: &str) -> Result<Asked, String> {
    let mut asked = Asked { change: Change::default(), timeout_ms: None };
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let wrong = |limit: &str| format!("{key} is {value:?}, must be {limit}");
        match key {
            "vcpus" => {
                let count = value.parse().ok().filter(|count| *count > 0);
                asked.change.vcpus = Some(count.ok_or_else(|| wrong("a whole number from 1"))?);
            }
            "memory_mib" => {
                asked.change.memory_mib = Some(value.parse().map_err(|_| wrong("a whole number of MiB"))?);
            }
            "timeout_ms" => {
                let ms = value.parse().ok().filter(|ms| (1..=MAX_RESIZE_MS).contains(ms));
                asked.timeout_ms = Some(ms.ok_or_else(|| wrong(&format!("1 to {MAX_RESIZE_MS}")))?);
            }
            _ => return Err(format!("{key:?} is not known; known are vcpus, memory_mib and timeout_ms")),
        }
    }
    if asked.change == Change::default() {
        return Err("neither vcpus nor memory_mib is given".to_owned());
    }
    Ok(asked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_read_and_what_is_wrong_is_told() {
        let change = Change { vcpus: Some(4), memory_mib: Some(512) };
        let all = parse("vcpus=4&memory_mib=512&timeout_ms=250").unwrap();
        assert_eq!(all, Asked { change, timeout_ms: Some(250) });
        assert_eq!(parse("vcpus=4").unwrap().change.memory_mib, None);
        for (query, words) in [
            ("", "neither vcpus"),
            ("timeout_ms=5", "neither vcpus"),
            ("vcpus=0", "from 1"),
            ("vcpus=256", "vcpus is \"256\""),
            ("memory_mib=-2", "number of MiB"),
            ("vcpus=2&timeout_ms=0", "1 to 300000"),
            ("cpus=2", "\"cpus\" is not known"),
        ] {
            let text = parse(query).unwrap_err();
            assert!(text.contains(words), "{text}");
        }
    }
}
