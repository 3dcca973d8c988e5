//! A tap of the lab machine, with its address, for as long as somebody holds a queue of it.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::run;

/// The interface. It is gone when the last of its queues is closed.
#[derive(Debug)]
pub struct Tap {
    name: String,
}

impl Tap {
    /// Makes interface `name` with `queues` queues, at `address` in a network of 24 bits.
    pub fn make(name: &str, queues: usize, address: Ipv4Addr, mtu: u16) -> Result<(Tap, Vec<OwnedFd>)> {
        run(Command::new("modprobe").arg("tun"))?.ok()?;
        let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
        let fds = (0..queues).map(|_| attach(name, flags)).collect::<Result<_>>()?;
        let (cidr, mtu) = (format!("{address}/24"), mtu.to_string());
        // Nothing that this host says by itself, as to find its neighbours by IPv6: the tests count.
        run(Command::new("sh").args(["-c", "echo 1 > /proc/sys/net/ipv6/conf/$1/disable_ipv6", "sh", name]))?;
        run(Command::new("ip").args(["address", "add", &cidr, "dev", name]))?.ok()?;
        run(Command::new("ip").args(["link", "set", name, "mtu", &mtu, "up"]))?.ok()?;
        Ok((Tap { name: name.into() }, fds))
    }

    /// Whether the host still has it.
    pub fn exists(&self) -> bool {
        Path::new("/sys/class/net").join(&self.name).exists()
    }
}

/// Opens one queue of interface `name`.
pub fn attach(name: &str, flags: libc::c_int) -> Result<OwnedFd> {
    let file = File::options().read(true).write(true).open("/dev/net/tun").context("open /dev/net/tun")?;
    // SAFETY: `ifreq` is plain old data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    ensure!(name.len() < request.ifr_name.len(), "{name} is too long for an interface");
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).context("flags of an interface")?;
    // SAFETY: TUNSETIFF reads and writes an `ifreq`, which `request` is and which lives during the call.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    ensure!(done == 0, "attach to {name}: {}", io::Error::last_os_error());
    Ok(file.into())
}
