//! What a resize acts on: a VM's vCPUs, devices and upcall channel.

use std::time::{Duration, Instant};

use vmm_api::{Size, Stats};

use super::Vm;
use super::resize::{Answer, Asked, Machine, MemoryState, Resizer, mib};
use crate::devices::Devices;
use crate::event_loop::{EventLoop, Token};
use crate::upcall::{Ask, Channel, Happened};
use crate::vcpu::{CpuSet, Vcpus};

struct Parts<'a> {
    vcpus: &'a mut Vcpus,
    devices: &'a Devices,
    channel: &'a mut Channel,
}

impl Machine for Parts<'_> {
    fn is_open(&self) -> bool {
        self.channel.hello().is_some()
    }

    fn send(&mut self, ask: &Ask, within: Duration) -> Option<u64> {
        self.channel.send(ask, within)
    }

    fn start_vcpus(&mut self, set: CpuSet) -> Result<(), String> {
        self.vcpus.start(set).map_err(|error| error.to_string())
    }

    fn park_vcpus(&mut self, set: CpuSet) {
        // It goes on, then: a vCPU that the guest does not use waits all the same.
        if let Err(error) = self.vcpus.park(set) {
            log::error!("{error}");
        }
    }

    fn hang_up(&mut self) {
        self.channel.close();
    }

    fn memory(&self) -> Option<MemoryState> {
        let (base, transport) = self.devices.mem()?;
        let mem = transport.device();
        Some(MemoryState { base, requested: mem.requested(), plugged: mem.plugged(), seen: mem.seen() })
    }

    fn request_memory(&mut self, bytes: u64) -> Result<(), String> {
        let (_, mut transport) =
            self.devices.mem().ok_or("this VM was configured without memory to grow into")?;
        transport.device_mut().set_requested(bytes).map_err(|error| error.to_string())
    }
}

impl Vm {
    /// Calls `work` with the resizes and what they act on.
    fn with_resizer<T>(&mut self, work: impl FnOnce(&mut Resizer, &mut Parts<'_>) -> T) -> T {
        let mut parts = Parts { vcpus: &mut self.vcpus, devices: &self.devices, channel: &mut self.channel };
        work(&mut self.resizer, &mut parts)
    }

    /// The guest dialled the upcall port.
    pub fn accept_upcall(&mut self, socket: std::os::fd::OwnedFd, guest_port: u32, events: &EventLoop) {
        // One that dials anew has hung up before, which may not have been looked at.
        self.on_upcall();
        let Some(fd) = self.channel.accept(socket, guest_port, Instant::now()) else { return };
        if let Err(error) = events.add(&fd, Token::Upcall) {
            log::error!("wait for the upcall channel: {error}");
            self.channel.close();
        }
    }

    /// The guest has sent something over the upcall channel, or closed it.
    pub fn on_upcall(&mut self) {
        let now = Instant::now();
        for what in self.channel.on_ready() {
            match &what {
                Happened::Opened(hello) => log::info!(
                    "upcall channel open: Linux {}, CPUs {} of {} online",
                    hello.release,
                    hello.online,
                    hello.possible
                ),
                Happened::Lost(why) => log::warn!("upcall channel lost: {why}"),
                Happened::Replied { .. } => {}
            }
            self.with_resizer(|resizer, parts| resizer.happened(what, parts, now));
        }
    }

    /// Begins a resize, or has it wait.
    pub fn resize(&mut self, asked: Asked) {
        self.with_resizer(|resizer, parts| resizer.request(asked, parts));
    }

    /// Ends what has taken too long.
    pub fn expire_resizes(&mut self, now: Instant) {
        self.channel.expire(now);
        if self.resizer.next_timeout(now) == Some(Duration::ZERO) {
            self.with_resizer(|resizer, parts| resizer.expire(parts, now));
        }
    }

    /// How long until [`Vm::expire_resizes`] has something to do.
    pub fn next_resize_timeout(&self, now: Instant) -> Option<Duration> {
        [self.channel.next_timeout(now), self.resizer.next_timeout(now)].into_iter().flatten().min()
    }

    /// Answers since the last call.
    pub fn take_resize_answers(&mut self) -> Vec<Answer> {
        self.resizer.take_answers()
    }

    /// Who waits for the end of a resize, now that the VM ends.
    pub fn end_resizes(&mut self) -> Vec<u64> {
        self.resizer.end_all()
    }

    /// vCPUs it can have.
    pub fn possible_vcpus(&self) -> CpuSet {
        self.resizer.possible()
    }

    /// Memory at boot and at most, in MiB.
    pub fn memory_limits_mib(&self) -> (u32, u32) {
        let boot = self.ram.boot_bytes();
        let more = self.devices.mem().map_or(0, |(_, transport)| transport.device().most());
        (mib(boot), mib(boot + more))
    }

    /// Says how large it is, and what its resizes did.
    pub fn describe_size(&self, stats: &mut Stats) {
        let (_, max) = self.memory_limits_mib();
        let boot = self.ram.boot_bytes();
        let memory = self.devices.mem().map(|(_, transport)| transport);
        let (asked, plugged) =
            memory.map_or((0, 0), |mem| (mem.device().requested(), mem.device().plugged()));
        stats.size = Some(Size {
            vcpus_asked: u8::try_from(self.resizer.vcpus_asked()).unwrap_or(u8::MAX),
            vcpus: self.resizer.online().map(CpuSet::len),
            vcpus_max: self.resizer.possible().len(),
            memory_asked_mib: mib(boot + asked),
            memory_mib: mib(boot + plugged),
            memory_max_mib: max,
            upcall: self.channel.hello().is_some(),
        });
        stats.resizes = self.resizer.counters().list();
        let channel = self.channel.counters();
        let counters = [
            ("upcall_opened", channel.opened),
            ("upcall_lost", channel.lost),
            ("upcall_turned_away", channel.turned_away),
            ("upcall_requests", channel.requests),
            ("upcall_stray_replies", channel.stray_replies),
            ("upcall_violations", channel.violations),
        ];
        stats.resizes.extend(counters.map(|(name, value)| (name.to_owned(), value)));
    }
}
