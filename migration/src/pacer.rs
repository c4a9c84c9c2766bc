//! Holds all streams of a migration together to a cap of bytes a second.
//!
//! A token bucket, kept as the time at which the next byte is due. Frames go in pieces of [`PIECE`] worth of the cap at
//! most, and what was not used in the last [`BURST`] may be made up for; so no second sees more than their sum, 2 %, above
//! the cap, but for what threads oversleep. A stream sleeps for moments only, however large its frames are. What counts is
//! what streams hand to their links: the heads of TCP and IP come on top.

use crate::bell::Bell;
use crate::clock::Clock;
use crate::link::{Link, LinkError};
use crate::region::PAGE_SIZE;
use std::fmt;
use std::num::{NonZeroU16, NonZeroU64};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vm_memory::VolatileSlice;

/// The longest piece of a frame, in time.
const PIECE: Duration = Duration::from_millis(5);

/// How much may be made up for: a thread that slept for a moment sleeps longer on a busy host.
const BURST: Duration = Duration::from_millis(15);

/// The most content of a frame of each stream together, in time: between two frames a source looks whether it should go on.
const FRAME: Duration = Duration::from_millis(250);

/// How often the bell of a pacer has rung that is in force.
const NEVER: u64 = 0;

const NANOSECONDS: u128 = 1_000_000_000;

/// When bytes may go, by virtual time.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    bytes_per_second: NonZeroU64,
    /// When the next byte is due.
    due: Duration,
}

impl Bucket {
    /// Takes room for `bytes` bytes; how long to wait from `now` until they may go.
    fn take(&mut self, bytes: usize, now: Duration) -> Duration {
        let begin = self.due.max(now.saturating_sub(BURST));
        let nanoseconds = bytes as u128 * NANOSECONDS / u128::from(self.bytes_per_second.get());
        let length = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        self.due = begin.saturating_add(length);
        begin.saturating_sub(now)
    }

    /// The most bytes to go at once.
    fn piece(&self) -> usize {
        self.bytes_in(PIECE).max(1)
    }

    fn bytes_in(&self, time: Duration) -> usize {
        let bytes = u128::from(self.bytes_per_second.get()) * time.as_nanos() / NANOSECONDS;
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }
}

/// The cap that all streams of a migration share.
#[derive(Debug)]
pub(crate) struct Pacer {
    bucket: Mutex<Bucket>,
    streams: NonZeroU16,
    /// Rings when nobody is to wait any more.
    released: Bell,
}

impl Pacer {
    /// A cap for so many streams together.
    pub(crate) fn new(bytes_per_second: NonZeroU64, streams: NonZeroU16) -> Self {
        let bucket = Bucket { bytes_per_second, due: Duration::ZERO };
        Self { bucket: Mutex::new(bucket), streams, released: Bell::new() }
    }

    /// How many pages with content there should be in a frame at most.
    pub(crate) fn pages_per_frame(&self) -> u32 {
        let bytes = self.lock().bytes_in(FRAME) / usize::from(self.streams.get());
        u32::try_from(bytes / PAGE_SIZE).unwrap_or(u32::MAX).max(1)
    }

    /// Lets all who wait go at once, now and later: their links are cut.
    pub(crate) fn release(&self) {
        self.released.ring();
    }

    fn lock(&self) -> MutexGuard<'_, Bucket> {
        // A bucket is whole after each call.
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A pacer, and the clock by which it is kept.
#[derive(Clone, Copy)]
pub(crate) struct Pace<'a> {
    pub(crate) pacer: &'a Pacer,
    pub(crate) clock: &'a dyn Clock,
}

impl fmt::Debug for Pace<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pace").field("pacer", self.pacer).finish_non_exhaustive()
    }
}

impl Pace<'_> {
    /// Sends `head` and `payload` over the link, each piece when its turn has come.
    pub(crate) fn send<L: Link>(
        &self,
        link: &mut L,
        head: &[u8],
        payload: &[VolatileSlice<'_>],
    ) -> Result<(), LinkError> {
        let mut frame = Frame { head, payload, offset: 0 };
        loop {
            let most = self.pacer.lock().piece();
            let (head, payload) = frame.take(most);
            let bytes = head.len() + payload.iter().map(VolatileSlice::len).sum::<usize>();
            if bytes == 0 {
                return Ok(());
            }
            self.await_turn(link, bytes);
            link.send(head, &payload)?;
        }
    }

    fn await_turn<L: Link>(&self, link: &mut L, bytes: usize) {
        let now = self.clock.now();
        let wait = self.pacer.lock().take(bytes, now);
        if !wait.is_zero() {
            link.idle(&self.pacer.released, NEVER, wait);
        }
    }
}

/// What is left to send of a frame.
struct Frame<'f, 'm> {
    head: &'f [u8],
    payload: &'f [VolatileSlice<'m>],
    /// Bytes of the first slice of the payload that went.
    offset: usize,
}

impl<'f, 'm> Frame<'f, 'm> {
    /// Takes the first `most` bytes, or what there is.
    fn take(&mut self, most: usize) -> (&'f [u8], Vec<VolatileSlice<'m>>) {
        let (head, rest) = self.head.split_at(self.head.len().min(most));
        self.head = rest;
        let (mut room, mut slices) = (most - head.len(), Vec::new());
        while let Some((first, others)) = self.payload.split_first()
            && room > 0
        {
            let bytes = (first.len() - self.offset).min(room);
            slices.push(first.subslice(self.offset, bytes).expect("a part of the slice"));
            (room, self.offset) = (room - bytes, self.offset + bytes);
            if self.offset == first.len() {
                (self.payload, self.offset) = (others, 0);
            }
        }
        (head, slices)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: u64 = 10_000_000;

    fn bucket(rate: u64) -> Bucket {
        Bucket { bytes_per_second: NonZeroU64::new(rate).unwrap(), due: Duration::ZERO }
    }

    /// The most bytes in any second, of pieces at these moments.
    fn busiest_second(pieces: &[(Duration, usize)]) -> usize {
        let sum = |from: Duration| {
            let second = pieces.iter().filter(|(at, _)| (from..from + Duration::from_secs(1)).contains(at));
            second.map(|(_, bytes)| bytes).sum()
        };
        pieces.iter().map(|(at, _)| sum(*at)).max().unwrap()
    }

    #[test]
    fn no_second_sees_more_than_the_cap_and_a_twentieth() {
        for rate in [1000, RATE, 1_250_000_000] {
            let mut bucket = bucket(rate);
            let (mut now, mut pieces, mut sent) = (Duration::ZERO, Vec::new(), 0);
            // Some streams that oversleep, and one that comes back after a long while.
            for piece in 0..1000_u32 {
                now += bucket.take(bucket.piece(), now) + Duration::from_micros((piece % 7 * 1000).into());
                if piece == 500 {
                    now += Duration::from_secs(10);
                }
                pieces.push((now, bucket.piece()));
                sent += bucket.piece();
            }
            let most = bucket.bytes_in(Duration::from_millis(1050));
            assert!(busiest_second(&pieces) <= most, "{rate}: {} in a second", busiest_second(&pieces));
            let average = sent as f64 / (now - Duration::from_secs(10)).as_secs_f64();
            assert!(average >= rate as f64 * 0.95, "{rate}: oversleeping costs throughput: {average}");
        }
    }

    #[test]
    fn what_is_due_waits_for_what_went_before() {
        let mut bucket = bucket(RATE);
        let now = Duration::from_secs(7);
        assert_eq!(bucket.take(150_000, now), Duration::ZERO, "the burst");
        assert_eq!(bucket.take(100_000, now), Duration::ZERO);
        assert_eq!(bucket.take(100_000, now), Duration::from_millis(10));
        assert_eq!(bucket.take(100_000, now + Duration::from_millis(15)), Duration::from_millis(5));
        assert_eq!(self::bucket(1).piece(), 1);
        assert_eq!(self::bucket(1).take(usize::MAX, now), Duration::ZERO);
    }

    #[test]
    fn a_frame_is_cut_into_pieces_in_order() {
        let (head, mut pages) = ([1, 2, 3, 4, 5], [[6_u8; 4], [7; 4]]);
        let payload: Vec<_> = pages.iter_mut().map(|page| VolatileSlice::from(&mut page[..])).collect();
        for most in 1..20 {
            let mut frame = Frame { head: &head, payload: &payload, offset: 0 };
            let mut bytes = Vec::new();
            loop {
                let (head, slices) = frame.take(most);
                let before = bytes.len();
                bytes.extend(head);
                for slice in slices {
                    let mut copy = vec![0; slice.len()];
                    slice.copy_to(&mut copy[..]);
                    bytes.extend(copy);
                }
                assert!(bytes.len() - before <= most);
                if bytes.len() == before {
                    break;
                }
            }
            assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 6, 6, 6, 7, 7, 7, 7], "pieces of {most}");
        }
    }
}
