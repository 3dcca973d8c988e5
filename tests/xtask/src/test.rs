//! `cargo xtask test`: every test there is. Unit tests on this machine, end-to-end tests in lab machines, fuzz targets
//! for a while each. All run even when some fail; the last line says how many did.

mod labs;
mod units;

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::cache::Cache;
use crate::guest::Flavour;
use crate::lab::machine::Machine;
use crate::product::Product;
use crate::steps::{both, step};
use crate::{build, fuzz, guest, packages};

/// Tests that the upcall driver passes on a kernel that looks for its own mistakes too. It is many times slower.
const OF_THE_DRIVER: [&str; 2] = ["vm_resize", "vm_upcall"];

/// Options of `xtask test`.
#[derive(Debug, Args)]
pub struct Options {
    /// Only this kind of test
    #[arg(long)]
    only: Option<Only>,
    /// Only tests whose name contains this
    filter: Option<String>,
    /// As much as the lab can hold where tests have less to do otherwise: 50 pods at once, half an hour of stress
    #[arg(long)]
    long: bool,
    /// Only lab tests of the upcall driver, on a guest kernel that looks for its own mistakes
    #[arg(long)]
    debug_kernel: bool,
    /// Fuzz each target for this many seconds
    #[arg(long, default_value_t = 2)]
    fuzz_seconds: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Only {
    /// On this machine
    Unit,
    /// In the lab
    Lab,
    /// Fuzz targets
    Fuzz,
}

/// How many tests ended how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Count {
    pub passed: u32,
    pub failed: u32,
    pub ignored: u32,
    /// What failed, for the end.
    pub failures: Vec<String>,
}

impl Count {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.failures.extend(other.failures);
    }

    /// Takes what a line of libtest's output says: a test's failure, or a program's result.
    fn take_line(&mut self, line: &str) {
        if let Some(name) = line.strip_prefix("test ").and_then(|line| line.strip_suffix(" ... FAILED")) {
            self.failures.push(name.to_string());
        }
        if let Some(result) = line.strip_prefix("test result: ") {
            let number = |word: &str| {
                let part = result.split([';', '.']).find_map(|part| part.trim().strip_suffix(word));
                part.and_then(|part| part.trim().parse::<u32>().ok()).unwrap_or(0)
            };
            self.passed += number("passed");
            self.failed += number("failed");
            self.ignored += number("ignored");
        }
    }

    /// Counts a program that failed without saying which of its tests did.
    fn settle(&mut self, program: &str, succeeded: bool, how: &str) {
        if !succeeded && self.failed == 0 {
            self.failed += 1;
            self.failures.push(format!("{program} ({how})"));
        }
    }
}

/// Runs the tests; the result is this process's exit code.
pub fn main(cache: &Cache, options: &Options) -> Result<u8> {
    let only = if options.debug_kernel { Some(Only::Lab) } else { options.only };
    let wanted = |kind| only.is_none_or(|only| only == kind);
    packages::ensure(cache)?;
    let mut count = Count::default();
    if wanted(Only::Unit) {
        let build = || step("build the unit tests", build::unit_tests);
        let programs = if wanted(Only::Lab) {
            let for_the_lab = || {
                guest::kernel(cache, Flavour::Shipped)?;
                Machine::prepare(cache)
            };
            both(build, for_the_lab)?.0
        } else {
            build()?
        };
        count.add(step("unit tests", || Ok(units::run(&programs, options.filter.as_deref())))?);
    }
    if wanted(Only::Lab) {
        count.add(in_lab(cache, options)?);
    }
    if wanted(Only::Fuzz) {
        count.add(fuzz::all(cache, options.fuzz_seconds, options.filter.as_deref())?);
    }
    for failure in &count.failures {
        println!("failed: {failure}");
    }
    let ignored = if count.ignored > 0 { format!(", {} skipped", count.ignored) } else { String::new() };
    println!("{} passed, {} failed{ignored}", count.passed, count.failed);
    Ok(u8::from(count.failed > 0 || count.passed == 0))
}

/// How many programs run on this machine at a time: one more than CI has processors, since many wait for a timeout.
const AT_ONCE: usize = 3;

/// Calls `run` for each of `programs`, some at a time, and adds up.
pub fn some_at_a_time<T: Sync>(programs: &[T], run: impl Fn(&T) -> Count + Sync) -> Count {
    let (next, count) = (AtomicUsize::new(0), Mutex::new(Count::default()));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(program) = programs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let one = run(program);
                    count.lock().expect("no code panics while it holds this lock").add(one);
                }
            });
        }
    });
    count.into_inner().expect("no code panics while it holds this lock")
}

fn in_lab(cache: &Cache, options: &Options) -> Result<Count> {
    let flavour = if options.debug_kernel { Flavour::Debug } else { Flavour::Shipped };
    let product = Product::build_with(cache, flavour)?;
    let mut tests = step("build the end-to-end tests", build::lab_tests)?;
    if options.debug_kernel {
        tests.retain(|(name, _)| OF_THE_DRIVER.contains(&name.as_str()));
    }
    for (name, program) in &tests {
        product.add_stripped("tests", program, name)?;
    }
    let exerciser = step("build the exerciser", build::exerciser)?;
    product.add_stripped("tests", &exerciser, "exerciser")?;
    let names: Vec<&str> = tests.iter().map(|(name, _)| name.as_str()).collect();
    labs::run(cache, product, &names, options)
}

/// Passes output on and counts as it goes by.
struct Lines<W> {
    to: W,
    rest: VecDeque<u8>,
    count: Count,
}

impl<W: Write> Lines<W> {
    fn to(to: W) -> Self {
        Self { to, rest: VecDeque::new(), count: Count::default() }
    }
}

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.to.write_all(bytes)?;
        self.rest.extend(bytes);
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            self.count.take_line(String::from_utf8_lossy(&line).trim_end());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtest_lines_are_counted_wherever_they_are_cut() {
        let mut lines = Lines::to(io::sink());
        for piece in [
            "test a ... ok\ntest b::c ... FAI",
            "LED\ntest result: FAILED. 1 passed; 1 failed; ",
            "2 ignored; 0 measured; 0 filtered out; finished in 0.1s\n",
        ] {
            lines.write_all(piece.as_bytes()).unwrap();
        }
        let expected = Count { passed: 1, failed: 1, ignored: 2, failures: vec!["b::c".into()] };
        assert_eq!(lines.count, expected);
    }

    #[test]
    fn program_that_dies_counts_as_a_failure() {
        let mut count = Count { passed: 3, ..Count::default() };
        count.settle("vm_boot", false, "exit code 134");
        assert_eq!((count.passed, count.failed), (3, 1));
        assert_eq!(count.failures, ["vm_boot (exit code 134)"]);
    }
}
