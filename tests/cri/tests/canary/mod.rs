//! A system call that is made on purpose in a process that would not make it.

use anyhow::{Context, Result, bail, ensure};
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// The instruction `syscall`, as a word in memory has it.
const SYSCALL: i64 = 0x050f;
/// Its length in bytes.
const LENGTH: u64 = 2;
/// How often the process may be found outside of a call.
const TRIES: usize = 100;

/// Has the main thread of process `pid` make a system call without arguments, where it stands: what the call answers. The
/// process goes on as if nothing had been.
pub fn call(pid: i32, number: i64) -> Result<i64> {
    let pid = Pid::from_raw(pid);
    for _ in 0..TRIES {
        ptrace::attach(pid).context("attach")?;
        let stopped = waitpid(pid, None)?;
        ensure!(matches!(stopped, WaitStatus::Stopped(_, Signal::SIGSTOP)), "{stopped:?}");
        let outcome = call_here(pid, number);
        ptrace::detach(pid, None).context("detach")?;
        if let Some(answer) = outcome? {
            return Ok(answer);
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    bail!("the process was never found in a system call")
}

/// None when the process does not wait in a call, just behind an instruction that makes one.
fn call_here(pid: Pid, number: i64) -> Result<Option<i64>> {
    let before = ptrace::getregs(pid).context("read its registers")?;
    let at = before.rip - LENGTH;
    let word = ptrace::read(pid, at as ptrace::AddressType).context("read its code")?;
    if before.orig_rax.cast_signed() < 0 || word & 0xffff != SYSCALL {
        return Ok(None);
    }
    let mut registers = before;
    registers.rip = at;
    registers.rax = number.cast_unsigned();
    // The call that it waits in is not taken up again meanwhile.
    registers.orig_rax = u64::MAX;
    ptrace::setregs(pid, registers).context("write its registers")?;
    ptrace::step(pid, None).context("let it make the call")?;
    let stopped = waitpid(pid, None)?;
    ensure!(matches!(stopped, WaitStatus::Stopped(_, Signal::SIGTRAP)), "{stopped:?}");
    let answer = ptrace::getregs(pid).context("read the answer")?.rax;
    ptrace::setregs(pid, before).context("give it its registers back")?;
    Ok(Some(answer.cast_signed()))
}
