//! A long way between two network namespaces: a tap in each, and two threads that carry the frames from one to the other, each
//! way with a rate, a delay and a loss. It needs no netem, which not every kernel has. The taps offer no offloads, so that
//! frames are no longer than the wire's.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, spawn};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use devices::virtio::net::{MAX_FRAME, Port, Tap};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::cell::Far;
use super::random::SplitMix;
use crate::network::Rate;

/// How long frames wait at most for those before them, as in the buffer of a router; those that would wait longer are lost.
const BUFFER: Duration = Duration::from_millis(50);

/// How long nothing comes before the threads look whether they are to end.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Frames that are read before some are written.
const AT_ONCE: usize = 64;

/// Two taps, and what is between them, until this is dropped.
#[derive(Debug)]
pub(super) struct Distance {
    over: Arc<AtomicBool>,
    carriers: Vec<JoinHandle<()>>,
}

impl Distance {
    /// Makes a tap `device` in each of the two namespaces, whose files these are, and joins them.
    pub(super) fn lay(namespaces: [File; 2], device: &'static str, rate: Rate, far: Far) -> Result<Self> {
        let [near, there] = namespaces.map(|namespace| tap_in(namespace, device));
        let (near, there) = (near?, there?);
        let over = Arc::new(AtomicBool::new(false));
        let ways = [(near.try_clone()?, there.try_clone()?, 1), (there, near, 2)];
        let carriers = ways.map(|(from, to, seed)| {
            let (over, way) = (Arc::clone(&over), Way::new(rate, far, seed));
            spawn(move || carry(&from, &to, way, &over))
        });
        Ok(Self { over, carriers: carriers.into() })
    }
}

impl Drop for Distance {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for carrier in self.carriers.drain(..) {
            // One that panicked has been heard.
            let _ = carrier.join();
        }
    }
}

/// A tap that is visible in another namespace: a thread is in one of its own choice, and ends with it.
fn tap_in(namespace: File, device: &'static str) -> Result<Tap> {
    let make = move || -> Result<Tap> {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        Ok(Tap::open(device)?)
    };
    spawn(make).join().map_err(|_| anyhow!("The thread that makes a tap has panicked"))?.context("Cannot make a tap")
}

/// Carries frames until it is over. A frame that the other tap does not take is lost, as on any wire.
fn carry(from: &Tap, to: &Tap, mut way: Way, over: &AtomicBool) {
    let mut frame = vec![0; MAX_FRAME];
    while !over.load(Ordering::Relaxed) {
        for _ in 0..AT_ONCE {
            match from.file().read(&mut frame) {
                Ok(length) => way.enter(&frame[..length], Instant::now()),
                Err(_) => break,
            }
        }
        while let Some(frame) = way.leave(Instant::now()) {
            let _ = to.file().write(&frame);
            way.spare.push(frame);
        }
        let timeout =
            way.next().map_or(LOOK_EVERY, |due| due.saturating_duration_since(Instant::now()).min(LOOK_EVERY));
        let timeout = Timespec::try_from(timeout).ok();
        let _ = poll(&mut [PollFd::new(from.file(), PollFlags::IN)], timeout.as_ref());
    }
}

/// One direction: frames under way, and when each arrives.
#[derive(Debug)]
struct Way {
    bytes_per_second: f64,
    delay: Duration,
    loss: f64,
    chance: SplitMix,
    free_at: Option<Instant>,
    under_way: VecDeque<(Instant, Vec<u8>)>,
    spare: Vec<Vec<u8>>,
}

impl Way {
    fn new(rate: Rate, far: Far, seed: u64) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "rates are far below 2^53")]
        let bytes_per_second = rate.bits() as f64 / 8.0;
        let (delay, loss) = (far.round_trip / 2, far.loss);
        let (under_way, spare) = (VecDeque::new(), Vec::new());
        Self { bytes_per_second, delay, loss, chance: SplitMix(seed), free_at: None, under_way, spare }
    }

    fn enter(&mut self, frame: &[u8], now: Instant) {
        let begins = self.free_at.map_or(now, |free_at| free_at.max(now));
        if self.is_lost() || begins > now + BUFFER {
            return;
        }
        let bytes = f64::from(u32::try_from(frame.len()).unwrap_or(u32::MAX));
        let gone = begins + Duration::from_secs_f64(bytes / self.bytes_per_second);
        self.free_at = Some(gone);
        let mut kept = self.spare.pop().unwrap_or_default();
        kept.clear();
        kept.extend(frame);
        self.under_way.push_back((gone + self.delay, kept));
    }

    fn next(&self) -> Option<Instant> {
        self.under_way.front().map(|(due, _)| *due)
    }

    fn leave(&mut self, now: Instant) -> Option<Vec<u8>> {
        self.under_way.pop_front_if(|(due, _)| *due <= now).map(|(_, frame)| frame)
    }

    fn is_lost(&mut self) -> bool {
        let drawn = u32::try_from(self.chance.next() >> 32).expect("half of 64 bits");
        f64::from(drawn) < self.loss * f64::from(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEGABIT: Rate = Rate::from_megabits(1);

    fn way(round_trip_ms: u64, loss: f64) -> Way {
        Way::new(MEGABIT, Far { round_trip: Duration::from_millis(round_trip_ms), loss }, 1)
    }

    #[test]
    fn frames_take_turns_and_half_a_round_trip() {
        let (mut way, start) = (way(16, 0.0), Instant::now());
        way.enter(&[1; 1250], start); // 10 ms at this rate
        way.enter(&[2; 125], start);
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!((way.next(), way.leave(at(17))), (Some(at(18)), None));
        assert_eq!(way.leave(at(18)).as_deref(), Some(&[1; 1250][..]));
        assert_eq!((way.leave(at(18)), way.next()), (None, Some(at(19))));
        assert_eq!(way.leave(at(30)).as_deref(), Some(&[2; 125][..]));
        way.enter(&[3; 125], at(40)); // the wire was idle
        assert_eq!(way.next(), Some(at(49)));
    }

    #[test]
    fn what_would_wait_too_long_is_lost() {
        let (mut way, start) = (way(0, 0.0), Instant::now());
        (0..10).for_each(|_| way.enter(&[0; 1250], start));
        assert_eq!(way.under_way.len(), 6, "those that wait for 0, 10, up to 50 ms");
    }

    #[test]
    fn the_loss_is_as_wished() {
        let (mut way, start) = (way(0, 0.01), Instant::now());
        let lost = (0..100_000).filter(|_| way.is_lost()).count();
        assert!((900..1100).contains(&lost), "{lost}");
        assert!(!(0..1000).any(|_| Way { loss: 0.0, ..Way::new(MEGABIT, Far::default(), 3) }.is_lost()));
        way.loss = 1.0;
        way.enter(&[0; 100], start);
        assert_eq!(way.next(), None);
    }
}
