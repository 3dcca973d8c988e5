//! Tables for a terminal.

/// Longest id that is shown whole; a longer one loses its end, and what is left still names it to every command.
const LONG_ID: usize = 24;
/// What is left of it.
const SHORT_ID: usize = 13;

/// An id at a length for a table.
pub fn short(id: &str, full: bool) -> &str {
    if full || id.len() <= LONG_ID { id } else { id.get(..SHORT_ID).unwrap_or(id) }
}

/// Rows under a heading, in columns as wide as they must be.
pub fn table<const N: usize>(heading: [&str; N], rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([heading[column].len()]).max().unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |cells: [&str; N]| {
        let padded = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    let mut text = line(heading);
    for row in rows {
        text.push_str(&line(row.each_ref().map(String::as_str)));
    }
    text
}

/// Seconds as people say them: `42s`, `12m`, `3h12m`, `5d3h`.
pub fn age(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{minutes}m"),
        3_600..86_400 => format!("{hours}h{}m", minutes % 60),
        _ => format!("{days}d{}h", hours % 24),
    }
}

/// Bytes in MiB, with a decimal.
pub fn mib(bytes: u64) -> String {
    let tenths = bytes.saturating_mul(10) >> 20;
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let rows = [["a".to_owned(), "long cell".to_owned()], ["née".to_owned(), String::new()]];
        assert_eq!(table(["X", "Y"], &rows), "X    Y\na    long cell\nnée\n");
    }

    #[test]
    fn values_are_said_in_short() {
        let ages = [0, 59, 60, 3_599, 3_600, 11_520, 86_400, 450_000].map(age);
        assert_eq!(ages, ["0s", "59s", "1m", "59m", "1h0m", "3h12m", "1d0h", "5d5h"]);
        assert_eq!(mib(20 << 20), "20.0 MiB");
        assert_eq!(mib((3 << 20) / 2), "1.5 MiB");
        let id = "0123456789abcdef0123456789abcdef";
        assert_eq!((short(id, false), short(id, true), short("web", false)), ("0123456789abc", id, "web"));
    }
}
