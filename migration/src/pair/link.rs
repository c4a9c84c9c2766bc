//! Links in memory with virtual time, and faults by frame.
//!
//! Each end of a link belongs to one thread. Time passes in two ways only: sending takes it (bandwidth), and when every
//! thread waits and nothing is under way, it jumps to the end of the shortest wait. So a test of a half-minute timeout
//! takes microseconds, and never depends on the load of the machine.

use super::{Handles, Weather};
use crate::CancelToken;
use crate::bell::Bell;
use crate::clock::Clock;
use crate::link::{Cutter, Link, LinkError};
use crate::region::PAGE_SIZE;
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;
use vm_memory::{GuestMemoryMmap, VolatileSlice};

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

/// Harm to the frame of this number, from 0, of those that one end sends over one link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FaultAt {
    pub(crate) sender: usize,
    /// The stream that the link is for.
    pub(crate) stream: usize,
    pub(crate) frame: usize,
    pub(crate) harm: Harm,
}

/// What the thread that has one end of a link does.
#[derive(Debug)]
enum Party {
    Busy,
    Waiting {
        until: Duration,
    },
    /// As before, and a bell that had rung so often ends it, too.
    Idle {
        until: Duration,
        rung: Arc<AtomicU64>,
        seen: u64,
    },
    /// Nothing, but it looks at the link now and then, until the first bytes come.
    Polling,
    Gone,
}

impl Party {
    /// When its wait for `came` is over whatever happens; `None` while it does something.
    fn until(&self, came: &Way) -> Option<Duration> {
        match self {
            Self::Polling => came.bytes.is_empty().then_some(Duration::MAX),
            Self::Busy => None,
            Self::Waiting { until } => Some(*until),
            Self::Idle { until, rung, seen } => (rung.load(Ordering::SeqCst) == *seen).then_some(*until),
            Self::Gone => Some(Duration::MAX),
        }
    }
}

#[derive(Debug, Default)]
struct Way {
    bytes: VecDeque<u8>,
    frames: usize,
    stalled: bool,
    blocked: bool,
    held_back: Option<Vec<u8>>,
}

/// One link: its two ends, and what is under way from each.
#[derive(Debug)]
struct Wire {
    cut: bool,
    parties: [Party; 2],
    ways: [Way; 2],
}

#[derive(Debug)]
struct State {
    now: Duration,
    wires: Vec<Wire>,
    weather: Weather,
    /// Far ends that were dialled and not yet let in.
    at_the_door: VecDeque<usize>,
    /// Every handle that was sent. The byte that stands for it on its way is its number, from 1.
    handles: Vec<Arc<GuestMemoryMmap<()>>>,
    /// When the source began to send how many bytes.
    traffic: Vec<(Duration, usize)>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    cancel: CancelToken,
}

/// One end of a link.
#[derive(Debug)]
pub(crate) struct End {
    shared: Arc<Shared>,
    wire: usize,
    side: usize,
    patience: Duration,
}

/// The time that both ends see.
#[derive(Debug, Clone)]
pub(crate) struct VirtualClock {
    shared: Arc<Shared>,
    /// Whose thread sleeps by it: that of this end of the first link.
    side: usize,
}

/// The way to more links between the same two ends.
#[derive(Debug, Clone)]
pub(crate) struct Door(Arc<Shared>);

pub(crate) fn connect(weather: Weather, cancel: &CancelToken) -> (End, End, [VirtualClock; 2], Door) {
    let (wires, at_the_door, handles, traffic) = (Vec::new(), VecDeque::new(), Vec::new(), Vec::new());
    let state = State { now: Duration::ZERO, wires, weather, at_the_door, handles, traffic };
    let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), cancel: cancel.clone() });
    let wire = shared.lock().add();
    let [near, far] = [SOURCE, TARGET].map(|side| End::new(&shared, wire, side));
    let clocks = [SOURCE, TARGET].map(|side| VirtualClock { shared: Arc::clone(&shared), side });
    (near, far, clocks, Door(shared))
}

impl Door {
    /// The source's end of one more link.
    pub(crate) fn dial(&self) -> Result<End, LinkError> {
        let mut state = self.0.lock();
        if state.wires.len() > 1 && state.weather.no_more_links {
            return Err(LinkError::Io(io::ErrorKind::ConnectionRefused.into()));
        }
        let wire = state.add();
        state.wires[wire].parties[TARGET] = Party::Polling;
        state.at_the_door.push_back(wire);
        drop(state);
        self.0.changed.notify_all();
        Ok(End::new(&self.0, wire, SOURCE))
    }

    /// The target's end of one more link, if it comes within `limit`, or a moment, of real time.
    pub(crate) fn accept(&self, limit: Duration) -> Option<End> {
        let state = self.0.lock();
        let moment = limit.min(Duration::from_millis(1));
        let waited = self.0.changed.wait_timeout_while(state, moment, |state| state.at_the_door.is_empty());
        let mut state = waited.unwrap().0;
        let wire = state.at_the_door.pop_front()?;
        state.wires[wire].parties[TARGET] = Party::Polling;
        drop(state);
        Some(End::new(&self.0, wire, TARGET))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Waits until `done` or for `limit`; `false` in the latter case.
    fn wait(&self, wire: usize, side: usize, limit: Duration, done: impl Fn(&State) -> bool) -> bool {
        let mut state = self.lock();
        let until = state.now + limit;
        loop {
            if done(&state) || state.now >= until {
                let party = &mut state.wires[wire].parties[side];
                if !matches!(party, Party::Polling) {
                    *party = Party::Busy;
                }
                return done(&state);
            }
            state.wires[wire].parties[side] = Party::Waiting { until };
            if !state.jump(&self.changed) {
                state = self.changed.wait(state).unwrap();
            }
        }
    }
}

impl State {
    fn add(&mut self) -> usize {
        let (parties, ways) = ([Party::Busy, Party::Busy], [Way::default(), Way::default()]);
        self.wires.push(Wire { cut: false, parties, ways });
        self.wires.len() - 1
    }

    /// Lets time pass to the end of the shortest wait, if everybody waits.
    fn jump(&mut self, changed: &Condvar) -> bool {
        let waits = self.wires.iter().flat_map(|Wire { cut: _, parties: [near, far], ways: [there, back] }| {
            [near.until(back), far.until(there)]
        });
        let Some(until) = waits.collect::<Option<Vec<_>>>().and_then(|waits| waits.into_iter().min()) else {
            return false;
        };
        assert!(until < Duration::MAX, "somebody waits");
        self.now = self.now.max(until);
        for party in self.wires.iter_mut().flat_map(|wire| wire.parties.iter_mut()) {
            if matches!(party, Party::Waiting { until } | Party::Idle { until, .. } if *until <= self.now) {
                *party = Party::Busy;
            }
        }
        changed.notify_all();
        true
    }

    /// Something happened that this end may have waited for: it counts as busy until it has looked.
    fn wake(&mut self, wire: usize, side: usize) {
        let party = &mut self.wires[wire].parties[side];
        if matches!(party, Party::Waiting { .. }) {
            *party = Party::Busy;
        }
    }

    /// Puts a frame on its way, with the harm that the weather has for it.
    fn send(
        &mut self,
        (stream, side): (usize, usize),
        patience: Duration,
        head: &[u8],
        pages: &[u8],
    ) -> Result<(), LinkError> {
        let Self { now, wires, weather, at_the_door: _, handles: _, traffic } = self;
        let Wire { cut, parties: _, ways } = &mut wires[stream];
        let way = &mut ways[side];
        let frame = way.frames;
        way.frames += 1;
        if side == SOURCE {
            traffic.push((*now, head.len() + pages.len()));
        }
        *now += Duration::from_nanos((head.len() + pages.len()) as u64 * NANOSECONDS_PER_BYTE);
        let broken = || LinkError::Io(io::ErrorKind::BrokenPipe.into());
        if *cut {
            return Err(broken());
        }
        let at = (side, stream, frame);
        let harm = weather.faults.iter().find(|fault| (fault.sender, fault.stream, fault.frame) == at);
        let mut bytes = [head, pages].concat();
        match harm.map(|fault| fault.harm) {
            None => {}
            Some(Harm::Cut) => *cut = true,
            Some(Harm::CutInside) => {
                way.bytes.extend(&bytes[..bytes.len() / 2]);
                *cut = true;
            }
            Some(Harm::CutAfter) => {
                way.bytes.extend(&bytes);
                *cut = true;
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
        if *cut {
            return Err(broken());
        }
        if way.blocked {
            *now += patience;
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
    fn new(shared: &Arc<Shared>, wire: usize, side: usize) -> Self {
        Self { shared: Arc::clone(shared), wire, side, patience: Duration::from_secs(1) }
    }

    /// Frames that each end has tried to send.
    pub(crate) fn frames(&self) -> [usize; 2] {
        self.shared.lock().wires[self.wire].ways.each_ref().map(|way| way.frames)
    }

    /// When the source began to send how many bytes, over all links.
    pub(crate) fn traffic(&self) -> Vec<(Duration, usize)> {
        self.shared.lock().traffic.clone()
    }

    /// Closes the link, as dropping a socket does. The others need not wait for this end any more.
    pub(crate) fn hang_up(&mut self) {
        Scissors { shared: Arc::clone(&self.shared), wire: self.wire }.cut();
        self.shared.lock().wires[self.wire].parties[self.side] = Party::Gone;
        self.shared.changed.notify_all();
    }

    /// Leaves the link open, with nobody at this end, and nobody who expects it to be let in at the other.
    pub(crate) fn abandon(self) {
        self.shared.lock().wires[self.wire].parties = [Party::Gone, Party::Gone];
        std::mem::forget(self);
    }

    fn take(&mut self, into: &mut [u8]) -> Result<(), LinkError> {
        let mut at = 0;
        self.shared.lock().wires[self.wire].parties[self.side] = Party::Busy;
        while at < into.len() {
            if !self.wait(self.patience)? {
                return Err(LinkError::TimedOut { limit: self.patience });
            }
            let bytes = &mut self.shared.lock().wires[self.wire].ways[1 - self.side].bytes;
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

impl Drop for End {
    fn drop(&mut self) {
        self.hang_up();
    }
}

/// Cuts a link.
#[derive(Debug)]
pub(crate) struct Scissors {
    shared: Arc<Shared>,
    wire: usize,
}

impl Cutter for Scissors {
    fn cut(&self) {
        let mut state = self.shared.lock();
        state.wires[self.wire].cut = true;
        [SOURCE, TARGET].into_iter().for_each(|side| state.wake(self.wire, side));
        self.shared.changed.notify_all();
    }
}

impl Link for End {
    type Cutter = Scissors;
    type Handle = Arc<GuestMemoryMmap<()>>;

    fn cutter(&self) -> io::Result<Scissors> {
        Ok(Scissors { shared: Arc::clone(&self.shared), wire: self.wire })
    }

    fn send(&mut self, head: &[u8], payload: &[VolatileSlice<'_>]) -> Result<(), LinkError> {
        let mut pages = vec![0; payload.iter().map(VolatileSlice::len).sum()];
        let mut rest = pages.as_mut_slice();
        for slice in payload {
            let copied = slice.copy_to(rest);
            rest = &mut rest[copied..];
        }
        let (wire, side) = (self.wire, self.side);
        let mut state = self.shared.lock();
        let first = (wire, side) == (0, SOURCE);
        if first && state.weather.cancel_at == Some(state.wires[wire].ways[SOURCE].frames) {
            self.shared.cancel.cancel();
        }
        let result = state.send((wire, side), self.patience, head, &pages);
        state.wake(wire, 1 - side);
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
            if self.side == TARGET {
                let pages = u32::try_from(bytes.len() / PAGE_SIZE).unwrap();
                let time = self.shared.lock().weather.page_time * pages;
                self.shared.wait(self.wire, self.side, time, |_| false);
            }
        }
        Ok(())
    }

    fn carries_handles(&self) -> bool {
        self.shared.lock().weather.handles != Handles::AreNotTaken
    }

    fn send_handle(&mut self, handle: &Self::Handle) -> Result<(), LinkError> {
        let number = {
            let mut state = self.shared.lock();
            if state.weather.handles == Handles::Arrive {
                state.handles.push(Arc::clone(handle));
            }
            u8::try_from(state.handles.len()).unwrap()
        };
        self.send(&[number], &[])
    }

    fn receive_handle(&mut self) -> Result<Option<Self::Handle>, LinkError> {
        let mut number = [0];
        self.take(&mut number)?;
        let handle = usize::from(number[0]).checked_sub(1);
        Ok(handle.and_then(|handle| self.shared.lock().handles.get(handle).cloned()))
    }

    fn wait(&mut self, limit: Duration) -> Result<bool, LinkError> {
        let (wire, from) = (self.wire, 1 - self.side);
        let came = |state: &State| state.wires[wire].cut || !state.wires[wire].ways[from].bytes.is_empty();
        Ok(self.shared.wait(wire, self.side, limit, came))
    }

    fn set_patience(&mut self, limit: Duration) {
        self.patience = limit;
    }

    fn round_trip(&self) -> Option<Duration> {
        self.shared.lock().weather.round_trip
    }

    fn same_host(&self) -> bool {
        false
    }

    fn in_flight(&self) -> u64 {
        0
    }

    fn idle(&mut self, bell: &Bell, seen: u64, limit: Duration) {
        let rung = bell.count();
        let mut state = self.shared.lock();
        let until = state.now + limit;
        while rung.load(Ordering::SeqCst) == seen && state.now < until {
            state.wires[self.wire].parties[self.side] = Party::Idle { until, rung: Arc::clone(&rung), seen };
            if !state.jump(&self.shared.changed) {
                drop(state);
                bell.wait(seen, Duration::from_micros(100));
                state = self.shared.lock();
            }
        }
        state.wires[self.wire].parties[self.side] = Party::Busy;
    }
}

impl Clock for VirtualClock {
    fn now(&self) -> Duration {
        self.shared.lock().now
    }

    fn sleep(&self, time: Duration) {
        self.shared.wait(0, self.side, time, |_| false);
    }

    fn thread_cpu(&self) -> Duration {
        Duration::ZERO
    }
}
