//! How large a VM is, and the way to another size.

use vmm_api::{Ending, Reached, Resized};

use crate::config::Config;
use crate::config::size::Size;

/// A change of size: what it leaves alone is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Change {
    /// vCPUs.
    pub vcpus: Option<u8>,
    /// Memory, in MiB.
    pub memory_mib: Option<u32>,
}

impl Change {
    /// Whether it changes nothing.
    pub(super) fn is_empty(&self) -> bool {
        *self == Change::default()
    }
}

/// How large the VM is, as far as is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Last asked for.
    pub asked: Size,
    /// vCPUs that the guest has online; none: it has not said.
    pub vcpus: Option<u8>,
    /// Memory that it has, MiB; none: it has not said.
    pub memory_mib: Option<u32>,
    /// The most.
    pub max: Size,
    /// What it booted with: memory does not go below that.
    pub boot: Size,
}

impl Sizes {
    /// Of a VM that is about to boot.
    pub(super) fn booting(config: &Config) -> Self {
        let boot = config.boot_size();
        let max = config.sizing().max;
        Sizes { asked: boot, vcpus: Some(boot.vcpus), memory_mib: Some(boot.memory_mib), max, boot }
    }

    /// Takes what came of a change.
    pub(super) fn note(&mut self, resized: &Resized) {
        if resized.ending == Ending::Replaced {
            return;
        }
        if let Some(Reached { asked, reached }) = resized.vcpus {
            self.asked.vcpus = u8::try_from(asked).unwrap_or(u8::MAX);
            self.vcpus = reached.map(|n| u8::try_from(n).unwrap_or(u8::MAX));
        }
        if let Some(Reached { asked, reached }) = resized.memory_mib {
            (self.asked.memory_mib, self.memory_mib) = (asked, reached);
        }
    }

    /// The way from here to `goal`: what grows first, and what shrinks then. What is not known is set with what grows,
    /// as the target is absolute. CPUs up to `held` stay.
    pub(super) fn steps(&self, goal: Size, held: u8) -> (Change, Change) {
        let goal = goal.min(self.max);
        let memory = goal.memory_mib.max(self.boot.memory_mib);
        let mut grow = Change::default();
        let mut shrink = Change::default();
        match self.vcpus {
            Some(now) if goal.vcpus > now => grow.vcpus = Some(goal.vcpus),
            Some(now) => shrink.vcpus = Some(goal.vcpus.max(held)).filter(|vcpus| *vcpus < now),
            None => grow.vcpus = Some(goal.vcpus.max(held.min(self.max.vcpus))),
        }
        match self.memory_mib {
            Some(now) if memory > now => grow.memory_mib = Some(memory),
            Some(now) => shrink.memory_mib = Some(memory).filter(|mib| *mib < now),
            None => grow.memory_mib = Some(memory),
        }
        (grow, shrink)
    }

    /// What takes back what `grow` has reached.
    pub(super) fn back(&self, before: Sizes, grow: Change) -> Change {
        let lower = |now: Option<u32>, before: Option<u32>| before.filter(|before| now != Some(*before));
        Change {
            vcpus: grow
                .vcpus
                .and(lower(self.vcpus.map(u32::from), before.vcpus.map(u32::from)))
                .and_then(|n| u8::try_from(n).ok()),
            memory_mib: grow.memory_mib.and(lower(self.memory_mib, before.memory_mib)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(vcpus: u8, memory_mib: u32) -> Size {
        Size { vcpus, memory_mib }
    }

    fn sizes() -> Sizes {
        Sizes {
            asked: size(2, 512),
            vcpus: Some(2),
            memory_mib: Some(512),
            max: size(4, 1024),
            boot: size(2, 256),
        }
    }

    fn change(vcpus: Option<u8>, memory_mib: Option<u32>) -> Change {
        Change { vcpus, memory_mib }
    }

    const NONE: Change = Change { vcpus: None, memory_mib: None };

    #[test]
    fn what_grows_comes_before_what_shrinks_and_both_are_bounded() {
        let now = sizes();
        assert_eq!(now.steps(size(2, 512), 0), (NONE, NONE));
        assert_eq!(now.steps(size(3, 300), 0), (change(Some(3), None), change(None, Some(300))));
        assert_eq!(now.steps(size(1, 700), 0), (change(None, Some(700)), change(Some(1), None)));
        assert_eq!(now.steps(size(9, 9000), 0), (change(Some(4), Some(1024)), NONE));
        assert_eq!(
            now.steps(size(1, 64), 0),
            (NONE, change(Some(1), Some(256))),
            "not below that of the boot"
        );
        assert_eq!(now.steps(size(1, 512), 2), (NONE, NONE), "a container may use CPU 1");
        assert_eq!(now.steps(size(3, 512), 2).0, change(Some(3), None));
    }

    #[test]
    fn what_is_not_known_is_asked_for_again() {
        let unknown = Sizes { vcpus: None, memory_mib: None, ..sizes() };
        assert_eq!(unknown.steps(size(1, 300), 0), (change(Some(1), Some(300)), NONE));
        assert_eq!(unknown.steps(size(1, 300), 3).0.vcpus, Some(3));
    }

    #[test]
    fn sizes_are_as_reported() {
        let mut now = sizes();
        let resized = |ending, reached| Resized {
            ending,
            vcpus: Some(Reached { asked: 4, reached }),
            memory_mib: None,
            detail: String::new(),
        };
        now.note(&resized(Ending::Replaced, None));
        assert_eq!(now, sizes(), "nothing was tried");
        now.note(&resized(Ending::Partial, Some(3)));
        assert_eq!((now.asked.vcpus, now.vcpus, now.memory_mib), (4, Some(3), Some(512)));
        let grow = change(Some(4), Some(700));
        assert_eq!(now.back(sizes(), grow), change(Some(2), None), "memory had not come");
        now.note(&resized(Ending::TimedOut, None));
        assert_eq!((now.vcpus, now.back(sizes(), grow)), (None, change(Some(2), None)));
    }
}
