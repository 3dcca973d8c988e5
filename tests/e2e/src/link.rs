//! A link to a host of its own, a network namespace, that can be slow.

use anyhow::Result;

use crate::{Netns, run};
use std::process::Command;

/// A pair of veth interfaces, one of them in a network namespace. Both go when this is dropped.
#[derive(Debug)]
pub struct Link {
    namespace: Netns,
    far: String,
}

/// The far end's address.
pub const FAR: &str = "10.250.77.2";
const NEAR: &str = "10.250.77.1";

impl Link {
    /// Makes it, to a namespace called `name` (7 letters at most).
    pub fn make(name: &str) -> Result<Link> {
        let (near, far) = (format!("{name}-near"), format!("{name}-far"));
        let namespace = Netns::make(name)?;
        let ip = |words: &str| run(Command::new("ip").args(words.split(' ')))?.ok();
        ip(&format!("link add {near} type veth peer name {far} netns {name}"))?;
        ip(&format!("addr add {NEAR}/30 dev {near}"))?;
        ip(&format!("link set {near} up"))?;
        namespace.run(&format!("ip addr add {FAR}/30 dev {far}"))?;
        namespace.run(&format!("ip link set {far} up"))?;
        namespace.run("ip link set lo up")?;
        Ok(Link { namespace, far })
    }

    /// A command that runs at the far end.
    pub fn command(&self, program: &str) -> Command {
        self.namespace.command(program)
    }

    /// What comes from the far end comes at this rate, and so much later, both as `tc` understands them.
    pub fn slow_down(&self, rate: &str, delay: &str) -> Result<()> {
        let far = &self.far;
        self.namespace.run(&format!("tc qdisc add dev {far} root handle 1: netem delay {delay}"))?;
        let bucket = format!("tbf rate {rate} burst 64kb limit 1mb");
        self.namespace.run(&format!("tc qdisc add dev {far} parent 1:1 handle 10: {bucket}"))?;
        Ok(())
    }

    /// As fast as it can be again.
    pub fn speed_up(&self) -> Result<()> {
        self.namespace.run(&format!("tc qdisc del dev {} root", self.far)).map(drop)
    }
}
