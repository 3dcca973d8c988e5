//! The server under a real kernel's FUSE client: this machine's, by way of `/dev/fuse`.
//!
//! The kernel's client is the same as in a guest; only the way to it is not virtio-fs. The server's threads are under
//! the system call filter that they have in the VMM, so this is also the proof that the filter's list is complete. Needs root and `/dev/fuse`, and
//! says so when it is skipped.

mod confine;

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread::JoinHandle;

use imagefs::{Cache, FileServer, Limits, MountOptions};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::TempDir;
use virtio::fs::FsServer;
use virtio::queue::{Reader, Writer};
use vm_memory::VolatileSlice;

/// Requests of up to 1 MiB, and what stands around them.
const BUFFER: usize = (1 << 20) + (1 << 16);

struct Mounted {
    at: TempDir,
    threads: Vec<JoinHandle<()>>,
    server: Arc<FileServer>,
}

impl Mounted {
    /// Mounts a share with `source` in it as `m`. `None` where that is impossible.
    fn new(source: &Path, options: MountOptions) -> Option<Self> {
        let device =
            match OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open("/dev/fuse") {
                Ok(device) => device,
                Err(e) => {
                    eprintln!("skipped: opening /dev/fuse: {e}");
                    return None;
                }
            };
        let at = tempfile::tempdir().unwrap();
        let data = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
            device.as_raw_fd()
        );
        let data = std::ffi::CString::new(data).unwrap();
        if let Err(e) = mount("ctvm", at.path(), "fuse.ctvm", MountFlags::empty(), &*data) {
            eprintln!("skipped: mounting: {e}");
            return None;
        }
        let server = Arc::new(FileServer::new(Limits { nodes: 12_000, handles: 2000 }).unwrap());
        server.mount("m", File::open(source).unwrap().into(), options).unwrap();
        let threads = (0..2)
            .map(|_| {
                let (server, device) = (server.clone(), device.try_clone().unwrap());
                std::thread::spawn(move || serve(&server, device))
            })
            .collect();
        Some(Mounted { at, threads, server })
    }

    fn path(&self) -> PathBuf {
        self.at.path().join("m")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount(self.at.path(), UnmountFlags::DETACH).unwrap();
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

fn serve(server: &FileServer, mut device: File) {
    server.enter_thread().unwrap();
    confine::confine("fs");
    let (mut request, mut reply) = (vec![0; BUFFER], vec![0; BUFFER]);
    loop {
        let len = match device.read(&mut request) {
            Ok(len) => len,
            Err(e) if e.raw_os_error() == Some(libc::ENODEV) => return, // unmounted
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::ENOENT | libc::EAGAIN)) => continue,
            Err(e) => panic!("reading /dev/fuse: {e}"),
        };
        // SAFETY: both buffers outlive the call, and nothing else touches them meanwhile.
        let slice = |bytes: &mut [u8]| vec![unsafe { VolatileSlice::new(bytes.as_mut_ptr(), bytes.len()) }];
        let answer = server.handle(Reader::new(slice(&mut request[..len])), Writer::new(slice(&mut reply)));
        if answer > 0 {
            match device.write(&reply[..answer as usize]) {
                // The caller was killed meanwhile, or the file system is gone.
                Ok(_) => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => {}
                Err(e) => panic!("answering {} bytes: {e}", answer),
            }
        }
    }
}

/// Runs a script with `$SHARE`, the source as the kernel shows it, and `$HOST`, the source itself.
fn script(name: &str, options: MountOptions, script: &str) {
    let source = tempfile::tempdir().unwrap();
    let Some(mounted) = Mounted::new(source.path(), options) else { return };
    let output = Command::new("bash")
        .args(["-euxo", "pipefail", "-c", script])
        .env("SHARE", mounted.path())
        .env("HOST", source.path())
        .env("LC_ALL", "C")
        .current_dir(mounted.path())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{name}: {}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    let counters = mounted.server.metrics();
    assert!(counters.contains(&("malformed", 0)), "{counters:?}");
}

fn each_cache(name: &str, text: &str) {
    for cache in [Cache::Shared, Cache::Live, Cache::Exclusive] {
        script(&format!("{name}, {cache:?}"), MountOptions { cache, ..MountOptions::default() }, text);
    }
}

#[test]
fn trees_are_copied_packed_and_compared() {
    each_cache(
        "trees",
        r#"
        mkdir tree && cp -a /etc/. tree/ && diff -r --no-dereference /etc tree
        (cd /etc && find . -printf '%p %y %m %U %G %s %l\n' | grep -v '^\. ' | sort) > $HOST/../want.$$
        (cd tree && find . -printf '%p %y %m %U %G %s %l\n' | grep -v '^\. ' | sort) > $HOST/../have.$$
        # Sizes of directories are the host's affair.
        diff <(sed 's/ d \([0-9]*\) \([0-9]* [0-9]*\) [0-9]*/ d \1 \2/' $HOST/../want.$$) \
             <(sed 's/ d \([0-9]*\) \([0-9]* [0-9]*\) [0-9]*/ d \1 \2/' $HOST/../have.$$)
        rm $HOST/../want.$$ $HOST/../have.$$
        tar -cf all.tar -C tree . && mkdir unpacked && tar -xpf all.tar -C unpacked && diff -r --no-dereference tree unpacked
        tar -df all.tar -C $HOST/unpacked
        rm -rf tree unpacked && test "$(ls -A)" = all.tar
        "#,
    );
}

#[test]
fn files_behave_as_files_do() {
    each_cache(
        "files",
        r#"
        # hard links, rename over, unlinked and still open
        echo one > a && ln a b && test $(stat -c %h a) = 2 && test $(stat -c %i a) = $(stat -c %i b)
        echo two > c && mv c a && test $(cat a) = two && test $(cat b) = one && test $(stat -c %h b) = 1
        exec 5<>b; rm b; echo more >&5; test "$(cat <&5; cat /proc/self/fd/5)" = "one
more" || test "$(cat /proc/self/fd/5)" = more
        exec 5>&-
        # modes, set-id bits, owners
        touch m && chmod 4751 m && test $(stat -c %a m) = 4751 && chown 5:6 m && test $(stat -c %a:%u:%g m) = 751:5:6
        mkdir d && chmod 1777 d && test $(stat -c %a $HOST/d) = 1777
        (umask 027; touch u; mkdir ud); test $(stat -c %a u) = 640; test $(stat -c %a ud) = 750
        # programs, scripts
        cp /bin/true prog && ./prog && printf '#!/bin/sh\nexit 7\n' > sh && chmod +x sh && (./sh || test $? = 7)
        # sparse
        truncate -s 1G sparse && test $(stat -c %b sparse) = 0 && echo end >> sparse && test $(stat -c %b sparse) -lt 100
        cp --sparse=always sparse sparse2 && test $(stat -c %b sparse2) -lt 100 && cmp -n 5 -i 1073741824 sparse sparse2
        # append by two at once
        for w in 1 2; do (for i in $(seq 200); do echo $w >> log; done) & done; wait; test $(wc -l < log) = 400
        # locks (the guest's own)
        exec 6>lock; flock -n 6; ! flock -n lock true; exec 6>&-; flock -n lock true
        # fifos and sockets work inside, and stay names outside
        mkfifo fifo; (echo through > fifo &) ; test $(cat fifo) = through; test -p $HOST/fifo
        # times
        touch -d '1980-01-02 03:04:05.123456789 UTC' t && test "$(stat -c %Y t)" = 315630245
        test "$(TZ=UTC stat -c %y $HOST/t)" = '1980-01-02 03:04:05.123456789 +0000'
        touch -h -d @5 -t 197001010000.05 link 2>/dev/null || { ln -s nowhere link; touch -h -d @5 link; }
        test $(stat -c %Y link) = 5
        # names
        n=$(printf 'x%.0s' $(seq 255)); touch "$n" && ! touch "x$n"; touch $'new\nline' ' ' '-'; test -e "$HOST/"$'new\nline'
        "#,
    );
}

#[test]
fn attributes_and_capabilities_are_kept() {
    each_cache(
        "attributes",
        r#"
        cp /bin/true p
        python3 - p <<'PY'
import os, sys
p = sys.argv[1]
os.setxattr(p, "user.a", b"1" * 1000)
assert os.getxattr(p, "user.a") == b"1" * 1000
caps = bytes([1, 0, 0, 2, 0, 0x20] + [0] * 14)
os.setxattr(p, "security.capability", caps)
assert sorted(os.listxattr(p)) == ["security.capability", "user.a"], os.listxattr(p)
os.removexattr(p, "user.a")
try:
    os.setxattr(p, "trusted.x", b"")
    raise SystemExit("trusted.x was set")
except OSError as e:
    assert e.errno == 95, e
with open(p, "ab") as f:
    f.write(b"x")
assert os.listxattr(p) == [], os.listxattr(p)
PY
        "#,
    );
}

#[test]
fn mappings_are_shared_and_written_back() {
    each_cache(
        "mappings",
        r#"
        python3 - <<'PY'
import mmap, os
size = 4 << 20
with open("map", "w+b") as f:
    f.truncate(size)
    a = mmap.mmap(f.fileno(), size)
    with open("map", "r+b") as g:
        b = mmap.mmap(g.fileno(), size)
        for at in range(0, size, 4096 * 7):
            a[at:at + 5] = b"hello"
            assert b[at:at + 5] == b"hello"
        a.flush()
        host = os.environ["HOST"] + "/map"
        data = open(host, "rb").read()
        assert all(data[at:at + 5] == b"hello" for at in range(0, size, 4096 * 7))
        # write(2) and mapping see each other
        os.pwrite(g.fileno(), b"WORLD", 4096)
        assert a[4096:4101] == b"WORLD"
# O_APPEND and a mapping of the same descriptor
fd = os.open("log", os.O_RDWR | os.O_APPEND | os.O_CREAT)
os.write(fd, b"x" * 8192)
m = mmap.mmap(fd, 8192)
m[0:3] = b"abc"
m.flush()
os.write(fd, b"end")
assert os.stat("log").st_size == 8195, os.stat("log")
data = open(os.environ["HOST"] + "/log", "rb").read()
assert data == b"abc" + b"x" * 8189 + b"end", (len(data), data[:5], data[-5:])
PY
        dd if=/dev/urandom of=direct bs=1M count=8 oflag=direct 2>/dev/null
        dd if=direct bs=64k iflag=direct 2>/dev/null | cmp - $HOST/direct
        "#,
    );
}

#[test]
fn a_user_without_privileges_is_one_here_too() {
    script(
        "users",
        MountOptions::default(),
        r#"
        as() { setpriv --reuid 1234 --regid 1234 --groups "$@"; }
        as 1234 -- sh -c '! touch mine' 
        mkdir open && chmod 777 open && as 1234 -- touch open/mine && test $(stat -c %u:%g $HOST/open/mine) = 1234:1234
        # allowed by a supplementary group only: the guest's kernel decides, the host must not overrule it
        mkdir team && chgrp 4242 team && chmod 770 team
        as 1234,4242 -- touch team/file && test $(stat -c %u:%g $HOST/team/file) = 1234:1234
        as 1234 -- sh -c '! touch team/other'
        # a set-group-id directory
        chmod 2770 team && as 1234,4242 -- mkdir team/sub && test $(stat -c %u:%g:%a $HOST/team/sub) = 1234:4242:2755
        # writing drops set-id bits, truncating too
        cp /bin/true open/su && chmod 6777 open/su && as 1234 -- sh -c 'echo x >> open/su' && test $(stat -c %a open/su) = 777
        chmod 6777 open/su && as 1234 -- truncate -s 1 open/su && test $(stat -c %a open/su) = 777
        chmod 6777 open/su && as 1234 -- sh -c ': > open/su' && test $(stat -c %a $HOST/open/su) = 777
        "#,
    );
}

#[test]
fn packages_are_unpacked_as_dpkg_does() {
    script(
        "dpkg",
        MountOptions { cache: Cache::Exclusive, ..MountOptions::default() },
        r#"
        # A package of our own: nothing is fetched.
        work=$(mktemp -d); trap 'rm -rf $work' EXIT
        mkdir -p $work/p/DEBIAN $work/p/usr/bin $work/p/usr/share/doc/p
        printf 'Package: p\nVersion: 1\nArchitecture: all\nMaintainer: t <t@t>\nDescription: t\n' > $work/p/DEBIAN/control
        cp /bin/true $work/p/usr/bin/p; chmod 4755 $work/p/usr/bin/p; ln -s p $work/p/usr/bin/q; ln $work/p/usr/bin/p $work/p/usr/bin/r
        for i in $(seq 500); do echo $i > $work/p/usr/share/doc/p/$i; done
        dpkg-deb -b $work/p $work/p.deb >/dev/null
        dpkg -x $work/p.deb x && ./x/usr/bin/q && test $(stat -c %a $HOST/x/usr/bin/p) = 4755
        test $(stat -c %h x/usr/bin/r) = 2 && test $(ls x/usr/share/doc/p | wc -l) = 500
        # Into a root of its own, with dpkg's database (its way: write, fsync, rename over).
        mkdir -p tree/var/lib/dpkg/{info,updates} && : > tree/var/lib/dpkg/status
        for n in 1 2 3; do dpkg --force-all --root=$SHARE/tree --install $work/p.deb >/dev/null; done
        grep -q 'Status: install ok installed' $HOST/tree/var/lib/dpkg/status && ./tree/usr/bin/q
        dpkg --force-all --root=$SHARE/tree --purge p >/dev/null && test ! -e tree/usr/bin/p
        "#,
    );
}

#[test]
fn a_read_only_share_serves_programs_and_nothing_else() {
    script(
        "read-only",
        MountOptions { read_only: true, cache: Cache::Exclusive, layer: false },
        r#"
        cp /bin/true $HOST/prog; mkdir $HOST/d
        ./prog; ls -la >/dev/null
        for cmd in 'touch new' 'touch prog' 'rm prog' 'rmdir d' 'mkdir new' 'ln prog x' 'ln -s prog x' 'mv prog x' 'chmod 700 prog' 'sh -c "echo > prog"'; do
            ! eval "$cmd" 2>err.$$.txt 2>/dev/null
        done
        test "$(ls $HOST)" = "d
prog"
        "#,
    );
}

#[test]
fn what_the_host_changes_is_seen() {
    script(
        "changes of the host",
        MountOptions { cache: Cache::Live, ..MountOptions::default() },
        r#"
        echo 1 > f; for i in $(seq 2 50); do echo $i > $HOST/f; test $(cat f) = $i; done
        echo longer than before > $HOST/f; test $(stat -c %s f) = 19
        ls >/dev/null; touch $HOST/new; test -e new; rm $HOST/new; test ! -e new
        mv $HOST/f $HOST/g; test ! -e f; test -e g
        "#,
    );
}
