//! What a source measures as its rounds go by: how fast bytes go, what a dirty page costs, and what remained each time.
//!
//! Older rounds count half each time, so that the figures follow the link and the guest, but a short round does not decide
//! alone.

use super::{Goal, Stats, WINDOW, bytes, predict, ratio, stalls, whole};
use crate::counts::PageCounts;
use crate::region::PAGE_SIZE;
use std::time::Duration;

/// A round that is over, as far as it tells something about the next.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Round {
    /// From 1.
    pub(crate) number: u32,
    /// How its pages went.
    pub(crate) kinds: PageCounts,
    /// Bytes that went over the link.
    pub(crate) bytes: u64,
    /// Bytes that the target received in it.
    pub(crate) received: u64,
    /// How long it took.
    pub(crate) time: Duration,
}

/// What it is like after a round.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Standing {
    /// Since the start of the migration.
    pub(crate) elapsed: Duration,
    /// Pages that were written in the round.
    pub(crate) dirty_pages: u64,
    /// Pages that it did not come to.
    pub(crate) unsent_pages: u64,
    /// Bytes that the target has not received yet.
    pub(crate) in_flight: u64,
    /// The link's round trip.
    pub(crate) round_trip: Duration,
    /// How long the look at the dirty log took.
    pub(crate) log_time: Duration,
    /// The share of its time that is taken from the guest.
    pub(crate) throttle: f64,
}

/// The measurements of a migration.
#[derive(Debug, Clone)]
pub(crate) struct Trend {
    /// The most bytes a second that may be sent.
    cap: f64,
    received: f64,
    time: f64,
    sent: f64,
    pages: f64,
    last_time: Duration,
    recent: Vec<u64>,
    stalled_rounds: u32,
    cheap_rounds: u32,
}

impl Trend {
    pub(crate) fn new(cap: Option<u64>) -> Self {
        Self {
            cap: cap.map_or(f64::INFINITY, bytes),
            received: 0.0,
            time: 0.0,
            sent: 0.0,
            pages: 0.0,
            last_time: Duration::ZERO,
            recent: Vec::with_capacity(WINDOW + 1),
            stalled_rounds: 0,
            cheap_rounds: 0,
        }
    }

    /// Adds a round.
    pub(crate) fn add(&mut self, round: Round) {
        let Round { number, kinds, bytes: sent, received, time } = round;
        self.received = self.received / 2.0 + bytes(received);
        self.time = self.time / 2.0 + time.as_secs_f64();
        self.last_time = time;
        // The zero pages of the first round are those that nobody uses; later ones were written just now. Where most went as
        // digests, what they cost says nothing of pages.
        let told = kinds.sent() - kinds.zero - kinds.kept;
        if kinds.kept <= told {
            self.sent = self.sent / 2.0 + bytes(sent);
            self.pages = self.pages / 2.0 + bytes(if number == 1 { told } else { kinds.all() });
        }
    }

    /// The bytes that so many dirty pages will be on the link.
    fn cost(&self, pages: u64) -> f64 {
        let whole = bytes(PAGE_SIZE as u64);
        let page = if self.pages > 0.0 { (self.sent / self.pages).min(whole) } else { whole };
        page * bytes(pages)
    }

    /// How it stands after a round.
    pub(crate) fn stats(&mut self, round: u32, standing: Standing) -> Stats<'_> {
        let Standing { elapsed, dirty_pages, unsent_pages, in_flight, round_trip, log_time, throttle } = standing;
        let remaining = whole(self.cost(dirty_pages + unsent_pages)) + in_flight;
        if unsent_pages == 0 {
            // What a round that was cut short has left says nothing about the guest.
            push(&mut self.recent, remaining);
        }
        let last = self.last_time.as_secs_f64();
        Stats {
            round,
            elapsed,
            remaining,
            recent: &self.recent,
            dirtied_per_second: if last > 0.0 { self.cost(dirty_pages) / last } else { 0.0 },
            bytes_per_second: if self.time > 0.0 { (self.received / self.time).min(self.cap) } else { 0.0 },
            round_trip,
            log_time,
            stalled_rounds: self.stalled_rounds,
            cheap_rounds: self.cheap_rounds,
            throttle,
        }
    }

    /// Remembers, for the rounds to come, what was true after the last one.
    pub(crate) fn note(&mut self, verdict: Verdict) {
        (self.stalled_rounds, self.cheap_rounds) = verdict.counted(self.stalled_rounds, self.cheap_rounds);
    }

    /// How what remained changed with the last round.
    pub(crate) fn last_ratio(&self) -> f64 {
        last_ratio(&self.recent)
    }
}

/// How what remained changed with the last round; 1 before there were two.
pub(super) fn last_ratio(recent: &[u64]) -> f64 {
    match *recent {
        [.., before, now] => ratio(now, before),
        _ => 1.0,
    }
}

/// Adds what remains after a round, and forgets the oldest.
pub(super) fn push(recent: &mut Vec<u64>, remaining: u64) {
    recent.push(remaining);
    recent.drain(..recent.len().saturating_sub(WINDOW));
}

/// What a round has shown of the downtime goal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Holds,
    Open,
    Stalls,
}

impl Verdict {
    pub(crate) fn of(stats: &Stats<'_>, goal: &Goal) -> Self {
        if predict(stats, goal) <= goal.max_downtime {
            Self::Holds
        } else if stalls(stats, goal) {
            Self::Stalls
        } else {
            Self::Open
        }
    }

    /// The numbers of rounds in a row that stalled, and of those that were sent although the goal held, after this one.
    pub(super) fn counted(self, stalled: u32, cheap: u32) -> (u32, u32) {
        match self {
            Self::Stalls => (stalled + 1, cheap),
            Self::Holds => (0, cheap + 1),
            Self::Open => (0, cheap),
        }
    }
}
