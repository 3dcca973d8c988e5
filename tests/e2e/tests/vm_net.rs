//! The network device between a guest's own driver and a tap of the host.
#![cfg(feature = "lab")]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use e2e::vm::{Guest, GuestSpec, ScriptOutput};
use e2e::{Tap, md5, run};
use vmm_api::{ClientError, ExitReason, MemoryConfig, Op, Stats};

const MIB: usize = 1 << 20;
const LONG: usize = 64 * MIB;

/// A network of one host and one guest: `10.7.N.1` and `10.7.N.2`. A test has a number of its own.
struct Net {
    number: u8,
    mtu: u16,
    tap: Tap,
    /// Whoever dials here waits until [`finish`] has seen what it wants to see of it.
    gate: TcpListener,
}

impl Net {
    fn make(number: u8, queues: usize, mtu: u16) -> Result<(Net, Vec<OwnedFd>)> {
        let address = Ipv4Addr::new(10, 7, number, 1);
        let (tap, fds) = Tap::make(&format!("ctvm-e2e{number}"), queues, address, mtu)?;
        let gate = TcpListener::bind((address, 0)).context("listen on the tap's address")?;
        Ok((Net { number, mtu, tap, gate }, fds))
    }

    fn host(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 7, self.number, 1)
    }

    fn guest(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 7, self.number, 2)
    }

    /// A guest whose `eth0` is set up before `script` runs, with `$host` for the other end and `hold WORD` to say a word and
    /// wait for [`Net::release`].
    fn boot(&self, fds: Vec<OwnedFd>, vcpus: u8, script: &str) -> Result<Guest> {
        let (host, guest) = (self.host(), self.guest());
        let port = self.gate.local_addr()?.port();
        let spec = GuestSpec {
            vcpus,
            memory: MemoryConfig::new(256),
            nets: vec![(fds, [2, 0, 0, 0, 7, self.number], self.mtu)],
            script: format!(
                "host={host}; hold() {{ echo $1; nc $host {port} </dev/null; }}\n\
                 ip address add {guest}/24 dev eth0; ip link set eth0 up\n{script}\nhold finished\n"
            ),
            ..GuestSpec::default()
        };
        spec.boot()
    }

    /// Lets a guest go on that holds.
    fn release(&self) -> Result<()> {
        self.gate.accept().context("accept a guest that holds")?;
        Ok(())
    }

    fn listen(&self) -> Result<TcpListener> {
        TcpListener::bind((self.host(), 0)).context("listen on the tap's address")
    }
}

/// Takes what one guest sends until its end.
fn take(listener: TcpListener) -> JoinHandle<Result<Vec<u8>>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        listener.accept()?.0.read_to_end(&mut bytes)?;
        Ok(bytes)
    })
}

/// Sends `bytes` to the one who dials, and waits for its end.
fn give(listener: TcpListener, bytes: Vec<u8>) -> JoinHandle<Result<()>> {
    thread::spawn(move || {
        let mut stream = listener.accept()?.0;
        stream.write_all(&bytes)?;
        stream.shutdown(Shutdown::Write)?;
        stream.read_to_end(&mut Vec::new())?;
        Ok(())
    })
}

fn join<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    thread.join().expect("the thread does not panic")
}

/// Bytes in which nothing repeats.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// The script's output, the counters at its end, and the VM's end, after which the tap is gone.
fn finish(net: &Net, mut guest: Guest) -> Result<(ScriptOutput, Stats)> {
    guest.wait_for_line("end of the script", |line| line == "finished")?;
    let stats = guest.stats()?;
    net.release()?;
    let output = guest.script()?;
    assert_eq!(output.status, 0, "{output:#?}");
    assert_eq!(guest.exit_reason()?, ExitReason::GuestReset);
    assert!(!net.tap.exists(), "the tap is still there");
    Ok((output, stats))
}

fn counter(stats: &Stats, name: &str) -> u64 {
    stats.devices["net0"][name]
}

/// Nothing went wrong that nobody would notice.
fn assert_clean(stats: &Stats) {
    for name in ["rx_too_long", "tx_malformed", "tx_refused", "host_errors", "bad_commands", "breakages"] {
        assert_eq!(counter(stats, name), 0, "{name} in {:#?}", stats.devices["net0"]);
    }
}

/// Pings from the host, one for each payload size.
fn ping(net: &Net, sizes: &[u16]) -> Result<()> {
    for size in sizes {
        let mut busybox = Command::new("busybox");
        busybox.args(["ping", "-c", "1", "-W", "30", "-s", &size.to_string(), &net.guest().to_string()]);
        run(&mut busybox)?.ok().with_context(|| format!("{size} bytes"))?;
    }
    Ok(())
}

#[test]
fn guest_and_host_reach_each_other() -> Result<()> {
    let (net, fds) = Net::make(1, 1, 1500)?;
    let script = "echo mac=$(cat /sys/class/net/eth0/address) mtu=$(cat /sys/class/net/eth0/mtu)\n\
         echo carrier=$(cat /sys/class/net/eth0/carrier)\n\
         for size in 0 1 2 1471 1472 1473 9999 65507; do ping -c 1 -W 30 -s $size $host >/dev/null && echo ping=$size; done\n\
         mkdir /tmp/www; echo hello > /tmp/www/file; httpd -p 80 -h /tmp/www\n\
         hold ready\n";
    let mut guest = net.boot(fds, 1, script)?;
    guest.wait_for_line("readiness", |line| line == "ready")?;
    ping(&net, &[0, 1, 3, 1472, 1473, 65_507])?;
    let mut page = TcpStream::connect((net.guest(), 80))?;
    page.write_all(b"GET /file HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    page.read_to_string(&mut answer)?;
    assert!(answer.ends_with("\r\n\r\nhello\n"), "{answer}");
    net.release()?;
    let (output, stats) = finish(&net, guest)?;
    assert!(output.lines.iter().any(|line| line == "mac=02:00:00:00:07:01 mtu=1500"), "{output:#?}");
    assert_eq!(output.value("carrier")?, "1");
    let pings: Vec<_> = output.lines.iter().filter_map(|line| line.strip_prefix("ping=")).collect();
    assert_eq!(pings, ["0", "1", "2", "1471", "1472", "1473", "9999", "65507"]);
    assert_clean(&stats);
    Ok(())
}

#[test]
fn long_streams_arrive_byte_for_byte_and_in_large_segments() -> Result<()> {
    let (net, fds) = Net::make(2, 1, 1500)?;
    let (from_guest, to_guest) = (net.listen()?, net.listen()?);
    let ports = [from_guest.local_addr()?.port(), to_guest.local_addr()?.port()];
    let script = format!(
        "dd if=/dev/urandom of=/tmp/a bs=1M count=64 2>/dev/null\n\
         nc $host {} < /tmp/a >/dev/null; echo sent=$(md5sum < /tmp/a | cut -d' ' -f1); rm /tmp/a\n\
         nc $host {} </dev/null > /tmp/b; echo got=$(md5sum < /tmp/b | cut -d' ' -f1)\n",
        ports[0], ports[1]
    );
    let sent = noise(LONG);
    let (taker, giver) = (take(from_guest), give(to_guest, sent.clone()));
    let guest = net.boot(fds, 1, &script)?;
    let (output, stats) = finish(&net, guest)?;
    let got = join(taker)?;
    join(giver)?;
    assert_eq!(got.len(), LONG);
    assert_eq!(output.value("sent")?, md5(got)?);
    assert_eq!(output.value("got")?, md5(sent)?);
    assert_clean(&stats);
    for direction in ["rx", "tx"] {
        let [bytes, frames] = ["bytes", "frames"].map(|what| counter(&stats, &format!("{direction}_{what}")));
        println!("{direction}: {bytes} bytes in {frames} frames");
        assert!(bytes > LONG as u64);
    }
    // With the acknowledgements of the other stream among them, which are a good part.
    assert!(counter(&stats, "rx_bytes") / counter(&stats, "rx_frames") > 1514, "no segments to the guest");
    assert!(counter(&stats, "tx_bytes") / counter(&stats, "tx_frames") > 1514, "no segments from the guest");
    Ok(())
}

#[test]
fn a_driver_that_leaves_and_comes_back_and_a_vm_that_was_paused_go_on() -> Result<()> {
    let (net, fds) = Net::make(7, 2, 1500)?;
    let script = format!(
        "ping -c 1 -W 30 $host >/dev/null\n\
         device=$(basename $(readlink /sys/class/net/eth0/device)); driver=/sys/bus/virtio/drivers/virtio_net\n\
         echo $device > $driver/unbind; ls /sys/class/net | grep eth0 && echo left=1\n\
         echo $device > $driver/bind; ip address add {}/24 dev eth0; ip link set eth0 up\n\
         ping -c 1 -W 30 $host >/dev/null && echo back=1\n\
         hold ready\n",
        net.guest()
    );
    let mut guest = net.boot(fds, 2, &script)?;
    guest.wait_for_line("readiness", |line| line == "ready")?;
    guest.call(Op::Pause)?;
    guest.call(Op::Resume)?;
    ping(&net, &[56])?;
    net.release()?;
    let (output, stats) = finish(&net, guest)?;
    assert_eq!(output.value("back")?, "1");
    assert!(output.value("left").is_err(), "{output:#?}");
    assert_eq!(counter(&stats, "pairs_in_use"), 2);
    assert_clean(&stats);
    Ok(())
}

#[test]
fn frames_are_as_large_as_the_mtu() -> Result<()> {
    let (net, fds) = Net::make(3, 1, 9000)?;
    let script = "echo mtu=$(cat /sys/class/net/eth0/mtu)\n\
         for size in 8971 8972 8973; do ping -c 1 -W 30 -s $size $host >/dev/null && echo ping=$size; done\n\
         hold ready\n";
    let mut guest = net.boot(fds, 1, script)?;
    guest.wait_for_line("readiness", |line| line == "ready")?;
    ping(&net, &[8971, 8972, 8973])?;
    net.release()?;
    let (output, stats) = finish(&net, guest)?;
    assert_eq!(output.value("mtu")?, "9000");
    assert_eq!(output.lines.iter().filter(|line| line.starts_with("ping=")).count(), 3, "{output:#?}");
    assert_clean(&stats);
    Ok(())
}

#[test]
fn two_queue_pairs_carry_many_streams() -> Result<()> {
    const STREAMS: usize = 6;
    const LEN: usize = 4 * MIB;
    let (net, fds) = Net::make(4, 2, 1500)?;
    let sent = noise(LEN);
    let mut script = String::from("echo queues=$(ls -d /sys/class/net/eth0/queues/* | wc -l)\n");
    let (mut takers, mut givers) = (vec![], vec![]);
    for stream in 0..STREAMS {
        let (from_guest, to_guest) = (net.listen()?, net.listen()?);
        script += &format!(
            "( nc $host {} </dev/null > /tmp/{stream}; nc $host {} < /tmp/{stream} ) &\n",
            to_guest.local_addr()?.port(),
            from_guest.local_addr()?.port(),
        );
        takers.push(take(from_guest));
        givers.push(give(to_guest, sent.clone()));
    }
    script += "wait\n";
    let guest = net.boot(fds, 2, &script)?;
    let (output, stats) = finish(&net, guest)?;
    for giver in givers {
        join(giver)?;
    }
    for taker in takers {
        assert!(join(taker)? == sent, "a stream came back changed");
    }
    assert_eq!(output.value("queues")?, "4");
    assert_eq!(counter(&stats, "pairs_in_use"), 2);
    assert_clean(&stats);
    Ok(())
}

#[test]
fn one_vcpu_uses_one_pair_and_hears_all_queues_of_the_tap() -> Result<()> {
    let (net, fds) = Net::make(5, 4, 1500)?;
    let mut guest = net.boot(fds, 1, "hold ready")?;
    guest.wait_for_line("readiness", |line| line == "ready")?;
    // Flows of the host's, which the tap spreads by their hash.
    for _ in 0..16 {
        let refused = TcpStream::connect((net.guest(), 9)).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    }
    net.release()?;
    let (_, stats) = finish(&net, guest)?;
    assert_eq!(counter(&stats, "pairs_in_use"), 1);
    assert_clean(&stats);
    Ok(())
}

#[test]
fn what_is_no_tap_is_refused_by_name() -> Result<()> {
    let refused = |fds: Vec<OwnedFd>| -> Result<String> {
        let nets = vec![(fds, [2, 0, 0, 0, 7, 6], 1500)];
        let error = GuestSpec { nets, ..GuestSpec::default() }.boot().unwrap_err();
        let error = error.downcast::<ClientError>()?;
        Ok(error.to_string())
    };
    let null = || std::fs::File::open("/dev/null").map(OwnedFd::from);
    let said = refused(vec![null()?])?;
    assert!(said.contains("make net0") && said.contains("descriptor 0 is no tap"), "{said}");
    run(Command::new("modprobe").arg("tun"))?.ok()?;
    let said = refused(vec![tap::attach("ctvm-e2e6", libc::IFF_TAP | libc::IFF_NO_PI)?])?;
    assert!(said.contains("tap ctvm-e2e6 is attached without IFF_VNET_HDR"), "{said}");
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
    let said = refused(vec![tap::attach("ctvm-e2e6", flags)?, tap::attach("ctvm-e2e7", flags)?])?;
    assert!(said.contains("descriptor 1 is a queue of tap ctvm-e2e7, the first one of ctvm-e2e6"), "{said}");
    Ok(())
}
