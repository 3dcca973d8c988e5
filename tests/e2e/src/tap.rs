//! A tap of the lab machine, with its address, for as long as somebody holds a queue of it.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

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
        let fds = tap::open(name, queues).with_context(|| format!("attach to {name}"))?;
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
