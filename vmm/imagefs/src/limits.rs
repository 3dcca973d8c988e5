//! How many descriptors the guest may make us hold.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors left to the rest of the process.
const RESERVE: usize = 256;
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
    /// What the process's limit of descriptors allows: three quarters of it for nodes, one quarter for handles.
    pub fn of_process() -> Self {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(CEILING).min(CEILING);
        let usable = usize::try_from(limit).expect("at most CEILING").saturating_sub(RESERVE);
        Limits { nodes: usable - usable / 4, handles: usable / 4 }
    }
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
        let Limits { nodes, handles } = Limits::of_process();
        assert!(
            u64::try_from(nodes + handles + RESERVE).unwrap() <= process,
            "{nodes} + {handles} of {process}"
        );
        assert!(nodes > handles && handles > 0);
    }
}
