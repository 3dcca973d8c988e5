//! End-to-end test programs, shared out among lab machines.
//!
//! A program has a lab for itself while it runs. Those that count what is left on the machine run their tests one at a
//! time, which leaves a CPU idle: a second lab works on them while the first works on the others.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use lab_protocol::Command;

use super::{Count, Lines, Options};
use crate::cache::Cache;
use crate::host;
use crate::lab::client::{Client, Streams};
use crate::lab::machine::{Machine, Shape};
use crate::product::{IN_LAB, Product};
use crate::steps::step;

/// One end-to-end test program may take this long; with `--long`, the second.
const LIMITS: [Duration; 2] = [Duration::from_secs(20 * 60), Duration::from_secs(60 * 60)];

/// Tests that count what is left on the machine, one at a time.
const ALONE: [&str; 16] = [
    "contents",
    "crowd",
    "exercise",
    "exhausted",
    "formats",
    "hostile",
    "nothing_left",
    "nydus",
    "nydus_faults",
    "nydus_shared",
    "nydus_slow_link",
    "nydus_snapshotter",
    "releases",
    "rounds",
    "stress",
    "users",
];

/// Memory that this machine keeps when labs have what they may take, in MiB.
const KEPT_MIB: u64 = 4096;

/// Runs `programs` in as many labs as this machine has memory for, two at most.
pub fn run(cache: &Cache, product: Product, programs: &[&str], options: &Options) -> Result<Count> {
    let shape = Shape { product: Some(product), ..Shape::default() };
    let room = host::available_mib().saturating_sub(KEPT_MIB) / u64::from(shape.memory_mib);
    // With a filter there is too little to do for a second one.
    let labs = if options.filter.is_some() || options.debug_kernel { 1 } else { room.clamp(1, 2) };
    let (alone, together): (Vec<&str>, Vec<&str>) = programs.iter().partition(|name| is_alone(name));
    let queue = Mutex::new(together.into_iter().chain(alone).collect::<VecDeque<_>>());
    let take = |first: bool| {
        let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
        if first { queue.pop_front() } else { queue.pop_back() }
    };
    let live = labs == 1;
    let work = |number: u64| -> Result<Count> {
        let machine = step("start a lab", || Machine::start(cache, &shape))?;
        let mut count = Count::default();
        while let Some(name) = take(number == 0) {
            let one =
                step(&format!("end-to-end tests: {name}"), || run_one(machine.client(), name, options, live));
            // Not a test, the lab itself failed: what it still said is all there is.
            count.add(one.inspect_err(|_| machine.show_console())?);
        }
        if count.failed > 0 {
            machine.show_console();
        }
        Ok(count)
    };
    let counts: Vec<Result<Count>> = std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..labs).map(|number| scope.spawn(move || work(number))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect()
    });
    let mut all = Count::default();
    for count in counts {
        all.add(count?);
    }
    Ok(all)
}

fn is_alone(name: &str) -> bool {
    ALONE.contains(&name)
}

fn run_one(client: Client, name: &str, options: &Options, live: bool) -> Result<Count> {
    let threads = if is_alone(name) { 1 } else { 2 };
    let mut argv = vec![format!("{IN_LAB}/tests/{name}"), format!("--test-threads={threads}")];
    argv.extend(options.filter.clone());
    let mut env = vec!["RUST_BACKTRACE=1".to_owned()];
    env.extend(options.long.then(|| "CTVM_LONG=1".to_owned()));
    env.extend(options.debug_kernel.then(|| "CTVM_DEBUG_KERNEL=1".to_owned()));
    let command = Command { argv, env, ..Command::default() };
    let said = Said::default();
    let to: Box<dyn Write> = if live { Box::new(io::stdout()) } else { Box::new(said.clone()) };
    let mut lines = Lines::to(to);
    let mut stderr: Box<dyn Write> = if live { Box::new(io::stderr()) } else { Box::new(said.clone()) };
    let streams = Streams { stdin: Box::new(io::empty()), stdout: &mut lines, stderr: &mut stderr };
    let ended = client.run(&command, streams, Some(LIMITS[usize::from(options.long)]));
    said.show()?;
    let code = ended?.shell_code();
    let mut count = lines.count;
    for failure in &mut count.failures {
        failure.insert_str(0, &format!("{name}::"));
    }
    count.settle(name, code == 0, &format!("exit code {code}"));
    Ok(count)
}

/// What a program says while another one runs too: shown in one piece when it has ended.
#[derive(Clone, Default)]
struct Said(Arc<Mutex<Vec<u8>>>);

impl Said {
    fn show(&self) -> io::Result<()> {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Locked: nothing of the other program comes between.
        io::stdout().lock().write_all(&bytes)
    }
}

impl Write for Said {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
