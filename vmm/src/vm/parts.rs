//! What changes act on: a VM's vCPUs, devices and upcall channel.

use std::time::{Duration, Instant};

use vmm_api::{Size, Stats};

use super::Vm;
use super::change::{Answer, Asked, Changes, Gone, Machine, MemoryState, mib};
use crate::devices::{DeviceKey, Devices};
use crate::event_loop::{EventLoop, Token};
use crate::upcall::{Ask, Channel, DevicePlace, Happened};
use crate::vcpu::{CpuSet, Vcpus};

pub(super) struct Parts<'a> {
    vcpus: &'a mut Vcpus,
    devices: &'a mut Devices,
    channel: &'a mut Channel,
    events: &'a EventLoop,
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

    fn serves(&self, kind: u16) -> bool {
        self.channel.hello().is_some_and(|hello| hello.knows(kind))
    }

    fn place(&self, device: DeviceKey) -> Option<DevicePlace> {
        self.devices.place(device).map(|(_, place)| place)
    }

    fn driver_status(&self, device: DeviceKey) -> u32 {
        self.devices.driver_status(device)
    }

    fn unplug(&mut self, device: DeviceKey) -> Option<Gone> {
        self.devices.remove(self.events, device)
    }
}

impl Vm {
    /// Calls `work` with the changes and what they act on.
    pub(super) fn with_changes<T>(
        &mut self,
        events: &EventLoop,
        work: impl FnOnce(&mut Changes, &mut Parts<'_>) -> T,
    ) -> T {
        let Vm { vcpus, devices, channel, changes, .. } = self;
        work(changes, &mut Parts { vcpus, devices, channel, events })
    }

    /// The guest dialled the upcall port.
    pub fn accept_upcall(&mut self, socket: std::os::fd::OwnedFd, guest_port: u32, events: &EventLoop) {
        // One that dials anew has hung up before, which may not have been looked at.
        self.on_upcall(events);
        let Some(fd) = self.channel.accept(socket, guest_port, Instant::now()) else { return };
        if let Err(error) = events.add(&fd, Token::Upcall) {
            log::error!("wait for the upcall channel: {error}");
            self.channel.close();
        }
    }

    /// The guest has sent something over the upcall channel, or closed it.
    pub fn on_upcall(&mut self, events: &EventLoop) {
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
            self.with_changes(events, |changes, parts| changes.happened(what, parts, now));
        }
    }

    /// Begins a resize, or has it wait.
    pub fn resize(&mut self, events: &EventLoop, asked: Asked) {
        self.with_changes(events, |changes, parts| changes.request(asked, parts));
    }

    /// Ends what has taken too long.
    pub fn expire_changes(&mut self, events: &EventLoop, now: Instant) {
        self.channel.expire(now);
        if self.changes.next_timeout(now) == Some(Duration::ZERO) {
            self.with_changes(events, |changes, parts| changes.expire(parts, now));
        }
    }

    /// How long until [`Vm::expire_changes`] has something to do.
    pub fn next_change_timeout(&self, now: Instant) -> Option<Duration> {
        [self.channel.next_timeout(now), self.changes.next_timeout(now)].into_iter().flatten().min()
    }

    /// Answers of resizes since the last call.
    pub fn take_resize_answers(&mut self) -> Vec<Answer> {
        self.changes.take_answers()
    }

    /// Who waits for the end of a change, now that the VM ends.
    pub fn end_changes(&mut self) -> Vec<u64> {
        self.changes.end_all()
    }

    /// vCPUs it can have.
    pub fn possible_vcpus(&self) -> CpuSet {
        self.changes.possible()
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
            vcpus_asked: u8::try_from(self.changes.vcpus_asked()).unwrap_or(u8::MAX),
            vcpus: self.changes.online().map(CpuSet::len),
            vcpus_max: self.changes.possible().len(),
            memory_asked_mib: mib(boot + asked),
            memory_mib: mib(boot + plugged),
            memory_max_mib: max,
            upcall: self.channel.hello().is_some(),
        });
        stats.resizes = self.changes.counters().list();
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
        let plugs = self.changes.plug_counters();
        let counters = [
            ("attached", plugs.attached),
            ("detached", plugs.detached),
            ("refused", plugs.refused),
            ("timed_out", plugs.timed_out),
            ("reset", plugs.reset),
            ("parked", self.changes.parked() as u64),
        ];
        stats.plugs = counters.map(|(name, value)| (name.to_owned(), value)).into();
    }
}
