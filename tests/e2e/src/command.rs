//! Commands that always end: with a status, or killed at their time limit.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long any one command may take. The lab machine is emulated: what takes 50 ms elsewhere takes seconds here.
pub const LIMIT: Duration = Duration::from_secs(300);

/// A command that has ended.
#[derive(Debug)]
pub struct Finished {
    /// Exit status; 128 + the signal's number where a signal ended it.
    pub code: i32,
    /// All it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// All it wrote to its standard error.
    pub stderr: Vec<u8>,
}

impl Finished {
    /// Standard output as text, without the last line end.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }

    /// Standard error as text.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Standard output as text if the command succeeded, else an error that shows both streams.
    pub fn ok(self) -> Result<String> {
        if self.code != 0 {
            bail!("status {}: {}{}", self.code, String::from_utf8_lossy(&self.stdout), self.errors());
        }
        Ok(self.text())
    }
}

/// Runs a command to its end with nothing on its standard input.
pub fn run(command: &mut Command) -> Result<Finished> {
    command.stdin(Stdio::null());
    finish(spawn(command)?, command, LIMIT)
}

/// Runs a command to its end, feeding it `input` followed by an end of file.
pub fn run_with_input(command: &mut Command, input: Vec<u8>) -> Result<Finished> {
    command.stdin(Stdio::piped());
    let mut child = spawn(command)?;
    let mut stdin = child.stdin.take().expect("stdin is piped");
    // A reader that ends early breaks the pipe; what it did then shows in its output.
    let feeder = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let finished = finish(child, command, LIMIT);
    feeder.join().expect("the feeder does not panic");
    finished
}

fn spawn(command: &mut Command) -> Result<Child> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().with_context(|| format!("starting {command:?}"))
}

fn finish(mut child: Child, command: &Command, limit: Duration) -> Result<Finished> {
    let collect = |mut from: Box<dyn Read + Send>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            from.read_to_end(&mut bytes).map(|_| bytes)
        })
    };
    let stdout = collect(Box::new(child.stdout.take().expect("stdout is piped")));
    let stderr = collect(Box::new(child.stderr.take().expect("stderr is piped")));
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            bail!("{command:?} did not end within {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let code = status.code().unwrap_or_else(|| 128 + status.signal().expect("ended by status or signal"));
    let stdout = stdout.join().expect("the collector does not panic")?;
    let stderr = stderr.join().expect("the collector does not panic")?;
    Ok(Finished { code, stdout, stderr })
}

/// Their MD5 sum, as md5sum prints it.
pub fn md5(bytes: Vec<u8>) -> Result<String> {
    let sum = run_with_input(&mut Command::new("md5sum"), bytes)?.ok()?;
    Ok(sum.split(' ').next().unwrap_or_default().to_owned())
}

/// Asks `condition` until it is true; an error naming `what` after [`LIMIT`].
pub fn wait_until(what: &str, condition: impl FnMut() -> Result<bool>) -> Result<()> {
    wait_at_most(LIMIT, what, condition)
}

/// Between two looks at what is waited for.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// The same with a limit of one's own.
pub fn wait_at_most(limit: Duration, what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let began = Instant::now();
    while !condition()? {
        let waited = began.elapsed();
        if waited > limit {
            bail!("not within {limit:?}: {what}");
        }
        // Who asks takes time from what is waited for: a tenth more is waited at most.
        std::thread::sleep((waited / 10).clamp(SHORTEST_PAUSE, LONGEST_PAUSE));
    }
    Ok(())
}
