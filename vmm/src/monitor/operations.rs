//! What each operation does. It is legal when it comes here.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use imagefs::{Cache, FileServer, MountOptions};
use vmm_api::hotplug::MAX_PLUG_MS;
use vmm_api::resize::MAX_RESIZE_MS;
use vmm_api::{ApiError, DeviceName, ErrorCode, FsCache, Op, Reply, Stats, Vcpus, VmConfig};

use super::{Answer, Monitor};
use crate::clock::monotonic_us;
use crate::config::{Fds, NewDevice, ValidConfig, take_blobs};
use crate::error::Coded;
use crate::upcall;
use crate::vcpu::CpuSet;
use crate::vm::Vm;
use crate::vm::builder::{self, VmError};
use crate::vm::change::{Asked, Cpus, Target};
use crate::vm::lifecycle::State;

/// Longest wait of a `VsockConnect`, in milliseconds.
const MAX_DIAL_MS: u32 = 60_000;

type Done = Result<Answer, ApiError>;

const DONE: Done = Ok(Answer::Now(Reply::Done));

impl Monitor {
    pub(super) fn perform(&mut self, id: u64, op: Op, fds: Vec<OwnedFd>) -> Done {
        if let Op::Configure(config) = op {
            return self.configure(*config, fds);
        }
        let mut fds = Fds::new(fds);
        let done = match op {
            Op::Attach { device, timeout_ms } => {
                let device = NewDevice::take(device, &mut fds).map_err(|e| e.to_api())?;
                fds = none_left(fds)?;
                self.attach(id, device, timeout_ms)
            }
            Op::ImageChannel { disk, channel, blobs } => {
                let channel = fds.take("channel", channel).map_err(|e| e.to_api())?;
                let blobs = take_blobs(blobs, &mut fds).map_err(|e| e.to_api())?;
                self.vm().devices().connect_image(&disk, channel, blobs).map_err(|e| e.to_api())?;
                DONE
            }
            Op::FsMount { share, at, dir, read_only, cache, layer } => {
                let dir = fds.take("dir", dir).map_err(|e| e.to_api())?;
                let options = MountOptions { read_only, cache: cache_of(cache), layer };
                self.fs_mount(share.as_deref(), &at, dir, options)
            }
            other => {
                fds = none_left(fds)?;
                self.perform_without_fds(id, other)
            }
        }?;
        none_left(fds)?;
        Ok(done)
    }

    fn perform_without_fds(&mut self, id: u64, op: Op) -> Done {
        match op {
            Op::Boot => self.boot(),
            Op::Pause => self.pause(),
            Op::Resume => self.resume(),
            Op::Detach { device, timeout_ms } => self.detach(id, &device, timeout_ms),
            Op::FsUnmount { share, at } => self.fs_unmount(share.as_deref(), &at),
            Op::VsockConnect { port, timeout_ms } => self.vsock_connect(id, port, timeout_ms),
            Op::Resize { vcpus, memory_mib, timeout_ms } => self.resize(id, vcpus, memory_mib, timeout_ms),
            Op::Balloon { mib } => self.balloon(mib),
            Op::Stats => Ok(Answer::Now(Reply::Stats(Box::new(self.stats())))),
            // What follows is the main loop's business.
            Op::Shutdown => DONE,
            Op::Configure(_) | Op::Attach { .. } | Op::FsMount { .. } | Op::ImageChannel { .. } => {
                unreachable!("`perform` keeps those that take descriptors")
            }
        }
    }

    fn vm(&self) -> &Vm {
        self.vm.as_ref().expect("the lifecycle lets nothing through before there is one")
    }

    fn vm_mut(&mut self) -> &mut Vm {
        self.vm.as_mut().expect("the lifecycle lets nothing through before there is one")
    }

    fn configure(&mut self, config: VmConfig, fds: Vec<OwnedFd>) -> Done {
        self.timeline.configure_us = monotonic_us();
        self.serves_upcall = !config.vsock.as_ref().is_some_and(|v| v.ports.contains(&upcall::abi::PORT));
        match self.build(config, fds) {
            Ok(vm) => {
                self.vm = Some(vm);
                self.refused = None;
                DONE
            }
            Err(error) => {
                let answer = error.to_api();
                self.refused = Some(error);
                Err(answer)
            }
        }
    }

    /// The answer comes when the guest's has, or when the time is up.
    fn resize(&mut self, id: u64, vcpus: Option<Vcpus>, memory_mib: Option<u32>, timeout_ms: u32) -> Done {
        if !(1..=MAX_RESIZE_MS).contains(&timeout_ms) {
            return Err(invalid(format!("timeout_ms is {timeout_ms}, must be 1 to {MAX_RESIZE_MS}")));
        }
        let vm = self.vm.as_mut().expect("the lifecycle lets nothing through before there is one");
        if vm.devices().vsock().is_none() {
            return Err(missing("socket device"));
        }
        let target = Target {
            vcpus: vcpus.map(|vcpus| vcpu_target(vcpus, vm.possible_vcpus())).transpose()?,
            memory: memory_mib.map(|mib| memory_target(mib, vm.memory_limits_mib())).transpose()?,
        };
        if target == (Target { vcpus: None, memory: None }) {
            return Err(invalid("neither vcpus nor memory_mib is given".to_owned()));
        }
        let timeout = Duration::from_millis(timeout_ms.into());
        vm.resize(&self.events, Asked { id, target, at: Instant::now(), timeout });
        Ok(Answer::Later)
    }

    fn build(&mut self, config: VmConfig, fds: Vec<OwnedFd>) -> Result<Vm, VmError> {
        let config = ValidConfig::check(config, fds)?;
        let timeline = &mut self.timeline;
        builder::build(&self.events, self.shell.take(), config, || timeline.kvm_ready_us = monotonic_us())
    }

    fn boot(&mut self) -> Done {
        self.vm_mut().prepare().map_err(|e| e.to_api())?;
        self.timeline.loaded_us = monotonic_us();
        self.timeline.running_us = self.timeline.loaded_us;
        self.vm().run();
        Ok(Answer::Now(Reply::Booted { timeline: self.timeline }))
    }

    fn pause(&mut self) -> Done {
        let vm = self.vm.as_mut().expect("the lifecycle lets nothing through before there is one");
        vm.pause(&self.events).map_err(|e| e.to_api())?;
        DONE
    }

    fn resume(&mut self) -> Done {
        let vm = self.vm.as_mut().expect("the lifecycle lets nothing through before there is one");
        vm.resume(&self.events).map_err(|e| e.to_api())?;
        DONE
    }

    /// On a VM that runs the answer comes when the guest's driver has the device, or when the time is up.
    fn attach(&mut self, id: u64, device: NewDevice, timeout_ms: u32) -> Done {
        let timeout = plug_timeout(timeout_ms)?;
        let vm = self.vm.as_mut().expect("the lifecycle lets nothing through before there is one");
        if self.state == State::Configured {
            let attached = vm.attach(&self.events, device).map_err(|e| e.to_api())?;
            return Ok(Answer::Now(Reply::Attached(attached)));
        }
        if vm.devices().vsock().is_none() {
            return Err(missing("socket device"));
        }
        vm.plug(&self.events, device, id, timeout).map_err(|e| e.to_api())?;
        Ok(Answer::Later)
    }

    /// The answer comes when nothing of the device is left, or when the time is up.
    fn detach(&mut self, id: u64, device: &DeviceName, timeout_ms: u32) -> Done {
        let timeout = plug_timeout(timeout_ms)?;
        let vm = self.vm.as_mut().expect("the lifecycle lets nothing through before there is one");
        if vm.devices().vsock().is_none() {
            return Err(missing("socket device"));
        }
        vm.unplug(&self.events, device, id, timeout).map_err(|e| e.to_api())?;
        Ok(Answer::Later)
    }

    fn fs_mount(&self, share: Option<&str>, at: &str, dir: OwnedFd, options: MountOptions) -> Done {
        self.files(share)?.mount(at, dir, options).map_err(|e| e.to_api())?;
        DONE
    }

    fn fs_unmount(&self, share: Option<&str>, at: &str) -> Done {
        let open = self.files(share)?.unmount(at).map_err(|e| e.to_api())?;
        log::debug!("{at:?} is out of the share; the guest holds {open} files of it open");
        DONE
    }

    fn files(&self, share: Option<&str>) -> Result<&FileServer, ApiError> {
        self.vm().devices().files(share).ok_or_else(|| match share {
            None => missing("file share"),
            Some(tag) => {
                let name = DeviceName::Fs(tag.to_owned());
                ApiError::msg(ErrorCode::NotFound, format!("there is no {name}"))
            }
        })
    }

    fn balloon(&self, mib: u32) -> Done {
        let vm = self.vm();
        let (_, max) = vm.memory_limits_mib();
        if mib > max {
            return Err(invalid(format!("mib is {mib}, must be 0 to {max} (max_mib)")));
        }
        let mut balloon = vm.devices().balloon().ok_or_else(|| missing("balloon"))?;
        balloon.device_mut().set_target(u64::from(mib) << 20).map_err(|e| invalid(e.to_string()))?;
        DONE
    }

    /// The answer comes with the guest's, or when the time is up.
    fn vsock_connect(&mut self, id: u64, port: u32, timeout_ms: u32) -> Done {
        if !(1..=MAX_DIAL_MS).contains(&timeout_ms) {
            let text = format!("timeout_ms is {timeout_ms}, must be 1 to {MAX_DIAL_MS}");
            return Err(ApiError::msg(ErrorCode::InvalidArgument, text));
        }
        let vm = self.vm.as_ref().expect("the lifecycle lets nothing through before there is one");
        let Some(mut vsock) = vm.devices().vsock() else { return Err(missing("socket device")) };
        let timeout = Duration::from_millis(timeout_ms.into());
        let dial = self.dials.begin(id, timeout, Instant::now()).map_err(|e| e.to_api())?;
        if let Err(e) = vsock.device_mut().connect(port, dial) {
            self.dials.end(dial);
            return Err(e.to_api());
        }
        Ok(Answer::Later)
    }

    fn stats(&self) -> Stats {
        let mut stats =
            Stats { state: self.state.name().to_owned(), timeline: self.timeline, ..Stats::default() };
        let Some(vm) = &self.vm else { return stats };
        for (kind, count) in vm.vcpus().exit_counts().flatten() {
            *stats.exits.entry(kind.to_owned()).or_default() += count;
        }
        for (name, counters) in vm.devices().metrics() {
            let counters = counters.into_iter().map(|(counter, value)| (counter.to_owned(), value)).collect();
            stats.devices.insert(name.to_owned(), counters);
        }
        vm.describe_size(&mut stats);
        // What the guest's kernel says of its memory is there by the next time.
        if let Some(mut balloon) = vm.devices().balloon() {
            balloon.device_mut().request_statistics();
        }
        stats
    }
}

fn invalid(text: String) -> ApiError {
    ApiError::msg(ErrorCode::InvalidArgument, text)
}

fn plug_timeout(timeout_ms: u32) -> Result<Duration, ApiError> {
    match (1..=MAX_PLUG_MS).contains(&timeout_ms) {
        true => Ok(Duration::from_millis(timeout_ms.into())),
        false => Err(invalid(format!("timeout_ms is {timeout_ms}, must be 1 to {MAX_PLUG_MS}"))),
    }
}

fn vcpu_target(wanted: Vcpus, possible: CpuSet) -> Result<Cpus, ApiError> {
    let max = possible.len();
    match wanted {
        Vcpus::Count(count) if (1..=max).contains(&count) => Ok(Cpus::Count(count)),
        Vcpus::Count(count) => Err(invalid(format!("vcpus is {count}, must be 1 to {max} (max_vcpus)"))),
        Vcpus::These(indices) => match indices.iter().find(|index| !possible.has(**index)) {
            Some(index) => {
                let last = max - 1;
                Err(invalid(format!("vcpus names {index}, must be 0 to {last} (max_vcpus is {max})")))
            }
            None if !indices.contains(&0) => Err(invalid("vcpus is without 0, which cannot go".to_owned())),
            None => Ok(Cpus::These(indices.into_iter().collect())),
        },
    }
}

fn memory_target(wanted: u32, (boot, max): (u32, u32)) -> Result<u64, ApiError> {
    if !(boot..=max).contains(&wanted) {
        return Err(invalid(format!(
            "memory_mib is {wanted}, must be {boot} (size_mib, which cannot go) to {max} (max_mib)"
        )));
    }
    if !wanted.is_multiple_of(2) {
        return Err(invalid(format!("memory_mib is {wanted}, must be a multiple of 2")));
    }
    Ok(u64::from(wanted - boot) << 20)
}

fn missing(device: &str) -> ApiError {
    ApiError::msg(ErrorCode::FailedPrecondition, format!("this VM was configured without a {device}"))
}

/// Refuses descriptors that the operation does not name.
fn none_left(fds: Fds) -> Result<Fds, ApiError> {
    fds.done().map_err(|e| e.to_api())?;
    Ok(Fds::new(vec![]))
}

/// The owner's word in the file server's terms.
fn cache_of(asked: FsCache) -> Cache {
    match asked {
        FsCache::Shared => Cache::Shared,
        FsCache::Live => Cache::Live,
        FsCache::Exclusive => Cache::Exclusive,
    }
}
