//! Programs of unit tests, two at a time: many wait for timeouts, and cargo would run one after the other.

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result};

use super::{Count, Lines};
use crate::build;

/// How many run at a time.
const AT_ONCE: usize = 2;

/// Runs `programs`, each in its folder, and the examples of the documentation.
pub fn run(programs: &[(PathBuf, PathBuf)], filter: Option<&str>) -> Result<Count> {
    let mut commands = VecDeque::new();
    let mut examples = build::cargo("test");
    examples.args(["--workspace", "--doc", "--no-fail-fast"]);
    commands.push_back(("examples".to_owned(), examples));
    for (program, folder) in programs {
        let mut command = Command::new(program);
        command.current_dir(folder).env("CARGO_MANIFEST_DIR", folder);
        commands.push_back((name(program), command));
    }
    let (queue, count) = (Mutex::new(commands), Mutex::new(Count::default()));
    let work = || -> Result<()> {
        loop {
            // A statement of its own: the lock is not to be held while the program runs.
            let next = locked(&queue).pop_front();
            let Some((name, mut command)) = next else { return Ok(()) };
            let (one, said) = run_one(&name, command.args(filter))?;
            io::stdout().lock().write_all(&said)?;
            locked(&count).add(one);
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        let join = |worker: std::thread::ScopedJoinHandle<'_, _>| {
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        workers.into_iter().try_for_each(join)
    })?;
    Ok(count.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn locked<T>(of: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
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
