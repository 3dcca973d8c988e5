//! Opening images at a service of the test's own.

use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use vmm_api::frame;
use vmm_api::image::{Blob, OpenReply, OpenedImage};
use vmm_api::{ApiError, MemoryRange};

use super::*;

const LIMIT: Duration = Duration::from_secs(20);

fn request() -> OpenRequest {
    OpenRequest::Open { bootstrap: "/b/image.boot".into(), config: "{}".into(), look: true }
}

/// A service that answers one request so, with as many descriptors.
fn service(folder: &Path, answer: &str, fds: usize) -> PathBuf {
    let path = folder.join("images.sock");
    let address = SocketAddrUnix::new(&path).unwrap();
    let listener =
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    let answer = answer.to_owned();
    std::thread::spawn(move || {
        let connection = rustix::net::accept(&listener).unwrap();
        let packet = frame::recv(&connection).unwrap();
        assert_eq!(serde_json::from_slice::<OpenRequest>(&packet.bytes).unwrap(), request());
        let files: Vec<File> = (0..fds).map(|_| tempfile::tempfile().unwrap()).collect();
        if let Some(first) = files.first() {
            first.set_len(5000).unwrap();
        }
        let borrowed: Vec<BorrowedFd<'_>> = files.iter().map(|file| file.as_fd()).collect();
        frame::send(&connection, answer.as_bytes(), &borrowed).unwrap();
        // Until the other side is done.
        let _ = frame::recv(&connection);
    });
    path
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn opened(answer: &str, fds: usize) -> Result<Opened, OpenError> {
    let folder = tempfile::tempdir().unwrap();
    let path = service(folder.path(), answer, fds);
    runtime().block_on(open(&path, &request(), LIMIT))
}

fn two_blobs(version: u8) -> String {
    let blob = |bytes| Blob { id: "ab".into(), bytes };
    let image = OpenedImage { version, blobs: vec![blob(9000), blob(1)], ready: true };
    serde_json::to_string(&OpenReply::Opened(image)).unwrap()
}

#[test]
fn an_image_becomes_a_disk_and_a_mount() {
    let image = opened(&two_blobs(6), 3).unwrap();
    let (disk, fds) = image.disk("ctvm-disk-2", 0, By::Disk);
    assert_eq!(
        (disk.file, disk.read_only, disk.id.as_str(), fds.len()),
        (FdIndex(0), true, "ctvm-disk-2", 4)
    );
    let parts = disk.image.unwrap();
    assert!(!parts.dax);
    assert_eq!(parts.channel, FdIndex(1));
    let blobs: Vec<_> = parts.blobs.iter().map(|blob| (blob.file.0, blob.bytes)).collect();
    assert_eq!(blobs, [(2, 9000), (3, 1)]);
    let place = Attached {
        name: DeviceName::Disk("ctvm-disk-2".into()),
        slot: 3,
        registers: 0,
        irq: 0,
        memory: None,
        took_us: 0,
    };
    let mount = image.mount(&place, "ctvm-disk-2", "/x".into(), false).unwrap();
    assert_eq!((mount.type_.as_str(), mount.source.as_str()), ("ctvm-image", "ctvm-disk-2"));
    assert_eq!(mount.options, ["part=0:8192", "part=8192:12288", "part=20480:4096"]);
    let mount = image.mount(&place, "ctvm-disk-2", "/x".into(), true).unwrap();
    assert_eq!(mount.options[2..], ["part=20480:4096", "own-users"]);
    assert_eq!(image.bytes().unwrap(), 24_576);
    // As memory.
    assert!(image.disk("ctvm-disk-2", 0, By::Memory).0.image.unwrap().dax);
    let place = Attached { memory: Some(MemoryRange { start: 1 << 32, bytes: 2 << 20 }), ..place };
    let mount = image.mount(&place, "ctvm-disk-2", "/x".into(), false).unwrap();
    assert_eq!(mount.options, ["memory=0x100000000", "part=0:8192", "part=8192:12288", "part=20480:4096"]);
    // Again, for a disk that is there.
    let (blobs, fds) = image.parts(0);
    assert_eq!((blobs[0].file, blobs[1].file, fds.len()), (FdIndex(1), FdIndex(2), 3));
}

#[test]
fn a_service_that_is_not_there_is_told_how_to_start() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("none.sock");
    let error = runtime().block_on(open(&path, &request(), LIMIT)).unwrap_err();
    assert!(error.to_string().contains("start it on this node with `ctvm-images serve`"), "{error}");
    // One that has died has left its socket.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let error = runtime().block_on(open(&path, &request(), LIMIT)).unwrap_err();
    assert!(chain(&error).contains("ctvm-images serve"), "{error}");
}

#[test]
fn answers_that_cannot_be_are_said() {
    let said = |answer: &str, fds| opened(answer, fds).unwrap_err().to_string();
    let refused =
        serde_json::to_string(&OpenReply::Refused { reason: "the registry is down".into() }).unwrap();
    assert_eq!(said(&refused, 0), "the image service cannot open /b/image.boot: the registry is down");
    assert!(said(&two_blobs(5), 3).contains("hands /b/image.boot out as RAFS 5, must be 6"));
    for fds in [0, 1, 2, 4] {
        let text = format!("{fds} descriptors for a bootstrap and 2 blobs");
        assert!(said(&two_blobs(6), fds).ends_with(&text), "{fds}");
    }
    assert!(said("nonsense", 0).starts_with("the image service's answer: "));
    let many =
        OpenedImage { version: 6, blobs: vec![Blob { id: String::new(), bytes: 1 }; 129], ready: false };
    let many = serde_json::to_string(&OpenReply::Opened(many)).unwrap();
    assert!(said(&many, 130).ends_with("129 blobs, must be 0 to 128"));
}

#[test]
fn a_service_that_says_nothing_is_not_waited_for_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("images.sock");
    let listener =
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let short = Duration::from_millis(100);
    // Several, so that its backlog is full, too.
    for _ in 0..4 {
        let error = runtime().block_on(open(&path, &request(), short)).unwrap_err();
        assert!(error.to_string().ends_with("did not answer within 100ms"), "{error}");
    }
}

fn image_root(layers: &[&str], upper: bool) -> ImageRoot {
    ImageRoot {
        bootstrap: "/b".into(),
        config: String::new(),
        layers: layers.iter().map(PathBuf::from).collect(),
        upper: upper.then(|| Upper { parent: "/s/7".into(), upper: "fs".into(), work: "work".into() }),
        maps: None,
        volatile: false,
        warnings: vec![],
    }
}

#[test]
fn an_overlay_lies_over_what_there_is() {
    let options = |root: &ImageRoot| overlay("c", root, "/l").map(|mount| mount.options.join(","));
    assert_eq!(options(&image_root(&[], false)), None);
    assert_eq!(
        options(&image_root(&[], true)).unwrap(),
        "lowerdir=/l,upperdir=/run/ctvm/share/c-upper/fs,workdir=/run/ctvm/share/c-upper/work,userxattr,index=off,xino=off"
    );
    assert_eq!(
        options(&image_root(&["/s/6/fs", "/s/5/fs"], false)).unwrap(),
        "lowerdir=/run/ctvm/share/c-layer-0:/run/ctvm/share/c-layer-1:/l,ro,userxattr,index=off,xino=off"
    );
    let mut volatile = image_root(&[], true);
    volatile.volatile = true;
    assert!(options(&volatile).unwrap().ends_with(",volatile"));
}

#[test]
fn images_are_forgotten_by_their_container() {
    let images = Images::default();
    for (container, serial, by, bytes) in [
        ("a", "ctvm-disk-0", By::Memory, 5000),
        ("b", "ctvm-disk-1", By::Disk, 7),
        ("c", "ctvm-disk-2", By::Memory, 1),
    ] {
        images.add(serial.to_owned(), Image { container: container.into(), request: request(), by, bytes });
    }
    assert_eq!((images.count(By::Memory), images.count(By::Disk), images.memory_bytes()), (2, 1, 5001));
    assert_eq!((images.of("a"), images.of("b"), images.of("d")), (Some(By::Memory), Some(By::Disk), None));
    assert_eq!(images.forget("a"), ["ctvm-disk-0"]);
    assert_eq!((images.request("ctvm-disk-0"), images.request("ctvm-disk-1")), (None, Some(request())));
    assert_eq!(images.memory_bytes(), 1);
}

#[test]
fn what_the_guest_may_still_get_is_not_given_to_it_again_as_a_disk() {
    let attach = |source| OpenError::Attach { bootstrap: "/b".into(), by: By::Memory, source };
    let refused = |code| {
        let source = ApiError { code, message: String::new(), causes: vec![] };
        attach(VmmError::Refused { op: "attach", source })
    };
    for (code, again) in [
        (ErrorCode::FailedPrecondition, true),
        (ErrorCode::ResourceExhausted, true),
        (ErrorCode::InvalidArgument, true),
        (ErrorCode::DeadlineExceeded, false),
        (ErrorCode::Unavailable, false),
    ] {
        assert_eq!(is_refusal(&refused(code)), again, "{code:?}");
    }
    assert!(!is_refusal(&attach(VmmError::Answer { op: "attach" })));
    assert!(!is_refusal(&OpenError::TooMany { count: 2, limit: 1 }));
}
