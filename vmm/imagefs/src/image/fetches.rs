//! What has been asked of the image service and not been answered yet.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use vmm_api::image::{Fetch, Fetched, MAX_FETCH_BLOCKS};

use super::channel::{Channel, Lost};
use super::files::Span;

/// Most wishes under way at a time. More wait here for their turn.
const MAX_IN_FLIGHT: usize = 64;
/// Blocks that are ready, or asked for, between two that are not: up to so many, both are asked for at once. The service fetches
/// whole chunks, which are larger.
const NEIGHBOURHOOD: u64 = 32;

/// A wish under way.
#[derive(Debug)]
pub struct Flight {
    /// What was asked for.
    pub span: Span,
    since: Instant,
}

/// What was sent.
#[derive(Debug, Default)]
pub struct Asked {
    /// How many wishes.
    pub wishes: u64,
    /// For how many blocks.
    pub blocks: u64,
}

/// The wishes under way, and the connection that they went by.
#[derive(Debug)]
pub struct Fetches {
    channel: Option<Channel>,
    in_flight: BTreeMap<u64, Flight>,
    next_tag: u64,
    /// The connection had no room for the last wish.
    clogged: bool,
}

impl Fetches {
    /// None yet.
    pub fn new(channel: Channel) -> Self {
        Fetches { channel: Some(channel), in_flight: BTreeMap::new(), next_tag: 1, clogged: false }
    }

    /// The connection, unless it has been lost.
    pub fn channel(&self) -> Option<&Channel> {
        self.channel.as_ref()
    }

    /// Goes on with another connection, which knows nothing of what was asked before.
    pub fn connect(&mut self, channel: Channel) {
        (self.channel, self.clogged) = (Some(channel), false);
        self.in_flight.clear();
    }

    /// Closes the connection. What was under way will not be answered.
    pub fn hang_up(&mut self) {
        (self.channel, self.clogged) = (None, false);
        self.in_flight.clear();
    }

    /// Whether a wish waits for room on the connection.
    pub fn is_clogged(&self) -> bool {
        self.clogged
    }

    /// There may be room again, or nothing left to send.
    pub fn unclog(&mut self) {
        self.clogged = false;
    }

    /// Tags of wishes under way that will make blocks of `spans` ready.
    pub fn tags_for(&self, spans: &[Span]) -> Vec<u64> {
        let relevant = |flight: &Flight| spans.iter().any(|span| span.overlaps(&flight.span));
        self.in_flight.iter().filter(|(_, flight)| relevant(flight)).map(|(tag, _)| *tag).collect()
    }

    /// Asks for `spans`, as far as there is room: without what is under way already, neighbours together.
    pub fn ask(&mut self, spans: &[Span], now: Instant) -> Result<Asked, Lost> {
        let under_way: Vec<Span> = self.in_flight.values().map(|flight| flight.span).collect();
        let mut asked = Asked::default();
        for span in together(without(spans, &under_way)) {
            if self.ask_alone(span, now)?.is_none() {
                break;
            }
            asked.wishes += 1;
            asked.blocks += span.end - span.first;
        }
        Ok(asked)
    }

    /// Asks for `span`, at most as large as a wish can be, whatever else is under way. Its tag, if there was room for it.
    pub fn ask_alone(&mut self, span: Span, now: Instant) -> Result<Option<u64>, Lost> {
        let Some(channel) = &self.channel else { return Ok(None) };
        if self.in_flight.len() >= MAX_IN_FLIGHT {
            return Ok(None);
        }
        let tag = self.next_tag;
        let blocks = u32::try_from(span.end - span.first).expect("cut to what a wish can be");
        self.clogged = !channel.send(Fetch { tag, blob: span.blob, blocks, first: span.first })?;
        if self.clogged {
            return Ok(None);
        }
        self.next_tag += 1;
        self.in_flight.insert(tag, Flight { span, since: now });
        Ok(Some(tag))
    }

    /// The next answer, with what it answers.
    pub fn answer(&mut self) -> Result<Option<(Fetched, Flight)>, Lost> {
        let Some(channel) = &self.channel else { return Ok(None) };
        let Some(answer) = channel.receive()? else { return Ok(None) };
        let flight = self.in_flight.remove(&answer.tag).ok_or(Lost::Stranger { tag: answer.tag })?;
        Ok(Some((answer, flight)))
    }

    /// Gives a service up that has taken all wishes it can and answered none for `patience`.
    pub fn check(&self, patience: Duration, now: Instant) -> Result<(), Lost> {
        let latest = self.in_flight.values().map(|flight| flight.since).max();
        let stuck = latest.is_some_and(|since| now.saturating_duration_since(since) >= patience);
        if self.in_flight.len() == MAX_IN_FLIGHT && stuck {
            return Err(Lost::Stuck { count: MAX_IN_FLIGHT });
        }
        Ok(())
    }
}

/// `spans` cut to what one wish can be.
pub fn cut(span: Span) -> impl Iterator<Item = Span> {
    let step = u64::from(MAX_FETCH_BLOCKS);
    (0..(span.end - span.first).div_ceil(step)).map(move |n| {
        let first = span.first + n * step;
        Span { first, end: span.end.min(first + step), ..span }
    })
}

/// What of `spans` is in none of `others`.
fn without(spans: &[Span], others: &[Span]) -> Vec<Span> {
    let mut left = spans.to_vec();
    for other in others {
        left = left
            .into_iter()
            .flat_map(|span| {
                if !span.overlaps(other) {
                    return [Some(span), None];
                }
                let before = Span { end: other.first.max(span.first), ..span };
                let after = Span { first: other.end.min(span.end), ..span };
                [before, after].map(|part| Some(part).filter(|part| part.first < part.end))
            })
            .flatten()
            .collect();
    }
    left
}

/// `spans` in order, neighbours in one, cut to what a wish can be.
fn together(mut spans: Vec<Span>) -> Vec<Span> {
    spans.sort_unstable();
    let mut merged: Vec<Span> = Vec::new();
    for span in spans {
        match merged.last_mut() {
            Some(last) if last.blob == span.blob && span.first <= last.end + NEIGHBOURHOOD => {
                last.end = last.end.max(span.end);
            }
            _ => merged.push(span),
        }
    }
    merged.into_iter().flat_map(cut).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn span(blob: u32, first: u64, end: u64) -> Span {
        Span { blob, first, end }
    }

    #[test]
    fn neighbours_are_asked_for_together() {
        let most = u64::from(MAX_FETCH_BLOCKS);
        let asked = together(vec![span(0, 40, 50), span(0, 0, 8), span(1, 8, 9), span(0, 83, 84)]);
        assert_eq!(asked, [span(0, 0, 50), span(0, 83, 84), span(1, 8, 9)]);
        let asked = together(vec![span(3, 5, 5 + most * 2 + 1)]);
        assert_eq!(
            asked,
            [span(3, 5, 5 + most), span(3, 5 + most, 5 + most * 2), span(3, 5 + most * 2, 6 + most * 2)]
        );
    }

    #[test]
    fn what_is_under_way_is_not_asked_for_again() {
        let under_way = [span(0, 10, 20), span(1, 0, 100)];
        let spans = [span(0, 0, 15), span(0, 12, 18), span(0, 8, 30), span(2, 12, 13)];
        assert_eq!(
            without(&spans, &under_way),
            [span(0, 0, 10), span(0, 8, 10), span(0, 20, 30), span(2, 12, 13)]
        );
    }

    fn spans() -> impl Strategy<Value = Vec<Span>> {
        let one =
            (0u32..3, 0u64..3000, 1u64..1500).prop_map(|(blob, first, len)| span(blob, first, first + len));
        prop::collection::vec(one, 0..12)
    }

    proptest! {
        /// Every block that is wanted is asked for or under way, and no wish is longer than it may be.
        #[test]
        fn no_block_is_forgotten(wanted in spans(), under_way in spans()) {
            let asked = together(without(&wanted, &under_way));
            for span in &asked {
                prop_assert!(span.first < span.end && span.end - span.first <= u64::from(MAX_FETCH_BLOCKS));
            }
            let has = |spans: &[Span], blob, block| {
                spans.iter().any(|span| span.contains(&Span { blob, first: block, end: block + 1 }))
            };
            for want in &wanted {
                for block in (want.first..want.end).step_by(7).chain([want.end - 1]) {
                    prop_assert!(has(&asked, want.blob, block) || has(&under_way, want.blob, block));
                }
            }
        }
    }
}
