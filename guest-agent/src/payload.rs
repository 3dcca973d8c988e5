//! The last steps in a container's process before its program: what `libcontainer` leaves to its executor.
//!
//! Its default executor is right but for these things, done here:
//! - Signals: the Rust runtime ignores SIGPIPE, and an ignored signal stays ignored across exec; a container's
//!   `yes | head` would never end.
//! - Seccomp of an exec: `libcontainer` 0.7 builds an exec's `linux` section anew (`adapt_spec_for_tenant`) with no
//!   `seccomp` in it, so that exec'd processes run unfiltered. The container's filter is loaded here instead.
//! - A program that cannot be run: the default executor's words do not name it, and those of a container's first process reach
//!   nobody. Here they go to the agent and, as with runc, to the process's standard error.
//! - Users of an exec: `libcontainer` leaves a container's user namespace out of those that an exec joins. Until here the
//!   process has been in the guest's, as the user that the container's is there; it goes over, and becomes what it was to be.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::sync::Arc;

use caps::{CapSet, Capability};
use libcontainer::capabilities::drop_privileges;
use libcontainer::seccomp::initialize_seccomp;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::workload::default::DefaultExecutor;
use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;
use nix::unistd::execvp;
use oci_spec::runtime::{Capability as SpecCapability, LinuxCapabilities, LinuxSeccomp, Process, Spec};

use crate::errors::TaskError;
use crate::sys;
use crate::users::Users;
use crate::verdict::{self, Teller};

/// Most of a container's list of users that is looked at, in bytes.
const MAX_PASSWD: u64 = 1 << 20;

/// How to become the container's program.
#[derive(Debug, Clone, Default)]
pub struct Payload {
    exec_filter: Option<LinuxSeccomp>,
    /// CAP_SYS_ADMIN was added to what the process asked for, to load the filter, and must go again.
    borrowed_admin: bool,
    entry: Option<Entry>,
    /// The program's bytes are those of an image that comes as it is read.
    of_image: bool,
    /// Who is told why the program does not run, where the library tells nobody.
    teller: Option<Teller>,
}

/// How an exec gets among the sandbox's users.
#[derive(Debug, Clone)]
pub struct Entry {
    namespace: Arc<File>,
    /// Its own, there.
    capabilities: LinuxCapabilities,
    /// Its user there, if its home is to be looked up.
    homeless: Option<u32>,
}

impl Entry {
    /// For `process`, which is given the guest's names for its user and groups.
    ///
    /// # Errors
    /// There are no such users, or one has no place among them.
    pub fn new(users: &Users, process: &mut Process) -> Result<Self, TaskError> {
        let inside = process.user().clone();
        let (uid, gid) = users.outside(inside.uid(), inside.gid())?;
        let mut outside = inside.clone();
        outside.set_uid(uid).set_gid(gid);
        if let Some(groups) = inside.additional_gids() {
            let groups = groups.iter().map(|&gid| users.outside(0, gid).map(|(_, gid)| gid));
            outside.set_additional_gids(Some(groups.collect::<Result<_, _>>()?));
        }
        process.set_user(outside);
        let has_home = process.env().iter().flatten().any(|variable| variable.starts_with("HOME="));
        Ok(Entry {
            namespace: Arc::new(users.open()?),
            capabilities: process.capabilities().clone().unwrap_or_default(),
            homeless: (!has_home).then_some(inside.uid()),
        })
    }

    /// What has to stay open until then.
    pub fn fd(&self) -> RawFd {
        self.namespace.as_raw_fd()
    }
}

/// The home of user `uid` in a list as passwd(5) has it.
fn home(passwd: impl std::io::Read, uid: u32) -> Option<String> {
    BufReader::new(passwd.take(MAX_PASSWD)).lines().map_while(Result::ok).find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let is_it = fields.get(2).and_then(|id| id.parse().ok()) == Some(uid);
        fields.get(5).filter(|home| is_it && !home.is_empty()).map(|home| (*home).to_owned())
    })
}

impl Payload {
    /// For a container's first process, whose filter `libcontainer` loads.
    pub fn init(teller: Teller) -> Self {
        Self { teller: Some(teller), ..Self::default() }
    }

    /// The same for a program that is in an image which comes as it is read, or may be.
    pub fn of_image(self, of_image: bool) -> Self {
        Self { of_image, ..self }
    }

    /// For an exec in a container with `filter`, and where its users are not the guest's, how it gets there. Without no-new-privileges the kernel lets only CAP_SYS_ADMIN load
    /// a filter (seccomp(2)), and the executor runs after capabilities are dropped; so `process` is given that
    /// capability until then. The bounding set is left as it is. Whoever goes to another user namespace needs it, too,
    /// and leaves it behind.
    pub fn exec(filter: Option<LinuxSeccomp>, entry: Option<Entry>, process: &mut Process) -> Self {
        let mut borrowed_admin = false;
        if entry.is_some() || filter.is_some() && process.no_new_privileges() != Some(true) {
            let mut sets = process.capabilities().clone().unwrap_or_default();
            let mut effective = sets.effective().clone().unwrap_or_default();
            let mut permitted = sets.permitted().clone().unwrap_or_default();
            borrowed_admin = effective.insert(SpecCapability::SysAdmin);
            borrowed_admin |= permitted.insert(SpecCapability::SysAdmin);
            sets.set_effective(Some(effective)).set_permitted(Some(permitted));
            process.set_capabilities(Some(sets));
        }
        Self { exec_filter: filter, borrowed_admin, entry, ..Self::default() }
    }

    /// Becomes the program; why it did not.
    fn run(&self, spec: &Spec) -> String {
        for signal in Signal::iterator() {
            // Two of them cannot be handled and cannot be ignored either.
            let _ = sys::default_signal(signal);
        }
        let ready = self.enter().and_then(|()| self.load_filter()).and_then(|()| self.return_admin());
        if let Err(why) = ready {
            return why;
        }
        let args = spec.process().as_ref().and_then(|process| process.args().as_ref());
        let args = args.map(Vec::as_slice).unwrap_or_default();
        let texts: Result<Vec<CString>, _> = args.iter().map(|arg| CString::new(arg.as_bytes())).collect();
        match (args, texts.as_deref()) {
            ([program, ..], Ok(texts @ [file, ..])) => {
                let Err(errno) = execvp(file, texts);
                verdict::refused(program, errno, self.of_image)
            }
            _ => "no program, or an argument with a NUL in it".to_owned(),
        }
    }

    fn load_filter(&self) -> Result<(), String> {
        let Some(filter) = &self.exec_filter else { return Ok(()) };
        if initialize_seccomp(filter).map_err(|error| crate::launch::chain(&error))?.is_some() {
            return Err("a seccomp filter that notifies a listener cannot be given to an exec".to_owned());
        }
        Ok(())
    }

    /// Among the sandbox's users every process begins with all capabilities (user_namespaces(7)).
    fn enter(&self) -> Result<(), String> {
        let Some(entry) = &self.entry else { return Ok(()) };
        setns(entry.namespace.as_fd(), CloneFlags::CLONE_NEWUSER)
            .map_err(|errno| format!("cannot enter the sandbox's user namespace: {errno}"))
    }

    fn return_admin(&self) -> Result<(), String> {
        if let Some(entry) = &self.entry {
            let syscall = create_syscall();
            return drop_privileges(&entry.capabilities, syscall.as_ref()).map_err(|error| error.to_string());
        }
        if self.borrowed_admin {
            let drop =
                |set| caps::drop(None, set, Capability::CAP_SYS_ADMIN).map_err(|error| error.to_string());
            drop(CapSet::Effective)?;
            drop(CapSet::Permitted)?;
        }
        Ok(())
    }
}

impl Executor for Payload {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let why = self.run(spec);
        if let Some(teller) = &self.teller {
            teller.tell(&why);
        }
        Err(ExecutorError::Other(why))
    }

    fn setup_envs(&self, mut envs: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // The library looks for the user by the guest's number.
        if let Some(uid) = self.entry.as_ref().and_then(|entry| entry.homeless) {
            let found = File::open("/etc/passwd").ok().and_then(|passwd| home(passwd, uid));
            match found {
                Some(home) => envs.insert("HOME".to_owned(), home),
                None => envs.remove("HOME"),
            };
        }
        DefaultExecutor {}.setup_envs(envs)
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        DefaultExecutor {}.validate(spec)
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxCapabilities, LinuxSeccompBuilder};

    use super::*;

    fn process(no_new_privileges: Option<bool>, caps: &[SpecCapability]) -> Process {
        let mut sets = LinuxCapabilities::default();
        sets.set_effective(Some(caps.iter().copied().collect()));
        sets.set_permitted(Some(caps.iter().copied().collect()));
        let mut process = Process::default();
        process.set_no_new_privileges(no_new_privileges).set_capabilities(Some(sets));
        process
    }

    fn filter() -> Option<LinuxSeccomp> {
        Some(
            LinuxSeccompBuilder::default()
                .default_action(oci_spec::runtime::LinuxSeccompAction::ScmpActAllow)
                .build()
                .unwrap(),
        )
    }

    #[test]
    fn a_home_is_found_by_the_users_number() {
        let passwd =
            "root:x:0:0::/root:/bin/sh\nbad\n\nweb:x:1000:100:Web:/home/web:/bin/sh\nnone:x:5:5:::\n";
        let of = |uid| home(passwd.as_bytes(), uid);
        assert_eq!((of(0).as_deref(), of(1000).as_deref()), (Some("/root"), Some("/home/web")));
        assert_eq!((of(5), of(7)), (None, None));
    }

    #[test]
    fn who_enters_borrows_the_capability_and_keeps_his_own_list() {
        let mut process = process(Some(true), &[SpecCapability::Chown]);
        let capabilities = process.capabilities().clone().unwrap();
        let namespace = Arc::new(File::open("/dev/null").unwrap());
        let entry = Entry { namespace, capabilities: capabilities.clone(), homeless: None };
        let payload = Payload::exec(None, Some(entry), &mut process);
        let permitted = process.capabilities().as_ref().unwrap().permitted().clone().unwrap();
        assert!(permitted.contains(&SpecCapability::SysAdmin));
        assert_eq!(payload.entry.unwrap().capabilities, capabilities);
    }

    #[test]
    fn capability_is_borrowed_only_to_load_a_filter() {
        for (nnp, filter, caps, borrowed) in [
            (None, filter(), &[][..], true),
            (Some(true), filter(), &[], false),
            (None, None, &[], false),
            (None, filter(), &[SpecCapability::SysAdmin], false),
        ] {
            let mut process = process(nnp, caps);
            let payload = Payload::exec(filter, None, &mut process);
            assert_eq!(payload.borrowed_admin, borrowed);
            let permitted = process.capabilities().as_ref().unwrap().permitted().clone().unwrap();
            assert_eq!(permitted.contains(&SpecCapability::SysAdmin), borrowed || !caps.is_empty());
        }
    }
}
