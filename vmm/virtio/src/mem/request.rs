//! Requests and responses as they lie in memory (virtio 1.2, 5.15.6).

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Types of requests.
pub const REQ_PLUG: u16 = 0;
pub const REQ_UNPLUG: u16 = 1;
pub const REQ_UNPLUG_ALL: u16 = 2;
pub const REQ_STATE: u16 = 3;

/// Any request: those that name blocks name them in the same place.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Request {
    pub kind: U16,
    pub padding: [u8; 6],
    pub addr: U64,
    pub nb_blocks: U16,
    pub padding_of_kind: [u8; 6],
}

/// Any response.
#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
pub struct Response {
    kind: U16,
    padding: [u8; 6],
    state: U16,
}

/// Bytes of a request.
pub const REQUEST: usize = size_of::<Request>();
/// Bytes of a response.
pub const RESPONSE: usize = size_of::<Response>();

/// Of the blocks that a STATE request names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockState {
    /// All are there.
    Plugged,
    /// None is.
    Unplugged,
    /// Some are.
    Mixed,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Ack,
    /// Not now: more than what was asked for.
    Nack,
    /// Not now: the host cannot.
    Busy,
    /// It makes no sense.
    Error,
    /// Done, and this is the state.
    State(BlockState),
}

impl Answer {
    /// For the wire.
    pub fn response(self) -> Response {
        let kind = match self {
            Answer::Ack | Answer::State(_) => 0,
            Answer::Nack => 1,
            Answer::Busy => 2,
            Answer::Error => 3,
        };
        let state = match self {
            Answer::State(BlockState::Unplugged) => 1,
            Answer::State(BlockState::Mixed) => 2,
            _ => 0,
        };
        Response { kind: U16::new(kind), padding: [0; 6], state: U16::new(state) }
    }
}
