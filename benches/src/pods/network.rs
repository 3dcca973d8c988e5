//! Throughput and latency between the host and a pod, and between the host and a bare guest behind a tap.

use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result};
use benches::rows::Row;
use benches::subject::Subject;
use cri::{Cri, Pod};
use e2e::vm::Guest;

use crate::device::{Link, Qemu};
use crate::traffic::{self, Servers};
use crate::{CTVM, Handler, RUNC};

/// Most counted rounds: streams are long.
const MOST_ROUNDS: usize = 5;

/// One end of the traffic, alive, and its figures.
#[derive(Debug)]
struct End {
    place: &'static str,
    subject: String,
    servers: Servers,
    /// MB/s.
    sent: Vec<f64>,
    /// MB/s.
    received: Vec<f64>,
    /// µs.
    round_trips: Vec<f64>,
    _alive: Alive,
}

/// What ends when it is dropped.
#[derive(Debug)]
enum Alive {
    Pod { _pod: Box<Pod> },
    Guest { _guest: Guest },
    Qemu { _qemu: Qemu },
}

/// Runs the part.
pub fn measure(cri: &Cri, runs: usize) -> Result<Vec<Row>> {
    let mut ends = vec![pod(cri, CTVM)?, pod(cri, RUNC)?, ctvm(Link(1))?, qemu(Link(2), false)?];
    if Path::new("/dev/vhost-net").exists() {
        ends.push(qemu(Link(3), true)?);
    }
    for round in 0..=runs.min(MOST_ROUNDS) {
        for end in &mut ends {
            end.measure(round).with_context(|| format!("{} of {}", end.place, end.subject))?;
        }
    }
    let mut rows = Vec::new();
    for place in ["pod", "tap"] {
        let of_place = || ends.iter().filter(|end| end.place == place);
        let mut add = |what: &str, unit, values: fn(&End) -> &Vec<f64>| {
            for end in of_place() {
                let name = format!("{place}, {what}");
                rows.extend(Row::of("pods", name, &end.subject, unit, values(end).clone()));
            }
        };
        add("TCP from the host", "MB/s", |end| &end.sent);
        add("TCP to the host", "MB/s", |end| &end.received);
        add("TCP round trip", "µs", |end| &end.round_trips);
    }
    Ok(rows)
}

impl End {
    fn new(place: &'static str, subject: impl Into<String>, servers: Servers, alive: Alive) -> End {
        let (sent, received, round_trips) = (vec![], vec![], vec![]);
        End { place, subject: subject.into(), servers, sent, received, round_trips, _alive: alive }
    }

    /// One round of all quantities; the first one is not counted.
    fn measure(&mut self, round: usize) -> Result<()> {
        let (sent, received) = (self.servers.send()?, self.servers.receive()?);
        let round_trips = self.servers.round_trips()?;
        eprintln!("{}, round {round}: {} {sent} and {received} MB/s", self.place, self.subject);
        if round > 0 {
            self.sent.push(sent);
            self.received.push(received);
            self.round_trips.extend(round_trips);
        }
        Ok(())
    }
}

fn pod(cri: &Cri, handler: Handler) -> Result<End> {
    let pod = Pod::run(cri, handler.name).with_context(|| handler.name)?;
    pod.start(&pod.container(&["sh", "-c", &traffic::servers()]))?;
    let address: IpAddr = pod.address()?.parse().context("the pod's address")?;
    Ok(End::new("pod", handler.subject, Servers::at(address)?, Alive::Pod { _pod: Box::new(pod) }))
}

fn ctvm(link: Link) -> Result<End> {
    let guest = link.ctvm()?;
    let servers = Servers::at(link.guest().into())?;
    Ok(End::new("tap", Subject::Ctvm.name()?, servers, Alive::Guest { _guest: guest }))
}

fn qemu(link: Link, vhost: bool) -> Result<End> {
    let qemu = link.qemu(vhost)?;
    let servers = Servers::at(link.guest().into()).with_context(|| qemu.console())?;
    let name = Subject::Qemu.name()?;
    let subject = if vhost { format!("{name}, vhost-net") } else { name.to_owned() };
    Ok(End::new("tap", subject, servers, Alive::Qemu { _qemu: qemu }))
}
