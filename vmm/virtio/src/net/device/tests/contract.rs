//! The tests that every device must pass, for one pair and for two.

use std::collections::HashMap;

use super::*;
use crate::testing::contract::Fixture;

/// Frames in both directions, over each tap, all received by the first queue; and commands, where there is a control queue.
struct NetFixture<const PAIRS: usize> {
    wires: Wires,
    buffers: Heap,
    heads: HashMap<u32, u16>,
    came: HashMap<u32, Vec<u8>>,
}

impl<const PAIRS: usize> Default for NetFixture<PAIRS> {
    fn default() -> Self {
        let buffers = Heap::within(0x10_0000..SEAM);
        NetFixture { wires: Wires::new(PAIRS), buffers, heads: HashMap::new(), came: HashMap::new() }
    }
}

impl<const PAIRS: usize> NetFixture<PAIRS> {
    const BUFFER: usize = 4096;

    fn offer(&mut self, guest: &mut Guest) {
        guest.queues[RX].add(&mut self.buffers, &[Buffer::In(Self::BUFFER)]);
        guest.notify(RX);
    }

    fn wire(n: u32) -> usize {
        usize::try_from(n).unwrap() / 4 % PAIRS
    }
}

impl<const PAIRS: usize> Fixture for NetFixture<PAIRS> {
    type Device = Net;

    fn device(&mut self) -> Net {
        self.wires.net()
    }

    fn prepare(&mut self, guest: &mut Guest) {
        // What the last driver sent, and did not take, is nobody's.
        for wire in 0..PAIRS {
            while self.wires.take(wire).is_some() {}
            let end = &self.wires.device[wire];
            while end.recv(&mut [0; 1]).is_ok() {}
        }
        self.came.clear();
        guest.heap = Heap::within(SEAM..MEMORY_END);
        for _ in 0..20 {
            self.offer(guest);
        }
    }

    fn submit(&mut self, guest: &mut Guest, n: u32) {
        let (wire, frame) = (Self::wire(n), frame(n, 100));
        match n % 4 {
            0 | 1 => self.wires.send(wire, &frame),
            2 if PAIRS > 1 => {
                let command = [Buffer::Out(vec![4, 0]), Buffer::Out(vec![1, 0]), Buffer::In(1)];
                self.heads.insert(n, guest.send(2 * PAIRS, &command));
            }
            _ => {
                let (front, back) = frame.split_at(40);
                let buffers = [Buffer::Out(front.into()), Buffer::Out(back.into())];
                self.heads.insert(n, guest.send(transmit_queue(wire), &buffers));
            }
        }
    }

    fn complete(&mut self, guest: &mut Guest, device: &mut Net, n: u32) {
        let wire = Self::wire(n);
        match n % 4 {
            0 | 1 => {
                while !self.came.contains_key(&n) {
                    let used = guest.wait(device, RX);
                    let number = u32::from_le_bytes(used.data[HEADER..HEADER + 4].try_into().unwrap());
                    self.came.insert(number, content(&used).to_vec());
                    self.offer(guest);
                }
                assert_eq!(self.came.remove(&n).unwrap(), seen(frame(n, 100), 1));
            }
            2 if PAIRS > 1 => {
                let used = guest.wait_for(device, 2 * PAIRS, self.heads.remove(&n).unwrap());
                assert_eq!(content(&used), [0]);
            }
            _ => {
                let used = guest.wait_for(device, transmit_queue(wire), self.heads.remove(&n).unwrap());
                assert_eq!(used.len, 0);
                assert_eq!(self.wires.take(wire).unwrap(), frame(n, 100));
            }
        }
    }
}

type OnePair = NetFixture<1>;
type TwoPairs = NetFixture<2>;

crate::device_contract_tests!(of_one_pair, OnePair);
crate::device_contract_tests!(of_two_pairs, TwoPairs);
