//! Processes added to a container: announced, started, forgotten.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use agent_api::task::ExecProcessRequest;
use oci_spec::runtime::Process as ProcessSpec;

use crate::container::{Container, PAUSED, nix_pid};
use crate::errors::TaskError;
use crate::launch::chain;
use crate::payload::{Entry as UsersEntry, Payload};
use crate::process::{Phase, Process};
use crate::reaper::Exit;
use crate::spec;
use crate::stdio::{Names, Wiring};

/// A process added to a container.
#[derive(Debug)]
pub struct Exec {
    /// The process.
    pub process: Arc<Process>,
    plan: Mutex<Option<Plan>>,
}

/// What `Exec` announced and `Start` carries out.
#[derive(Debug)]
struct Plan {
    spec: ProcessSpec,
    wiring: Wiring,
    file: PathBuf,
}

impl Container {
    /// Announces an exec.
    pub async fn add_exec(&self, request: &ExecProcessRequest) -> Result<(), TaskError> {
        spec::check_id(&request.exec_id)?;
        self.must_run("exec")?;
        let names = Names {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let spec = spec::process(request.spec.as_ref(), names.terminal)?;
        let exec = Arc::new(Exec { process: Arc::new(Process::planned(names)), plan: Mutex::default() });
        match self.execs().entry(request.exec_id.clone()) {
            Entry::Occupied(_) => return Err(TaskError::Exists(request.exec_id.clone())),
            Entry::Vacant(entry) => entry.insert(exec.clone()),
        };
        match Wiring::dial(&self.guest.host, &exec.process.names).await {
            Ok(wiring) => {
                let file = self.files.bundle.join(format!("exec-{}.json", request.exec_id));
                *exec.plan() = Some(Plan { spec, wiring, file });
                Ok(())
            }
            Err(error) => {
                self.execs().remove(&request.exec_id);
                Err(error.into())
            }
        }
    }

    /// Makes an announced exec.
    pub async fn start_exec(&self, exec_id: &str) -> Result<u32, TaskError> {
        let exec = self.exec(exec_id)?;
        let _starting = self.starting.read().await;
        if self.is_paused() {
            return Err(TaskError::State { what: "start an exec", state: PAUSED });
        }
        let plan = exec.plan().take();
        let Some(Plan { mut spec, wiring, file }) = plan else {
            return Err(TaskError::State { what: "start", state: exec.process.phase().name() });
        };
        let entry = match self.own_users.then(|| UsersEntry::new(&self.guest.users, &mut spec)).transpose() {
            Ok(entry) => entry,
            Err(error) => {
                exec.process.failed();
                return Err(error);
            }
        };
        let keep = entry.as_ref().map(UsersEntry::fd).into_iter().collect();
        let payload = Payload::exec(self.filter.clone(), entry, &mut spec).of_image(self.of_image);
        let owner = (spec.user().uid(), spec.user().gid());
        let at_exit = self.explain_end(Some(&spec));
        let written = spec::save(&spec, &file).map_err(TaskError::io("write the exec's process"));
        let made = match written {
            Ok(()) => {
                let file = file.clone();
                self.launch(&exec.process, wiring, (owner, keep), at_exit, move |builder| {
                    let builder = builder.with_executor(payload);
                    let made = builder.as_tenant().with_detach(true).with_process(Some(file)).build();
                    made.map(nix_pid).map_err(|error| chain(&error))
                })
                .await
            }
            Err(error) => Err(error),
        };
        // The library has read it, or nobody will.
        let _ = std::fs::remove_file(&file);
        match made {
            Ok(()) => {
                exec.process.mark_started();
                Ok(exec.process.pid())
            }
            Err(error) => {
                exec.process.failed();
                Err(error)
            }
        }
    }

    /// Forgets an exec that does not run.
    pub fn delete_exec(&self, exec_id: &str) -> Result<(u32, Exit), TaskError> {
        let exec = self.exec(exec_id)?;
        let exit = match exec.process.phase() {
            Phase::Stopped(exit) => exit,
            Phase::Created if exec.plan().take().is_some() => {
                exec.process.failed();
                never_started()
            }
            phase => return Err(TaskError::State { what: "delete", state: phase.name() }),
        };
        self.execs().remove(exec_id);
        Ok((exec.process.pid(), exit))
    }

    pub(super) fn exec(&self, exec_id: &str) -> Result<Arc<Exec>, TaskError> {
        self.execs()
            .get(exec_id)
            .cloned()
            .ok_or_else(|| TaskError::NoExec { container: self.id.clone(), exec: exec_id.to_owned() })
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Exec>>> {
        self.execs.lock().expect("no code panics while it holds this lock")
    }
}

impl Exec {
    fn plan(&self) -> MutexGuard<'_, Option<Plan>> {
        self.plan.lock().expect("no code panics while it holds this lock")
    }
}

fn never_started() -> Exit {
    Exit { status: 0, at: std::time::SystemTime::now() }
}
