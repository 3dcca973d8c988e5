//! Guests with a network device on a tap and nothing around them: our VMM's device and QEMU's, with the same kernel,
//! root and servers.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::process::Child;

use anyhow::{Context, Result};
use benches::subject;
use command_fds::{CommandFdExt, FdMapping};
use e2e::Tap;
use e2e::vm::{Guest, GuestSpec, ROOT_CMDLINE, make_root};
use tempfile::TempDir;

use crate::traffic;

const MTU: u16 = 1500;
/// Under which QEMU gets the tap.
const TAP_FD: i32 = 10;

/// A tap with a guest behind it: `10.7.N.1` and `10.7.N.2`.
#[derive(Debug, Clone, Copy)]
pub struct Link(pub u8);

impl Link {
    /// The guest's address.
    pub fn guest(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 7, self.0, 2)
    }

    /// A tap of one queue, and its descriptor.
    fn tap(self) -> Result<OwnedFd> {
        let (_, mut fds) =
            Tap::make(&format!("ctvm-bench{}", self.0), 1, Ipv4Addr::new(10, 7, self.0, 1), MTU)?;
        fds.pop().context("a tap without a queue")
    }

    /// What the guest runs.
    fn script(self) -> String {
        format!("ip address add {}/24 dev eth0; ip link set eth0 up\n{}", self.guest(), traffic::servers())
    }

    fn mac(self) -> [u8; 6] {
        [2, 0, 0, 0, 7, self.0]
    }

    /// Starts our VMM.
    pub fn ctvm(self) -> Result<Guest> {
        let mut spec = GuestSpec {
            nets: vec![(vec![self.tap()?], self.mac(), MTU)],
            script: self.script(),
            ..GuestSpec::default()
        };
        spec.memory.size_mib = subject::MEMORY_MIB;
        spec.boot()
    }

    /// Starts QEMU, with its own device or with the kernel's (`vhost`).
    pub fn qemu(self, vhost: bool) -> Result<Qemu> {
        let folder = tempfile::Builder::new().prefix("qemu").tempdir_in("/var/tmp")?;
        let root = make_root(folder.path(), &self.script(), &[])?;
        let console = folder.path().join("console");
        let mut command = subject::qemu(&format!("console=hvc0 quiet panic=-1 reboot=t {ROOT_CMDLINE}"));
        let vhost = if vhost { "on" } else { "off" };
        let mac = self.mac().map(|byte| format!("{byte:02x}")).join(":");
        command
            .args(["-drive", &format!("id=root,file={},format=raw,if=none,readonly=on", root.display())])
            .args(["-device", "virtio-blk-device,drive=root"])
            .args(["-chardev", &format!("file,id=console,path={}", console.display())])
            .args(["-device", "virtio-serial-device", "-device", "virtconsole,chardev=console"])
            .args(["-netdev", &format!("tap,id=net,fd={TAP_FD},vhost={vhost}")])
            .args(["-device", &format!("virtio-net-device,netdev=net,mac={mac}")])
            .fd_mappings(vec![FdMapping { parent_fd: self.tap()?, child_fd: TAP_FD }])?;
        let vmm = command.spawn().context("start QEMU")?;
        Ok(Qemu { vmm, folder })
    }
}

/// A running QEMU.
#[derive(Debug)]
pub struct Qemu {
    vmm: Child,
    folder: TempDir,
}

impl Qemu {
    /// What its guest has said.
    pub fn console(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("console")).unwrap_or_default()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
    }
}
