//! The policy that chooses codecs while a migration runs: what makes a page end soonest over this link, on this guest.
//!
//! One pure object for all streams of a migration: no clock, no I/O, no thread. A stream asks it how to make its next frame
//! ([`Policy::choose`]) and tells it what became of the frame ([`Policy::note`]). From that it keeps three accounts:
//! - [`link`]: how fast the link takes the bytes of one stream while the stream waits for it, and how many it buffers;
//! - [`work`]: what each codec costs in processor time and gains in bytes on the pages seen lately;
//! - [`mod@forecast`]: what the next pages would take under each combination of codecs; the best one is chosen.
//!
//! A codec that was not tried yet is believed to be as good as it usually is, and so is tried where that would pay: on a
//! slow link at once, on a fast one in a short frame, on a link that takes raw pages faster than it could ever work not at
//! all. One that does not pay is let go, and tried again after ever more frames.

mod forecast;
mod link;
mod why;
mod work;

pub use why::{Chosen, Why};

use crate::codec::Codecs;
use crate::codec::block::{Packing, ZstdLevel};
use crate::counts::PageCounts;
use forecast::{Forecast, forecast};
use link::LinkRate;
use std::time::Duration;
use work::Work;

/// The ways to pack that are considered, from the one that takes least time to the one that packs smallest.
const PACKINGS: [Packing; 6] = [
    Packing::Stored,
    Packing::Lz4,
    Packing::Zstd(ZstdLevel::MIN),
    Packing::Zstd(ZstdLevel::new(3).expect("there is a level 3")),
    Packing::Zstd(ZstdLevel::new(6).expect("there is a level 6")),
    Packing::Zstd(ZstdLevel::MAX),
];

/// Pages of a frame that only tries a codec: few enough to cost nothing, enough to tell.
const TRIAL_PAGES: u32 = 64;

/// Bytes of a page, on average, below which packing has little left to do.
const SHORT: f64 = 1024.0;

/// What another combination of codecs must gain to be worth a change, as a share: the accounts are noisy.
const WORTH_A_CHANGE: f64 = 0.03;

/// The share of the time that each cheap codec may take where it is not known to gain anything: equal pages and changes
/// are only found by one that was on before they came.
const CHANCE: f64 = 0.01;

/// What a second of processor time is worth, in seconds of the migration: the guest and the other end need processors, too.
const CPU_PRICE: f64 = 0.1;

/// How far over its budget encoding may get, in seconds of processor time, before it pauses: an average, not a limit.
const OVERDRAFT: f64 = 0.05;

/// Frames that are sent unpacked then: more than a shaper lets through at once.
const RAW_FRAMES: u32 = 4;

/// Frames in a row that did not wait for the link, after which nobody knows how fast it is.
const LONG_UNKNOWN: u32 = 16;

/// What does not change in a migration.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Terms {
    /// Processors of this host.
    pub(crate) cpus: f64,
    /// How many of them encoding may take, on average.
    pub(crate) budget: f64,
    /// How many streams share the link and the budget.
    pub(crate) streams: u16,
    /// Whether pages may be sent again, so that copies of them are of use.
    pub(crate) resends: bool,
    /// Whether both ends are on this host: the link is memory then.
    pub(crate) same_host: bool,
}

/// How to make the next frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Choice {
    /// The codecs to try on each page, and the packing of the rest.
    pub(crate) codecs: Codecs,
    /// The most pages to take that are not zero, if there is a limit beside those of every frame.
    pub(crate) pages: Option<u32>,
}

/// What became of one frame.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Measured {
    /// Its pages, by the way they went.
    pub(crate) pages: PageCounts,
    /// Bytes of the runs and of the changes among them.
    pub(crate) rle_bytes: u64,
    pub(crate) delta_bytes: u64,
    /// Bytes of its block before and after packing.
    pub(crate) block: u64,
    pub(crate) packed: u64,
    /// Processor time that looking at its pages and encoding them one by one took, that packing the block took, and that
    /// the kernel took to send it.
    pub(crate) pages_cpu: Duration,
    pub(crate) pack_cpu: Duration,
    pub(crate) send_cpu: Duration,
    /// How long sending took, and the time since this stream had sent the frame before.
    pub(crate) send: Duration,
    pub(crate) between: Duration,
    /// Bytes that were sent.
    pub(crate) bytes: u64,
    /// Bytes that the peer had not received when the last frame was sent, when this one was begun to be sent, and when it
    /// was sent.
    pub(crate) queued_last: u64,
    pub(crate) queued_before: u64,
    pub(crate) queued_after: u64,
    /// The link's round trip.
    pub(crate) round_trip: Duration,
}

/// The policy of one migration.
#[derive(Debug)]
pub(crate) struct Policy {
    terms: Terms,
    link: LinkRate,
    work: Work,
    current: (Codecs, Why),
    /// Frames that are still to be sent unpacked to see what the link takes.
    raw_left: u32,
    round: u32,
    /// Processor time that encoding took, and time that passed, over all streams, in seconds.
    spent: f64,
    elapsed: f64,
    /// What the round was sent by, and how many pages that are not zero.
    tally: Vec<(Codecs, Why, u64)>,
}

impl Policy {
    pub(crate) fn new(terms: Terms) -> Self {
        let cheap = Codecs { rle: true, dedup: true, ..Codecs::ZERO };
        // Between two hosts a link is taken to be slow until it is measured, which is after a frame or two: equal pages are
        // found only if the first of them was looked at.
        let first = if terms.same_host { Codecs::ZERO } else { cheap };
        let mut work = Work::new();
        work.changed(&first);
        Self {
            terms,
            link: LinkRate::new(),
            work,
            current: (first, Why::Unmeasured),
            raw_left: 0,
            round: 0,
            spent: 0.0,
            elapsed: 0.0,
            tally: Vec::new(),
        }
    }

    /// Begins a round.
    pub(crate) fn begin_round(&mut self, round: u32) {
        self.round = round;
        self.work.begin_round(round);
        self.tally.clear();
    }

    /// How the next frame is to be made, by whichever stream asks.
    pub(crate) fn choose(&mut self) -> Choice {
        self.work.frame();
        if self.overdrawn() {
            self.work.changed(&Codecs::ZERO);
            self.current = (Codecs::ZERO, Why::Budget);
            return Choice { codecs: Codecs::ZERO, pages: None };
        }
        let Some(best) = self.best() else { return Choice { codecs: self.current.0, pages: None } };
        let codecs = best.0;
        self.work.changed(&codecs);
        self.current = best;
        if self.looks_at_link() {
            let raw = Codecs { packing: Packing::Stored, ..codecs };
            return Choice { codecs: raw, pages: None };
        }
        Choice { codecs, pages: self.work.is_trial().then_some(TRIAL_PAGES) }
    }

    /// Whether to send a few frames unpacked: because packing keeps the link waiting and nobody knows what it could take, or
    /// because the rate has changed and what looks like the link may be the other end.
    fn looks_at_link(&mut self) -> bool {
        let packs = self.current.0.packing != Packing::Stored;
        let unknown = |policy: &mut Self| policy.link.unblocked() >= LONG_UNKNOWN && policy.work.try_raw();
        if self.raw_left == 0 && packs && (self.link.lacks_raw() || unknown(self)) {
            self.raw_left = RAW_FRAMES;
            self.link.look_back();
        } else if self.raw_left > 0 {
            self.raw_left -= 1;
            if self.raw_left == 0 {
                self.link.look_back();
            }
        }
        packs && self.raw_left > 0
    }

    /// Takes in what became of a frame that was made as `codecs` say.
    pub(crate) fn note(&mut self, codecs: &Codecs, measured: &Measured) {
        self.work.note(codecs, measured, self.round);
        self.link.note(codecs.packing != Packing::Stored, measured);
        self.spent += (measured.pages_cpu + measured.pack_cpu).as_secs_f64();
        // Each stream has its own time, so all of them together pass time as often as there are streams.
        self.elapsed += (measured.between + measured.send).as_secs_f64() / f64::from(self.terms.streams);
        let why = if self.current.0 == *codecs { self.current.1 } else { Why::Trial };
        // Zero pages are the same to all codecs.
        let count = measured.pages.all() - measured.pages.zero;
        match self.tally.iter_mut().find(|(of, because, _)| of == codecs && *because == why) {
            Some((_, _, pages)) => *pages += count,
            None => self.tally.push((*codecs, why, count)),
        }
    }

    /// What most pages of the round went by, and why.
    pub(crate) fn chosen(&self) -> Chosen {
        let most = self.tally.iter().max_by_key(|(_, _, pages)| pages);
        let (codecs, why) = most.map_or(self.current, |(codecs, why, _)| (*codecs, *why));
        let streams = f64::from(self.terms.streams);
        Chosen { codecs, why, link_bytes_per_second: self.link.of(false).map(|rate| rate * streams) }
    }

    /// The best combination and what speaks for it; `None` while nothing is known of the link.
    fn best(&self) -> Option<(Codecs, Why)> {
        self.link.of(false)?;
        let now = (self.current.0, self.forecast(&self.current.0));
        let all: Vec<_> = candidates(&self.terms).map(|codecs| (codecs, self.forecast(&codecs))).collect();
        // What takes no more processor time than now need not promise much.
        let eager = |of: &Forecast| if of.encode > now.1.encode { of.score / (1.0 - WORTH_A_CHANGE) } else { of.score };
        let fitting = all.iter().filter(|(_, forecast)| forecast.fits);
        let least = fitting.min_by(|(_, a), (_, b)| eager(a).total_cmp(&eager(b)));
        let best = match least {
            Some(least) if !now.1.fits || eager(&least.1) < now.1.score => *least,
            Some(_) => now,
            None => (Codecs::ZERO, now.1),
        };
        let enough = best.1.score * (1.0 - WORTH_A_CHANGE);
        let over_budget = all.iter().any(|(_, forecast)| !forecast.fits && forecast.score < enough);
        Some((best.0, self.why(&best, over_budget)))
    }

    /// What speaks for a combination.
    fn why(&self, (codecs, forecast): &(Codecs, Forecast), over_budget: bool) -> Why {
        let could_pack = || {
            let usually = self.work.with_usual_packing();
            let packed = |packing: &Packing| self.forecast_with(&Codecs { packing: *packing, ..*codecs }, &usually);
            PACKINGS[1..].iter().any(|packing| packed(packing).score < forecast.score)
        };
        if over_budget {
            Why::Budget
        } else if codecs.packing != Packing::Stored {
            Why::SlowLink
        } else if forecast.bytes < SHORT {
            Why::ShortPages
        } else if could_pack() {
            Why::NothingGained
        } else {
            Why::FastLink
        }
    }

    fn forecast(&self, codecs: &Codecs) -> Forecast {
        self.forecast_with(codecs, &self.work)
    }

    fn forecast_with(&self, codecs: &Codecs, work: &Work) -> Forecast {
        forecast(codecs, work, &self.link, &self.terms)
    }

    fn overdrawn(&self) -> bool {
        self.terms.budget < self.terms.cpus && self.spent > self.terms.budget * self.elapsed + OVERDRAFT
    }
}

/// Every combination that may be chosen.
fn candidates(terms: &Terms) -> impl Iterator<Item = Codecs> {
    let deltas = if terms.resends { [false, true].as_slice() } else { &[false] };
    let cheap = deltas.iter().flat_map(|delta| {
        [(false, false), (true, false), (false, true), (true, true)].map(|(rle, dedup)| (rle, *delta, dedup))
    });
    cheap.flat_map(|(rle, delta, dedup)| PACKINGS.map(|packing| Codecs { zero: true, rle, delta, dedup, packing }))
}

#[cfg(test)]
mod tests;
