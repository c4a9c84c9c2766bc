//! How fast the link takes the bytes of one stream, for [`Policy`](super::Policy).
//!
//! A stream that waits in sending shows it: what the peer received in that time, by the time. A stream that does not wait
//! shows that the link is at least as fast as what went over it.
//!
//! The other end may be what is waited for: it has a page to install for each page that came, however short it came. Then
//! fewer bytes go over the link a second once pages are packed, and packing gains nothing. So the rates of packed and of
//! unpacked frames are kept apart, for as long as the link is what it was when they were compared.

use super::Measured;
use super::work::real;

/// How much of what was known is kept with each frame that waited.
const KEEP: f64 = 0.85;

/// A send has waited if it took so much longer than its processor time, and by so many seconds.
const WAITED: (f64, f64) = (1.5, 20e-6);

/// Frames after a change between packed and unpacked ones until only frames of the new kind are measured.
const SETTLED: u32 = 4;

/// Frames until what was compared once is compared again: one of the two may have been measured in a bad moment. It is
/// asked ever more rarely, as long as the link is the same.
const COMPARED: (u32, u32) = (16, 1024);

/// A link whose rate changes by more than this factor is another link.
const ANOTHER: f64 = 1.5;

/// A connection begins slowly: nothing is known before so many seconds and two round trips have passed.
const LONG_ENOUGH: f64 = 1e-3;

/// Nor before so many bytes or so many seconds: the other end takes its time for the first frame.
const BEGINNING: (f64, f64) = (3e6, 25e-3);

/// What is known of a kind of frames that was not sent lately counts for so many seconds.
const LITTLE: f64 = 100e-6;

/// Bytes and seconds over which the least that a link takes is looked at: shapers let bursts through, of some milliseconds of
/// the link's rate or of some packets, whichever is more. Over a shorter time a burst would be most of what is seen.
const WINDOW: (f64, f64) = (3e6, 50e-3);

/// Frames of fewer bytes show nothing.
const TOO_SMALL: u64 = 64 << 10;

/// The most of a buffer that is forgotten with each frame.
const BUFFER_KEEP: f64 = 0.98;

#[derive(Debug, Clone)]
pub(super) struct LinkRate {
    /// Bytes and seconds of waiting with frames of the present kind.
    bytes: f64,
    seconds: f64,
    packed: bool,
    settled: u32,
    other: Option<Other>,
    buffer: f64,
    unblocked: u32,
    /// How long the next comparison counts.
    compared: u32,
    /// Bytes that were received in the latest seconds that were spent on frames.
    observed: (f64, f64),
    /// Bytes and seconds of all frames, and whether that was enough to know the link.
    begun: (f64, f64),
    known: bool,
}

/// The rate of frames of the other kind, and that of the present kind when they were compared.
#[derive(Debug, Clone, Copy)]
struct Other {
    rate: f64,
    beside: Option<f64>,
    /// Frames since then.
    age: u32,
}

impl LinkRate {
    pub(super) fn new() -> Self {
        Self {
            bytes: 0.0,
            seconds: 0.0,
            packed: false,
            settled: 0,
            other: None,
            buffer: 0.0,
            unblocked: 0,
            compared: COMPARED.0,
            observed: (0.0, 0.0),
            begun: (0.0, 0.0),
            known: false,
        }
    }

    /// Bytes a second that the link takes of a stream with packed or unpacked frames, as far as that is known.
    pub(super) fn of(&self, packed: bool) -> Option<f64> {
        let present = self.present().filter(|_| self.known)?;
        let other = self.other.filter(|_| packed != self.packed);
        Some(other.map_or(present, |other| other.rate))
    }

    /// Bytes that are under way when a stream has sent a frame and begins the next: the link goes on with them meanwhile.
    pub(super) fn buffer(&self) -> f64 {
        self.buffer
    }

    /// Whether pages are packed and nobody knows how fast the link would take them unpacked.
    pub(super) fn lacks_raw(&self) -> bool {
        self.packed && self.other.is_none()
    }

    /// How many frames in a row did not wait.
    pub(super) fn unblocked(&self) -> u32 {
        self.unblocked
    }

    fn present(&self) -> Option<f64> {
        (self.seconds > 0.0).then(|| self.bytes / self.seconds)
    }

    /// Takes in how a frame was sent.
    pub(super) fn note(&mut self, packed: bool, measured: &Measured) {
        if measured.bytes < TOO_SMALL {
            return;
        }
        if packed != self.packed {
            self.change();
        }
        let (send, cpu) = (measured.send.as_secs_f64(), measured.send_cpu.as_secs_f64());
        let time = send + measured.between.as_secs_f64();
        let queued = real(measured.queued_after);
        let received_in = |before: u64| real(measured.bytes + before) - queued;
        let waited = send > cpu * WAITED.0 + WAITED.1;
        // A link that never ran dry was busy while the stream encoded, too.
        let busy = if measured.queued_before > 0 { time } else { send };
        let received = received_in(if measured.queued_before > 0 { measured.queued_last } else { 0 });
        if !self.known {
            self.bytes += received_in(measured.queued_before).max(1.0);
            self.seconds += send;
        } else if waited && received > 0.0 {
            self.unblocked = 0;
            (self.bytes, self.seconds) = (self.bytes * KEEP + received, self.seconds * KEEP + busy);
        } else {
            self.unblocked += 1;
        }
        self.begun = (self.begun.0 + real(measured.bytes), self.begun.1 + time);
        let (bytes, seconds) = self.begun;
        let began = seconds > LONG_ENOUGH + 2.0 * measured.round_trip.as_secs_f64() && bytes > BEGINNING.0;
        self.known |= began || seconds > BEGINNING.1;
        self.at_least(received_in(measured.queued_last), time);
        self.settle();
        let on_its_way = self.present().unwrap_or(0.0) * measured.round_trip.as_secs_f64();
        self.buffer = (queued - on_its_way).max(self.buffer * BUFFER_KEEP).max(0.0);
    }

    /// What was received within a time is what the link takes at least.
    fn at_least(&mut self, bytes: f64, seconds: f64) {
        self.observed.0 += bytes;
        self.observed.1 += seconds;
        if self.observed.0 > WINDOW.0 && self.observed.1 > WINDOW.1 {
            self.look_back();
        }
    }

    /// Raises the rate to what was received lately, if that is more, and begins to look anew.
    pub(super) fn look_back(&mut self) {
        let (bytes, seconds) = std::mem::take(&mut self.observed);
        if bytes > WINDOW.0 && seconds > LONG_ENOUGH && self.present().is_none_or(|rate| bytes / seconds > rate) {
            (self.bytes, self.seconds) = (bytes.max(1.0), seconds);
        }
    }

    /// Frames are of the other kind from now on.
    fn change(&mut self) {
        let next = self.of(!self.packed);
        let before = self.present().filter(|_| self.settled == SETTLED);
        self.other = before.map(|rate| Other { rate, beside: None, age: 0 });
        self.packed = !self.packed;
        self.settled = 0;
        // What is known of the new kind counts as much as one frame.
        if let Some(rate) = next {
            (self.bytes, self.seconds) = (rate * LITTLE, LITTLE);
        }
    }

    fn settle(&mut self) {
        self.settled = (self.settled + 1).min(SETTLED);
        let Some((present, other)) = self.present().zip(self.other.as_mut()).filter(|_| self.settled == SETTLED) else {
            return;
        };
        let beside = *other.beside.get_or_insert(present);
        other.age += 1;
        if (present / beside).max(beside / present) > ANOTHER {
            (self.other, self.compared) = (None, COMPARED.0);
        } else if !self.packed && other.age > self.compared {
            (self.other, self.compared) = (None, (self.compared * 2).min(COMPARED.1));
        }
    }
}
