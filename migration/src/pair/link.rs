//! A link in memory with virtual time, and faults by frame.
//!
//! Time passes in two ways only: sending takes it (bandwidth), and when both ends wait and nothing is under way, it jumps
//! to the end of the shorter wait. So a test of a half-minute timeout takes microseconds, and never depends on the load
//! of the machine.

use super::Weather;
use crate::CancelToken;
use crate::clock::Clock;
use crate::link::{Link, LinkError};
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;
use vm_memory::VolatileSlice;

/// Bytes a second: 1 GB/s.
const NANOSECONDS_PER_BYTE: u64 = 1;

pub(crate) const SOURCE: usize = 0;
pub(crate) const TARGET: usize = 1;

/// What happens to one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Harm {
    /// The link is cut before it.
    Cut,
    /// The link is cut in the middle of it.
    CutInside,
    /// The link is cut right after it.
    CutAfter,
    /// It and all after it vanish, and the sender does not notice.
    Stall,
    /// It and all after it do not go out, and the sender waits in vain.
    Block,
    /// Its head is replaced by noise.
    Garbage,
    /// One bit of its head is flipped.
    Flip,
    /// One bit of its pages is flipped.
    FlipPage,
    /// It alone vanishes.
    Lose,
    /// It comes twice.
    Double,
    /// It comes after the next.
    Swap,
}

impl Harm {
    /// All but the one that only a comparison of memory can find.
    pub(crate) const FOUND: [Self; 10] = [
        Self::Cut,
        Self::CutInside,
        Self::CutAfter,
        Self::Stall,
        Self::Block,
        Self::Garbage,
        Self::Flip,
        Self::Lose,
        Self::Double,
        Self::Swap,
    ];
}

/// Harm to the frame of this number, from 0, of those that one end sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FaultAt {
    pub(crate) sender: usize,
    pub(crate) frame: usize,
    pub(crate) harm: Harm,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Party {
    Busy,
    Waiting { until: Duration },
    Gone,
}

#[derive(Debug, Default)]
struct Way {
    bytes: VecDeque<u8>,
    frames: usize,
    stalled: bool,
    blocked: bool,
    held_back: Option<Vec<u8>>,
}

#[derive(Debug)]
struct State {
    now: Duration,
    cut: bool,
    parties: [Party; 2],
    ways: [Way; 2],
    weather: Weather,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    cancel: CancelToken,
}

/// One end of the link.
#[derive(Debug)]
pub(crate) struct End {
    shared: Arc<Shared>,
    side: usize,
    patience: Duration,
}

/// The time that one end's thread sees. When it is dropped, the other end need not wait for this one any more.
#[derive(Debug)]
pub(crate) struct VirtualClock {
    shared: Arc<Shared>,
    side: usize,
}

pub(crate) fn connect(weather: Weather, cancel: &CancelToken) -> (End, End, [VirtualClock; 2]) {
    let (parties, ways) = ([Party::Busy; 2], [Way::default(), Way::default()]);
    let state = Mutex::new(State { now: Duration::ZERO, cut: false, parties, ways, weather });
    let shared = Arc::new(Shared { state, changed: Condvar::new(), cancel: cancel.clone() });
    let end = |side| End { shared: Arc::clone(&shared), side, patience: Duration::from_secs(1) };
    let clock = |side| VirtualClock { shared: Arc::clone(&shared), side };
    (end(SOURCE), end(TARGET), [clock(SOURCE), clock(TARGET)])
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Waits until `done` or for `limit`; `false` in the latter case.
    fn wait(&self, side: usize, limit: Duration, done: impl Fn(&State) -> bool) -> bool {
        let mut state = self.lock();
        let until = state.now + limit;
        loop {
            if done(&state) || state.now >= until {
                state.parties[side] = Party::Busy;
                return done(&state);
            }
            state.parties[side] = Party::Waiting { until };
            match state.parties[1 - side] {
                Party::Busy => state = self.changed.wait(state).unwrap(),
                Party::Gone => state.now = until,
                Party::Waiting { until: other } => {
                    state.now = until.min(other).max(state.now);
                    state.wake(1 - side);
                    self.changed.notify_all();
                }
            }
        }
    }
}

impl State {
    /// Something happened that this end may have waited for: it counts as busy until it has looked.
    fn wake(&mut self, side: usize) {
        if matches!(self.parties[side], Party::Waiting { .. }) {
            self.parties[side] = Party::Busy;
        }
    }

    /// Puts a frame on its way, with the harm that the weather has for it.
    fn send(&mut self, side: usize, patience: Duration, head: &[u8], pages: &[u8]) -> Result<(), LinkError> {
        let frame = self.ways[side].frames;
        self.ways[side].frames += 1;
        self.now += Duration::from_nanos((head.len() + pages.len()) as u64 * NANOSECONDS_PER_BYTE);
        let broken = || LinkError::Io(io::ErrorKind::BrokenPipe.into());
        if self.cut {
            return Err(broken());
        }
        let harm = self.weather.faults.iter().find(|fault| (fault.sender, fault.frame) == (side, frame));
        let (mut bytes, way) = ([head, pages].concat(), &mut self.ways[side]);
        match harm.map(|fault| fault.harm) {
            None => {}
            Some(Harm::Cut) => self.cut = true,
            Some(Harm::CutInside) => {
                way.bytes.extend(&bytes[..bytes.len() / 2]);
                self.cut = true;
            }
            Some(Harm::CutAfter) => {
                way.bytes.extend(&bytes);
                self.cut = true;
                return Ok(());
            }
            Some(Harm::Stall) => way.stalled = true,
            Some(Harm::Block) => way.blocked = true,
            Some(Harm::Garbage) => {
                let noise = (1_u8..=255).cycle().map(|n| n.wrapping_mul(167));
                bytes[..head.len()].iter_mut().zip(noise).for_each(|(byte, noise)| *byte = noise);
            }
            Some(Harm::Flip) => bytes[head.len() / 2] ^= 4,
            Some(Harm::FlipPage) => {
                if let Some(byte) = bytes.get_mut(head.len() + pages.len() / 2) {
                    *byte ^= 4;
                }
            }
            Some(Harm::Lose) => return Ok(()),
            Some(Harm::Double) => way.bytes.extend(&bytes),
            Some(Harm::Swap) => {
                way.held_back = Some(bytes);
                return Ok(());
            }
        }
        if self.cut {
            return Err(broken());
        }
        if way.blocked {
            self.now += patience;
            return Err(LinkError::TimedOut { limit: patience });
        }
        if !way.stalled {
            way.bytes.extend(bytes);
            way.bytes.extend(way.held_back.take().into_iter().flatten());
        }
        Ok(())
    }
}

impl End {
    /// Frames that each end has tried to send.
    pub(crate) fn frames(&self) -> [usize; 2] {
        self.shared.lock().ways.each_ref().map(|way| way.frames)
    }

    /// Closes the link, as dropping a socket does.
    pub(crate) fn hang_up(&mut self) {
        let mut state = self.shared.lock();
        state.cut = true;
        state.wake(1 - self.side);
        self.shared.changed.notify_all();
    }

    fn take(&mut self, into: &mut [u8]) -> Result<(), LinkError> {
        let mut at = 0;
        while at < into.len() {
            let (from, limit) = (1 - self.side, self.patience);
            if !self.shared.wait(self.side, limit, |state| state.cut || !state.ways[from].bytes.is_empty()) {
                return Err(LinkError::TimedOut { limit });
            }
            let bytes = &mut self.shared.lock().ways[from].bytes;
            if bytes.is_empty() {
                return Err(LinkError::Closed);
            }
            let count = bytes.len().min(into.len() - at);
            into[at..at + count].iter_mut().zip(bytes.drain(..count)).for_each(|(to, from)| *to = from);
            at += count;
        }
        Ok(())
    }
}

impl Link for End {
    fn send(&mut self, head: &[u8], payload: &[VolatileSlice<'_>]) -> Result<(), LinkError> {
        let mut pages = vec![0; payload.iter().map(VolatileSlice::len).sum()];
        let mut rest = pages.as_mut_slice();
        for slice in payload {
            let copied = slice.copy_to(rest);
            rest = &mut rest[copied..];
        }
        let mut state = self.shared.lock();
        if self.side == SOURCE && state.weather.cancel_at == Some(state.ways[SOURCE].frames) {
            self.shared.cancel.cancel();
        }
        let result = state.send(self.side, self.patience, head, &pages);
        state.wake(1 - self.side);
        self.shared.changed.notify_all();
        result
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<(), LinkError> {
        self.take(buffer)
    }

    fn receive_pages(&mut self, slices: &[VolatileSlice<'_>]) -> Result<(), LinkError> {
        for slice in slices {
            let mut bytes = vec![0; slice.len()];
            self.take(&mut bytes)?;
            slice.copy_from(&bytes);
        }
        Ok(())
    }

    fn wait(&mut self, limit: Duration) -> Result<bool, LinkError> {
        let from = 1 - self.side;
        Ok(self.shared.wait(self.side, limit, |state| state.cut || !state.ways[from].bytes.is_empty()))
    }

    fn set_patience(&mut self, limit: Duration) {
        self.patience = limit;
    }

    fn round_trip(&self) -> Option<Duration> {
        self.shared.lock().weather.round_trip
    }

    fn in_flight(&self) -> u64 {
        0
    }
}

impl Clock for VirtualClock {
    fn now(&self) -> Duration {
        self.shared.lock().now
    }

    fn sleep(&self, time: Duration) {
        self.shared.wait(self.side, time, |_| false);
    }
}

impl Drop for VirtualClock {
    fn drop(&mut self) {
        self.shared.lock().parties[self.side] = Party::Gone;
        self.shared.changed.notify_all();
    }
}
