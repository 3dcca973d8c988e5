//! Devices come and go while the guest runs, and nothing of them is left in the VMM.
#![cfg(feature = "lab")]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::FileExt as _;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use e2e::Tap;
use e2e::vm::{Guest, GuestSpec, SHELL, scratch_file};
use vmm_api::config::MAX_DISKS;
use vmm_api::{
    ApiError, Attached, ClientError, DeviceName, DiskConfig, Ending, ErrorCode, FdIndex, FsCache, FsConfig,
    NetConfig, NewDevice, Op, Reply, Vcpus,
};

const LIMIT: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;
/// What an attach or a detach may take here.
const TIMEOUT_MS: u32 = 30_000;

fn spec() -> GuestSpec {
    GuestSpec { script: SHELL.into(), ..GuestSpec::default() }
}

/// A guest that has opened the upcall channel, and whose kernel has not complained yet.
fn boot(spec: GuestSpec) -> Result<Guest> {
    let mut guest = spec.boot()?;
    guest.ask("dmesg -c > /dev/null")?;
    for _ in 0..600 {
        if guest.stats()?.size.is_some_and(|size| size.upcall) {
            return Ok(guest);
        }
        thread::sleep(Duration::from_millis(50));
    }
    bail!("no upcall channel");
}

fn attach(guest: &mut Guest, device: NewDevice, fds: &[BorrowedFd<'_>]) -> Result<Attached> {
    match guest.client().call(Op::Attach { device, timeout_ms: TIMEOUT_MS }, fds, LIMIT)? {
        (Reply::Attached(attached), _) => Ok(attached),
        (other, _) => bail!("{other:?}"),
    }
}

fn new_disk(id: &str) -> NewDevice {
    NewDevice::Disk(DiskConfig { file: FdIndex(0), read_only: false, id: id.into(), queues: 1, image: None })
}

fn add_disk(guest: &mut Guest, file: &File, id: &str) -> Result<Attached> {
    attach(guest, new_disk(id), &[file.as_fd()])
}

/// The VMM's own words for why something was not done.
fn refusal<T: std::fmt::Debug>(ended: Result<T>) -> Result<ApiError> {
    match ended {
        Ok(done) => bail!("not refused: {done:?}"),
        Err(error) => match error.downcast::<ClientError>()? {
            ClientError::Api(error) => Ok(error),
            other => bail!("{other:?}"),
        },
    }
}

fn remove(guest: &mut Guest, device: DeviceName) -> Result<()> {
    match guest.call(Op::Detach { device, timeout_ms: TIMEOUT_MS })? {
        Reply::Done => Ok(()),
        other => bail!("{other:?}"),
    }
}

fn disk(id: &str) -> DeviceName {
    DeviceName::Disk(id.into())
}

/// The block device in the guest that has this serial number; empty if there is none.
fn node_of(guest: &mut Guest, id: &str) -> Result<String> {
    guest
        .ask(&format!("for d in /sys/block/vd*; do [ \"$(cat $d/serial)\" = {id} ] && echo ${{d##*/}}; done"))
}

/// The guest's kernel has found nothing wrong.
fn is_content(guest: &mut Guest) -> Result<()> {
    let complaints = guest.ask("dmesg | grep -iE 'warn|bug:|stall|lockup|call trace|leak' || true")?;
    ensure!(complaints.is_empty(), "{complaints}");
    Ok(())
}

/// Descriptors and threads that a VMM has.
fn holds(pid: i32) -> Result<(usize, usize)> {
    let count =
        |what: &str| -> Result<usize> { Ok(std::fs::read_dir(format!("/proc/{pid}/{what}"))?.count()) };
    Ok((count("fd")?, count("task")?))
}

/// Waits until the VMM has no more than it had; a thread that is gone is seen in /proc a moment longer.
fn holds_as_before(guest: &Guest, before: (usize, usize), when: &str) -> Result<()> {
    for _ in 0..50 {
        if holds(guest.vmm_pid())? == before {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(20));
    }
    bail!("{when}: descriptors and threads {:?}, {before:?} before", holds(guest.vmm_pid())?);
}

#[test]
fn a_disk_comes_is_written_goes_and_comes_again() -> Result<()> {
    let mut guest = boot(spec())?;
    let file = scratch_file(16 * MIB)?;
    file.write_all_at(b"from the host", 512)?;
    let attached = add_disk(&mut guest, &file, "later")?;
    ensure!(attached.name == disk("later") && attached.took_us > 0, "{attached:?}");
    let node = node_of(&mut guest, "later")?;
    ensure!(!node.is_empty(), "{}", guest.ask("ls /sys/block; dmesg | tail")?);
    let read =
        guest.ask(&format!("dd if=/dev/{node} bs=512 skip=1 count=1 2>/dev/null | head -c 13; echo"))?;
    ensure!(read == "from the host", "{read}");
    guest.ask(&format!("echo from the guest > /dev/{node}"))?;
    remove(&mut guest, disk("later"))?;
    let mut written = [0; 14];
    file.read_exact_at(&mut written, 0)?;
    ensure!(&written == b"from the guest", "{:?}", String::from_utf8_lossy(&written));
    ensure!(node_of(&mut guest, "later")?.is_empty(), "the guest still has it");
    let again = add_disk(&mut guest, &file, "later")?;
    ensure!(again.slot == attached.slot, "{again:?} after {attached:?}");
    let node = node_of(&mut guest, "later")?;
    let read = guest.ask(&format!("head -n 1 /dev/{node}"))?;
    ensure!(read == "from the guest", "{read}");
    let plugs = guest.stats()?.plugs;
    ensure!(plugs["attached"] == 2 && plugs["detached"] == 1 && plugs["parked"] == 0, "{plugs:?}");
    println!("the first took {} us, the second {} us", attached.took_us, again.took_us);
    is_content(&mut guest)
}

#[test]
fn twenty_rounds_leave_nothing() -> Result<()> {
    let mut guest = boot(spec())?;
    let (file, other) = (scratch_file(4 * MIB)?, scratch_file(4 * MIB)?);
    let pid = guest.vmm_pid();
    add_disk(&mut guest, &other, "stays")?;
    let before = holds(pid)?;
    let mut took = vec![];
    for round in 0..20u8 {
        file.write_all_at(&[round; 512], 0)?;
        took.push(add_disk(&mut guest, &file, "same")?.took_us);
        let node = node_of(&mut guest, "same")?;
        let read = guest.ask(&format!("head -c 1 /dev/{node} | od -An -tu1"))?;
        ensure!(read.trim() == round.to_string(), "round {round}: {read}");
        remove(&mut guest, disk("same"))?;
        holds_as_before(&guest, before, &format!("round {round}"))?;
    }
    took.sort_unstable();
    println!("attach: median {} us, longest {} us", took[10], took[19]);
    ensure!(!node_of(&mut guest, "stays")?.is_empty(), "the other one went, too");
    let counters = guest.stats()?.devices;
    ensure!(!counters.contains_key("blk2"), "{:?}", counters.keys());
    let resets = counters.get("blk1").context("the other one")?["resets"];
    ensure!(resets <= 1, "its driver began anew {resets} times");
    is_content(&mut guest)
}

#[test]
fn a_network_device_comes_and_carries_packets_and_goes() -> Result<()> {
    let mut guest = boot(spec())?;
    let before = holds(guest.vmm_pid())?;
    let mac = [2, 0, 0, 0, 7, 90];
    for round in 0..2 {
        let (tap, fds) = Tap::make("ctvm-e2e90", 1, Ipv4Addr::new(10, 7, 90, 1), 1500)?;
        let net = NetConfig { taps: vec![FdIndex(0)], mac, mtu: 1500 };
        let attached = attach(&mut guest, NewDevice::Net(net), &[fds[0].as_fd()])?;
        drop(fds);
        ensure!(attached.name == DeviceName::Net(mac), "{attached:?}");
        let name = guest.ask("grep -l 02:00:00:00:07:5a /sys/class/net/*/address | cut -d/ -f5")?;
        guest.ask(&format!("ip address add 10.7.90.2/24 dev {name}; ip link set {name} up"))?;
        let listener = TcpListener::bind((Ipv4Addr::new(10, 7, 90, 1), 0))?;
        let port = listener.local_addr()?.port();
        // All of it over the new device, both ways.
        let peer = thread::spawn(move || -> Result<usize> {
            let mut stream = listener.accept()?.0;
            stream.write_all(b"hello from the host\n")?;
            Ok(stream.read_to_end(&mut Vec::new())?)
        });
        let said = guest
            .ask(&format!("dd if=/dev/zero bs=64k count=64 2>/dev/null | nc 10.7.90.1 {port} | head -n 1"))?;
        ensure!(said == "hello from the host", "round {round}: {said}");
        let sent = peer.join().expect("no panic")?;
        ensure!(sent == 64 << 16, "round {round}: {sent} bytes came");
        remove(&mut guest, DeviceName::Net(mac))?;
        ensure!(!tap.exists(), "round {round}: the VMM still holds the tap");
        let left = guest.ask("ls /sys/class/net")?;
        ensure!(!left.contains(&name), "round {round}: {left}");
        holds_as_before(&guest, before, &format!("round {round}"))?;
    }
    is_content(&mut guest)
}

#[test]
fn a_further_share_comes_and_goes_with_its_threads() -> Result<()> {
    let folder = tempfile::tempdir_in("/var/tmp")?;
    std::fs::write(folder.path().join("file"), "through the new share")?;
    let mut guest = boot(spec())?;
    let before = holds(guest.vmm_pid())?;
    for round in 0..3 {
        let fs = FsConfig { tag: "more".into(), threads: 2 };
        let attached = attach(&mut guest, NewDevice::Fs(fs), &[])?;
        ensure!(attached.name == DeviceName::Fs("more".into()), "{attached:?}");
        let (_, threads) = holds(guest.vmm_pid())?;
        ensure!(threads == before.1 + 2, "round {round}: {threads} threads");
        let dir = File::open(folder.path())?;
        let mount = Op::FsMount {
            share: Some("more".into()),
            at: "it".into(),
            dir: FdIndex(0),
            read_only: false,
            cache: FsCache::Shared,
            layer: false,
        };
        guest.client().call(mount, &[dir.as_fd()], LIMIT)?;
        let read = guest.ask("mkdir -p /tmp/m; mount -t virtiofs more /tmp/m && cat /tmp/m/it/file; echo")?;
        ensure!(read == "through the new share", "round {round}: {read}");
        guest.ask(&format!("echo {round} > /tmp/m/it/back; umount /tmp/m"))?;
        let back = std::fs::read_to_string(folder.path().join("back"))?;
        ensure!(back.trim() == round.to_string(), "{back}");
        remove(&mut guest, DeviceName::Fs("more".into()))?;
        holds_as_before(&guest, before, &format!("round {round}"))?;
    }
    is_content(&mut guest)
}

#[test]
fn what_cannot_come_or_go_is_refused_with_the_numbers() -> Result<()> {
    let mut guest = boot(spec())?;
    let file = scratch_file(MIB)?;
    add_disk(&mut guest, &file, "one")?;
    let before = guest.stats()?.devices.len();
    for (id, code, word) in [
        ("one", ErrorCode::AlreadyExists, "disk \"one\" is there already"),
        ("root", ErrorCode::AlreadyExists, "disk \"root\" is there already"),
        ("", ErrorCode::InvalidArgument, "has no name"),
        ("a name of many bytes.", ErrorCode::InvalidArgument, "disk.id has 21 bytes"),
    ] {
        let error = refusal(attach(&mut guest, new_disk(id), &[file.as_fd()]))?;
        ensure!(error.code == code && error.to_string().contains(word), "{error:?} is without {word:?}");
    }
    let odd = scratch_file(100)?;
    let error = refusal(attach(&mut guest, new_disk("odd"), &[odd.as_fd()]))?;
    ensure!(error.to_string().contains("not a multiple of 512"), "{error}");
    let net = NetConfig { taps: vec![FdIndex(0)], mac: [2, 0, 0, 0, 0, 9], mtu: 1500 };
    let error = refusal(attach(&mut guest, NewDevice::Net(net), &[file.as_fd()]))?;
    ensure!(error.to_string().contains("is no tap"), "{error}");
    for missing in [disk("two"), DeviceName::Net([2, 0, 0, 0, 0, 9]), DeviceName::Fs("x".into()), disk("")] {
        let error = refusal(remove(&mut guest, missing.clone()))?;
        ensure!(
            error.code == ErrorCode::NotFound && error.message == format!("there is no {missing}"),
            "{error}"
        );
    }
    guest.call(Op::Pause)?;
    let error = refusal(attach(&mut guest, new_disk("two"), &[file.as_fd()]))?;
    ensure!(error.message == "attach needs a running VM; this one is paused", "{error}");
    guest.call(Op::Resume)?;
    ensure!(guest.stats()?.devices.len() == before, "something stayed: {:?}", guest.stats()?.devices.keys());

    // Until no place is left.
    let root_and_one = 2;
    for n in root_and_one..MAX_DISKS {
        add_disk(&mut guest, &file, &format!("disk{n}"))?;
    }
    let error = refusal(attach(&mut guest, new_disk("more"), &[file.as_fd()]))?;
    ensure!(error.message.contains("would be number 17 of its kind, at most 16 can be"), "{error}");
    let fs = |tag: &str| NewDevice::Fs(FsConfig { tag: tag.into(), threads: 1 });
    let error = refusal(attach(&mut guest, fs("f"), &[]))?;
    ensure!(error.code == ErrorCode::ResourceExhausted, "{error:?}");
    ensure!(error.message == "no slot left for fs: a VM has 19", "{error}");
    let seen = guest.ask("grep -l disk /sys/block/vd*/serial | wc -l")?;
    ensure!(seen == (MAX_DISKS - root_and_one).to_string(), "the guest sees {seen}");
    // Each is where its slot says, and makes room when it goes.
    for n in root_and_one..MAX_DISKS {
        remove(&mut guest, disk(&format!("disk{n}")))?;
    }
    attach(&mut guest, fs("f"), &[])?;
    is_content(&mut guest)
}

#[test]
fn a_guest_without_the_driver_is_told_of() -> Result<()> {
    let mut guest = GuestSpec { cmdline: "ctvm_upcall.off=1", ..spec() }.boot()?;
    guest.ask("sleep 1")?;
    let before = (holds(guest.vmm_pid())?, guest.stats()?.devices.len());
    let file = scratch_file(MIB)?;
    let op = Op::Attach { device: new_disk("never"), timeout_ms: 1500 };
    let error = refusal(guest.client().call(op, &[file.as_fd()], LIMIT).map_err(Into::into))?;
    ensure!(error.code == ErrorCode::FailedPrecondition, "{error:?}");
    let word = "attach disk \"never\": the guest's kernel has not opened the upcall channel (after 15";
    ensure!(error.message.starts_with(word), "{error}");
    ensure!(error.message.ends_with("of 1500 ms); nothing of it is left"), "{error}");
    let error = refusal(remove(&mut guest, disk("never")))?;
    ensure!(error.code == ErrorCode::NotFound, "{error:?}");
    let after = (holds(guest.vmm_pid())?, guest.stats()?.devices.len());
    ensure!(after == before, "{after:?} after {before:?}");
    guest.ask("true")?;
    Ok(())
}

/// The kernel takes away what is in use, as it does when a disk is pulled out of a machine: what uses it gets errors.
#[test]
fn what_is_in_use_goes_and_its_user_gets_errors() -> Result<()> {
    let mut guest = boot(spec())?;
    let image = tempfile::NamedTempFile::new_in("/var/tmp")?;
    image.as_file().set_len(16 * MIB)?;
    e2e::run(std::process::Command::new("mkfs.ext4").args(["-q", "-F"]).arg(image.path()))?.ok()?;
    let file = File::options().read(true).write(true).open(image.path())?;
    add_disk(&mut guest, &file, "used")?;
    let node = node_of(&mut guest, "used")?;
    guest.ask(&format!(
        "mkdir -p /tmp/m; mount -t ext4 /dev/{node} /tmp/m; echo kept > /tmp/m/file; sync; exec 3< /dev/{node}"
    ))?;
    remove(&mut guest, disk("used"))?;
    let mut said = String::new();
    for command in [
        "sync; echo 3 > /proc/sys/vm/drop_caches",
        "head -c 512 <&3 | wc -c",
        "cat /tmp/m/file 2>&1 || true",
        "sh -c 'echo more > /tmp/m/new' 2>/dev/null || true",
        "sync; exec 3<&-; umount /tmp/m; echo gone",
    ] {
        said = format!("{said}{}\n", guest.ask(command)?);
    }
    ensure!(
        said.contains("0\n") && said.contains("Input/output error") && said.ends_with("gone\n"),
        "{said}"
    );
    ensure!(guest.stats()?.plugs["detached"] == 1, "{:?}", guest.stats()?.plugs);
    // What was synced before is on the disk, as the next attach of it shows.
    add_disk(&mut guest, &file, "used")?;
    let node = node_of(&mut guest, "used")?;
    let kept = guest
        .ask(&format!("mount -t ext4 /dev/{node} /tmp/m 2>/dev/null && cat /tmp/m/file; umount /tmp/m"))?;
    ensure!(kept.contains("kept"), "{kept}");
    remove(&mut guest, disk("used"))?;

    // A share that is mounted goes just so.
    let folder = tempfile::tempdir_in("/var/tmp")?;
    std::fs::write(folder.path().join("file"), "x")?;
    attach(&mut guest, NewDevice::Fs(FsConfig { tag: "more".into(), threads: 1 }), &[])?;
    let dir = File::open(folder.path())?;
    let (at, share) = ("it".to_owned(), Some("more".to_owned()));
    let mount =
        Op::FsMount { share, at, dir: FdIndex(0), read_only: true, cache: FsCache::Shared, layer: false };
    guest.client().call(mount, &[dir.as_fd()], LIMIT)?;
    guest.ask("mount -t virtiofs more /tmp/m; exec 4< /tmp/m/it/file")?;
    remove(&mut guest, DeviceName::Fs("more".into()))?;
    let said = guest.ask("ls /tmp/m/it 2>&1 || true; exec 4<&-; umount /tmp/m && echo gone")?;
    ensure!(said.contains("not connected") && said.ends_with("gone"), "{said}");
    guest.ask("true")?;
    Ok(())
}

/// Pausing in the middle is no harm, as the answer comes when the guest goes on.
#[test]
fn a_pause_in_the_middle_delays_and_no_more() -> Result<()> {
    let mut guest = boot(spec())?;
    let file = scratch_file(MIB)?;
    let before = holds(guest.vmm_pid())?;
    for round in 0..8 {
        let op = Op::Attach { device: new_disk("paused"), timeout_ms: TIMEOUT_MS };
        let begun = guest.client().begin(op, &[file.as_fd()])?;
        guest.call(Op::Pause)?;
        guest.call(Op::Resume)?;
        let (Reply::Attached(_), _) = guest.client().finish(begun, LIMIT)? else { bail!("not attached") };
        let node = node_of(&mut guest, "paused")?;
        guest.ask(&format!("head -c 512 /dev/{node} > /dev/null && echo read"))?;
        let op = Op::Detach { device: disk("paused"), timeout_ms: TIMEOUT_MS };
        let begun = guest.client().begin(op, &[])?;
        guest.call(Op::Pause)?;
        guest.call(Op::Resume)?;
        guest.client().finish(begun, LIMIT)?;
        holds_as_before(&guest, before, &format!("round {round}"))?;
    }
    is_content(&mut guest)
}

/// A guest that stands still answers nothing. What it may have is parked, and goes when it has woken up.
#[test]
fn a_guest_that_does_not_answer_gives_the_device_up_later() -> Result<()> {
    let mut guest = boot(spec())?;
    let file = scratch_file(MIB)?;
    let before = holds(guest.vmm_pid())?;
    let op = |device| Op::Attach { device, timeout_ms: 500 };
    let begun = guest.client().begin(op(new_disk("slow")), &[file.as_fd()])?;
    guest.call(Op::Pause)?;
    match guest.client().finish(begun, LIMIT) {
        Err(ClientError::Api(error)) => {
            ensure!(error.code == ErrorCode::DeadlineExceeded, "{error:?}");
            ensure!(error.message.contains("the guest did not answer"), "{error}");
            ensure!(error.message.contains("is parked in slot 4 of 19"), "{error}");
        }
        // It was faster than the pause.
        Ok(_) => remove_when_resumed(&mut guest, "slow")?,
        Err(other) => bail!("{other}"),
    }
    guest.call(Op::Resume)?;
    for _ in 0..100 {
        if holds(guest.vmm_pid())? == before {
            break;
        }
        thread::sleep(Duration::from_millis(100));
    }
    let plugs = guest.stats()?.plugs;
    ensure!(plugs["parked"] == 0 && holds(guest.vmm_pid())? == before, "{plugs:?}");
    ensure!(node_of(&mut guest, "slow")?.is_empty(), "the guest still has it");
    add_disk(&mut guest, &file, "slow")?;

    // And one that does not answer when a device is to go keeps it, until it is asked again.
    let op = Op::Detach { device: disk("slow"), timeout_ms: 500 };
    let begun = guest.client().begin(op, &[])?;
    guest.call(Op::Pause)?;
    match guest.client().finish(begun, LIMIT) {
        Err(ClientError::Api(error)) => {
            ensure!(error.code == ErrorCode::DeadlineExceeded, "{error:?}");
            ensure!(error.message.contains("it stays attached, and can be detached later"), "{error}");
            guest.call(Op::Resume)?;
            remove(&mut guest, disk("slow"))?;
        }
        Ok(_) => drop(guest.call(Op::Resume)?),
        Err(other) => bail!("{other}"),
    }
    ensure!(holds(guest.vmm_pid())? == before, "{:?} after {before:?}", holds(guest.vmm_pid())?);
    add_disk(&mut guest, &file, "slow")?;
    is_content(&mut guest)
}

fn remove_when_resumed(guest: &mut Guest, id: &str) -> Result<()> {
    guest.call(Op::Resume)?;
    remove(guest, disk(id))?;
    guest.call(Op::Pause)?;
    Ok(())
}

#[test]
fn resizes_and_devices_stand_in_one_line() -> Result<()> {
    let mut guest = boot(GuestSpec { max_vcpus: Some(4), ..spec() })?;
    let files = [scratch_file(MIB)?, scratch_file(MIB)?];
    let vcpus = |n| Op::Resize { vcpus: Some(Vcpus::Count(n)), memory_mib: None, timeout_ms: TIMEOUT_MS };
    for round in 0..5u8 {
        let mut begun = vec![];
        for (file, id) in files.iter().zip(["a", "b"]) {
            let op = Op::Attach { device: new_disk(id), timeout_ms: TIMEOUT_MS };
            begun.push(guest.client().begin(op, &[file.as_fd()])?);
        }
        begun.push(guest.client().begin(vcpus(4 - round % 2), &[])?);
        for id in ["a", "b"] {
            let op = Op::Detach { device: disk(id), timeout_ms: TIMEOUT_MS };
            begun.push(guest.client().begin(op, &[])?);
        }
        for call in begun {
            match guest.client().finish(call, LIMIT)?.0 {
                Reply::Attached(_) | Reply::Done => {}
                Reply::Resized(resized) => {
                    ensure!(resized.ending == Ending::Done, "round {round}: {resized}");
                }
                other => bail!("round {round}: {other:?}"),
            }
        }
    }
    let plugs = guest.stats()?.plugs;
    ensure!(plugs["attached"] == 10 && plugs["detached"] == 10, "{plugs:?}");
    is_content(&mut guest)
}

/// Devices of the boot can go, too, and several queues on several vCPUs are no matter.
#[test]
fn a_disk_of_the_boot_goes_and_a_larger_one_comes() -> Result<()> {
    let first = scratch_file(MIB)?;
    let disks = vec![(first, false, "boot".to_owned(), 1)];
    let mut guest = boot(GuestSpec { vcpus: 2, disks, ..spec() })?;
    let (descriptors, _) = holds(guest.vmm_pid())?;
    remove(&mut guest, disk("boot"))?;
    ensure!(holds(guest.vmm_pid())?.0 < descriptors, "its descriptors are still there");
    let second = scratch_file(64 * MIB)?;
    let config = DiskConfig { file: FdIndex(0), read_only: false, id: "boot".into(), queues: 4, image: None };
    attach(&mut guest, NewDevice::Disk(config), &[second.as_fd()])?;
    let node = node_of(&mut guest, "boot")?;
    let seen = guest.ask(&format!("cat /sys/block/{node}/size; ls /sys/block/{node}/mq | wc -l"))?;
    ensure!(seen == format!("{}\n2", 64 * MIB / 512), "{seen}");
    let sums = guest.ask(&format!(
        "dd if=/dev/urandom of=/tmp/p bs=1M count=8 2>/dev/null; \
         for i in 0 1 2 3; do dd if=/tmp/p of=/dev/{node} bs=1M seek=$((i*8)) conv=notrunc 2>/dev/null & done; wait; \
         sync; echo 3 > /proc/sys/vm/drop_caches; \
         for i in 0 1 2 3; do dd if=/dev/{node} bs=1M skip=$((i*8)) count=8 2>/dev/null | cmp - /tmp/p || echo bad; done"
    ))?;
    ensure!(sums.is_empty(), "{sums}");
    is_content(&mut guest)
}

/// Killed at any moment, the VMM leaves nothing.
#[test]
fn a_vmm_that_is_killed_in_the_middle_leaves_nothing() -> Result<()> {
    let file = scratch_file(MIB)?;
    let address = Ipv4Addr::new(10, 7, 91, 1);
    for delay_ms in [0, 2, 5, 10, 20, 40] {
        let mut guest = boot(spec())?;
        let (tap, fds) = Tap::make("ctvm-e2e91", 1, address, 1500)?;
        let op = Op::Attach { device: new_disk("killed"), timeout_ms: TIMEOUT_MS };
        guest.client().begin(op, &[file.as_fd()])?;
        let net = NetConfig { taps: vec![FdIndex(0)], mac: [2, 0, 0, 0, 7, 91], mtu: 1500 };
        let op = Op::Attach { device: NewDevice::Net(net), timeout_ms: TIMEOUT_MS };
        guest.client().begin(op, &[fds[0].as_fd()])?;
        drop(fds);
        thread::sleep(Duration::from_millis(delay_ms));
        let pid = guest.vmm_pid();
        // Kills it with SIGKILL, and waits for it.
        drop(guest);
        ensure!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "it is still there");
        ensure!(!tap.exists(), "after {delay_ms} ms: somebody holds the tap");
    }
    Ok(())
}
