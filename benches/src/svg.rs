//! The boot timeline as a picture.

use crate::boot::Start;

const WIDTH: f64 = 900.0;
const LEFT: f64 = 150.0;
const ROW: f64 = 56.0;
const COLOURS: [&str; 6] = ["#9aa5b1", "#627d98", "#486581", "#334e68", "#2680c2", "#3ebd93"];

/// One bar a subject, one colour a stage, to one scale.
pub fn timeline(starts: &[(String, Start)]) -> String {
    let longest = starts.iter().filter_map(|(_, s)| s.ends.last()).map(|(_, end)| *end).fold(1.0, f64::max);
    let scale = (WIDTH - LEFT - 60.0) / longest;
    let height = 40.0 + ROW * starts.len() as f64 + 30.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"22\" font-size=\"15\">exec of the VMM to agent ready, ms of exact time</text>\n"
    );
    for (i, (name, start)) in starts.iter().enumerate() {
        let y = 40.0 + ROW * i as f64;
        svg += &format!("<text x=\"10\" y=\"{}\">{}</text>\n", y + 17.0, escape(name));
        let mut from = 0.0;
        // A subject with fewer stages has the later ones: colours count from the end.
        let first = COLOURS.len().saturating_sub(start.ends.len());
        for (k, (stage, end)) in start.ends.iter().enumerate() {
            let (x, width) = (LEFT + from * scale, (end - from).max(0.0) * scale);
            let colour = COLOURS[(first + k) % COLOURS.len()];
            svg += &format!(
                "<rect x=\"{x:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"24\" fill=\"{colour}\"><title>{} {end:.1} ms</title></rect>\n",
                escape(stage)
            );
            if width > 40.0 {
                svg += &format!(
                    "<text x=\"{:.1}\" y=\"{}\" fill=\"white\">{}</text>\n",
                    x + 4.0,
                    y + 16.0,
                    escape(stage)
                );
            }
            from = *end;
        }
        svg += &format!("<text x=\"{:.1}\" y=\"{}\">{from:.1}</text>\n", LEFT + from * scale + 6.0, y + 17.0);
    }
    svg + "</svg>\n"
}

/// A text between tags.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stage_is_drawn() {
        let start = Start { ends: vec![("PID 1", 30.0), ("agent ready", 40.0)] };
        let svg = timeline(&[("a<b".into(), start)]);
        assert_eq!(svg.matches("<title>").count(), 2);
        assert!(svg.contains("a&lt;b") && svg.contains("40.0</text>"));
    }
}
