//! How many descriptors the guest may make us hold.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors left to the rest of the process.
const RESERVE: usize = 256;
/// Servers that may be added to the first one of a process.
pub const FURTHER_SERVERS: usize = 3;
/// Limit asked for by [`raise_descriptor_limit`]: the kernel's default ceiling (`fs.nr_open`).
const CEILING: u64 = 1 << 20;

/// Bounds on what a guest may hold; what goes beyond fails with `ENFILE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Nodes: inodes that the guest knows. One descriptor each.
    pub nodes: usize,
    /// Handles: files and directories open in the guest. One descriptor each.
    pub handles: usize,
}

impl Limits {
    /// What the process's limit of descriptors allows the first server of it: three quarters of its part for nodes, one
    /// quarter for handles.
    pub fn of_process() -> Self {
        let usable = usable();
        Self::of(usable - (FURTHER_SERVERS * further(usable)))
    }

    /// The same for each of up to [`FURTHER_SERVERS`] that come later.
    pub fn of_a_further_server() -> Self {
        Self::of(further(usable()))
    }

    fn of(part: usize) -> Self {
        Limits { nodes: part - part / 4, handles: part / 4 }
    }
}

fn usable() -> usize {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(CEILING).min(CEILING);
    usize::try_from(limit).expect("at most CEILING").saturating_sub(RESERVE)
}

/// Kept for each server that may come later.
fn further(usable: usize) -> usize {
    usable / 16
}

/// Raises the process's limit of descriptors as far as it may, and tells how far that was. A guest that lists a
/// distribution's files makes us hold one for each; see the design page.
pub fn raise_descriptor_limit() -> io::Result<u64> {
    let had = getrlimit(Resource::Nofile);
    let (Some(current), Some(maximum)) = (had.current, had.maximum) else { return Ok(CEILING) };
    // Only a privileged process may go beyond its hard limit.
    for wanted in [CEILING, maximum] {
        if wanted > current
            && setrlimit(
                Resource::Nofile,
                Rlimit { current: Some(wanted), maximum: Some(wanted.max(maximum)) },
            )
            .is_ok()
        {
            return Ok(wanted);
        }
    }
    Ok(current)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limits_leave_room_for_others() {
        let process = getrlimit(Resource::Nofile).current.unwrap_or(CEILING).min(CEILING);
        let (first, further) = (Limits::of_process(), Limits::of_a_further_server());
        let sum = |limits: Limits| limits.nodes + limits.handles;
        let all = sum(first) + FURTHER_SERVERS * sum(further);
        assert!(u64::try_from(all + RESERVE).unwrap() <= process, "{first:?} and {further:?} of {process}");
        for limits in [first, further] {
            assert!(limits.nodes > limits.handles && limits.handles > 0);
        }
    }
}
