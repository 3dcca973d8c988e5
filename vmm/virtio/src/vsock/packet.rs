//! The packets of a socket device (virtio 1.2, 5.10.6): the header as it lies in memory, and what of it is checked
//! before any connection sees it.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The host's context id (virtio 1.2, 5.10.4).
pub const HOST_CID: u64 = 2;
/// `VIRTIO_VSOCK_TYPE_STREAM`, the one socket type offered.
pub const STREAM: u16 = 1;
/// The sender of `VIRTIO_VSOCK_OP_SHUTDOWN` will not receive any more (`VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`).
pub const NO_RECEIVE: u32 = 1;
/// The sender of `VIRTIO_VSOCK_OP_SHUTDOWN` will not send any more (`VIRTIO_VSOCK_SHUTDOWN_F_SEND`).
pub const NO_SEND: u32 = 2;
/// Size of the header in bytes.
pub const HEADER_LEN: usize = size_of::<Header>();

/// `struct virtio_vsock_hdr`.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: U64,
    /// Context id of the receiver.
    pub dst_cid: U64,
    /// Port of the sender.
    pub src_port: U32,
    /// Port of the receiver.
    pub dst_port: U32,
    /// Bytes of payload that follow.
    pub len: U32,
    /// Socket type.
    pub kind: U16,
    /// One of [`Op`].
    pub op: U16,
    /// Meaning depends on `op`.
    pub flags: U32,
    /// Buffer space of the sender for this connection (virtio 1.2, 5.10.6.3).
    pub buf_alloc: U32,
    /// Bytes that the sender's buffer has passed on so far, modulo 2^32.
    pub fwd_cnt: U32,
}

/// What a packet asks for (`enum virtio_vsock_op`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Open a connection.
    Request = 1,
    /// The connection is open.
    Response = 2,
    /// The connection is no more, or never was.
    Reset = 3,
    /// [`NO_RECEIVE`] and [`NO_SEND`] in the flags; once set they hold.
    Shutdown = 4,
    /// Payload.
    Data = 5,
    /// `buf_alloc` and `fwd_cnt`, as in each packet.
    CreditUpdate = 6,
    /// Send me a `CreditUpdate`.
    CreditRequest = 7,
}

impl TryFrom<u16> for Op {
    type Error = Reject;

    fn try_from(op: u16) -> Result<Self, Reject> {
        Ok(match op {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Reset,
            4 => Op::Shutdown,
            5 => Op::Data,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            _ => return Err(Reject::Op(op)),
        })
    }
}

/// Names a connection of the one guest with the one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// Port on the host's side.
    pub host_port: u32,
    /// Port on the guest's side.
    pub guest_port: u32,
}

/// A packet of the guest which is about a connection with the host, whether or not there is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// The connection.
    pub key: Key,
    /// What it asks for.
    pub op: Op,
    /// Bytes of payload, as the guest says.
    pub len: u32,
    /// Meaning depends on `op`.
    pub flags: u32,
    /// The guest's buffer space.
    pub buf_alloc: u32,
    /// Bytes the guest's reader has taken so far.
    pub fwd_cnt: u32,
}

/// Why a packet belongs to no possible connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Reject {
    /// The guest speaks for somebody else.
    #[error("source cid {0} is not the guest's")]
    Source(u64),
    /// There is nobody but the host here.
    #[error("destination cid {0} is not the host's, 2")]
    Destination(u64),
    /// A socket type that was not offered.
    #[error("socket type {0} is not a stream, 1")]
    Type(u16),
    /// An operation that does not exist.
    #[error("operation {0} is not one of 1 to 7")]
    Op(u16),
}

/// A reset to be sent which belongs to no connection (any more).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reset {
    /// Whom the guest addressed.
    pub src_cid: u64,
    /// The connection.
    pub key: Key,
    /// The socket type the guest used.
    pub kind: u16,
}

impl Header {
    /// Checks where the packet comes from and goes to, and what it is. In this order, so that the answer to a
    /// packet that is wrong in two ways does not depend on chance.
    pub fn check(&self, guest_cid: u32) -> Result<Packet, Reject> {
        if self.src_cid.get() != u64::from(guest_cid) {
            return Err(Reject::Source(self.src_cid.get()));
        }
        if self.dst_cid.get() != HOST_CID {
            return Err(Reject::Destination(self.dst_cid.get()));
        }
        if self.kind.get() != STREAM {
            return Err(Reject::Type(self.kind.get()));
        }
        Ok(Packet {
            key: self.key(),
            op: Op::try_from(self.op.get())?,
            len: self.len.get(),
            flags: self.flags.get(),
            buf_alloc: self.buf_alloc.get(),
            fwd_cnt: self.fwd_cnt.get(),
        })
    }

    /// The connection that a packet of the guest is about.
    pub fn key(&self) -> Key {
        Key { host_port: self.dst_port.get(), guest_port: self.src_port.get() }
    }

    /// The reset that answers a packet without a connection. A reset is never answered, or two peers could answer
    /// each other for ever; nor is a packet whose sender we cannot name.
    pub fn answer(&self, guest_cid: u32) -> Option<Reset> {
        let answerable = self.op.get() != Op::Reset as u16 && self.src_cid.get() == u64::from(guest_cid);
        answerable.then(|| Reset { src_cid: self.dst_cid.get(), key: self.key(), kind: self.kind.get() })
    }

    /// A packet to the guest, without payload, flags or credit.
    pub fn to_guest(guest_cid: u32, key: Key, op: Op) -> Header {
        Header {
            src_cid: HOST_CID.into(),
            dst_cid: u64::from(guest_cid).into(),
            src_port: key.host_port.into(),
            dst_port: key.guest_port.into(),
            kind: STREAM.into(),
            op: (op as u16).into(),
            ..Header::default()
        }
    }
}

impl Reset {
    /// The reset of a connection with the host.
    pub fn of(key: Key) -> Self {
        Reset { src_cid: HOST_CID, key, kind: STREAM }
    }

    /// The packet.
    pub fn header(&self, guest_cid: u32) -> Header {
        Header {
            src_cid: self.src_cid.into(),
            kind: self.kind.into(),
            ..Header::to_guest(guest_cid, self.key, Op::Reset)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_guest(op: u16) -> Header {
        Header {
            src_cid: 3.into(),
            dst_cid: 2.into(),
            src_port: 7.into(),
            dst_port: 1024.into(),
            kind: STREAM.into(),
            op: op.into(),
            len: 9.into(),
            ..Header::default()
        }
    }

    #[test]
    fn header_lies_in_memory_as_the_specification_says() {
        assert_eq!(HEADER_LEN, 44);
        let mut header = from_guest(5);
        header.flags = 0x0102_0304.into();
        header.buf_alloc = 0x1112_1314.into();
        header.fwd_cnt = 0x2122_2324.into();
        let bytes = [
            3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 4, 0, 0, 9, 0, 0, 0, 1, 0, 5, 0,
            4, 3, 2, 1, 0x14, 0x13, 0x12, 0x11, 0x24, 0x23, 0x22, 0x21,
        ];
        assert_eq!(header.as_bytes(), bytes);
        assert_eq!(Header::read_from_bytes(&bytes), Ok(header));
    }

    #[test]
    fn every_operation_has_its_number() {
        for op in 1..=7 {
            assert_eq!(Op::try_from(op).map(|o| o as u16), Ok(op));
        }
        for op in [0, 8, u16::MAX] {
            assert_eq!(Op::try_from(op), Err(Reject::Op(op)));
        }
    }

    #[test]
    fn a_packet_from_or_for_somebody_else_is_rejected() {
        let key = Key { host_port: 1024, guest_port: 7 };
        let good = from_guest(5);
        assert_eq!(good.check(3).map(|p| (p.key, p.op, p.len)), Ok((key, Op::Data, 9)));

        let cases = [
            (Header { src_cid: 4.into(), ..good }, Reject::Source(4), None),
            // The upper half of a context id counts too.
            (Header { src_cid: (3 | 1 << 32).into(), ..good }, Reject::Source(3 | 1 << 32), None),
            (
                Header { dst_cid: 9.into(), ..good },
                Reject::Destination(9),
                Some(Reset { src_cid: 9, key, kind: 1 }),
            ),
            (Header { kind: 2.into(), ..good }, Reject::Type(2), Some(Reset { src_cid: 2, key, kind: 2 })),
            (Header { op: 0.into(), ..good }, Reject::Op(0), Some(Reset::of(key))),
        ];
        for (header, reject, answer) in cases {
            assert_eq!(header.check(3), Err(reject));
            assert_eq!(header.answer(3), answer, "{reject}");
        }
        assert_eq!(from_guest(Op::Reset as u16).answer(3), None);
    }

    #[test]
    fn a_reset_goes_back_the_way_the_packet_came() {
        let header = Reset { src_cid: 9, key: Key { host_port: 1, guest_port: 2 }, kind: 2 }.header(3);
        assert_eq!((header.src_cid.get(), header.src_port.get()), (9, 1));
        assert_eq!((header.dst_cid.get(), header.dst_port.get()), (3, 2));
        assert_eq!((header.kind.get(), header.op.get(), header.len.get()), (2, 3, 0));
    }
}
