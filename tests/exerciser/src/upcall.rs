//! A guest's end of the upcall channel that does one thing wrong, once, and is honest from then on. It only says that it has
//! CPUs online. Written from the protocol's page (`kernel-config/upcall/README.md`), not from the VMM's side of it.

use std::io::{Read, Write};
use std::mem::{size_of, zeroed};
use std::net::TcpStream;
use std::os::fd::{FromRawFd, OwnedFd};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

const HOST: u32 = 2;
const PORT: u32 = 1023;
const HELLO: u16 = 1;
const WELCOME: u16 = 2;
const QUERY: u16 = 16;
const SET_CPUS: u16 = 17;
const REPLY: u16 = 0x8000;
const EBUSY: u32 = 16;
const SET: usize = 32;

struct Channel {
    stream: TcpStream,
    epoch: u64,
    online: [u8; SET],
}

struct Request {
    kind: u16,
    deadline: Duration,
    seq: u64,
    body: Vec<u8>,
}

/// Serves the channel; the first request for CPUs meets `fault`.
pub fn run(fault: &str) -> Result<()> {
    let mut online = [0; SET];
    online[0] = 1;
    let mut channel = Channel { stream: dial(900)?, epoch: 0, online };
    channel.greet()?;
    println!("upcall open");
    loop {
        let request = channel.take()?;
        if request.kind == SET_CPUS {
            channel = channel.fail(fault, &request)?;
            break;
        }
        channel.answer(&request)?;
    }
    loop {
        let request = channel.take()?;
        channel.answer(&request)?;
    }
}

impl Channel {
    fn greet(&mut self) -> Result<()> {
        let mut hello = vec![0; 24];
        hello[..8].copy_from_slice(&(1u64 << QUERY | 1 << SET_CPUS).to_le_bytes());
        hello[16..20].copy_from_slice(&4096u32.to_le_bytes());
        let mut possible = [0; SET];
        possible[0] = 0xff;
        hello.extend(possible);
        hello.extend(self.online);
        hello.extend([b'x'; 63]);
        hello.push(0);
        let frame = frame(HELLO, 0, self.epoch, 0, &hello);
        self.stream.write_all(&frame)?;
        let welcome = self.take_frame()?;
        ensure!(welcome.0 == WELCOME, "the host answered hello with {}", welcome.0);
        self.epoch = welcome.1;
        Ok(())
    }

    /// Type, epoch, deadline, sequence number and body of the next frame.
    fn take_frame(&mut self) -> Result<(u16, u64, u32, u64, Vec<u8>)> {
        let mut header = [0; 40];
        self.stream.read_exact(&mut header).context("the host hung up")?;
        let u32_at = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("8 bytes"));
        let kind = u16::from_le_bytes([header[6], header[7]]);
        let mut body = vec![0; u32_at(8) as usize];
        self.stream.read_exact(&mut body)?;
        Ok((kind, u64_at(24), u32_at(16), u64_at(32), body))
    }

    fn take(&mut self) -> Result<Request> {
        let (kind, _, deadline, seq, body) = self.take_frame()?;
        Ok(Request { kind, deadline: Duration::from_millis(deadline.into()), seq, body })
    }

    /// Does what it is told, in words.
    fn obey(&mut self, request: &Request) -> Vec<u8> {
        if request.kind == SET_CPUS {
            self.online.copy_from_slice(&request.body[..SET]);
        }
        self.reply(request, 0, 0)
    }

    fn reply(&self, request: &Request, status: u32, failed: u32) -> Vec<u8> {
        let mut body = self.online.to_vec();
        match request.kind {
            SET_CPUS => {
                let count = u32::from(status != 0);
                body.extend(count.to_le_bytes());
                body.extend([0; 4]);
                if count > 0 {
                    body.extend(failed.to_le_bytes());
                    body.extend(status.to_le_bytes());
                }
            }
            _ => body.extend([0; 32]),
        }
        frame(request.kind | REPLY, status, self.epoch, request.seq, &body)
    }

    fn answer(&mut self, request: &Request) -> Result<()> {
        let reply = self.obey(request);
        self.stream.write_all(&reply).context("answer")
    }

    /// Meets a request for CPUs with `fault`; the channel as it is afterwards.
    fn fail(mut self, fault: &str, request: &Request) -> Result<Channel> {
        let spoilt = |mut reply: Vec<u8>, at: usize, byte: u8| {
            reply[at] = byte;
            reply
        };
        match fault {
            // CPU 2 does not come, whatever else does.
            "refuse" => {
                self.online.copy_from_slice(&request.body[..SET]);
                self.online[0] &= !(1 << 2);
                let reply = self.reply(request, EBUSY, 2);
                self.stream.write_all(&reply)?;
            }
            "late" => {
                sleep(request.deadline + Duration::from_secs(3));
                self.answer(request)?;
            }
            "twice" => {
                self.answer(request)?;
                self.answer(request)?;
            }
            // An answer to what was asked before comes first.
            "disorder" => {
                let before = Request { seq: request.seq - 1, kind: QUERY, body: vec![], ..*request };
                self.answer(&before)?;
                self.answer(request)?;
            }
            "short" => {
                let reply = frame(SET_CPUS | REPLY, 0, self.epoch, request.seq, &self.online[..7]);
                return self.broken(&reply);
            }
            "length" => {
                let reply = spoilt(self.obey(request), 10, 1);
                return self.broken(&reply);
            }
            "magic" => {
                let reply = spoilt(self.obey(request), 0, 0);
                return self.broken(&reply);
            }
            "epoch" => {
                let byte = self.epoch.to_le_bytes()[0];
                let reply = spoilt(self.obey(request), 24, !byte);
                return self.broken(&reply);
            }
            "cpus" => {
                self.online = [0; SET];
                let reply = self.reply(request, 0, 0);
                self.online[0] = 1;
                return self.broken(&reply);
            }
            "reset" => return self.again(),
            "die" => {
                drop(self);
                sleep(Duration::from_secs(3));
                bail!("died as asked");
            }
            other => bail!("no such fault: {other}"),
        }
        Ok(self)
    }

    /// Sends what is wrong; the host has to hang up on it.
    fn broken(mut self, bytes: &[u8]) -> Result<Channel> {
        self.stream.write_all(bytes)?;
        let mut byte = [0];
        ensure!(!matches!(self.stream.read(&mut byte), Ok(1..)), "the host goes on after a broken frame");
        self.again()
    }

    /// Hangs up and dials again.
    fn again(self) -> Result<Channel> {
        let Channel { epoch, online, stream } = self;
        drop(stream);
        // As the protocol has it: whose connection ended waits before the next one.
        sleep(Duration::from_millis(50));
        let mut channel = Channel { stream: dial(901)?, epoch, online };
        channel.greet()?;
        println!("upcall open again");
        Ok(channel)
    }
}

fn frame(kind: u16, status: u32, epoch: u64, seq: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = b"CTUP".to_vec();
    bytes.extend(1u16.to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes.extend(u32::try_from(body.len()).expect("small").to_le_bytes());
    bytes.extend(status.to_le_bytes());
    bytes.extend([0; 8]);
    bytes.extend(epoch.to_le_bytes());
    bytes.extend(seq.to_le_bytes());
    bytes.extend(body);
    bytes
}

/// A connection to the host's upcall port from `port`. A stream is a stream: std's works on any connected socket.
fn dial(port: u32) -> Result<TcpStream> {
    let address = |cid, port| {
        // SAFETY: numbers and padding only, for which zeros are a value.
        let mut address: libc::sockaddr_vm = unsafe { zeroed() };
        address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).expect("a small number");
        (address.svm_cid, address.svm_port) = (cid, port);
        address
    };
    let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).expect("a small number");
    let (us, host) = (address(libc::VMADDR_CID_ANY, port), address(HOST, PORT));
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    ensure!(fd >= 0, "socket: {}", std::io::Error::last_os_error());
    // SAFETY: a new descriptor, ours alone.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: the address lives until after the call, and its size is `len`.
    let bound = unsafe { libc::bind(fd, (&raw const us).cast(), len) };
    ensure!(bound == 0, "bind to port {port}: {}", std::io::Error::last_os_error());
    // SAFETY: as above.
    let connected = unsafe { libc::connect(fd, (&raw const host).cast(), len) };
    ensure!(connected == 0, "dial the host: {}", std::io::Error::last_os_error());
    Ok(TcpStream::from(socket))
}
