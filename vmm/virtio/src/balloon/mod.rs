//! The balloon (virtio 1.2, 5.5): pages that the guest does without go back to the host.
//!
//! ```text
//! inflate    the owner wants memory back (set_target): the driver allocates pages and names them
//! deflate    the driver wants pages back: it takes them, and they come zeroed at first touch
//! reporting  the driver names what is free, unasked, in blocks of 2 MiB: the everyday road, it costs the guest nothing
//! statistics what the guest's kernel says of its memory, asked for by the owner
//! ```
//!
//! Nothing is remembered of single pages: one that was given back and is touched again is there again, empty. So a driver
//! that lies about its pages loses its own data and nothing else, and `DEFLATE_ON_OOM` costs nothing to offer.
//!
//! **Poison** (5.5.6.7): a guest that fills its free pages with a pattern (`poison_val`) and would miss it keeps the pages it
//! reports, unless the pattern is zeros, which is what pages come back with.
//!
//! **Queues**: the specification numbers them with gaps for features that are not there, Linux without. With statistics
//! and without free page hints, reporting is queue 4 by the text and 3 by Linux; both are served.
//!
//! Not offered: `MUST_TELL_HOST` (there is nothing the host would have to do first), `FREE_PAGE_HINT`.

mod backend;
mod device;
mod metrics;
mod pages;
mod state;
mod statistics;

pub use backend::BalloonBackend;
pub use device::{Balloon, TargetError};
pub use metrics::BalloonMetrics;
pub use pages::PAGE;
pub use state::BalloonState;
pub use statistics::Statistics;
