//! Packets to a socket device, between sockets that are read, written, ended and closed: no packet hurts anything but its
//! own connection, and a reset leaves none.
#![no_main]

use std::cell::RefCell;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use fuzz::{Input, disturb};
use libfuzzer_sys::fuzz_target;
use virtio::device::VirtioDevice;
use virtio::testing::{Buffer, Guest};
use virtio::vsock::{MAX_CONNECTIONS, Vsock, VsockEvent};

const CID: u32 = 3;
const PORTS: [u32; 2] = [1024, 1025];
/// The host dials from here on.
const DIALLED: u32 = 1 << 20;

thread_local! {
    static GUEST: RefCell<Guest> = RefCell::new(Guest::of(&device(), true));
}

fn device() -> Vsock {
    Vsock::new(CID, &PORTS).expect("a context id and a few descriptors")
}

fuzz_target!(|data: &[u8]| {
    GUEST.with(|guest| {
        let guest = &mut *guest.borrow_mut();
        let mut input = Input(data);
        let mut vsock = device();
        guest.restart(&vsock.queue_sizes());
        guest.activate(&mut vsock).expect("rings are in memory");
        let mut hosts = Vec::new();
        let mut dials = 0;

        for _ in 0..100 {
            if input.is_empty() {
                break;
            }
            match input.u8() % 16 {
                0..=5 => packet(guest, &mut input),
                6 | 7 => {
                    for _ in 0..input.u8() % 8 {
                        let len = usize::try_from(input.len()).expect("32 bits") % 5000;
                        if guest.queues[0].free() > 0 {
                            guest.send(0, &[Buffer::In(len)]);
                        }
                    }
                }
                8 => disturb(guest, usize::from(input.u8() % 3), &mut input),
                9 => {
                    dials += 1;
                    let _ = vsock.connect(u32::from(input.u8() % 4), dials);
                }
                10 => drop(vsock.cancel(u64::from(input.u8()))),
                11 | 12 => host(&mut hosts, &mut input),
                13 => {
                    vsock.pause();
                    if input.u8() % 4 == 0 {
                        let activation = guest.activation_from::<Vsock>(&vsock.queues(), vsock.features());
                        let mut other = device();
                        let restored = other.restore(&vsock.save(), Some(activation));
                        restored.expect("what was saved fits");
                        vsock = other;
                    }
                    if input.u8() % 4 != 0 {
                        vsock.resume();
                    }
                }
                14 => vsock.resume(),
                _ => drop(guest.pump(&mut vsock)),
            }
            vsock.on_queue(usize::from(input.u8() % 3));
            vsock.on_backend();
            for event in vsock.take_events() {
                match event {
                    VsockEvent::Accepted { port, socket, .. } => {
                        assert!(PORTS.contains(&port));
                        hosts.push(UnixStream::from(socket));
                    }
                    VsockEvent::Connected { request, socket } => {
                        assert!(request <= dials);
                        hosts.push(UnixStream::from(socket));
                    }
                    VsockEvent::Refused { request, .. } => assert!(request <= dials),
                }
            }
            assert!(vsock.connections() <= MAX_CONNECTIONS);
        }

        vsock.reset();
        assert_eq!(vsock.connections(), 0);
        for mut host in hosts {
            // An error says that what the host wrote was not all read.
            let end =
                host.read_to_end(&mut Vec::new()).map_or_else(|e| e.kind(), |_| ErrorKind::UnexpectedEof);
            assert!(matches!(end, ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset), "{end}");
        }
    });
});

/// A packet with a sensible header, most of the time.
fn packet(guest: &mut Guest, input: &mut Input<'_>) {
    let shape = input.u8();
    let host_port = match input.u8() % 8 {
        0..=3 => PORTS[0],
        4 => input.u32(),
        port => DIALLED + u32::from(port - 5),
    };
    let len = match shape % 4 {
        0 | 1 => 0,
        _ => input.len(),
    };
    let (src_cid, dst_cid) = match shape / 4 % 16 {
        0 => (input.u64(), 2),
        1 => (u64::from(CID), input.u64()),
        _ => (u64::from(CID), 2),
    };
    let kind = if shape / 64 == 3 { input.u16() } else { 1 };
    let op = input.u8();
    let op = if op >= 0xf0 { u16::from(op) } else { u16::from(op % 8) };

    let mut header = Vec::with_capacity(44);
    header.extend(src_cid.to_le_bytes());
    header.extend(dst_cid.to_le_bytes());
    header.extend(u32::from(input.u8() % 4).to_le_bytes());
    header.extend(host_port.to_le_bytes());
    header.extend(len.to_le_bytes());
    header.extend(kind.to_le_bytes());
    header.extend(op.to_le_bytes());
    header.extend(u32::from(input.u8()).to_le_bytes());
    header.extend(input.len().to_le_bytes());
    header.extend(input.len().to_le_bytes());

    let mut buffers = vec![Buffer::Out(header)];
    // As much payload as the header says, or not.
    let there = if input.u8() % 8 == 0 { input.len() } else { len };
    let there = usize::try_from(there).expect("32 bits").min(70_000);
    if there > 0 {
        buffers.push(Buffer::Out(vec![7; there]));
    }
    if guest.queues[1].free() >= buffers.len() {
        guest.send(1, &buffers);
    }
}

/// What the owner of a socket may do with it.
fn host(hosts: &mut Vec<UnixStream>, input: &mut Input<'_>) {
    if hosts.is_empty() {
        return;
    }
    let at = usize::from(input.u8()) % hosts.len();
    // Whatever comes of it: the device must bear it.
    match input.u8() % 8 {
        0..=2 => drop(hosts[at].write(&vec![9; usize::try_from(input.len()).expect("32 bits") % 100_000])),
        3 | 4 => drop(hosts[at].read(&mut [0; 8192])),
        5 => drop(hosts[at].shutdown(Shutdown::Write)),
        6 => drop(hosts[at].shutdown(Shutdown::Read)),
        _ => drop(hosts.swap_remove(at)),
    }
}
