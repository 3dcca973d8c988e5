//! From a VMM without a VM ([`monitor`](super::monitor)) to a guest whose agent answers: configure, boot, wait for the
//! agent, set the guest up.
//!
//! Each stage has a deadline; a failure says which stage, why, and what the guest's console said last. When it fails,
//! what was started is stopped before the error is returned.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use agent_api::sandbox::{NetworkStep, SetupRequest, SetupResponse};
use agent_api::{AGENT_PORT, GUEST_CID, LOG_PORT, SHARE_TAG, STREAM_PORT};
use tokio::sync::{mpsc, oneshot};
use vmm_api::{
    ConsoleConfig, DiskConfig, Event, FdIndex, FsConfig, GuestMemoryBacking, KernelConfig, MemoryConfig,
    NetConfig, Op, Reply, Resized, VmConfig, VsockConfig,
};

use crate::agent::{Agent, AgentError};
use crate::clock;
use crate::config::Config;
use crate::config::size::Size;
use crate::sandbox::complaints::Complaints;
use crate::sandbox::console::Console;
use crate::sandbox::disks::{Disk, DiskError, Disks};
use crate::sandbox::guest_log;
use crate::sandbox::images::Images;
use crate::sandbox::monitor::Monitor;
use crate::sandbox::net::{Device, NetError, Network};
use crate::sandbox::pod::Extras;
use crate::sandbox::resize::{self, Change};
use crate::sandbox::streams::Streams;
use crate::sandbox::timeline::Timeline;
use crate::vmm::{Events, Vmm, VmmError};

/// Kernel command line of every sandbox: the console for last words, the image as root, and an end to the machine
/// when the kernel panics.
pub const CMDLINE: &str =
    "console=hvc0 quiet root=/dev/vda ro rootfstype=erofs init=/sbin/init reboot=k panic=-1";

/// Descriptors of the VM's configuration: kernel, image, console, from here on taps, and then disks.
const FIRST_TAP: u8 = 3;

/// Bytes of entropy the guest starts with.
const ENTROPY: usize = 64;

/// What to boot.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The operator's wishes.
    pub config: Config,
    /// Name of the sandbox, for the VMM's log.
    pub name: String,
    /// Name of the guest.
    pub hostname: String,
    /// What else it gets.
    pub extras: Extras,
}

/// What of the host becomes the VM's.
#[derive(Debug, Default)]
pub struct Hardware {
    /// The pod's interfaces.
    pub network: Network,
    /// The first container's block devices.
    pub disks: Vec<Disk>,
}

/// A running VM.
#[derive(Debug)]
pub struct Vm {
    /// Its monitor.
    pub vmm: Vmm,
    /// Its agent.
    pub agent: Agent,
    /// Streams that the guest dials.
    pub streams: Arc<Streams>,
    /// What its console said.
    pub console: Console,
    /// What it booted with.
    pub boot: Size,
    /// What came of growing it, if it booted small.
    pub grown: Option<Result<Resized, VmmError>>,
    /// Its disks beside the guest's image.
    pub disks: tokio::sync::Mutex<Disks>,
    /// How its images are opened again.
    pub images: Images,
}

/// Where a boot can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Connecting the pod's interfaces.
    Network,
    /// Opening the container's block devices.
    Disks,
    /// Opening kernel and image.
    Files,
    /// Starting the VMM.
    Spawn,
    /// Having it make the VM.
    Configure,
    /// Having it run.
    Boot,
    /// The guest's way to its agent's connection.
    Agent,
    /// Making the guest this sandbox.
    Setup,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Stage::Network => "connecting the pod's network",
            Stage::Disks => "opening the container's block devices",
            Stage::Files => "opening the guest's files",
            Stage::Spawn => "starting the VMM",
            Stage::Configure => "configuring the VM",
            Stage::Boot => "starting the VM",
            Stage::Agent => "waiting for the guest's agent",
            Stage::Setup => "setting up the guest",
        })
    }
}

/// A VM that did not come up.
#[derive(Debug, thiserror::Error)]
#[error("boot failed while {stage}{}", said(.last_words))]
pub struct BootError {
    /// At which stage.
    pub stage: Stage,
    /// What the guest's console said last.
    pub last_words: String,
    /// Why.
    #[source]
    pub cause: Box<BootCause>,
}

fn said(last_words: &str) -> String {
    if last_words.is_empty() { String::new() } else { format!(" (guest's console: {last_words:?})") }
}

impl BootError {
    /// One from before there was a VM.
    pub fn early(stage: Stage, cause: impl Into<BootCause>) -> Self {
        BootError { stage, last_words: String::new(), cause: Box::new(cause.into()) }
    }
}

/// Why a VM did not come up.
#[derive(Debug, thiserror::Error)]
pub enum BootCause {
    /// The pod's network.
    #[error(transparent)]
    Network(#[from] NetError),
    /// A block device of the container.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A file of the guest cannot be opened.
    #[error("{what} {path}")]
    File {
        /// What it is.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The VMM.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The guest did not get there in time.
    #[error("no connection within {0:?}")]
    Deadline(std::time::Duration),
    /// A resource of this process.
    #[error("{what}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// Boots a VM in a VMM that was started for it.
///
/// # Errors
/// See [`BootError`]; no VMM is left running then.
pub async fn boot(
    monitor: Monitor,
    plan: &Plan,
    hardware: Hardware,
    timeline: &Timeline,
    lost_images: mpsc::UnboundedSender<String>,
) -> Result<Vm, BootError> {
    let Monitor { vmm, events, console, console_fd, kernel, image } = monitor;
    let streams = Streams::new();
    let mut fds = vec![kernel.as_fd(), image.as_fd(), console_fd.as_fd()];
    let Hardware { network, disks } = &hardware;
    fds.extend(network.devices.iter().flat_map(|device| &device.taps).map(AsFd::as_fd));
    fds.extend(disks.iter().map(|disk| disk.file().as_fd()));
    let (agent_tx, agent) = oneshot::channel();
    tokio::spawn(dispatch(events, streams.clone(), agent_tx, lost_images));
    match come_up(plan, &hardware, &vmm, agent, &fds, timeline).await {
        Ok((agent, grown)) => {
            let (boot, images) = (plan.config.boot_size(), Images::default());
            let disks = tokio::sync::Mutex::new(Disks::of_boot(disks));
            Ok(Vm { vmm, agent, streams, console, boot, grown, disks, images })
        }
        Err((stage, cause)) => {
            let exit = vmm.stop(plan.config.timeouts.shutdown()).await;
            log::error!("boot failed while {stage}: the VMM {exit}");
            Err(BootError { stage, last_words: console.last_words(), cause: Box::new(cause) })
        }
    }
}

async fn come_up(
    plan: &Plan,
    hardware: &Hardware,
    vmm: &Vmm,
    agent: oneshot::Receiver<OwnedFd>,
    fds: &[BorrowedFd<'_>],
    timeline: &Timeline,
) -> Result<(Agent, Option<Result<Resized, VmmError>>), (Stage, BootCause)> {
    let config = &plan.config;
    let limit = config.timeouts.vmm();
    let configure = Op::Configure(Box::new(vm_config(plan, hardware)));
    vmm.call(configure, fds, limit).await.map_err(|e| (Stage::Configure, e.into()))?;
    let (reply, _) = vmm.call(Op::Boot, &[], limit).await.map_err(|e| (Stage::Boot, e.into()))?;
    let Reply::Booted { timeline: stages } = reply else {
        return Err((Stage::Boot, VmmError::Answer { op: "boot" }.into()));
    };
    timeline.reached_at("vmm main", stages.main_us);
    timeline.reached_at("kvm set-up", stages.kvm_ready_us);
    timeline.reached_at("guest loaded", stages.loaded_us);
    timeline.reached_at("vcpu running", stages.running_us);

    // The guest's kernel grows before it has run its first program.
    let (connection, grown) = tokio::join!(connection(vmm, agent, config.timeouts.boot()), grow(vmm, config));
    let (connection, ready_us) = connection.map_err(|cause| (Stage::Agent, cause))?;
    timeline.reached_at("agent ready", ready_us);
    if let Some((_, at)) = &grown {
        timeline.reached_at("vm grown", *at);
    }

    let agent = Agent::new(connection, config.timeouts.agent()).map_err(|e| (Stage::Setup, e.into()))?;
    let setup = setup_request(plan, &hardware.network.steps)
        .map_err(|source| (Stage::Setup, BootCause::Os { what: "reading entropy for the guest", source }))?;
    let response = agent.setup(&setup).await.map_err(|e| (Stage::Setup, e.into()))?;
    timeline.reached_at("kernel", init_started(&response, ready_us));
    timeline.reached("sandbox ready");
    log::info!(
        "VM runs: guest kernel {}, agent {}, VMM process {}",
        response.kernel_release,
        response.agent_version,
        vmm.pid()
    );
    Ok((agent, grown.map(|(grown, _)| grown)))
}

/// Waits for the agent's connection; when it came.
async fn connection(
    vmm: &Vmm,
    agent: oneshot::Receiver<OwnedFd>,
    limit: Duration,
) -> Result<(OwnedFd, u64), BootCause> {
    tokio::select! {
        connected = tokio::time::timeout(limit, agent) => match connected {
            Ok(Ok(connection)) => Ok((connection, clock::monotonic_us())),
            // The dispatcher ended without it: the VMM is gone.
            Ok(Err(_)) => Err(gone(vmm).await),
            Err(_) => Err(BootCause::Deadline(limit)),
        },
        _ = vmm.exited() => Err(gone(vmm).await),
    }
}

/// Grows a VM that boots small to the pod's size; what came of it, and when.
async fn grow(vmm: &Vmm, config: &Config) -> Option<(Result<Resized, VmmError>, u64)> {
    let (boot, first) = (config.boot_size(), config.sizing().first());
    let change = Change {
        vcpus: Some(first.vcpus).filter(|vcpus| *vcpus > boot.vcpus),
        memory_mib: Some(first.memory_mib).filter(|mib| *mib > boot.memory_mib),
    };
    match change {
        Change { vcpus: None, memory_mib: None } => None,
        change => {
            let grown = resize::change(vmm, change, config.timeouts.resize()).await;
            Some((grown, clock::monotonic_us()))
        }
    }
}

async fn gone(vmm: &Vmm) -> BootCause {
    VmmError::Gone(vmm.exited().await.to_string()).into()
}

/// When the guest's PID 1 began, on the host's clock: the agent measures both moments on its own.
fn init_started(setup: &SetupResponse, ready_us: u64) -> u64 {
    ready_us.saturating_sub(setup.dialled_us.saturating_sub(setup.started_us))
}

/// Hands the guest's connections to whom they are for, until the VMM ends.
async fn dispatch(
    mut events: Events,
    streams: Arc<Streams>,
    agent: oneshot::Sender<OwnedFd>,
    lost_images: mpsc::UnboundedSender<String>,
) {
    let mut agent = Some(agent);
    let mut logging = false;
    let mut complaints = Complaints::about("a connection of the guest was closed");
    while let Some((event, mut fds)) = events.recv().await {
        let (port, guest_port, socket) = match event {
            Event::VsockAccepted { port, guest_port, socket } => (port, guest_port, socket),
            Event::ImageLost { disk } => {
                // Nobody listens when the boot has failed.
                let _ = lost_images.send(disk);
                continue;
            }
            Event::Exiting { .. } => continue,
        };
        if fds.len() != 1 || socket != FdIndex(0) {
            log::error!("the VMM announced a connection without its socket");
            continue;
        }
        let connection = fds.remove(0);
        match port {
            AGENT_PORT => match agent.take() {
                // Dropped with the boot that gave up.
                Some(waiting) => drop(waiting.send(connection)),
                None => complaints.note(format_args!("the agent's port, a second time (from {guest_port})")),
            },
            STREAM_PORT => streams.accept(connection),
            LOG_PORT if !logging => {
                logging = true;
                tokio::spawn(guest_log::follow(connection));
            }
            _ => complaints.note(format_args!("nobody is at port {port}")),
        }
    }
}

fn vm_config(plan: &Plan, hardware: &Hardware) -> VmConfig {
    let (config, Hardware { network, disks }) = (&plan.config, hardware);
    let taps: usize = network.devices.iter().map(|device| device.taps.len()).sum();
    let first_disk = usize::from(FIRST_TAP) + taps;
    let image = DiskConfig::read_only(FdIndex(1), "ctvm-root");
    let disks = disks.iter().zip(0..).map(|(disk, number)| {
        let file = u8::try_from(first_disk + number as usize).expect("a packet has few descriptors");
        disk.config(number, FdIndex(file))
    });
    let cmdline = match config.cmdline.trim() {
        "" => CMDLINE.to_owned(),
        more => format!("{CMDLINE} {more}"),
    };
    let kernel = KernelConfig { image: FdIndex(0), initrd: None, cmdline, pvh: true };
    let (boot, max) = (config.boot_size(), config.sizing().max);
    VmConfig {
        name: plan.name.chars().take(128).collect(),
        vcpus: boot.vcpus,
        max_vcpus: Some(max.vcpus).filter(|max| *max > boot.vcpus),
        memory: MemoryConfig {
            backing: if config.hugepages {
                GuestMemoryBacking::Hugetlbfs
            } else {
                GuestMemoryBacking::Anonymous
            },
            prefault: config.prefault,
            max_mib: Some(max.memory_mib).filter(|max| *max > boot.memory_mib),
            ..MemoryConfig::new(boot.memory_mib)
        },
        disks: std::iter::once(image).chain(disks).collect(),
        vsock: Some(VsockConfig { cid: GUEST_CID, ports: vec![AGENT_PORT, STREAM_PORT, LOG_PORT] }),
        // The guest's generator is ready before its first driver where the processor feeds it, and the agent's
        // set-up seeds it from the host's: the device would be 56 exits and two kernel threads for nothing.
        rng: !std::arch::is_x86_feature_detected!("rdrand"),
        balloon: false,
        fs: Some(FsConfig { tag: SHARE_TAG.into(), threads: config.fs_threads }),
        // Which containers come, and whether their root file systems are images, is known when it runs.
        images: true,
        nets: net_configs(&network.devices),
        console: Some(ConsoleConfig { output: Some(FdIndex(2)), input: None }),
        ..VmConfig::new(boot.memory_mib, kernel)
    }
}

/// Their descriptors follow each other in the order of the devices.
fn net_configs(devices: &[Device]) -> Vec<NetConfig> {
    let mut fds = (FIRST_TAP..).map(FdIndex);
    let config = |device: &Device| NetConfig {
        taps: fds.by_ref().take(device.taps.len()).collect(),
        mac: device.mac,
        mtu: device.mtu,
    };
    devices.iter().map(config).collect()
}

fn setup_request(plan: &Plan, network: &[NetworkStep]) -> std::io::Result<SetupRequest> {
    let mut request = SetupRequest::new();
    request.hostname.clone_from(&plan.hostname);
    request.sysctls.clone_from(&plan.extras.sysctls);
    request.files.clone_from(&plan.extras.files);
    request.users = plan.extras.users.as_ref().map(Into::into).into();
    request.entropy = vec![0; ENTROPY];
    File::open("/dev/urandom")?.read_exact(&mut request.entropy)?;
    request.share_tag = SHARE_TAG.to_owned();
    request.realtime_ns = clock::realtime_ns();
    request.network = network.to_vec();
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BootSmall;

    #[test]
    fn the_vm_is_as_configured() {
        let config = Config {
            vcpus: 2,
            max_vcpus: 4,
            hugepages: true,
            cmdline: " debug ".into(),
            ..Config::default()
        };
        let plan = Plan { config, name: "n".repeat(300), hostname: "h".into(), extras: Extras::default() };
        let vm = vm_config(&plan, &Hardware::default());
        assert_eq!((vm.max_vcpus, vm.memory.size_mib, vm.name.len()), (Some(4), 256, 128));
        assert_eq!(vm.memory.backing, GuestMemoryBacking::Hugetlbfs);
        assert!(vm.kernel.cmdline.ends_with("panic=-1 debug"), "{}", vm.kernel.cmdline);
        assert!(vm.disks[0].read_only);
        assert_eq!(vm.vsock.unwrap().ports, [1024, 1025, 1026]);
    }

    #[test]
    fn one_that_boots_small_can_become_as_large_as_its_pod() {
        let booted = |boot_small| {
            let resize = crate::config::Resize { boot_small };
            let config = Config { vcpus: 4, max_vcpus: 4, memory_mib: 512, resize, ..Config::default() };
            let plan = Plan { config, name: "n".into(), hostname: "h".into(), extras: Extras::default() };
            let vm = vm_config(&plan, &Hardware::default());
            (vm.vcpus, vm.max_vcpus, vm.memory.size_mib, vm.memory.max_mib)
        };
        assert_eq!(booted(BootSmall::No), (4, None, 512, None));
        assert_eq!(booted(BootSmall::Vcpus), (1, Some(4), 512, None));
        assert_eq!(booted(BootSmall::All), (1, Some(4), 128, Some(512)));
    }

    #[test]
    fn pid_1_began_before_the_agent_was_ready() {
        let mut setup = SetupResponse::new();
        (setup.started_us, setup.dialled_us) = (30_000, 34_000);
        assert_eq!(init_started(&setup, 1_000_000), 996_000);
        // A guest that says nonsense does no harm.
        (setup.started_us, setup.dialled_us) = (5, u64::MAX);
        assert_eq!(init_started(&setup, 1_000_000), 0);
    }

    #[test]
    fn errors_say_stage_and_last_words() {
        let error = BootError {
            stage: Stage::Agent,
            last_words: "Kernel panic".into(),
            cause: Box::new(BootCause::Deadline(std::time::Duration::from_secs(3))),
        };
        assert_eq!(
            error.to_string(),
            "boot failed while waiting for the guest's agent (guest's console: \"Kernel panic\")"
        );
    }
}
