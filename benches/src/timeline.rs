//! The shim's own stages of a sandbox.

use std::path::Path;

use anyhow::{Context, Result};

/// Where the shim leaves a copy of each sandbox' timeline (`timeline_dir` in the lab's configuration).
pub const FOLDER: &str = "/var/tmp/ctvm-timelines";

/// Stages of one sandbox, ms since its shim started, in order.
///
/// # Errors
/// The file that is not there or is no timeline, by name.
pub fn read(namespace: &str, id: &str) -> Result<Vec<(String, f64)>> {
    let path = Path::new(FOLDER).join(format!("{namespace}-{id}.json"));
    let text = std::fs::read_to_string(&path).with_context(|| format!("timeline {}", path.display()))?;
    parse(&text).with_context(|| format!("timeline {}", path.display()))
}

fn parse(text: &str) -> Result<Vec<(String, f64)>> {
    let stages: Vec<(String, u64)> = serde_json::from_str(text)?;
    let begin = stages.first().context("no stages")?.1;
    Ok(stages.into_iter().map(|(name, us)| (name, us.saturating_sub(begin) as f64 / 1000.0)).collect())
}

#[cfg(test)]
mod tests {
    #[test]
    fn stages_count_from_the_first() {
        let stages = super::parse(r#"[["shim start",1000],["vmm exec",3500]]"#).unwrap();
        assert_eq!(stages, [("shim start".to_owned(), 0.0), ("vmm exec".to_owned(), 2.5)]);
        assert!(super::parse("[]").is_err());
    }
}
