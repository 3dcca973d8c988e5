//! The device status field (virtio 1.2, 2.1 and 3.1.1): which steps a driver may take.
//!
//! ```text
//!          ACKNOWLEDGE     DRIVER        FEATURES_OK       DRIVER_OK
//!  Reset ─────────────> 1 ────────> 3 ───────────────> 11 ──────────> 15
//!    ^                                  (or stays 3:
//!    │                                   refused)
//!    └── 0, from anywhere.     FAILED: from anywhere, then only 0 leads on.
//!
//!  NEEDS_RESET (64) is the device's to set; what the driver writes there does not count.
//! ```

/// The guest has seen the device.
pub const ACKNOWLEDGE: u32 = 1;
/// The guest knows how to drive it.
pub const DRIVER: u32 = 2;
/// The driver is set up.
pub const DRIVER_OK: u32 = 4;
/// The features are agreed on.
pub const FEATURES_OK: u32 = 8;
/// The device cannot go on.
pub const NEEDS_RESET: u32 = 64;
/// The driver gave up.
pub const FAILED: u32 = 128;

/// What a write to the status field asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing new.
    Stay,
    /// Forget everything.
    Reset,
    /// Just record the new value.
    Record,
    /// Check the features; record the new value if they are good.
    CheckFeatures,
    /// Record the new value and start work.
    Start,
}

/// A driver takes a step that it may not.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("device status cannot go from {from:#x} to {to:#x}")]
pub struct Refused {
    /// Status now.
    pub from: u32,
    /// Status asked for.
    pub to: u32,
}

/// Steps forward. Everything else that is allowed is in [`step`].
const STEPS: [(u32, u32, Step); 4] = [
    (0, ACKNOWLEDGE, Step::Record),
    (ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, Step::Record),
    (ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | FEATURES_OK, Step::CheckFeatures),
    (ACKNOWLEDGE | DRIVER | FEATURES_OK, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK, Step::Start),
];

/// What it means that the driver writes `to` while the status is `from` (both without [`NEEDS_RESET`]).
pub fn step(from: u32, to: u32) -> Result<Step, Refused> {
    if to == 0 {
        return Ok(Step::Reset);
    }
    if to == from {
        return Ok(Step::Stay);
    }
    if to == from | FAILED {
        return Ok(Step::Record);
    }
    STEPS
        .iter()
        .find(|(a, b, _)| (*a, *b) == (from, to))
        .map(|(_, _, step)| *step)
        .ok_or(Refused { from, to })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every value a driver can reach, and every byte it can write there.
    #[test]
    fn only_the_steps_of_the_diagram_are_allowed() {
        let road = [0, 1, 3, 11, 15];
        for (at, from) in road.into_iter().enumerate() {
            for to in 0..=255 {
                let expected = match to {
                    0 => Ok(Step::Reset),
                    _ if to == from => Ok(Step::Stay),
                    _ if to == from | 128 => Ok(Step::Record),
                    11 if from == 3 => Ok(Step::CheckFeatures),
                    15 if from == 11 => Ok(Step::Start),
                    _ if road.get(at + 1) == Some(&to) => Ok(Step::Record),
                    _ => Err(Refused { from, to }),
                };
                assert_eq!(step(from, to), expected, "{from} to {to}");
            }
            let failed = from | 128;
            for to in 1..=255 {
                assert_eq!(step(failed, to).is_ok(), to == failed, "{failed} to {to}");
            }
            assert_eq!(step(failed, 0), Ok(Step::Reset));
        }
    }
}
