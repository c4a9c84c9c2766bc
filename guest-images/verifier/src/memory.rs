//! The memory mode: a working set that is verified before it is rewritten, page by page, without end.
//!
//! The pass over the working set says which generation each page must have: those behind the cursor the current one,
//! those before it the last. So a page that a migration forgot, took twice or mixed up is found at the next look at it.
//! The cold part is written once and read only by reports.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::fault::Faults;
use crate::pattern::{Page, Stream};
use crate::worker::Work;

/// Pages of one step: half a millisecond, or ten under an emulator.
const STEP: usize = 256;
/// A dirtier with a rate does its work this often.
const BEAT: Duration = Duration::from_millis(2);

/// What the memory mode found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryReport {
    /// Pages in the working set.
    pub pages: u64,
    /// Pages that are written once.
    pub cold_pages: u64,
    /// Pages written since the start.
    pub written: u64,
    /// Pages verified since the start.
    pub verified: u64,
    /// Pages that were wrong.
    pub faults: Faults,
}

impl MemoryReport {
    /// Adds what another thread found.
    pub fn merge(&mut self, other: Self) {
        let Self { pages, cold_pages, written, verified, faults } = other;
        self.pages += pages;
        self.cold_pages += cold_pages;
        self.written += written;
        self.verified += verified;
        self.faults.merge(faults);
    }
}

/// One thread's share of the working set.
#[derive(Debug)]
pub struct Dirtier {
    stream: Stream,
    hot: Vec<Page>,
    cold: Vec<Page>,
    cursor: usize,
    generation: u64,
    pace: Pace,
    written: u64,
    verified: u64,
    faults: Faults,
}

/// How fast to dirty.
#[derive(Clone, Copy, Debug)]
pub enum Rate {
    /// As fast as it goes.
    Unlimited,
    /// So many pages per second.
    PagesPerSecond(u32),
}

#[derive(Debug)]
struct Pace {
    rate: Rate,
    since: Instant,
    owed: f64,
}

impl Dirtier {
    /// The generation of the cold pages, and of the hot ones before the first pass.
    const FIRST: u64 = 1;

    /// Allocates and fills the pages.
    pub fn new(stream: Stream, hot: usize, cold: usize, rate: Rate) -> Self {
        let mut dirtier = Self {
            stream,
            hot: vec![Page::zeroed(); hot],
            cold: vec![Page::zeroed(); cold],
            cursor: 0,
            generation: Self::FIRST + 1,
            pace: Pace { rate, since: Instant::now(), owed: 0.0 },
            written: 0,
            verified: 0,
            faults: Faults::default(),
        };
        for (number, page) in dirtier.hot.iter_mut().chain(&mut dirtier.cold).enumerate() {
            page.fill(stream, number as u64, Self::FIRST);
        }
        dirtier
    }

    fn rewrite_next(&mut self) {
        let number = self.cursor as u64;
        self.check_hot(self.cursor, self.generation - 1);
        self.hot[self.cursor].fill(self.stream, number, self.generation);
        self.written += 1;
        self.cursor += 1;
        if self.cursor == self.hot.len() {
            self.cursor = 0;
            self.generation += 1;
        }
    }

    fn check_hot(&mut self, place: usize, generation: u64) {
        self.verified += 1;
        if let Err(mismatch) = self.hot[place].check(self.stream, place as u64, generation) {
            self.faults.add(format!("hot {mismatch}"));
            // Told once; what the next report says of this page is what happens to it from now on.
            self.hot[place].fill(self.stream, place as u64, generation);
        }
    }

    fn verify_all(&mut self) {
        for place in 0..self.hot.len() {
            let generation = if place < self.cursor { self.generation } else { self.generation - 1 };
            self.check_hot(place, generation);
        }
        for (number, page) in (self.hot.len()..).zip(&mut self.cold) {
            self.verified += 1;
            if let Err(mismatch) = page.check(self.stream, number as u64, Self::FIRST) {
                self.faults.add(format!("cold {mismatch}"));
                page.fill(self.stream, number as u64, Self::FIRST);
            }
        }
    }
}

impl Work for Dirtier {
    type Report = MemoryReport;

    fn step(&mut self) -> Duration {
        if self.hot.is_empty() {
            return Duration::from_secs(1);
        }
        let (pages, rest) = self.pace.next(Instant::now());
        (0..pages).for_each(|_| self.rewrite_next());
        rest
    }

    fn report(&mut self) -> MemoryReport {
        self.verify_all();
        MemoryReport {
            pages: self.hot.len() as u64,
            cold_pages: self.cold.len() as u64,
            written: self.written,
            verified: self.verified,
            faults: self.faults.clone(),
        }
    }
}

impl Pace {
    /// How many pages to write now, and how long to rest then. A pause of the guest is not made up for.
    fn next(&mut self, now: Instant) -> (usize, Duration) {
        let Rate::PagesPerSecond(rate) = self.rate else { return (STEP, Duration::ZERO) };
        let passed = now.saturating_duration_since(self.since).min(Duration::from_millis(100));
        self.since = now;
        self.owed += passed.as_secs_f64() * f64::from(rate);
        let mut pages = 0;
        while self.owed >= 1.0 && pages < STEP {
            self.owed -= 1.0;
            pages += 1;
        }
        // Behind by more than a step: rest not at all, and forget what cannot be done.
        if self.owed >= 1.0 {
            self.owed = 0.0;
            return (pages, Duration::ZERO);
        }
        (pages, BEAT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirtier(hot: usize, cold: usize) -> Dirtier {
        Dirtier::new(Stream(1), hot, cold, Rate::Unlimited)
    }

    #[test]
    fn sound_memory_has_no_faults() {
        let mut dirtier = dirtier(1000, 10);
        for _ in 0..10 {
            assert_eq!(dirtier.step(), Duration::ZERO);
            assert!(dirtier.report().faults.none());
        }
        let report = dirtier.report();
        assert_eq!((report.pages, report.cold_pages, report.written), (1000, 10, 10 * STEP as u64));
        assert_eq!(report.verified, report.written + 11 * 1010);
    }

    #[test]
    fn a_stale_page_is_found_once_where_it_is_met() {
        // The pattern has zero pages of which two generations are alike: take a page that has changed.
        let mut dirtier = dirtier(100, 0);
        let before = dirtier.hot.clone();
        (0..250).for_each(|_| dirtier.rewrite_next());
        let stale = (60..100).find(|&place| dirtier.hot[place] != before[place]).unwrap();
        dirtier.hot[stale] = before[stale].clone();
        (0..49).for_each(|_| dirtier.rewrite_next());
        assert!(dirtier.rewrites_until_fault(stale) <= 1);
        let report = dirtier.report();
        assert_eq!(report.faults.count, 1);
        assert!(report.faults.first[0].starts_with(&format!("hot page {stale} ")), "{report:?}");
        assert_eq!(dirtier.report().faults.count, 1);
    }

    impl Dirtier {
        fn rewrites_until_fault(&mut self, place: usize) -> usize {
            if !self.faults.none() || self.cursor > place {
                return 0;
            }
            self.rewrite_next();
            1
        }
    }

    #[test]
    fn a_damaged_cold_page_is_found_by_the_report() {
        let mut dirtier = dirtier(10, 10);
        dirtier.cold[4].fill(Stream(2), 14, 2);
        let report = dirtier.report();
        assert_eq!(report.faults.count, 1);
        assert!(report.faults.first[0].starts_with("cold page 14 of generation 1"), "{report:?}");
    }

    #[test]
    fn no_pages_are_no_work() {
        let mut dirtier = dirtier(0, 3);
        assert!(dirtier.step() > Duration::ZERO);
        assert!(dirtier.report().faults.none());
    }

    #[test]
    fn the_pace_is_kept_and_a_pause_is_not_made_up_for() {
        let start = Instant::now();
        let mut pace = Pace { rate: Rate::PagesPerSecond(10_000), since: start, owed: 0.0 };
        let mut at = |ms| pace.next(start + Duration::from_millis(ms)).0;
        let first_second: usize = (1..=500).map(|beat| at(beat * 2)).sum();
        assert!((9_900..=10_000).contains(&first_second), "{first_second}");
        // Ten seconds of being moved: one full step, then the old pace.
        assert_eq!(at(11_000), STEP);
        assert!(at(11_002) <= 21);
    }

    #[test]
    fn reports_add_up() {
        let mut sum = dirtier(3, 1).report();
        sum.merge(dirtier(4, 0).report());
        assert_eq!((sum.pages, sum.cold_pages, sum.verified), (7, 1, 8));
    }
}
