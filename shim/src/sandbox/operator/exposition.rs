//! Writes Prometheus's text exposition format, version 0.0.4.
//!
//! A family's `HELP` and `TYPE` are written with its first sample, so that one without samples leaves no trace. Labels
//! that every sample has are given once.

use std::fmt::Write as _;

/// What kind of number a family holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, while its sandbox lives.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts how often a number was in each of some ranges.
    Histogram,
}

/// A sample's value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Number {
    /// Written exactly.
    Whole(u64),
    /// Written as the shortest text that reads as the same number.
    Real(f64),
}

impl From<u64> for Number {
    fn from(n: u64) -> Self {
        Number::Whole(n)
    }
}

impl From<u32> for Number {
    fn from(n: u32) -> Self {
        Number::Whole(n.into())
    }
}

impl From<usize> for Number {
    fn from(n: usize) -> Self {
        Number::Whole(n as u64)
    }
}

impl From<bool> for Number {
    fn from(yes: bool) -> Self {
        Number::Whole(yes.into())
    }
}

impl From<f64> for Number {
    fn from(n: f64) -> Self {
        Number::Real(n)
    }
}

/// Microseconds as seconds.
pub fn seconds(us: u64) -> f64 {
    // 2^53 microseconds are 285 years.
    #[expect(clippy::cast_precision_loss, reason = "exact for 285 years")]
    let us = us as f64;
    us / 1e6
}

/// The text, as far as it is written.
#[derive(Debug)]
pub struct Exposition {
    text: String,
    common: String,
}

/// One family of samples.
#[derive(Debug)]
pub struct Family<'a> {
    to: &'a mut Exposition,
    name: &'static str,
    kind: Kind,
    help: &'static str,
    begun: bool,
}

impl Exposition {
    /// An empty one whose samples all have the labels `common`.
    pub fn new(common: &[(&str, &str)]) -> Self {
        let mut text = String::new();
        for label in common {
            write_label(&mut text, *label);
        }
        Exposition { text: String::new(), common: text }
    }

    /// Begins a family. Each name may be begun once.
    pub fn family(&mut self, name: &'static str, kind: Kind, help: &'static str) -> Family<'_> {
        Family { to: self, name, kind, help, begun: false }
    }

    /// A family of one sample.
    pub fn gauge(&mut self, name: &'static str, help: &'static str, value: impl Into<Number>) {
        self.family(name, Kind::Gauge, help).sample(&[], value);
    }

    /// A family of one sample.
    pub fn counter(&mut self, name: &'static str, help: &'static str, value: impl Into<Number>) {
        self.family(name, Kind::Counter, help).sample(&[], value);
    }

    /// A histogram: for each bound, how many observations were at most that, with rising bounds; then their sum and count.
    pub fn histogram(
        &mut self,
        name: &'static str,
        help: &'static str,
        buckets: &[(f64, u64)],
        sum: impl Into<Number>,
        count: u64,
    ) {
        let mut family = self.family(name, Kind::Histogram, help);
        for (bound, observed) in buckets {
            family.write("_bucket", &[("le", &bound.to_string())], Number::Whole(*observed));
        }
        family.write("_bucket", &[("le", "+Inf")], Number::Whole(count));
        family.write("_sum", &[], sum.into());
        family.write("_count", &[], Number::Whole(count));
    }

    /// The text.
    pub fn finish(self) -> String {
        self.text
    }
}

impl Family<'_> {
    /// Writes a sample with labels of its own.
    pub fn sample(&mut self, labels: &[(&str, &str)], value: impl Into<Number>) {
        self.write("", labels, value.into());
    }

    fn write(&mut self, suffix: &str, labels: &[(&str, &str)], value: Number) {
        const INFALLIBLE: &str = "writing to a String cannot fail";
        let Exposition { text, common } = &mut *self.to;
        if !self.begun {
            self.begun = true;
            let kind = match self.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram => "histogram",
            };
            let (name, help) = (self.name, self.help);
            write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n").expect(INFALLIBLE);
        }
        text.push_str(self.name);
        text.push_str(suffix);
        if !(common.is_empty() && labels.is_empty()) {
            text.push('{');
            text.push_str(common);
            for label in labels {
                write_label(text, *label);
            }
            // The last comma; the format allows it, some readers do not.
            text.pop();
            text.push('}');
        }
        match value {
            Number::Whole(n) => writeln!(text, " {n}"),
            Number::Real(n) if n.is_nan() => writeln!(text, " NaN"),
            Number::Real(n) if n.is_infinite() => writeln!(text, " {}Inf", if n > 0.0 { '+' } else { '-' }),
            Number::Real(n) => writeln!(text, " {n}"),
        }
        .expect(INFALLIBLE);
    }
}

/// `name="value",`
fn write_label(text: &mut String, (name, value): (&str, &str)) {
    text.push_str(name);
    text.push_str("=\"");
    for c in value.chars() {
        match c {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            c => text.push(c),
        }
    }
    text.push_str("\",");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_have_one_head_and_empty_ones_none() {
        let mut to = Exposition::new(&[("sandbox", "web")]);
        to.family("ctvm_none", Kind::Gauge, "Nothing.");
        let mut exits = to.family("ctvm_exits_total", Kind::Counter, "Ends.");
        exits.sample(&[("kind", "error")], 3_u64);
        exits.sample(&[("kind", "signal")], 0_u64);
        to.gauge("ctvm_up", "Whether it runs.", true);
        assert_eq!(
            to.finish(),
            "# HELP ctvm_exits_total Ends.\n# TYPE ctvm_exits_total counter\n\
             ctvm_exits_total{sandbox=\"web\",kind=\"error\"} 3\n\
             ctvm_exits_total{sandbox=\"web\",kind=\"signal\"} 0\n\
             # HELP ctvm_up Whether it runs.\n# TYPE ctvm_up gauge\nctvm_up{sandbox=\"web\"} 1\n"
        );
    }

    #[test]
    fn a_histogram_has_buckets_a_sum_and_a_count() {
        let mut to = Exposition::new(&[("sandbox", "web")]);
        to.histogram("h_seconds", "Times.", &[(0.001, 2), (0.25, 3)], seconds(400_000), 4);
        assert_eq!(
            to.finish(),
            "# HELP h_seconds Times.\n# TYPE h_seconds histogram\n\
             h_seconds_bucket{sandbox=\"web\",le=\"0.001\"} 2\nh_seconds_bucket{sandbox=\"web\",le=\"0.25\"} 3\n\
             h_seconds_bucket{sandbox=\"web\",le=\"+Inf\"} 4\n\
             h_seconds_sum{sandbox=\"web\"} 0.4\nh_seconds_count{sandbox=\"web\"} 4\n"
        );
    }

    #[test]
    fn label_values_are_escaped_and_numbers_written_whole() {
        let mut to = Exposition::new(&[]);
        let mut family = to.family("m", Kind::Gauge, "h");
        family.sample(&[("l", "a\"b\\c\nd é")], u64::MAX);
        family.sample(&[], seconds(1_234_567));
        family.sample(&[], f64::NAN);
        family.sample(&[], f64::NEG_INFINITY);
        family.sample(&[], 1e-9);
        let text = to.finish();
        let samples: Vec<&str> = text.lines().skip(2).collect();
        assert_eq!(
            samples,
            [r#"m{l="a\"b\\c\nd é"} 18446744073709551615"#, "m 1.234567", "m NaN", "m -Inf", "m 0.000000001"]
        );
    }
}
