//! The real binary, its owner, and kernels of a few bytes.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use vmm_api::{
    ApiError, CONTROL_FD, Client, ClientError, Event, ExitReason, FdIndex, KernelConfig, Op, Reply, VmConfig,
};

/// Long enough for a busy machine; no test takes it when all is well.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A VMM that has been started.
#[derive(Debug)]
pub struct Vmm {
    /// The owner's end; `None` once it was closed.
    pub client: Option<Client>,
    child: Child,
}

/// How a process ended.
#[derive(Debug)]
pub struct End {
    pub status: ExitStatus,
    pub stderr: String,
}

impl Vmm {
    pub fn start() -> Self {
        Self::start_with(Command::new(env!("CARGO_BIN_EXE_ctvm-vmm")))
    }

    /// `command` must become the VMM.
    pub fn start_with(mut command: Command) -> Self {
        let (ours, theirs) = vmm_api::frame::pair().unwrap();
        command
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .fd_mappings(vec![FdMapping { parent_fd: theirs, child_fd: CONTROL_FD }])
            .unwrap();
        let child = command.spawn().unwrap();
        // With `command` goes our copy of the VMM's end.
        drop(command);
        Vmm { client: Some(Client::new(ours)), child }
    }

    pub fn client(&mut self) -> &mut Client {
        self.client.as_mut().expect("the lease was ended before")
    }

    pub fn call(&mut self, op: Op, fds: &[OwnedFd]) -> Result<Reply, ApiError> {
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        match self.client().call(op, &borrowed, LIMIT) {
            Ok((reply, _)) => Ok(reply),
            Err(ClientError::Api(error)) => Err(error),
            Err(other) => panic!("{other:?}; the VMM said {:?}", self.end().stderr),
        }
    }

    /// The reason in the last packet.
    pub fn exit_reason(&mut self) -> ExitReason {
        loop {
            match self.client().next_event(LIMIT) {
                Ok(Some((Event::Exiting { reason }, _))) => return reason,
                Ok(Some(_)) => {}
                other => panic!("{other:?}; the VMM said {:?}", self.end().stderr),
            }
        }
    }

    /// Ends the lease, waits for the process and gives what it left.
    pub fn end(&mut self) -> End {
        self.client = None;
        let status = self.child.wait().unwrap();
        let mut stderr = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        End { status, stderr }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Both fail only when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A file in memory.
pub fn file(bytes: &[u8]) -> OwnedFd {
    let mut file: File = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.into()
}

/// One vCPU, 64 MiB, the kernel as descriptor 0.
pub fn config() -> VmConfig {
    let kernel = KernelConfig { image: FdIndex(0), initrd: None, cmdline: "quiet".into(), pvh: true };
    VmConfig { name: "test".into(), ..VmConfig::new(64, kernel) }
}

pub fn configure(config: VmConfig) -> Op {
    Op::Configure(Box::new(config))
}

/// Where the code of [`kernel`] lies.
pub const ENTRY: u32 = 0x100_0000;

/// An ELF kernel that is nothing but `code`, entered in 32-bit mode at its first byte.
pub fn kernel(code: &[u8]) -> OwnedFd {
    let mut elf = vec![0; 64];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf[18] = 62;
    elf[24..32].copy_from_slice(&u64::from(ENTRY).to_le_bytes());
    elf[32] = 64;
    elf[54] = 56;
    elf[56] = 2;
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(ENTRY.to_le_bytes());
    let (code_len, note_len) = (code.len() as u64, note.len() as u64);
    for (kind, offset, gpa, len) in [(1u32, 4096, ENTRY.into(), code_len), (4, 4096 + code_len, 0, note_len)]
    {
        elf.extend(kind.to_le_bytes());
        elf.extend(5u32.to_le_bytes());
        for field in [offset, gpa, gpa, len, len, 4] {
            elf.extend(field.to_le_bytes());
        }
    }
    elf.resize(4096, 0);
    elf.extend(code);
    elf.extend(note);
    file(&elf)
}

/// Whether this machine's KVM can run a guest; says so when it cannot.
pub fn kvm_or_skip(test: &str) -> bool {
    match vmm::kvm::Kvm::open() {
        Ok(_) => true,
        Err(e) => {
            eprintln!("skipped {test}: {e}");
            false
        }
    }
}
