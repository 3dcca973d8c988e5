//! The size of a VM that there is not, and a guest that can be unwilling.
//!
//! | `resize=` | the first resize |
//! | --- | --- |
//! | `refused`, `timed_out`, `reset` | ends so, and changes nothing |
//! | `partial` | comes half the way |
//! | `stuck` | as `partial`, of those that shrink |
//! | `fatal` | the monitor dies |
//!
//! All others are done.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmm_api::{ApiError, Ending, ErrorCode, Outcome, Reached, Reply, Resized, Size, Stats, Vcpus, VmConfig};

/// How long a resize takes: enough for others to come in its middle.
const TAKES: Duration = Duration::from_millis(50);

/// What VM and containers were told about sizes, in order.
#[derive(Clone, Default)]
pub struct Journal(Arc<Mutex<Vec<String>>>);

impl Journal {
    pub fn note(&self, line: String) {
        self.0.lock().unwrap().push(line);
    }

    pub fn text(&self) -> String {
        self.0.lock().unwrap().join("\n")
    }
}

pub struct FakeVm {
    size: Mutex<Size>,
    boot_mib: u32,
    fault: Mutex<Option<String>>,
    busy: AtomicBool,
    ended: [AtomicU64; Ending::ALL.len()],
    journal: Journal,
}

impl FakeVm {
    pub fn new(config: &VmConfig, journal: Journal) -> Self {
        let boot_mib = config.memory.size_mib;
        let size = Size {
            vcpus_asked: config.vcpus,
            vcpus: Some(config.vcpus),
            vcpus_max: config.max_vcpus.unwrap_or(config.vcpus),
            memory_asked_mib: boot_mib,
            memory_mib: boot_mib,
            memory_max_mib: config.memory.max_mib.unwrap_or(boot_mib),
            upcall: true,
        };
        let fault = config.kernel.cmdline.split(' ').find_map(|word| word.strip_prefix("resize="));
        journal.note(format!("boot {} {boot_mib}", config.vcpus));
        FakeVm {
            size: Mutex::new(size),
            boot_mib,
            fault: Mutex::new(fault.map(str::to_owned)),
            busy: AtomicBool::new(false),
            ended: Default::default(),
            journal,
        }
    }

    /// What its monitor counts.
    pub fn count(&self, stats: &mut Stats) {
        stats.size = Some(*self.size.lock().unwrap());
        for (ending, count) in Ending::ALL.iter().zip(&self.ended) {
            stats.resizes.insert(ending.name().to_owned(), count.load(Ordering::Relaxed));
        }
        let all = self.ended.iter().map(|count| count.load(Ordering::Relaxed)).sum();
        for (name, count) in
            [("le_1000_us", 0), ("le_100000_us", all), ("sum_us", 50_000 * all), ("count", all)]
        {
            stats.resizes.insert(name.to_owned(), count);
        }
    }

    pub fn resize(&self, vcpus: Option<Vcpus>, memory_mib: Option<u32>, timeout_ms: u32) -> Outcome {
        assert!((1..=vmm_api::resize::MAX_RESIZE_MS).contains(&timeout_ms));
        let vcpus = vcpus.map(|vcpus| match vcpus {
            Vcpus::Count(count) => count,
            Vcpus::These(all) => panic!("{all:?}"),
        });
        let before = *self.size.lock().unwrap();
        let too_many = vcpus.is_some_and(|n| n > before.vcpus_max);
        if too_many || memory_mib.is_some_and(|mib| !(self.boot_mib..=before.memory_max_mib).contains(&mib)) {
            let text = format!("{vcpus:?} {memory_mib:?} of {} {}", before.vcpus_max, before.memory_max_mib);
            return Outcome::Err(ApiError::msg(ErrorCode::InvalidArgument, text));
        }
        let or_same = |n: Option<u32>| n.map_or_else(|| "-".to_owned(), |n| n.to_string());
        let asked = format!("{} {}", or_same(vcpus.map(u32::from)), or_same(memory_mib));
        if self.busy.swap(true, Ordering::SeqCst) {
            self.journal.note(format!("resize {asked} in the middle of another"));
        }
        self.journal.note(format!("resize {asked}"));
        std::thread::sleep(TAKES);
        let now = before.vcpus.unwrap_or(before.vcpus_asked);
        let shrinks = vcpus.is_some_and(|n| n < now) || memory_mib.is_some_and(|mib| mib < before.memory_mib);
        let fault = self.fault.lock().unwrap().take_if(|fault| fault != "stuck" || shrinks);
        let resized = self.apply(before, vcpus, memory_mib, fault.as_deref());
        self.ended[resized.ending as usize].fetch_add(1, Ordering::Relaxed);
        self.busy.store(false, Ordering::SeqCst);
        Outcome::Ok(Reply::Resized(resized))
    }

    fn apply(&self, before: Size, vcpus: Option<u8>, memory: Option<u32>, fault: Option<&str>) -> Resized {
        let ending = match fault {
            None => Ending::Done,
            Some("refused") => Ending::Refused,
            Some("partial" | "stuck") => Ending::Partial,
            Some("timed_out") => Ending::TimedOut,
            Some("reset") => Ending::Reset,
            Some("fatal") => std::process::abort(),
            Some(other) => panic!("resize={other}"),
        };
        let reached = |before: u32, asked: u32| match ending {
            Ending::Done => asked,
            Ending::Partial => u32::midpoint(before, asked),
            _ => before,
        };
        let mut size = self.size.lock().unwrap();
        let mut resized =
            Resized { ending, vcpus: None, memory_mib: None, detail: fault.unwrap_or_default().to_owned() };
        if let Some(asked) = vcpus {
            let now = reached(before.vcpus.unwrap_or(before.vcpus_asked).into(), asked.into());
            let is_known = !matches!(ending, Ending::TimedOut | Ending::Reset);
            size.vcpus_asked = asked;
            size.vcpus = is_known.then(|| u8::try_from(now).unwrap());
            resized.vcpus = Some(Reached { asked: asked.into(), reached: size.vcpus.map(u32::from) });
        }
        if let Some(asked) = memory {
            (size.memory_asked_mib, size.memory_mib) = (asked, reached(before.memory_mib, asked) & !1);
            resized.memory_mib = Some(Reached { asked, reached: Some(size.memory_mib) });
        }
        resized
    }
}
