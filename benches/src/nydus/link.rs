//! A registry behind a link of chosen speed: a network namespace of its own, and what comes out of it held back by `netem`.

use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use e2e::{Netns, SHARE, Service, run};
use tempfile::TempDir;

/// Where the registry is.
pub const REGISTRY: &str = "10.77.0.2:5000";
const GATEWAY: &str = "10.77.0.1/24";
const NAMESPACE: &str = "bench-registry";
const OURS: &str = "bench-reg0";
const THEIRS: &str = "bench-reg1";

/// How fast the link is. The delay is that of what the registry sends, and so of each round trip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speed {
    /// As the figures name it.
    pub name: &'static str,
    /// Rate and delay in tc's words; `None`: as fast as the CPU moves bytes.
    shape: Option<(&'static str, &'static str)>,
}

/// The slowest first.
pub const SPEEDS: [Speed; 3] = [
    Speed { name: "100 Mbit/s, 5 ms", shape: Some(("100mbit", "5ms")) },
    Speed { name: "1 Gbit/s, 1 ms", shape: Some(("1gbit", "1ms")) },
    NO_LIMIT,
];

/// Neither rate nor delay.
pub const NO_LIMIT: Speed = Speed { name: "no limit", shape: None };

/// The registry, and the link to it.
#[derive(Debug)]
pub struct Link {
    // Ends before its namespace does.
    _registry: Service,
    namespace: Netns,
    _store: TempDir,
}

impl Link {
    /// Starts Debian's registry with the store that `cargo xtask bench` has made.
    pub fn start() -> Result<Link> {
        // In memory, since in exact time the clock runs on while the lab waits for its own disks.
        let store = tempfile::Builder::new().prefix("registry").tempdir_in("/var/tmp")?;
        let ready_made = Path::new(SHARE).join("registry/docker");
        run(Command::new("cp").arg("-r").arg(&ready_made).arg(store.path()))?
            .ok()
            .context("copy the registry's store")?;
        let namespace = Netns::make(NAMESPACE)?;
        let ip = |words: &str| run(Command::new("ip").args(words.split(' ')))?.ok().context(words.to_owned());
        ip(&format!("link add {OURS} type veth peer name {THEIRS} netns {NAMESPACE}"))?;
        ip(&format!("address add {GATEWAY} dev {OURS}"))?;
        ip(&format!("link set {OURS} up"))?;
        let address = REGISTRY.split(':').next().unwrap_or_default();
        namespace.run(&format!("ip address add {address}/24 dev {THEIRS}"))?;
        namespace.run(&format!("ip link set {THEIRS} up"))?;
        let config = store.path().join("registry.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: warn}}\nhttp: {{addr: {REGISTRY}}}\nstorage: {{filesystem: {{rootdirectory: {}}}, \
             maintenance: {{uploadpurging: {{enabled: false}}, readonly: {{enabled: true}}}}}}\n",
            store.path().display()
        );
        fs::write(&config, text)?;
        let mut serve = Command::new("ip");
        serve.args(["netns", "exec", NAMESPACE, "docker-registry", "serve"]).arg(&config);
        serve.stdout(Stdio::null()).stderr(Stdio::null());
        let registry = Service::start(&mut serve, || TcpStream::connect(REGISTRY).is_ok())?;
        Ok(Link { _registry: registry, namespace, _store: store })
    }

    /// Makes the link as fast as that.
    pub fn set(&self, speed: Speed) -> Result<()> {
        let discipline = match speed.shape {
            Some((rate, delay)) => format!("netem rate {rate} delay {delay}"),
            None => "pfifo".to_owned(),
        };
        self.namespace.run(&format!("tc qdisc replace dev {THEIRS} root {discipline}")).map(drop)
    }

    /// Bytes that have come over the link, headers and all.
    pub fn received(&self) -> Result<u64> {
        let path = Path::new("/sys/class/net").join(OURS).join("statistics/rx_bytes");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        text.trim().parse().with_context(|| format!("{} holds {text:?}", path.display()))
    }
}
