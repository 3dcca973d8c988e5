//! Figures as rows: one quantity of one subject over all its runs.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// One row of the table and one object of the JSON file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    /// Which benchmark.
    pub group: Cow<'static, str>,
    /// Which quantity.
    pub name: String,
    /// `ctvm` or the peer's name and version.
    pub subject: String,
    /// Unit of the figures.
    pub unit: Cow<'static, str>,
    /// Median.
    pub p50: f64,
    /// 99th percentile (the largest value below 100 runs).
    pub p99: f64,
    /// Runs.
    pub n: usize,
    /// (largest - smallest) / median.
    pub spread: f64,
    /// Limit from the budget table, where one applies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<f64>,
}

impl Row {
    /// Sums up the values of all runs; `None` where there are none.
    pub fn of(
        group: &'static str,
        name: impl Into<String>,
        subject: impl Into<String>,
        unit: &'static str,
        mut values: Vec<f64>,
    ) -> Option<Row> {
        values.sort_by(f64::total_cmp);
        let (first, last) = (*values.first()?, *values.last()?);
        let p50 = percentile(&values, 50);
        let spread = if p50 == 0.0 { 0.0 } else { (last - first) / p50 };
        let p99 = percentile(&values, 99);
        let n = values.len();
        Some(Row {
            group: group.into(),
            name: name.into(),
            subject: subject.into(),
            unit: unit.into(),
            p50,
            p99,
            n,
            spread,
            budget: None,
        })
    }

    /// The same row with its budget.
    pub fn budget(mut self, limit: f64) -> Row {
        self.budget = Some(limit);
        self
    }
}

/// The smallest value that at least `p` per cent of all values do not exceed.
fn percentile(sorted: &[f64], p: usize) -> f64 {
    sorted[(sorted.len() * p).div_ceil(100).max(1) - 1]
}

/// A Markdown table.
pub fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "| group | what | subject | p50 | p99 | unit | n | spread | budget |\n|---|---|---|--:|--:|---|--:|--:|--:|\n",
    );
    for r in rows {
        let budget = r.budget.map_or(String::new(), |b| {
            format!("{} {}", figure(b), if r.p50 <= b { "met" } else { "**missed**" })
        });
        text += &format!(
            "| {} | {} | {} | {} | {} | {} | {} | {:.1} % | {budget} |\n",
            r.group,
            r.name,
            r.subject,
            figure(r.p50),
            figure(r.p99),
            r.unit,
            r.n,
            r.spread * 100.0
        );
    }
    text
}

fn figure(value: f64) -> String {
    if value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let row = Row::of("g", "n", "s", "ms", vec![4.0, 1.0, 2.0, 3.0]).unwrap();
        assert_eq!((row.p50, row.p99, row.n, row.spread), (2.0, 4.0, 4, 1.5));
        assert!(Row::of("g", "n", "s", "ms", vec![]).is_none());
    }

    #[test]
    fn a_missed_budget_is_said() {
        let row = Row::of("g", "n", "s", "ms", vec![2.5]).unwrap().budget(2.0);
        assert!(table(&[row]).contains("| 2 **missed** |"));
    }
}
