//! The tests that every device must pass. Requests are dials to a port that is not open: their answer does not need a
//! connection, which would not survive a restore.

use zerocopy::{FromBytes, IntoBytes};

use super::peer::{CID, PORT, Socket};
use crate::testing::contract::Fixture;
use crate::testing::{Buffer, Guest};
use crate::vsock::Vsock;
use crate::vsock::packet::{HEADER_LEN, Header, Op};

#[derive(Default)]
struct Refusals;

impl Fixture for Refusals {
    type Device = Vsock;

    fn device(&mut self) -> Vsock {
        Vsock::new(CID, &[PORT]).unwrap()
    }

    fn submit(&mut self, guest: &mut Guest, n: u32) {
        guest.send(0, &[Buffer::In(HEADER_LEN)]);
        let request = Socket::new(n, PORT + 1).header(Op::Request, 0, 0);
        guest.send(1, &[Buffer::Out(request.as_bytes().to_vec())]);
    }

    fn complete(&mut self, guest: &mut Guest, device: &mut Vsock, n: u32) {
        guest.wait(device, 1);
        let answer = guest.wait(device, 0);
        let header = Header::read_from_bytes(&answer.data).unwrap();
        assert_eq!((header.op.get(), header.dst_port.get()), (Op::Reset as u16, n));
    }
}

crate::device_contract_tests!(device, Refusals);
