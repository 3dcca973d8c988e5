//! containerd's filters (`pkg/filters`): selectors with commas between them, all of which must hold.
//!
//! `name==x`, `parent!="x y"`, `kind==committed`, `labels."containerd.io/snapshot.ref"==sha256:…`, and a field alone, which holds where
//! it is set. Patterns (`~=`) are not understood here; containerd applies those to what it is given.

use std::iter::Peekable;
use std::str::Chars;

use crate::error::SnapshotError;
use crate::snapshot::Snapshot;

/// Any of several filters; everything, where there is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filters(Vec<Vec<Selector>>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Selector {
    field: Vec<String>,
    test: Test,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Test {
    Set,
    Equal(String),
    NotEqual(String),
}

impl Filters {
    /// Of a request.
    pub fn parse(filters: &[String]) -> Result<Filters, SnapshotError> {
        filters.iter().map(|text| parse(text)).collect::<Result<_, _>>().map(Filters)
    }

    /// Whether a snapshot passes.
    pub fn match_(&self, snapshot: &Snapshot) -> bool {
        self.0.is_empty() || self.0.iter().any(|all| all.iter().all(|selector| selector.holds(snapshot)))
    }
}

impl Selector {
    fn holds(&self, snapshot: &Snapshot) -> bool {
        let value = value(&self.field, snapshot);
        match &self.test {
            Test::Set => value.is_some(),
            Test::Equal(wanted) => value.unwrap_or_default() == wanted,
            Test::NotEqual(other) => value.unwrap_or_default() != other,
        }
    }
}

fn value<'s>(field: &[String], snapshot: &'s Snapshot) -> Option<&'s str> {
    let (first, rest) = field.split_first()?;
    match (first.as_str(), rest) {
        ("name", []) => Some(&snapshot.name),
        ("parent", []) => snapshot.parent.as_deref(),
        ("kind", []) => Some(snapshot.kind.word()),
        // A key with dots need not be quoted.
        ("labels", key) => snapshot.labels.get(&key.join(".")).map(String::as_str),
        _ => None,
    }
}

fn parse(text: &str) -> Result<Vec<Selector>, SnapshotError> {
    let wrong = |what: &str| SnapshotError::Invalid(format!("filter {text:?}: {what}"));
    let mut rest = text.chars().peekable();
    let mut selectors = Vec::new();
    while rest.peek().is_some() {
        let mut field = vec![word(&mut rest, ".,=!~").ok_or_else(|| wrong("a quote without its end"))?];
        while rest.next_if_eq(&'.').is_some() {
            field.push(word(&mut rest, ".,=!~").ok_or_else(|| wrong("a quote without its end"))?);
        }
        if field.iter().any(String::is_empty) {
            return Err(wrong("a field without a name"));
        }
        let test = match rest.next() {
            None | Some(',') => {
                selectors.push(Selector { field, test: Test::Set });
                continue;
            }
            Some(first @ ('=' | '!')) if rest.next() == Some('=') => {
                let value = word(&mut rest, ",").ok_or_else(|| wrong("a quote without its end"))?;
                if first == '=' { Test::Equal(value) } else { Test::NotEqual(value) }
            }
            Some(_) => return Err(wrong("the operators are == and !=")),
        };
        selectors.push(Selector { field, test });
        if !matches!(rest.next(), None | Some(',')) {
            return Err(wrong("a comma is missing"));
        }
    }
    Ok(selectors)
}

/// A quoted word, or one up to any of `ends`. None where a quote has no end.
fn word(rest: &mut Peekable<Chars<'_>>, ends: &str) -> Option<String> {
    let mut word = String::new();
    if rest.next_if_eq(&'"').is_some() {
        loop {
            match rest.next()? {
                '"' => return Some(word),
                '\\' => word.push(rest.next()?),
                other => word.push(other),
            }
        }
    }
    while let Some(next) = rest.next_if(|next| !ends.contains(*next)) {
        word.push(next);
    }
    Some(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{Kind, Labels, Usage, now};

    fn matches(filter: &str) -> bool {
        let labels = Labels::from([
            ("containerd.io/snapshot.ref".to_owned(), "sha256:abc".to_owned()),
            ("plain".to_owned(), "a,b \"c\"".to_owned()),
        ]);
        let snapshot = Snapshot {
            id: 1,
            name: "k8s.io/3/one".into(),
            parent: None,
            kind: Kind::Committed,
            created: now(),
            updated: now(),
            labels,
            usage: Usage::default(),
        };
        Filters::parse(&[filter.to_owned()]).unwrap().match_(&snapshot)
    }

    #[test]
    fn what_containerd_asks_for_a_layer_is_understood() {
        assert!(matches("labels.\"containerd.io/snapshot.ref\"==sha256:abc,parent==\"\""));
        assert!(!matches("labels.\"containerd.io/snapshot.ref\"==sha256:abd,parent==\"\""));
        assert!(!matches("labels.\"containerd.io/snapshot.ref\"==sha256:abc,parent==\"x\""));
    }

    #[test]
    fn fields_are_compared_or_looked_for() {
        assert!(matches("name==k8s.io/3/one") && !matches("name==k8s.io/3/on"));
        assert!(matches("kind==committed,name") && !matches("parent"));
        assert!(matches("labels.plain==\"a,b \\\"c\\\"\"") && matches("labels.none!=x"));
        assert!(matches("labels.containerd.io/snapshot.ref"));
        assert!(matches(""));
    }

    #[test]
    fn any_of_several_is_enough() {
        let both = ["name==a".to_owned(), "name==b".to_owned()];
        assert_eq!(Filters::parse(&both).unwrap().0.len(), 2);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for filter in ["name~=x", "name=x", "name==\"x", "name==\"x\"y", ".==x", "==x", "name!"] {
            let error = Filters::parse(&[filter.to_owned()]).unwrap_err();
            assert!(error.to_string().contains("filter"), "{filter}: {error}");
        }
    }
}
