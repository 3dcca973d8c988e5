//! Configurations that are wrong in one thing each.

use std::fs::File;

use vmm_api::{ConsoleConfig, KernelConfig};

use super::*;

fn config() -> VmConfig {
    let kernel = KernelConfig { image: FdIndex(0), initrd: None, cmdline: "quiet".into(), pvh: true };
    VmConfig { name: "test".into(), ..VmConfig::new(128, kernel) }
}

fn fds(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| File::open("/dev/null").unwrap().into()).collect()
}

fn refused(change: impl FnOnce(&mut VmConfig)) -> String {
    let mut config = config();
    change(&mut config);
    ValidConfig::check(config, fds(1)).unwrap_err().to_string()
}

fn disk(file: u8) -> DiskConfig {
    DiskConfig::read_only(FdIndex(file), "root")
}

/// An image of that many blobs.
fn image(blobs: u8) -> DiskConfig {
    let blobs = (0..blobs).map(|n| BlobConfig { file: FdIndex(n + 3), bytes: 4096 }).collect();
    DiskConfig {
        image: Some(ImageConfig { channel: FdIndex(2), blobs, wait_ms: 1000, dax: false }),
        ..disk(0)
    }
}

fn net(tap: u8) -> NetConfig {
    NetConfig { taps: vec![FdIndex(tap)], mac: [2, 0, 0, 0, 0, 1], mtu: 1500 }
}

#[test]
fn a_good_one_passes() {
    let mut config = config();
    config.disks = vec![disk(2)];
    config.nets = vec![
        NetConfig { taps: [6, 5, 4, 3].map(FdIndex).to_vec(), mac: [0, 0, 0, 0, 0, 1], mtu: 68 },
        NetConfig { mtu: u16::MAX, ..net(7) },
    ];
    config.console = Some(ConsoleConfig { output: Some(FdIndex(1)), input: None });
    config.vsock = Some(VsockConfig { cid: 3, ports: vec![1024, 1025] });
    let valid = ValidConfig::check(config, fds(8)).unwrap();
    assert_eq!((valid.memory_bytes, valid.disks.len()), (128 << 20, 1));
    assert_eq!(valid.nets.iter().map(|net| net.taps.len()).collect::<Vec<_>>(), [4, 1]);
}

#[test]
fn the_largest_one_fits_into_a_packet() {
    let mut config = config();
    let mut index = 0..;
    let mut next = || FdIndex(index.next().unwrap());
    config.kernel.image = next();
    config.kernel.initrd = Some(next());
    config.disks = (0..MAX_DISKS).map(|_| DiskConfig { file: next(), ..disk(0) }).collect();
    let taps = |_| NetConfig { taps: (0..MAX_NET_PAIRS).map(|_| next()).collect(), ..net(0) };
    config.nets = (0..MAX_NETS).map(taps).collect();
    config.console = Some(ConsoleConfig { output: Some(next()), input: Some(next()) });
    config.serial = Some(next());
    let count = next().0.into();
    assert!(count <= vmm_api::frame::MAX_FDS, "{count}");
    ValidConfig::check(config, fds(count)).unwrap();
}

#[test]
fn each_refusal_has_value_and_limit() {
    type Change = fn(&mut VmConfig);
    let cases: [(&str, Change); 32] = [
        ("protocol version 9, this VMM speaks 1", |c| c.version = 9),
        ("vcpus is 0, must be 1 to 32", |c| c.vcpus = 0),
        ("vcpus is 33, must be 1 to 32", |c| c.vcpus = 33),
        ("memory.size_mib is 62, must be 64 to 1048576", |c| c.memory.size_mib = 62),
        ("memory.size_mib is 65, must be a multiple of 2", |c| c.memory.size_mib = 65),
        ("memory.max_mib is 126, must be 128 to 1048576", |c| c.memory.max_mib = Some(126)),
        ("memory.max_mib is 1048578, must be", |c| c.memory.max_mib = Some((1 << 20) + 2)),
        ("memory.max_mib is 129, must be a multiple of 2", |c| c.memory.max_mib = Some(129)),
        ("memory.max_mib is 0, must be", |c| c.memory.max_mib = Some(0)),
        ("memory.max_mib needs anonymous memory", |c| {
            c.memory.backing = GuestMemoryBacking::Hugetlbfs;
            c.memory.max_mib = Some(256);
        }),
        ("balloon needs anonymous memory", |c| {
            c.memory.backing = GuestMemoryBacking::Hugetlbfs;
            c.balloon = true;
        }),
        ("name has 129 bytes, must have 0 to 128", |c| c.name = "n".repeat(129)),
        ("kernel.cmdline has 2048 bytes, must have 0 to 2047", |c| c.kernel.cmdline = "x".repeat(2048)),
        ("kernel.cmdline has 1 bytes and a NUL among them", |c| c.kernel.cmdline = "\0".into()),
        ("disk.queues is 9, must be 1 to 8", |c| c.disks = vec![DiskConfig { queues: 9, ..disk(0) }]),
        ("disk.id has 21 bytes", |c| c.disks = vec![DiskConfig { id: "i".repeat(21), ..disk(0) }]),
        ("disk \"root\" is an image and not read-only", |c| {
            c.disks = vec![DiskConfig { read_only: false, ..image(0) }];
        }),
        ("disk.queues of an image is 2, must be 1 to 1", |c| {
            c.disks = vec![DiskConfig { queues: 2, ..image(0) }];
        }),
        ("disk.id of an image has 0 bytes, must have 1 to 20", |c| {
            c.disks = vec![DiskConfig { id: String::new(), ..image(0) }];
        }),
        ("number of image blobs is 129, must be 0 to 128", |c| c.disks = vec![image(129)]),
        ("number of disks is 17, must be 0 to 16", |c| c.disks = vec![disk(0); 17]),
        ("number of nets is 9, must be 0 to 8", |c| c.nets = vec![net(0); 9]),
        ("number of net.taps is 0, must be 1 to 4", |c| {
            c.nets = vec![NetConfig { taps: vec![], ..net(0) }];
        }),
        ("number of net.taps is 5, must be 1 to 4", |c| {
            c.nets = vec![NetConfig { taps: vec![FdIndex(0); 5], ..net(0) }];
        }),
        ("net.mtu is 67, must be 68 to 65535", |c| c.nets = vec![NetConfig { mtu: 67, ..net(0) }]),
        ("net.mac is 00:00:00:00:00:00, must be unicast and not all zeros", |c| {
            c.nets = vec![NetConfig { mac: [0; 6], ..net(0) }];
        }),
        ("net.mac is 01:00:5e:00:00:fb, must be unicast", |c| {
            c.nets = vec![NetConfig { mac: [1, 0, 0x5e, 0, 0, 0xfb], ..net(0) }];
        }),
        ("net.mac is ff:ff:ff:ff:ff:ff, must be unicast", |c| {
            c.nets = vec![NetConfig { mac: [0xff; 6], ..net(0) }];
        }),
        ("net.taps is descriptor 9 of the packet, which has 1", |c| c.nets = vec![net(9)]),
        ("vsock.cid is 2, must be 3 to 4294967294", |c| {
            c.vsock = Some(VsockConfig { cid: 2, ports: vec![] });
        }),
        ("vsock.ports names 5 twice", |c| c.vsock = Some(VsockConfig { cid: 3, ports: vec![5, 6, 5] })),
        ("fs.tag has 0 bytes, must have 1 to 36", |c| {
            c.fs = Some(vmm_api::FsConfig { tag: String::new(), threads: 1 });
        }),
    ];
    for (text, change) in cases {
        let said = refused(change);
        assert!(said.contains(text), "{said:?} does not say {text:?}");
    }
}

#[test]
fn an_image_has_a_descriptor_for_each_part() {
    let mut config = config();
    config.disks = vec![DiskConfig { file: FdIndex(1), ..image(2) }];
    let valid = ValidConfig::check(config, fds(5)).unwrap();
    let taken = valid.disks[0].image.as_ref().unwrap();
    assert_eq!((taken.blobs.len(), taken.wait), (2, Duration::from_secs(1)));
    assert!(valid.images);
    let missing = refused(|c| c.disks = vec![DiskConfig { file: FdIndex(0), ..image(1) }]);
    assert_eq!(missing, "disk.file is descriptor 0 of the packet, which is something else already");
}

#[test]
fn the_room_to_grow_is_what_is_above_the_size() {
    let grows = |max_mib| {
        let mut config = config();
        config.memory.max_mib = max_mib;
        ValidConfig::check(config, fds(1)).unwrap().hotplug_bytes
    };
    assert_eq!([None, Some(128), Some(130), Some(4096)].map(grows), [0, 0, 2 << 20, 3968 << 20]);
}

#[test]
fn each_descriptor_has_one_use() {
    assert_eq!(
        refused(|c| c.kernel.image = FdIndex(4)),
        "kernel.image is descriptor 4 of the packet, which has 1"
    );
    assert_eq!(
        refused(|c| c.kernel.initrd = Some(FdIndex(0))),
        "kernel.image is descriptor 0 of the packet, which is something else already"
    );
    let unused = ValidConfig::check(config(), fds(3)).unwrap_err();
    assert_eq!(unused.to_string(), "the packet has 3 descriptors, of which 2 are not named in it");
}

#[test]
fn devices_are_named_before_the_words_for_init() {
    let line = |base| cmdline_with_devices(base, &[(0xd000_0000, 5), (0xd000_1000, 6)], 4096).unwrap();
    let words = "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6";
    assert_eq!(line("quiet"), format!("quiet {words}"));
    assert_eq!(line(""), words);
    assert_eq!(line("quiet -- --verbose"), format!("quiet {words} -- --verbose"));
    assert_eq!(line("a=b--c x"), format!("a=b--c x {words}"));
}

#[test]
fn a_command_line_that_gets_too_long_is_refused() {
    let base = "x".repeat(2040);
    assert_eq!(cmdline_with_devices(&base, &[], 4096).unwrap(), base);
    let said = cmdline_with_devices(&base, &[(0xd000_0000, 5)], 4096).unwrap_err().to_string();
    assert_eq!(
        said,
        "the kernel command line has 2076 bytes with the words for 1 devices and its NUL, must have at most 2048"
    );
}
