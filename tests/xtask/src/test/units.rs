//! Programs of unit tests, some at a time: many wait for timeouts, and cargo would run one after the other.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use super::{Count, Lines, some_at_a_time};
use crate::build;

/// Runs `programs`, each in its folder, and the examples of the documentation.
pub fn run(programs: &[(PathBuf, PathBuf)], filter: Option<&str>) -> Count {
    let of_programs = programs.iter().map(Some);
    let all: Vec<_> = std::iter::once(None).chain(of_programs).collect();
    some_at_a_time(&all, |which| match which {
        Some((program, folder)) => {
            let mut command = Command::new(program);
            command.current_dir(folder).env("CARGO_MANIFEST_DIR", folder);
            run_and_show(&name(program), command.args(filter))
        }
        None => {
            let mut command = build::talkative_cargo("test");
            command.args(build::WHOLE).args(["--doc", "--no-fail-fast"]);
            run_and_show("examples", command.args(filter))
        }
    })
}

fn run_and_show(name: &str, command: &mut Command) -> Count {
    let ended = run_one(name, command).and_then(|(count, said)| {
        io::stdout().lock().write_all(&said)?;
        Ok(count)
    });
    ended.unwrap_or_else(|error| {
        let mut count = Count::default();
        count.settle(name, false, &format!("{error:#}"));
        count
    })
}

/// What cargo called the program, without the hash.
fn name(program: &Path) -> String {
    let file = program.file_name().unwrap_or_default().to_string_lossy();
    file.rsplit_once('-').map_or(&*file, |(name, _)| name).to_owned()
}

/// How its tests ended, and what it said.
fn run_one(name: &str, command: &mut Command) -> Result<(Count, Vec<u8>)> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {name}"))?;
    let mut lines = Lines::to(Vec::new());
    writeln!(lines, "\nunit tests of {name}")?;
    lines.write_all(&output.stdout)?;
    lines.to.extend(output.stderr);
    let Lines { mut count, to: said, .. } = lines;
    count.settle(name, output.status.success(), &output.status.to_string());
    Ok((count, said))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_each_program_says_is_counted() {
        let script = |text: &str| {
            let mut shell = Command::new("sh");
            shell.args(["-c", text]);
            run_one("unit", &mut shell).unwrap().0
        };
        let good =
            script("echo 'test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out'");
        assert_eq!((good.passed, good.failed, good.ignored), (3, 0, 1));
        let died = script("echo 'test a ... ok'; kill -6 $$");
        assert_eq!(died.failed, 1);
        assert!(died.failures[0].starts_with("unit (signal"), "{:?}", died.failures);
    }

    #[test]
    fn programs_are_called_as_cargo_calls_them() {
        assert_eq!(name(Path::new("/t/deps/import_edges-1a1848993b392a32")), "import_edges");
    }
}
