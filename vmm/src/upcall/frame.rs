//! Bytes to frames and back. What does not hold to the protocol is refused here, with what is wrong.

use std::time::Duration;

use zerocopy::{FromBytes, IntoBytes};

use super::abi::{self, CpuResult, CpusDone, Header, MAX_LEN, REPLY, kind};
use crate::vcpu::CpuSet;

const HEADER: usize = size_of::<Header>();

/// The guest does not hold to the protocol. The channel is closed on it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// No frame begins like this.
    #[error("magic {0:#x}, must be {magic:#x}", magic = abi::MAGIC)]
    Magic(u32),
    /// Another protocol.
    #[error("version {0}, must be {version}", version = abi::VERSION)]
    Version(u16),
    /// More than a frame may have.
    #[error("{0} bytes behind a header, may be {MAX_LEN}")]
    Length(u32),
    /// A frame that makes no sense now.
    #[error("a frame of type {got:#x} where {wanted} was due")]
    Kind {
        /// Its type.
        got: u16,
        /// What was due.
        wanted: &'static str,
    },
    /// Another life of the VM.
    #[error("a frame of another epoch")]
    Epoch,
    /// A structure that is cut off, or holds what cannot be.
    #[error("{what} of {len} bytes: {flaw}")]
    Body {
        /// Structure.
        what: &'static str,
        /// Bytes there were.
        len: usize,
        /// What is wrong.
        flaw: &'static str,
    },
}

/// One frame.
#[derive(Debug, Clone)]
pub struct Frame {
    /// What it is.
    pub kind: u16,
    /// 0, or a Linux errno.
    pub status: u32,
    /// Of this life of the VM.
    pub epoch: u64,
    /// Of the request.
    pub seq: u64,
    /// What follows the header.
    pub body: Vec<u8>,
}

/// Takes one frame off the front of `bytes`; `None` while it is not all there.
pub fn take(bytes: &mut Vec<u8>) -> Result<Option<Frame>, Violation> {
    let Ok((header, rest)) = Header::ref_from_prefix(bytes) else { return Ok(None) };
    if header.magic != abi::MAGIC {
        return Err(Violation::Magic(header.magic.get()));
    }
    if header.version != abi::VERSION {
        return Err(Violation::Version(header.version.get()));
    }
    let len = header.len.get() as usize;
    if len > MAX_LEN {
        return Err(Violation::Length(header.len.get()));
    }
    let Some(body) = rest.get(..len) else { return Ok(None) };
    let frame = Frame {
        kind: header.type_.get(),
        status: header.status.get(),
        epoch: header.epoch.get(),
        seq: header.seq.get(),
        body: body.to_vec(),
    };
    bytes.drain(..HEADER + len);
    Ok(Some(frame))
}

fn header(kind: u16, len: usize, epoch: u64, seq: u64) -> Header {
    Header {
        magic: abi::MAGIC.into(),
        version: abi::VERSION.into(),
        type_: kind.into(),
        len: u32::try_from(len).expect("bodies are ours, and small").into(),
        status: 0.into(),
        deadline_ms: 0.into(),
        reserved: 0.into(),
        epoch: epoch.into(),
        seq: seq.into(),
    }
}

/// The answer to a HELLO: go on, with this epoch.
pub fn welcome(epoch: u64) -> Vec<u8> {
    header(kind::WELCOME, 0, epoch, 0).as_bytes().to_vec()
}

/// The answer to whom the channel is not for; `errno` says why.
pub fn refused(errno: i32) -> Vec<u8> {
    let status = errno.unsigned_abs().into();
    Header { status, ..header(kind::REFUSED, 0, 0, 0) }.as_bytes().to_vec()
}

/// What the host asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// How do you see yourself?
    Query,
    /// Have these CPUs online.
    SetCpus(CpuSet),
    /// Do what the virtio-mem device whose registers are at `base` asks for.
    SetMemory {
        /// Address of the registers.
        base: u64,
        /// What the device asks for.
        bytes: u64,
    },
    /// There is a virtio-mmio device.
    AddDevice {
        /// Where.
        place: DevicePlace,
    },
    /// Give the virtio-mmio device up.
    RemoveDevice {
        /// Where it was.
        place: DevicePlace,
    },
}

/// Where a virtio-mmio device is in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DevicePlace {
    /// Address of its registers.
    pub base: u64,
    /// Bytes of them.
    pub size: u64,
    /// Interrupt: a pin of the IOAPIC.
    pub irq: u32,
}

impl Ask {
    /// Type of the request.
    pub fn kind(&self) -> u16 {
        match self {
            Ask::Query => kind::QUERY,
            Ask::SetCpus(_) => kind::SET_CPUS,
            Ask::SetMemory { .. } => kind::SET_MEMORY,
            Ask::AddDevice { .. } => kind::ADD_DEVICE,
            Ask::RemoveDevice { .. } => kind::REMOVE_DEVICE,
        }
    }

    /// The request's bytes.
    pub fn encode(&self, epoch: u64, seq: u64, within: Duration) -> Vec<u8> {
        let body = match self {
            Ask::Query => vec![],
            Ask::SetCpus(set) => abi::Cpus { online: set.to_words().map(Into::into) }.as_bytes().to_vec(),
            Ask::SetMemory { base, bytes } => {
                abi::Memory { base: (*base).into(), requested_bytes: (*bytes).into() }.as_bytes().to_vec()
            }
            Ask::AddDevice { place } | Ask::RemoveDevice { place } => {
                let DevicePlace { base, size, irq } = *place;
                let device =
                    abi::Device { base: base.into(), size: size.into(), irq: irq.into(), reserved: 0.into() };
                device.as_bytes().to_vec()
            }
        };
        // 0 would mean: take your time.
        let deadline_ms = u32::try_from(within.as_millis()).unwrap_or(u32::MAX).max(1);
        let header =
            Header { deadline_ms: deadline_ms.into(), ..header(self.kind(), body.len(), epoch, seq) };
        [header.as_bytes(), &body].concat()
    }
}

/// What the guest said of itself when it opened the channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Bit n: it knows requests of type n.
    pub ops: u64,
    /// CPUs it can ever have.
    pub possible: CpuSet,
    /// CPUs it has online.
    pub online: CpuSet,
    /// Its kernel's release.
    pub release: String,
}

impl Hello {
    /// Whether the guest's driver knows requests of this type.
    pub fn knows(&self, kind: u16) -> bool {
        self.ops & 1 << kind != 0
    }
}

/// Reads the body of a HELLO.
pub fn hello(body: &[u8]) -> Result<Hello, Violation> {
    let what = "hello";
    let hello: abi::Hello = structure(what, body)?;
    let set = |words: [zerocopy::little_endian::U64; 4]| cpus(what, body, words);
    // Printed in logs and in stats: a guest's bytes.
    let release = hello.release.iter().take_while(|byte| **byte != 0);
    let release = release.map(|byte| if byte.is_ascii_graphic() { char::from(*byte) } else { '?' }).collect();
    let (possible, online) = (set(hello.possible)?, set(hello.online)?);
    if !online.has(0) || !online.without(possible).is_empty() {
        let flaw = "CPU 0 is not online, or one is that is not possible";
        return Err(Violation::Body { what, len: body.len(), flaw });
    }
    Ok(Hello { ops: hello.ops.get(), possible, online, release })
}

/// Reads which CPUs a reply says are online: of a QUERY or of a SET_CPUS, which both begin with them.
pub fn online(kind: u16, body: &[u8]) -> Result<CpuSet, Violation> {
    let (what, words) = match kind & !REPLY {
        kind::SET_CPUS => ("result of set-cpus", structure::<CpusDone>("result of set-cpus", body)?.online),
        _ => ("view", structure::<abi::View>("view", body)?.online),
    };
    let online = cpus(what, body, words)?;
    match online.has(0) {
        true => Ok(online),
        false => Err(Violation::Body { what, len: body.len(), flaw: "CPU 0 is not online" }),
    }
}

/// Reads how much memory a view says could be had without anybody missing it, in bytes.
pub fn available(body: &[u8]) -> Result<u64, Violation> {
    Ok(structure::<abi::View>("view", body)?.free_bytes.get())
}

/// The first CPU that a SET_CPUS could not change, and the guest's errno.
pub fn first_failure(body: &[u8]) -> Option<(u32, u32)> {
    let (done, mut rest) = CpusDone::ref_from_prefix(body).ok()?;
    for _ in 0..done.count.get() {
        let (result, left) = CpuResult::ref_from_prefix(rest).ok()?;
        if result.status != 0 {
            return Some((result.apic_id.get(), result.status.get()));
        }
        rest = left;
    }
    None
}

fn structure<T: FromBytes + zerocopy::KnownLayout + zerocopy::Immutable>(
    what: &'static str,
    body: &[u8],
) -> Result<T, Violation> {
    // Longer is a later version's.
    T::read_from_prefix(body).map(|(value, _)| value).map_err(|_| Violation::Body {
        what,
        len: body.len(),
        flaw: "too short",
    })
}

fn cpus(
    what: &'static str,
    body: &[u8],
    words: [zerocopy::little_endian::U64; 4],
) -> Result<CpuSet, Violation> {
    let flaw = "names CPUs that this VM cannot have";
    CpuSet::from_words(words.map(|word| word.get())).ok_or(Violation::Body { what, len: body.len(), flaw })
}
