//! What the shim and the guest agent say to each other.
//!
//! Three vsock connections, each dialled by the agent to the host ([`HOST_CID`]):
//!
//! ```text
//! shim                                          agent (PID 1)
//!  │ <─────────── port 1024, once ──────────────── │  ttrpc; the *agent* is the server on it:
//!  │                                               │    containerd.task.v3.Task   ([`task`])
//!  │                                               │    ctvm.agent.v1.Sandbox     ([`sandbox`])
//!  │ <─────────── port 1025, one a stream ──────── │  8-byte stream id, then raw bytes ([`stream`])
//!  │ <─────────── port 1026, once ──────────────── │  one JSON object a line ([`log_line`])
//! ```
//!
//! The Task messages are containerd's own, so the shim rewrites and forwards instead of translating. What differs
//! from containerd's use of them:
//! - `CreateTaskRequest.options` carries the OCI configuration ([`SPEC_TYPE_URL`], JSON bytes) with every path
//!   already a path in the guest; `bundle` is not used.
//! - `stdin`, `stdout` and `stderr` are `""` (`/dev/null`) or `stream:<decimal id>` ([`stream::StreamId`]).
//! - `StatsRequest` without an id asks for all containers together.
//! - `rootfs` is mounts that the agent makes below the container's root, among them images on disks ([`image`]).
//! - There are no events: the shim holds one `Wait` a process, and one `OomKills` a container.
//!
//! Not here: how the host side of vsock is made (the VMM's business) and anything that touches a system call.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod image;
pub mod log_line;
pub mod sandbox;
pub mod stream;
pub mod users;

/// containerd's Task service, asynchronous: messages, client ([`task::TaskClient`]) and server trait
/// ([`task::Task`], [`task::create_task`]).
///
/// Served by the agent: `Create`, `Start`, `State`, `Kill`, `Delete`, `Wait`, `Exec`, `CloseIO`, `Pids`,
/// `ResizePty`, `Pause`, `Resume`, `Stats`, `Update`,
/// `Connect`. The rest answers `Unimplemented`.
pub mod task {
    pub use containerd_shim_protos::api::*;
    pub use containerd_shim_protos::shim_async::{Task, TaskClient, create_task};
}

/// What a container has used, in containerd's message for control groups v2: the value in `StatsResponse.stats`.
pub use containerd_shim_protos::cgroups_v2::metrics;

/// The messages' runtime and the RPC runtime, in the versions this crate is built with.
pub use {protobuf, ttrpc};

/// The host's vsock address (`VMADDR_CID_HOST`).
pub const HOST_CID: u32 = 2;
/// The guest's vsock address under the VMM.
pub const GUEST_CID: u32 = 3;

/// Host port of the agent's ttrpc connection, dialled once, when the agent is ready.
pub const AGENT_PORT: u32 = 1024;
/// Host port of the standard streams, dialled once for each stream.
pub const STREAM_PORT: u32 = 1025;
/// Host port of the guest's log, dialled once.
pub const LOG_PORT: u32 = 1026;

/// Name of the Task service as the agent registers it.
pub const TASK_SERVICE: &str = "containerd.task.v3.Task";

/// `type_url` of the OCI runtime configuration in `CreateTaskRequest.options`; the value is its JSON.
pub const SPEC_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
/// `type_url` of the OCI process in `ExecProcessRequest.spec`; the value is its JSON.
pub const PROCESS_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// `type_url` of [`metrics::Metrics`] in `StatsResponse.stats`, as containerd writes it.
pub const METRICS_TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";
/// `type_url` of OCI's resources in `UpdateTaskRequest.resources`; the value is their JSON.
pub const RESOURCES_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// Beginning of a namespace's path that names a container of the sandbox by its id, instead of a file; without an id, the
/// sandbox itself, which then has a process of its own for it.
pub const CONTAINER_NAMESPACE: &str = "container:";

/// Where the agent keeps the sandbox's own namespaces, each below its name in `/proc/PID/ns`, once it has some.
pub const NAMESPACES_PATH: &str = "/run/ctvm/ns";

/// `source` of a tmpfs that is the sandbox's one shared memory, of the size that its first user says.
pub const SANDBOX_SHM: &str = "ctvm-sandbox-shm";
/// Where the agent mounts it.
pub const SHM_PATH: &str = "/run/ctvm/shm";

/// Beginning of the `source` of a hugetlbfs that containers share: what follows, of the letters of a file's name, is the
/// same for those that have the same one.
pub const HUGE_PAGES: &str = "ctvm-huge-pages-";
/// Where the agent mounts those.
pub const HUGE_PAGES_PATH: &str = "/run/ctvm/huge";

/// `major` of a block device in `linux.devices` that is a disk of the VM: the one with the serial number that
/// [`disk_serial`] makes of its `minor`. Which numbers a disk has in the guest, only the guest can tell.
pub const DISK_MAJOR: i64 = -1;

/// Serial number of the sandbox's disk `number`, counted from 0. At most 20 bytes fit (virtio 1.2, 5.2.6).
pub fn disk_serial(number: u32) -> String {
    format!("ctvm-disk-{number}")
}

/// Where the agent puts `SetupRequest.files`.
pub const FILES_PATH: &str = "/run/ctvm/pod";

/// Tag of the one virtio-fs device.
pub const SHARE_TAG: &str = "ctvm";
/// Where the agent mounts it. A directory the VMM shows as `NAME` is `SHARE_PATH/NAME`.
pub const SHARE_PATH: &str = "/run/ctvm/share";

/// Line that PID 1 writes to the console as its first act when the kernel command line has `ctvm_mark=1`.
pub const INIT_MARK: &str = "CTVM-INIT\n";
/// Line that PID 1 writes to the console when its ttrpc connection is up, under the same condition.
pub const READY_MARK: &str = "CTVM-READY\n";

/// Most bytes of `SetupRequest.entropy` that are used: the size of the kernel's input pool.
pub const MAX_ENTROPY: usize = 512;
