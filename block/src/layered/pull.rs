//! What fetches a disk in the background, until all of it is here.
//!
//! Several runs of clusters are on their way at a time, as many as a long way needs ([`super::window`]); they begin where the guest has last
//! missed something, because what lies behind it is likely to be missed next. Clusters that the guest asks for, and that are
//! not on their way already, do not wait here: each channel fetches those by itself. What the base knows to be zeros does not travel. A place that does not give, or
//! does not take, is tried again as long as it takes.

use super::map::{Settled, bytes_of};
use super::window::Window;
use super::{LayeredBackend, OnceWhole, Shared};
use crate::backend::{Answer, Backend, Channel, Completion, Durability, Extent, ExtentKind, Operation, Unmap};
use crate::memory::{Buffers, Scratch};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use slab::Slab;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The most clusters of a run: 128 KiB, which hold up who waits for something else for a millisecond at 1 Gbit/s. With the most
/// of them that a [`Window`] lets go, 16 MiB are on their way, which is what that holds at 128 ms.
const RUN: u64 = 2;
/// The most runs that are under way, zeros among them.
const MOST: usize = 192;
/// How long nothing is asked for after a failure.
const AFTER_FAILURE: Duration = Duration::from_secs(1);
/// How long a pull that is to end waits for the base's word that it was given up.
const FOR_RELEASE: Duration = Duration::from_secs(2);
/// How long to wait for what others fetch.
const FOR_OTHERS: Duration = Duration::from_millis(10);

/// The tag of a request beside which there is no other.
const ALONE: u64 = u64::MAX;
/// The tag of a question what is where.
const LOOK: u64 = u64::MAX - 1;

/// What whoever began a pull hears of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pulled {
    /// All of the disk is here and durable.
    Whole,
    /// And its base was given up, or is left as it is. The pull is over.
    Released,
}

/// A pull that is under way. It ends when it is dropped.
#[derive(Debug)]
pub struct Puller {
    ends: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Puller {
    /// Begins to fetch what is missing of `disk`, and tells `hear`, on a thread that calls `thread_start` first.
    ///
    /// # Errors
    /// The host's refusal of a thread, or of the channels.
    pub fn start(
        disk: &LayeredBackend,
        thread_start: fn(),
        hear: impl FnMut(Pulled) + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::clone(&disk.shared);
        let ends = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let pull = Pull {
            local: shared.local.channel()?,
            base: shared.base.channel()?,
            ends: Arc::clone(&ends),
            runs: Slab::new(),
            known: Known::default(),
            window: Window::new(Instant::now()),
            looking: None,
            next: 0,
            demanded: 0,
            hear: Box::new(hear),
            shared,
        };
        pull.shared.is_pulled.store(true, Ordering::Release);
        let thread = std::thread::Builder::new().name("disk-pull".to_owned()).spawn(move || {
            thread_start();
            pull.run();
        })?;
        Ok(Self { ends, thread: Some(thread) })
    }

    /// Whether it is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Puller {
    fn drop(&mut self) {
        // The only refusal is a counter at its end, and then it is readable.
        let _ = rustix::io::write(&*self.ends, &1_u64.to_ne_bytes());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("The thread that fetches a disk had panicked");
        }
    }
}

/// A run of clusters on its way.
#[derive(Debug)]
struct OnItsWay {
    clusters: Range<u64>,
    /// When the base was asked for it.
    asked: Option<Instant>,
    /// What comes from the base; given up once it goes to the local file.
    scratch: Option<Arc<Scratch>>,
}

struct Pull {
    shared: Arc<Shared>,
    local: Box<dyn Channel>,
    base: Box<dyn Channel>,
    ends: Arc<OwnedFd>,
    runs: Slab<OnItsWay>,
    /// What is known of the base.
    known: Known,
    window: Window,
    /// The run whose base is looked at.
    looking: Option<u64>,
    /// Where the next run begins.
    next: u64,
    /// Where the guest had last missed something, when that was looked at.
    demanded: u64,
    hear: Box<dyn FnMut(Pulled) + Send>,
}

/// Whether a pull is over.
type Over = bool;

impl Pull {
    fn run(mut self) {
        let mut was_well = true;
        loop {
            if self.has_ended(Duration::ZERO) {
                return;
            }
            let outcome =
                if self.runs.is_empty() && self.shared.map.missing() == 0 { self.finish() } else { self.go_on() };
            match outcome {
                Ok(true) => return,
                Ok(false) => was_well = true,
                Err(error) => {
                    if std::mem::take(&mut was_well) {
                        tracing::warn!(%error, "What is missing of a disk does not come; trying again");
                    }
                    if self.has_ended(AFTER_FAILURE) {
                        return;
                    }
                }
            }
        }
    }

    /// Moves what can be moved, and waits for more.
    fn go_on(&mut self) -> io::Result<Over> {
        self.ask();
        self.base.commit();
        self.local.commit();
        match self.take()? {
            // There may be more to begin, and to take.
            true => {}
            // What is missing is on its way to others.
            false if self.runs.is_empty() => drop(self.has_ended(FOR_OTHERS)),
            false => self.wait(),
        }
        Ok(false)
    }

    /// Asks for runs until enough are on their way.
    fn ask(&mut self) {
        // Zeros do not travel, but are not done at once either.
        let far = |runs: &Slab<OnItsWay>| runs.iter().filter(|(_, run)| run.asked.is_some()).count();
        while far(&self.runs) < self.window.size() && self.runs.len() < MOST && self.looking.is_none() {
            let demanded = self.shared.demanded.load(Ordering::Relaxed);
            if demanded != self.demanded {
                (self.demanded, self.next) = (demanded, demanded);
            }
            let Some(clusters) = self.shared.map.claim_next(self.next, RUN) else { return };
            self.next = clusters.end;
            let tag = self.runs.insert(OnItsWay { clusters, asked: None, scratch: None }) as u64;
            self.fetch(tag);
        }
    }

    /// Begins with a run: as zeros, by a read, or, if nothing is known of it, by a question.
    fn fetch(&mut self, tag: u64) {
        let (offset, length) = bytes_of(&self.runs[key(tag)].clusters, self.shared.capacity);
        match self.known.is_zero(offset, length) {
            Some(true) => self.local.submit(tag, zeroes(offset, length)),
            Some(false) => {
                let scratch = Scratch::new(usize::try_from(length).expect("a run is 1 MiB long at most"));
                let into = Buffers::of(&scratch);
                let run = &mut self.runs[key(tag)];
                (run.scratch, run.asked) = (Some(scratch), Some(Instant::now()));
                self.base.submit(tag, Operation::Read { offset, into });
            }
            None => {
                self.looking = Some(tag);
                self.base.submit(LOOK, Operation::Status { offset, length: self.shared.capacity - offset });
            }
        }
    }

    /// Takes what is known of the base, and begins with the run that waits for that. A base that does not tell is read.
    fn looked(&mut self, outcome: io::Result<Answer>) {
        let Some(tag) = self.looking.take() else { return };
        let (offset, length) = bytes_of(&self.runs[key(tag)].clusters, self.shared.capacity);
        let mut extents = match outcome {
            Ok(Answer::Extents(extents)) => extents,
            Ok(Answer::Done) | Err(_) => Vec::new(),
        };
        let told: u64 = extents.iter().map(|extent| extent.length).sum();
        if told < length {
            extents.push(Extent { length: length - told, kind: ExtentKind::Data });
        }
        self.known = Known::new(offset, &extents);
        self.fetch(tag);
    }

    /// Takes what has come, and puts it into the local file; whether there was anything.
    ///
    /// # Errors
    /// The last failure; what failed is missing as before.
    fn take(&mut self) -> io::Result<bool> {
        let (mut failed, mut done) = (Ok(()), Vec::new());
        self.base.reap(&mut done);
        let mut any = !done.is_empty();
        for Completion { tag, outcome } in done.drain(..) {
            match outcome {
                outcome if tag == LOOK => self.looked(outcome),
                Ok(_) => self.store(tag),
                Err(error) => {
                    self.settle(tag, Settled::Missing);
                    failed = Err(error);
                }
            }
        }
        self.local.commit();
        self.local.reap(&mut done);
        any |= !done.is_empty();
        for Completion { tag, outcome } in done {
            let settled = if outcome.is_ok() { Settled::Here } else { Settled::Missing };
            self.settle(tag, settled);
            failed = outcome.map(|_| ()).and(failed);
        }
        failed.map(|()| any)
    }

    fn store(&mut self, tag: u64) {
        let OnItsWay { clusters, asked, scratch } = &mut self.runs[key(tag)];
        let Some(mut scratch) = scratch.take() else { return };
        if let Some(asked) = asked.take() {
            self.window.done(asked, Instant::now());
        }
        let (offset, length) = bytes_of(clusters, self.shared.capacity);
        self.shared.note_fetched(length);
        let is_zero = scratch.bytes().is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0));
        let operation = if is_zero {
            zeroes(offset, length)
        } else {
            Operation::Write { offset, from: Buffers::of(&scratch), durability: Durability::Cached }
        };
        self.local.submit(tag, operation);
    }

    fn settle(&mut self, tag: u64, settled: Settled) {
        let run = self.runs.remove(key(tag));
        self.shared.map.settle(run.clusters, settled);
    }

    /// Makes all durable, does without sidecar and base from then on, and gives up what was lent.
    fn finish(&mut self) -> io::Result<Over> {
        if self.shared.has_sidecar() {
            let flushed = self.ask_one(Whose::Local, Operation::Flush);
            if self.shared.note_flush(flushed)?.is_none() {
                return Ok(true);
            }
            self.shared.become_whole()?;
            (self.hear)(Pulled::Whole);
        }
        if self.shared.once_whole == OnceWhole::GiveUp {
            let all = Operation::Discard { offset: 0, length: self.shared.capacity };
            if self.ask_one(Whose::Base, all)?.is_none() {
                tracing::warn!("Whoever lent a disk has not heard that all of it is here");
                return Ok(true);
            }
        }
        self.shared.base.release();
        (self.hear)(Pulled::Released);
        Ok(true)
    }

    /// Does one request, where nothing else is under way; `None` if the pull is to end first. What is asked of the base then
    /// is waited for a little.
    fn ask_one(&mut self, whose: Whose, operation: Operation) -> io::Result<Option<Answer>> {
        let ends = Arc::clone(&self.ends);
        let (channel, patience) = match whose {
            Whose::Local => (&mut self.local, Duration::ZERO),
            Whose::Base => (&mut self.base, FOR_RELEASE),
        };
        let mut until: Option<Instant> = None;
        channel.submit(ALONE, operation);
        channel.commit();
        let mut done = Vec::new();
        loop {
            channel.reap(&mut done);
            if let Some(Completion { outcome, .. }) = done.pop() {
                return outcome.map(Some);
            }
            let mut polled = [channel.event(), ends.as_fd()].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            // Whatever it says, all is looked at next.
            let _ = match until {
                None => poll(&mut polled, None),
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(None);
                    }
                    poll(&mut polled[..1], Some(&timespec(left)))
                }
            };
            if !polled[1].revents().is_empty() {
                until.get_or_insert_with(|| Instant::now() + patience);
            }
        }
    }

    fn wait(&self) {
        let fds = [self.base.event(), self.local.event(), self.ends.as_fd()];
        // Whatever it says, all is looked at next.
        let _ = poll(&mut fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)), None);
    }

    /// Whether the pull is to end, waited for so long.
    fn has_ended(&self, within: Duration) -> bool {
        let mut polled = [PollFd::new(&*self.ends, PollFlags::IN)];
        poll(&mut polled, Some(&timespec(within))).is_ok_and(|ready| ready > 0)
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec { tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX), tv_nsec: time.subsec_nanos().into() }
}

impl Drop for Pull {
    fn drop(&mut self) {
        self.shared.is_pulled.store(false, Ordering::Release);
        let left: Vec<u64> = self.runs.drain().flat_map(|run| run.clusters).collect();
        self.shared.map.settle(left, Settled::Missing);
    }
}

/// Zeros, whatever is in the local file.
fn zeroes(offset: u64, length: u64) -> Operation {
    Operation::WriteZeroes { offset, length, unmap: Unmap::Allowed, durability: Durability::Cached }
}

/// Which parts of a stretch of the base read as zeros.
#[derive(Debug, Default)]
struct Known {
    start: u64,
    /// Where each part ends, and whether it is zeros; in order.
    parts: Vec<(u64, bool)>,
}

impl Known {
    fn new(start: u64, extents: &[Extent]) -> Self {
        let mut end = start;
        let part = |extent: &Extent| {
            end += extent.length;
            (end, matches!(extent.kind, ExtentKind::Zero | ExtentKind::Hole))
        };
        Self { start, parts: extents.iter().map(part).collect() }
    }

    /// Whether all of a range is zeros; `None` if not all of it is known, and what is known is zeros.
    fn is_zero(&self, offset: u64, length: u64) -> Option<bool> {
        if offset < self.start {
            return None;
        }
        let first = self.parts.partition_point(|(end, _)| *end <= offset);
        for (end, is_zero) in &self.parts[first..] {
            if !is_zero {
                return Some(false);
            }
            if *end >= offset + length {
                return Some(true);
            }
        }
        None
    }
}

#[derive(Clone, Copy)]
enum Whose {
    Local,
    Base,
}

fn key(tag: u64) -> usize {
    usize::try_from(tag).expect("it is a key of this address space")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_to_be_zeros() {
        let extent = |length, kind| Extent { length, kind };
        let known = Known::new(
            1000,
            &[extent(100, ExtentKind::Hole), extent(50, ExtentKind::Zero), extent(50, ExtentKind::Data)],
        );
        assert_eq!(known.is_zero(1000, 100), Some(true));
        assert_eq!(known.is_zero(1050, 100), Some(true));
        assert_eq!(known.is_zero(1050, 101), Some(false));
        assert_eq!(known.is_zero(1160, 10), Some(false));
        assert_eq!(known.is_zero(999, 10), None);
        assert_eq!(known.is_zero(1200, 1), None);
        assert_eq!(Known::default().is_zero(0, 1), None);
    }
}
