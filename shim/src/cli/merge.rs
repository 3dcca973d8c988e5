//! Puts several expositions in Prometheus's text format together: the format wants each family once, with one `HELP`,
//! one `TYPE` and all its samples in a row.
//!
//! Reads line by line and believes nothing: what is neither a comment nor a sample is left out and counted.

use std::collections::HashMap;

/// Families in the order in which they first came.
#[derive(Debug, Default)]
pub struct Merged {
    families: Vec<Family>,
    places: HashMap<String, usize>,
    /// Lines that are neither comment nor sample.
    pub left_out: usize,
}

#[derive(Debug, Default)]
struct Family {
    name: String,
    help: Option<String>,
    kind: Option<String>,
    samples: Vec<String>,
}

impl Merged {
    /// Adds an exposition.
    pub fn add(&mut self, text: &str) {
        for line in text.lines() {
            if line.trim().is_empty() {
                continue;
            }
            if let Some(comment) = line.strip_prefix('#') {
                let mut words = comment.trim_start().splitn(3, ' ');
                let word = words.next();
                if let (Some(word @ ("HELP" | "TYPE")), Some(name)) = (word, words.next())
                    && is_name(name)
                {
                    let rest = words.next().unwrap_or_default().to_owned();
                    let family = self.family(name);
                    let place = if word == "HELP" { &mut family.help } else { &mut family.kind };
                    place.get_or_insert(rest);
                }
                continue;
            }
            let end = line.find(['{', ' ']).unwrap_or(line.len());
            let has_value = line.rsplit_once(' ').is_some_and(|(_, value)| is_number(value));
            if is_name(&line[..end]) && has_value {
                let family = self.family_of_sample(&line[..end]).to_owned();
                self.family(&family).samples.push(line.to_owned());
            } else {
                self.left_out += 1;
            }
        }
    }

    /// A histogram's samples have names of their own.
    fn family_of_sample<'a>(&self, name: &'a str) -> &'a str {
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
        let is_histogram = |base: &&str| {
            let family = self.places.get(*base).map(|place| &self.families[*place]);
            family.is_some_and(|family| family.kind.as_deref() == Some("histogram"))
        };
        base.filter(is_histogram).unwrap_or(name)
    }

    fn family(&mut self, name: &str) -> &mut Family {
        let place = *self.places.entry(name.to_owned()).or_insert_with(|| {
            self.families.push(Family { name: name.to_owned(), ..Family::default() });
            self.families.len() - 1
        });
        &mut self.families[place]
    }

    /// All of them.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for family in self.families.iter().filter(|family| !family.samples.is_empty()) {
            let name = &family.name;
            for (word, rest) in [("HELP", &family.help), ("TYPE", &family.kind)] {
                if let Some(rest) = rest {
                    text.push_str(&format!("# {word} {name} {rest}\n"));
                }
            }
            for sample in &family.samples {
                text.push_str(sample);
                text.push('\n');
            }
        }
        text
    }
}

fn is_name(name: &str) -> bool {
    let first = |b: u8| b.is_ascii_alphabetic() || b == b'_' || b == b':';
    name.bytes().next().is_some_and(first) && name.bytes().all(|b| first(b) || b.is_ascii_digit())
}

fn is_number(value: &str) -> bool {
    value.parse::<f64>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_put_together_with_one_head() {
        let of = |sandbox: &str| {
            format!(
                "# HELP a_total Ends.\n# TYPE a_total counter\na_total{{sandbox=\"{sandbox}\",k=\"x y\"}} 1\n\
                 # HELP b Up.\n# TYPE b gauge\nb{{sandbox=\"{sandbox}\"}} 0.5\n"
            )
        };
        let mut merged = Merged::default();
        merged.add(&of("one"));
        merged.add(&of("two"));
        merged.add("# TYPE c gauge\n# a remark\nc NaN\n# HELP none Without samples.\n");
        assert_eq!(
            merged.text(),
            "# HELP a_total Ends.\n# TYPE a_total counter\n\
             a_total{sandbox=\"one\",k=\"x y\"} 1\na_total{sandbox=\"two\",k=\"x y\"} 1\n\
             # HELP b Up.\n# TYPE b gauge\nb{sandbox=\"one\"} 0.5\nb{sandbox=\"two\"} 0.5\n\
             # TYPE c gauge\nc NaN\n"
        );
        assert_eq!(merged.left_out, 0);
    }

    #[test]
    fn a_histograms_samples_stay_with_its_head() {
        let of = |sandbox: &str| {
            format!(
                "# TYPE h histogram\nh_bucket{{sandbox=\"{sandbox}\",le=\"1\"}} 2\nh_sum{{sandbox=\"{sandbox}\"}} 3\n\
                 h_count{{sandbox=\"{sandbox}\"}} 4\n# TYPE c gauge\nc_count{{sandbox=\"{sandbox}\"}} 5\n"
            )
        };
        let mut merged = Merged::default();
        merged.add(&of("one"));
        merged.add(&of("two"));
        let text = merged.text();
        let names: Vec<&str> = text.lines().map(|line| line.split('{').next().unwrap()).collect();
        let h = ["h_bucket", "h_sum", "h_count"];
        let expected = [&["# TYPE h histogram"][..], &h, &h, &["c_count"; 2]].concat();
        assert_eq!(names, expected, "{text}");
    }

    #[test]
    fn what_is_no_sample_is_left_out_and_counted() {
        let mut merged = Merged::default();
        merged.add("9a 1\nname\nname{x=\"y\"} many\n{} 1\n# TYPE\n# HELP é x\n\nfine 1e3\n\u{1b}[2J 1\n");
        assert_eq!((merged.text().as_str(), merged.left_out), ("fine 1e3\n", 5));
    }
}
