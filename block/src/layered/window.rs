//! How much of a disk may be on its way at a time: enough to keep the way busy, and hardly more, since what the guest waits for
//! stands behind it where the way is narrowest.
//!
//! As TCP Vegas does it (L. Brakmo, L. Peterson, 1995): the shortest time that a request ever took is that of an empty way, and
//! what a request takes beyond that it has spent behind others. From both follows how many stand in line, and the window is
//! opened or closed until a few do. The way may become longer: so it is left nearly empty for a moment now and then, and
//! measured anew.

use std::time::{Duration, Instant};

/// The fewest and the most requests on their way.
const LEAST: f64 = 2.0;
const MOST: f64 = 128.0;
/// How many should stand in line: none would leave the way idle between two, and each is some time for the guest.
const FEW: f64 = 1.0;
const MANY: f64 = 3.0;
/// How much the window opens at first for each request that is done: by a quarter in a round trip, so that what stands in line
/// before the first of them is measured is no more than a quarter of what the way holds.
const OPENS_BY: f64 = 0.25;
/// How often the way is measured anew.
const EVERY: Duration = Duration::from_secs(10);

/// The window of one pull.
#[derive(Debug)]
pub(super) struct Window {
    size: f64,
    /// Whether nothing has stood in line yet: the window opens fast.
    is_new: bool,
    shortest: Option<Duration>,
    measured: Instant,
    /// Requests that were sent before this are not measured: the way was not empty then.
    measuring: Option<Instant>,
}

impl Window {
    pub(super) fn new(now: Instant) -> Self {
        Self { size: LEAST, is_new: true, shortest: None, measured: now, measuring: None }
    }

    /// How many requests may be on their way.
    pub(super) fn size(&self) -> usize {
        let size = if self.measuring.is_some() { LEAST } else { self.size };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is between 2 and 128")]
        let size = size as usize;
        size
    }

    /// Takes note that a request that was sent at `sent` is done.
    pub(super) fn done(&mut self, sent: Instant, now: Instant) {
        let took = now.saturating_duration_since(sent);
        if let Some(begun) = self.measuring {
            // Those that were on their way when measuring began stood in each other's way.
            if sent >= begun {
                (self.shortest, self.measured, self.measuring) = (Some(took), now, None);
            }
            return;
        }
        let shortest = self.shortest.map_or(took, |shortest| shortest.min(took));
        self.shortest = Some(shortest);
        let in_line = self.size * (1.0 - shortest.as_secs_f64() / took.as_secs_f64().max(f64::MIN_POSITIVE));
        if in_line < FEW {
            self.size += if self.is_new { OPENS_BY } else { 1.0 / self.size };
        } else {
            self.is_new = false;
            if in_line > MANY {
                self.size -= (in_line - MANY).min(self.size / 2.0) / self.size;
            }
        }
        self.size = self.size.clamp(LEAST, MOST);
        if now.saturating_duration_since(self.measured) >= EVERY {
            self.measuring = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    /// A way that takes so many requests in a second, one after the other, and so long for each besides.
    struct Way {
        window: Window,
        now: Instant,
        free: Instant,
        on_their_way: VecDeque<(Instant, Instant)>,
        per_request: Duration,
        round_trip: Duration,
    }

    impl Way {
        fn new(per_second: u32, round_trip_ms: u64) -> Self {
            let now = Instant::now();
            let per_request = Duration::from_secs(1) / per_second;
            let round_trip = Duration::from_millis(round_trip_ms);
            Self { window: Window::new(now), now, free: now, on_their_way: VecDeque::new(), per_request, round_trip }
        }

        /// Goes on for so long; how many were done in a second, and how long they stood in line at most.
        fn go_on(&mut self, time: Duration) -> (f64, Duration) {
            let (begun, mut done, mut longest) = (self.now, 0, Duration::ZERO);
            while self.now < begun + time {
                while self.on_their_way.len() < self.window.size() {
                    let passed = self.free.max(self.now) + self.per_request;
                    self.free = passed;
                    self.on_their_way.push_back((self.now, passed + self.round_trip));
                }
                let (sent, over) = self.on_their_way.pop_front().unwrap();
                self.now = over;
                longest = longest.max((over - sent).saturating_sub(self.round_trip + self.per_request));
                self.window.done(sent, over);
                done += 1;
            }
            (f64::from(done) / (self.now - begun).as_secs_f64(), longest)
        }
    }

    #[test]
    fn every_way_is_busy_and_hardly_anything_stands_in_line() {
        for (per_second, round_trip_ms) in [(1000, 0), (1000, 16), (1000, 64), (100, 16), (10, 100), (5000, 1)] {
            let mut way = Way::new(per_second, round_trip_ms);
            way.go_on(Duration::from_secs(4));
            let (rate, in_line) = way.go_on(Duration::from_secs(4));
            let what = format!("{per_second} in a second, {round_trip_ms} ms: {rate:.0}, {in_line:?}");
            assert!(rate >= f64::from(per_second) * 0.9, "{what}");
            assert!(in_line <= way.per_request * 8, "{what}");
        }
    }

    #[test]
    fn a_way_that_becomes_longer_is_busy_again() {
        let mut way = Way::new(1000, 4);
        way.go_on(Duration::from_secs(5));
        way.round_trip = Duration::from_millis(40);
        way.go_on(Duration::from_secs(20));
        let (rate, _) = way.go_on(Duration::from_secs(5));
        assert!(rate >= 800.0, "{rate}");
    }
}
