//! Chunks on their way: however many want one, it is fetched once.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::watch;

/// Why a chunk did not come. Cheap to copy: all that wait get it.
#[derive(Debug, Clone)]
pub enum Failure {
    /// Broken or tampered.
    Bad(Arc<str>),
    /// Not to be had at all: missing, forbidden, or away for too long.
    Denied(Arc<str>),
    /// No room in the cache.
    NoSpace,
}

impl Failure {
    /// For a cause in words.
    pub fn bad(cause: impl std::fmt::Display) -> Self {
        Failure::Bad(cause.to_string().into())
    }

    /// The same for what cannot be had.
    pub fn denied(cause: impl std::fmt::Display) -> Self {
        Failure::Denied(cause.to_string().into())
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::Bad(cause) | Failure::Denied(cause) => f.write_str(cause),
            Failure::NoSpace => f.write_str("no room in the cache"),
        }
    }
}

/// How a flight ended.
pub type Landed = Result<(), Failure>;

/// One chunk on its way, as those see it that wait.
#[derive(Debug, Clone)]
pub struct Flight {
    /// Number of the source that it comes from.
    pub source: u64,
    landed: watch::Receiver<Option<Landed>>,
}

impl Flight {
    /// Waits for its end.
    pub async fn landed(mut self) -> Landed {
        match self.landed.wait_for(Option::is_some).await {
            Ok(landed) => landed.clone().unwrap_or(Ok(())),
            Err(_) => Err(Failure::bad("the fetch was abandoned")),
        }
    }
}

/// The end that brings it.
#[derive(Debug)]
pub struct Pilot(watch::Sender<Option<Landed>>);

impl Pilot {
    /// Ends the flight.
    pub fn land(self, landed: Landed) {
        self.0.send_replace(Some(landed));
    }
}

/// The flights of a cache file, by the chunk's offset.
#[derive(Debug, Default)]
pub struct Flights(HashMap<u64, Flight>);

impl Flights {
    /// The flight that brings a chunk.
    pub fn get(&self, offset: u64) -> Option<Flight> {
        // One whose pilot is lost will not land.
        let flies =
            |flight: &&Flight| flight.landed.borrow().is_none() && flight.landed.has_changed().is_ok();
        self.0.get(&offset).filter(flies).cloned()
    }

    /// Begins one.
    pub fn begin(&mut self, offset: u64, source: u64) -> (Pilot, Flight) {
        let (pilot, landed) = watch::channel(None);
        let flight = Flight { source, landed };
        self.0.insert(offset, flight.clone());
        (Pilot(pilot), flight)
    }

    /// Forgets one that has ended.
    pub fn end(&mut self, offset: u64) {
        self.0.remove(&offset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lost_pilot_is_a_failure_and_another_may_fly() {
        let mut flights = Flights::default();
        let (pilot, flight) = flights.begin(7, 1);
        assert!(flights.get(7).is_some() && flights.get(8).is_none());
        drop(pilot);
        assert!(flight.landed().await.is_err());
        assert!(flights.get(7).is_none(), "nobody waits for it");
        let (pilot, flight) = flights.begin(7, 2);
        pilot.land(Ok(()));
        assert!(flight.landed().await.is_ok());
    }
}
