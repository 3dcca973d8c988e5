//! Running all cases, and the table of how they ended.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::Cri;
use crate::cases::{Case, GROUPS, Ground};

/// How a case ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The runtime did what was asked.
    Pass,
    /// It did not; why.
    Fail(String),
    /// It was not asked, for there is no meaning in it; why.
    NotMeaningful(&'static str),
}

impl Outcome {
    /// The word for it, without the reason.
    pub fn word(&self) -> &'static str {
        match self {
            Outcome::Pass => "pass",
            Outcome::Fail(_) => "fail",
            Outcome::NotMeaningful(_) => "n/a",
        }
    }

    fn reason(&self) -> Option<&str> {
        match self {
            Outcome::Pass => None,
            Outcome::Fail(reason) => Some(reason),
            Outcome::NotMeaningful(reason) => Some(reason),
        }
    }
}

/// How all cases ended, by name.
pub type Outcomes = BTreeMap<&'static str, Outcome>;

/// What a column is called: `ctvm, containerd 1.7`.
pub fn column(handler: &str, release: &str) -> String {
    format!("{handler}, containerd {release}")
}

/// A column as JSON, for [`read`].
pub fn write(column: &str, outcomes: &Outcomes) -> String {
    let cases: Vec<_> = outcomes
        .iter()
        .map(|(name, outcome)| json!({"case": name, "word": outcome.word(), "reason": outcome.reason()}))
        .collect();
    json!({"column": column, "cases": cases}).to_string()
}

/// Reads what [`write`] wrote.
pub fn read(text: &str) -> Result<(String, Outcomes)> {
    let report: Value = serde_json::from_str(text)?;
    let mut outcomes = Outcomes::new();
    for entry in report["cases"].as_array().context("a report without cases")? {
        let name = entry["case"].as_str().context("a case without a name")?;
        let mut cases = GROUPS.iter().flat_map(|(_, cases)| cases.iter());
        let case = cases.find(|case| case.name == name).with_context(|| format!("unknown case {name:?}"))?;
        let outcome = match (entry["word"].as_str(), case.not_in_a_vm) {
            (Some("pass"), _) => Outcome::Pass,
            (Some("fail"), _) => Outcome::Fail(entry["reason"].as_str().unwrap_or_default().to_owned()),
            (Some("n/a"), Some(reason)) => Outcome::NotMeaningful(reason),
            (word, _) => bail!("case {name:?} ended as {word:?}"),
        };
        outcomes.insert(case.name, outcome);
    }
    Ok((report["column"].as_str().context("a report without its column's name")?.to_owned(), outcomes))
}

/// Runs the cases whose group or name contains `filter` under a runtime, two at a time, and tells each result as it
/// comes.
pub fn run(cri: &Cri, handler: &str, release: &str, filter: &str) -> Outcomes {
    let in_a_vm = handler.starts_with("ctvm");
    let cases: Vec<&Case> = GROUPS
        .iter()
        .flat_map(|(group, cases)| cases.iter().map(move |case| (group, case)))
        .filter(|(group, case)| group.contains(filter) || case.name.contains(filter))
        .map(|(_, case)| case)
        .collect();
    let (next, outcomes) = (AtomicUsize::new(0), Mutex::new(Outcomes::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut ground = Ground::new(cri, handler, release);
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = match case.not_in_a_vm {
                        Some(reason) if in_a_vm => Outcome::NotMeaningful(reason),
                        _ => ground
                            .run(case)
                            .map_or_else(|e| Outcome::Fail(without_ids(&e)), |()| Outcome::Pass),
                    };
                    eprintln!("{}: {}: {}", case.name, outcome.word(), outcome.reason().unwrap_or_default());
                    outcomes
                        .lock()
                        .expect("no code panics while it holds this lock")
                        .insert(case.name, outcome);
                }
            });
        }
    });
    outcomes.into_inner().expect("no code panics while it holds this lock")
}

/// An error's text, on one line, with what differs from run to run left out.
fn without_ids(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    let mut out = String::new();
    for word in text.split_whitespace() {
        let id = |part: &str| part.len() >= 32 && part.chars().all(|c| c.is_ascii_hexdigit());
        let plain = word.trim_matches(|c: char| !c.is_ascii_alphanumeric());
        let word = if id(plain) { word.replace(plain, "ID") } else { word.to_owned() };
        if !out.is_empty() {
            out.push(' ');
        }
        out.push_str(&word);
    }
    out.chars().take(300).collect::<String>().replace('|', "/")
}

/// The table as Markdown: a line for each case, a column for each runtime.
pub fn table(columns: &[(String, Outcomes)]) -> String {
    let mut text = String::new();
    let mut notes: Vec<String> = Vec::new();
    for (group, cases) in GROUPS {
        let names: Vec<_> = columns.iter().map(|(name, _)| name.as_str()).collect();
        let rule = "| --- ".repeat(columns.len() + 1);
        let _ = write!(text, "\n## {group}\n\n| case | {} |\n{rule}|\n", names.join(" | "));
        for case in cases {
            let _ = write!(text, "| {} |", case.name);
            for (_, outcomes) in columns {
                let Some(outcome) = outcomes.get(case.name) else {
                    text.push_str(" not run |");
                    continue;
                };
                let _ = write!(text, " {}", outcome.word());
                if let Some(reason) = outcome.reason() {
                    let number = notes.iter().position(|note| note == reason).unwrap_or_else(|| {
                        notes.push(reason.to_owned());
                        notes.len() - 1
                    });
                    let _ = write!(text, " ({})", number + 1);
                }
                text.push_str(" |");
            }
            text.push('\n');
        }
    }
    if !notes.is_empty() {
        text.push_str("\n## Reasons\n\n");
        for (number, note) in notes.iter().enumerate() {
            let _ = writeln!(text, "{}. {note}", number + 1);
        }
    }
    text
}

/// What a table says of a case in a column: its word.
pub fn lookup<'a>(table: &'a str, column: &str, case: &str) -> Option<&'a str> {
    let mut position = None;
    for line in table.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        if cells.get(1) == Some(&"case") {
            position = cells.iter().position(|cell| *cell == column);
        } else if cells.get(1) == Some(&case) {
            return cells.get(position?)?.split(' ').next();
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_says_what_it_was_made_from() {
        let name = GROUPS[0].1[0].name;
        let outcomes = |outcome: Outcome| Outcomes::from([(name, outcome)]);
        let text = table(&[
            ("runc".into(), outcomes(Outcome::Pass)),
            ("ctvm".into(), outcomes(Outcome::Fail("broken".into()))),
        ]);
        assert_eq!(lookup(&text, "runc", name), Some("pass"));
        assert_eq!(lookup(&text, "ctvm", name), Some("fail"));
        assert_eq!(lookup(&text, "ctvm", GROUPS[1].1[0].name), Some("not"));
        assert_eq!(lookup(&text, "crun", name), None);
        assert!(text.contains("| fail (1) |") && text.ends_with("1. broken\n"), "{text}");
    }

    #[test]
    fn a_column_is_read_as_it_was_written() {
        let names = GROUPS.iter().flat_map(|(_, cases)| cases.iter());
        let outcomes: Outcomes = names
            .map(|case| match case.not_in_a_vm {
                Some(reason) => (case.name, Outcome::NotMeaningful(reason)),
                None => (case.name, Outcome::Fail("why".into())),
            })
            .collect();
        assert_eq!(read(&write("c", &outcomes)).unwrap(), ("c".to_owned(), outcomes));
        assert!(read(r#"{"column":"c","cases":[{"case":"no such","word":"pass"}]}"#).is_err());
    }

    #[test]
    fn every_case_has_a_name_of_its_own() {
        let names: Vec<_> = GROUPS.iter().flat_map(|(_, cases)| cases.iter().map(|case| case.name)).collect();
        let different: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(different.len(), names.len());
        assert!(names.iter().all(|name| !name.contains('|')));
    }

    #[test]
    fn ids_are_left_out_of_reasons() {
        let error = anyhow::anyhow!("container {:?} | gone\n  now", "ab".repeat(32));
        assert_eq!(without_ids(&error), "container \"ID\" / gone now");
    }
}
