//! PID 1 of the lab machine (L1): brings it up and runs commands for `xtask`.
//!
//! The same binary runs twice. In the initramfs it loads the few modules that the root needs, mounts it (EROFS
//! below, tmpfs above, overlay) and executes itself there. Then it mounts what tests expect, loads KVM, brings
//! the network up and forks: PID 1 only reaps orphans, the child serves connections (see `protocol.rs`). Were
//! they one process, reaping orphans with `waitpid(-1)` would steal the exit codes of commands.
//!
//! It has no configuration and no restarts: a lab that fails to come up says why on the console and powers off.

mod boot;
mod run;
mod serve;

use std::path::Path;

fn main() {
    let stage = if Path::new(boot::MODULE_LIST).exists() {
        boot::enter_root()
    } else {
        boot::bring_up().and_then(|()| serve::fork_and_reap())
    };
    if let Err(error) = stage {
        eprintln!("lab-init: {error:#}");
    }
    boot::power_off();
}
