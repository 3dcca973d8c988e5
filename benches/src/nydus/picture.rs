//! Time to the first output as a picture.

use std::fmt::Write as _;

use benches::rows::Row;

use crate::svg::escape;

/// How the names of rows end that are drawn, and of those that are a part of them.
pub const TOTAL: &str = "pull to first output";
pub const PULL: &str = "of it the pull";

const WIDTH: f64 = 900.0;
const LEFT: f64 = 150.0;
/// For the figure behind a bar.
const RIGHT: f64 = 80.0;
const BAR: f64 = 15.0;
const COLOURS: [(&str, &str); 3] = [("#3ebd93", "#8eedc7"), ("#2680c2", "#84c5f4"), ("#627d98", "#bcccdc")];

/// A panel an image, to a scale of its own; in it three bars a speed, whose dark part is the pull.
pub fn draw(rows: &[Row]) -> String {
    let mut y = 52.0;
    let mut body = String::new();
    let panels = panels(rows);
    for (image, bars) in &panels {
        let longest = bars.iter().map(|bar| bar.total).fold(1.0, f64::max);
        let scale = (WIDTH - LEFT - RIGHT) / longest;
        let _ =
            writeln!(body, "<text x=\"10\" y=\"{}\" font-weight=\"bold\">{}</text>", y + 4.0, escape(image));
        y += 14.0;
        for speed in bars.chunk_by(|a, b| a.speed == b.speed) {
            let middle = y + BAR * speed.len() as f64 / 2.0 + 4.0;
            let _ = writeln!(body, "<text x=\"10\" y=\"{middle}\">{}</text>", escape(speed[0].speed));
            for (bar, (dark, light)) in speed.iter().zip(COLOURS.iter().cycle()) {
                let mut part = |from: f64, to: f64, colour: &str| {
                    let (x, width) = (LEFT + from * scale, (to - from).max(0.0) * scale);
                    let _ = writeln!(
                        body,
                        "<rect x=\"{x:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"{}\" fill=\"{colour}\"/>",
                        BAR - 2.0
                    );
                };
                part(0.0, bar.pull, dark);
                part(bar.pull, bar.total, light);
                let _ = writeln!(
                    body,
                    "<text x=\"{:.1}\" y=\"{}\" font-size=\"11\">{:.2} s</text>",
                    LEFT + bar.total * scale + 5.0,
                    y + BAR - 4.0,
                    bar.total / 1000.0
                );
                y += BAR;
            }
            y += 9.0;
        }
        y += 12.0;
    }
    let mut legend = String::new();
    let subjects = panels.first().map_or(&[][..], |(_, bars)| &bars[..]);
    for (at, (bar, (dark, light))) in subjects.iter().zip(COLOURS).enumerate() {
        let x = LEFT + 180.0 * at as f64;
        for (x, colour) in [(x, dark), (x + 12.0, light)] {
            let _ =
                writeln!(legend, "<rect x=\"{x}\" y=\"30\" width=\"12\" height=\"10\" fill=\"{colour}\"/>");
        }
        let _ = writeln!(legend, "<text x=\"{}\" y=\"39\">{}</text>", x + 30.0, escape(bar.subject));
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {y}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"20\" font-size=\"15\">start of the pull (dark) to the container's first output, exact time</text>\n\
         {legend}{body}</svg>\n"
    )
}

#[derive(Debug, PartialEq)]
struct Bar<'a> {
    speed: &'a str,
    subject: &'a str,
    /// Milliseconds.
    total: f64,
    pull: f64,
}

/// The bars of each image, in the rows' order.
fn panels(rows: &[Row]) -> Vec<(&str, Vec<Bar<'_>>)> {
    let mut panels: Vec<(&str, Vec<Bar<'_>>)> = Vec::new();
    for row in rows {
        let Some((of, TOTAL)) = row.name.split_once(": ") else { continue };
        let Some((image, speed)) = of.split_once(", ") else { continue };
        let pull = rows
            .iter()
            .find(|other| other.subject == row.subject && other.name.split_once(": ") == Some((of, PULL)));
        let bar =
            Bar { speed, subject: &row.subject, total: row.p50, pull: pull.map_or(0.0, |pull| pull.p50) };
        match panels.last_mut() {
            Some((last, bars)) if *last == image => bars.push(bar),
            _ => panels.push((image, vec![bar])),
        }
    }
    panels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_start_is_a_bar_with_its_pull() {
        let row = |name: &str, subject, ms| Row::of("nydus", name, subject, "ms", vec![ms]).unwrap();
        let rows = [
            row("small, slow, 5 ms: pull to first output", "a", 500.0),
            row("small, slow, 5 ms: pull to first output", "b", 700.0),
            row("small, slow, 5 ms: of it the pull", "b", 100.0),
            row("large, no limit: pull to first output", "a", 9000.0),
            row("large: CPU time to first output", "a", 1.0),
        ];
        let panels = panels(&rows);
        assert_eq!(panels.len(), 2);
        assert_eq!(panels[0].1[1], Bar { speed: "slow, 5 ms", subject: "b", total: 700.0, pull: 100.0 });
        let svg = draw(&rows);
        assert!(
            svg.contains(">0.70 s<") && svg.contains(">9.00 s<") && svg.contains(">slow, 5 ms<"),
            "{svg}"
        );
    }
}
