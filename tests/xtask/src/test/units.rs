//! Programs of unit tests, some at a time: many wait for timeouts, and cargo would run one after the other.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use super::{Count, Lines, some_at_a_time};
use crate::build;

/// Folders of recipes that have tests of their own, a program `check` that Python counts.
const RECIPES: [&str; 2] = ["kernel-config", "rootfs"];

/// The programs that take longest: they begin, so that none of them is waited for alone at the end.
const SLOW: [&str; 4] = ["mount", "service", "bounds", "sandbox"];

#[derive(Clone, Copy)]
enum Tests<'a> {
    /// A program of ours, and the folder of its package.
    Program(&'a Path, &'a Path),
    /// The examples of the documentation.
    Examples,
    /// A recipe's.
    Recipe(&'a str),
}

impl Tests<'_> {
    fn are_slow(&self) -> bool {
        matches!(self, Tests::Program(program, _) if SLOW.contains(&&*name(program)))
    }
}

/// Runs `programs`, each in its folder, the examples of the documentation, and the recipes' checks.
pub fn run(programs: &[(PathBuf, PathBuf)], filter: Option<&str>) -> Count {
    let is_wanted = |recipe: &&str| filter.is_none_or(|filter| recipe.contains(filter));
    let mut all = vec![Tests::Examples];
    all.extend(RECIPES.into_iter().filter(is_wanted).map(Tests::Recipe));
    all.extend(programs.iter().map(|(program, folder)| Tests::Program(program, folder)));
    all.sort_by_key(|tests| !tests.are_slow());
    some_at_a_time(&all, |tests| match *tests {
        Tests::Program(program, folder) => {
            let mut command = Command::new(program);
            command.current_dir(folder).env("CARGO_MANIFEST_DIR", folder);
            run_and_show(&name(program), command.args(filter))
        }
        Tests::Examples => {
            let mut command = build::talkative_cargo("test");
            command.args(build::WHOLE).args(["--doc", "--no-fail-fast"]);
            run_and_show("examples", command.args(filter))
        }
        Tests::Recipe(recipe) => {
            run_and_show(recipe, &mut Command::new(build::workspace().join(recipe).join("check")))
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
    if output.status.success() {
        count.passed += ran_by_python(&said);
    }
    count.settle(name, output.status.success(), &output.status.to_string());
    Ok((count, said))
}

/// The number in unittest's last words, "Ran 5 tests in 1.2s".
fn ran_by_python(said: &[u8]) -> u32 {
    let said = String::from_utf8_lossy(said);
    let number = |line: &str| line.strip_prefix("Ran ")?.split(' ').next()?.parse().ok();
    said.lines().rev().find_map(number).unwrap_or(0)
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
    fn what_python_ran_is_counted_when_it_passed() {
        let python = |end: &str| {
            let mut shell = Command::new("sh");
            shell.args(["-c", &format!("printf '...\\nRan 5 tests in 0.1s\\n\\n' >&2; {end}")]);
            run_one("rootfs", &mut shell).unwrap().0
        };
        assert_eq!((python("echo OK >&2").passed, python("echo OK >&2").failed), (5, 0));
        let failed = python("echo 'FAILED (failures=1)' >&2; exit 1");
        assert_eq!((failed.passed, failed.failed), (0, 1));
    }

    #[test]
    fn programs_are_called_as_cargo_calls_them() {
        assert_eq!(name(Path::new("/t/deps/import_edges-1a1848993b392a32")), "import_edges");
    }
}
