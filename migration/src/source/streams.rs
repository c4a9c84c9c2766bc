//! The further streams of a migration at the source: threads that each take dirty pages out of the ledger and send them
//! over a link of their own, while the driver does the same over the first.
//!
//! The driver orders a round ([`Streams::order`]); every stream sends pages until the ledger is empty, closes its share of
//! the round with `RoundEnd`, and says so. A stream that fails says why and ends; the driver finds it at its next look.
//! Dropping [`Crew`] cuts the links, so that no thread outlives the migration, whatever its target does.

use super::error::SourceError;
use super::sender::Sender;
use crate::batch::Batch;
use crate::batch::Method;
use crate::bell::Bell;
use crate::channel::{Channel, TICK};
use crate::clock::Clock;
use crate::codec::Codecs;
use crate::counts::PageCounts;
use crate::digest::TranscriptDigest;
use crate::guest::{GuestPages, HostError};
use crate::history::History;
use crate::ledger::{DirtyLedger, SharedLedger};
use crate::link::{Cutter, Link};
use crate::pacer::{Pace, Pacer};
use crate::policy::{Choice, Chosen, Measured, Policy, Why};
use crate::wire::{Frame, Join, RoundEnd};
use std::io;
use std::num::NonZeroU16;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{Builder, Scope};
use std::time::Duration;
use uuid::Uuid;

/// What all streams of a migration share.
#[derive(Debug)]
pub(super) struct Streams {
    /// The pages that the target lacks.
    pub(super) ledger: SharedLedger,
    /// How many there are, the driver's among them.
    pub(super) count: NonZeroU16,
    codecs: Chooser,
    history: OnceLock<History>,
    /// What the round under way has sent, over all streams.
    pub(super) sent: Sent,
    pacer: Option<Pacer>,
    /// The regions of which the target has an old copy, a bit for each.
    old: AtomicU64,
    /// Whether the round under way is to end with pages left in the ledger.
    cut_short: AtomicBool,
    orders: Mutex<Orders>,
    /// Rings when there is an order.
    ordered: Bell,
    /// Rings when a stream is done with its order, or has failed.
    pub(super) news: Bell,
}

/// Who chooses the codecs.
#[derive(Debug)]
pub(super) enum Chooser {
    /// Whoever asked for the migration.
    User(Codecs),
    /// Measurements.
    Policy(Box<Mutex<Policy>>),
}

#[derive(Debug)]
struct Orders {
    /// The round to send, from 1; 0 before the first.
    round: u32,
    over: bool,
    /// Streams that are not done with the round.
    busy: usize,
    failure: Option<SourceError>,
    shares: Vec<Share>,
}

/// What the driver knows of one further stream when it is done with a round.
#[derive(Debug, Clone, Copy, Default)]
struct Share {
    transcript: TranscriptDigest,
    in_flight: u64,
    /// Processor time of its thread, in all rounds.
    cpu: Duration,
}

/// Pages and bytes of a round so far.
#[derive(Debug, Default)]
pub(super) struct Sent {
    pages: Mutex<PageCounts>,
    /// Bytes of the further streams, in all rounds.
    further_bytes: AtomicU64,
}

impl Sent {
    /// Adds what a frame held.
    pub(super) fn add(&self, pages: PageCounts) {
        *self.lock() += pages;
    }

    /// The pages of the round so far.
    pub(super) fn pages(&self) -> PageCounts {
        *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, PageCounts> {
        lock(&self.pages)
    }

    /// Bytes that went over the further streams so far, in all rounds.
    pub(super) fn further_bytes(&self) -> u64 {
        self.further_bytes.load(Ordering::Relaxed)
    }
}

impl Streams {
    pub(super) fn new(count: NonZeroU16, codecs: Chooser, pacer: Option<Pacer>) -> Self {
        let orders = Orders { round: 0, over: false, busy: 0, failure: None, shares: Vec::new() };
        Self {
            ledger: SharedLedger::new(DirtyLedger::new(&[])),
            count,
            codecs,
            history: OnceLock::new(),
            sent: Sent::default(),
            pacer,
            old: AtomicU64::new(0),
            cut_short: AtomicBool::new(false),
            orders: Mutex::new(orders),
            ordered: Bell::new(),
            news: Bell::new(),
        }
    }

    /// Makes the ledger, and remembers from now on what was sent, for regions of these lengths in pages. `old` are those of
    /// which the target has an old copy, a bit for each: of them, the first round sends digests.
    pub(super) fn prepare(&self, pages_per_region: &[u64], old: u64, delta_cache: usize) {
        self.old.store(old, Ordering::Relaxed);
        *self.ledger.lock() = DirtyLedger::new(pages_per_region);
        self.history.get_or_init(|| History::new(delta_cache, pages_per_region));
    }

    /// Whether frames are measured: to choose codecs, or to tell people of each.
    pub(super) fn measures(&self) -> bool {
        matches!(self.codecs, Chooser::Policy(_)) || tracing::enabled!(tracing::Level::TRACE)
    }

    /// How the next frame is to be made.
    pub(super) fn choose(&self) -> Choice {
        match &self.codecs {
            Chooser::User(codecs) => Choice { codecs: *codecs, pages: None },
            Chooser::Policy(policy) => lock(policy).choose(),
        }
    }

    /// Takes in what became of a frame of a round.
    pub(super) fn note(&self, round: u32, codecs: &Codecs, measured: &Measured) {
        if let Chooser::Policy(policy) = &self.codecs {
            lock(policy).note(codecs, measured);
        }
        tracing::trace!(round, ?codecs, ?measured, chosen = ?self.chosen(), "frame");
    }

    /// What most pages of the round under way went by, and why.
    pub(super) fn chosen(&self) -> Chosen {
        match &self.codecs {
            Chooser::User(codecs) => Chosen { codecs: *codecs, why: Why::Asked, link_bytes_per_second: None },
            Chooser::Policy(policy) => lock(policy).chosen(),
        }
    }

    /// How the pages of a frame are encoded, in a round.
    pub(super) fn method(&self, round: u32, Choice { codecs, pages }: Choice) -> Result<Method<'_>, HostError> {
        let history = self.history.get_or_init(|| History::new(0, &[]));
        history.prepare(&codecs, round)?;
        let old = if round == 1 { self.old.load(Ordering::Relaxed) } else { 0 };
        Ok(Method { codecs, history, round, pages, old })
    }

    /// What every stream keeps to, if there is a cap.
    pub(super) fn pace<'a>(&'a self, clock: &'a dyn Clock) -> Option<Pace<'a>> {
        self.pacer.as_ref().map(|pacer| Pace { pacer, clock })
    }

    /// An empty frame, of a size that keeps to the cap.
    pub(super) fn batch(&self) -> Batch {
        Batch::new(self.pacer.as_ref().map_or(u32::MAX, Pacer::pages_per_frame))
    }

    /// Whether the target has old copies, and so says after the first round what they lack.
    pub(super) fn has_old(&self) -> bool {
        self.old.load(Ordering::Relaxed) != 0
    }

    /// Has every further stream send its share of a round.
    pub(super) fn order(&self, round: u32) {
        let mut orders = self.lock();
        (orders.round, orders.busy) = (round, orders.shares.len());
        self.cut_short.store(false, Ordering::Relaxed);
        *self.sent.lock() = PageCounts::default();
        if let Some(history) = self.history.get() {
            history.begin_round(round, &self.ledger.lock());
        }
        if let Chooser::Policy(policy) = &self.codecs {
            lock(policy).begin_round(round);
        }
        drop(orders);
        self.ordered.ring();
    }

    /// Has every stream end the round after the batch that it is at.
    pub(super) fn cut_short(&self) {
        self.cut_short.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_cut_short(&self) -> bool {
        self.cut_short.load(Ordering::Relaxed)
    }

    /// Whether every further stream is done with the round.
    pub(super) fn done(&self) -> bool {
        self.lock().busy == 0
    }

    /// Why a stream failed, if one did.
    pub(super) fn take_failure(&self) -> Option<SourceError> {
        self.lock().failure.take()
    }

    /// What each further stream has sent, after a round.
    pub(super) fn transcripts(&self) -> Vec<TranscriptDigest> {
        self.lock().shares.iter().map(|share| share.transcript).collect()
    }

    /// Bytes that the peer had not received when each further stream was done with the last round.
    pub(super) fn in_flight(&self) -> u64 {
        self.lock().shares.iter().map(|share| share.in_flight).sum()
    }

    /// Processor time that the threads of the further streams have taken up to the end of the last round.
    pub(super) fn cpu(&self) -> Duration {
        self.lock().shares.iter().map(|share| share.cpu).sum()
    }

    /// Waits for a round after `last`; `None` when there will be none.
    fn next<L: Link>(&self, last: u32, link: &mut L) -> Option<u32> {
        loop {
            let seen = self.ordered.rung();
            match &*self.lock() {
                Orders { over: true, .. } => return None,
                Orders { round, .. } if *round != last => return Some(*round),
                Orders { .. } => {}
            }
            link.idle(&self.ordered, seen, TICK);
        }
    }

    fn finish(&self, stream: usize, share: Share) {
        let mut orders = self.lock();
        orders.shares[stream] = share;
        orders.busy -= 1;
        drop(orders);
        self.news.ring();
    }

    fn fail(&self, error: SourceError) {
        self.lock().failure.get_or_insert(error);
        self.news.ring();
    }

    fn lock(&self) -> MutexGuard<'_, Orders> {
        lock(&self.orders)
    }
}

/// Locks what is sound after every step, so that a panic of another thread changes nothing.
fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The threads of the further streams.
pub(super) struct Crew<'a, C: Cutter> {
    streams: &'a Streams,
    clock: &'a dyn Clock,
    cutters: Vec<C>,
}

impl<'a, C: Cutter> Crew<'a, C> {
    pub(super) fn new(streams: &'a Streams, clock: &'a dyn Clock) -> Self {
        Self { streams, clock, cutters: Vec::new() }
    }

    /// Puts one more stream to work over `link`, which was just connected.
    pub(super) fn hire<'scope, L, P>(
        &mut self,
        scope: &'scope Scope<'scope, '_>,
        mut link: L,
        terms: Terms<'scope>,
        memory: P,
    ) -> io::Result<()>
    where
        'a: 'scope,
        L: Link<Cutter = C> + 'scope,
        P: GuestPages + 'scope,
    {
        let (streams, stream, clock) = (self.streams, self.cutters.len(), self.clock);
        let pace = streams.pace(clock);
        self.cutters.push(link.cutter()?);
        streams.lock().shares.push(Share::default());
        let serve = move || {
            (terms.thread)();
            link.set_patience(terms.patience);
            let number = u16::try_from(stream + 1).expect("the number of streams is bounded");
            let join = Frame::Join(Join { session: terms.session, stream: number });
            let served = Channel::new(&mut link).send(&join).map_err(SourceError::Link).and_then(|()| {
                let (channel, sender) = (Channel::new(&mut link).paced(pace), Sender::new(streams, clock));
                Worker { streams, stream, channel, sender, clock, memory, counted: 0 }.serve()
            });
            if let Err(error) = served {
                streams.fail(error);
            }
        };
        Builder::new().name(format!("stream-{}", stream + 1)).spawn_scoped(scope, serve)?;
        Ok(())
    }
}

impl<C: Cutter> Drop for Crew<'_, C> {
    fn drop(&mut self) {
        self.streams.lock().over = true;
        self.streams.ordered.ring();
        self.cutters.iter().for_each(Cutter::cut);
        self.streams.pacer.iter().for_each(Pacer::release);
    }
}

/// What every stream is to keep to.
#[derive(Clone, Copy)]
pub(super) struct Terms<'a> {
    pub(super) session: Uuid,
    /// How long a byte may take to move.
    pub(super) patience: Duration,
    /// What a thread does first.
    pub(super) thread: &'a (dyn Fn() + Sync),
}

/// One further stream.
struct Worker<'a, 'l, L, P> {
    streams: &'a Streams,
    stream: usize,
    channel: Channel<'l, L>,
    sender: Sender<'a>,
    clock: &'a dyn Clock,
    memory: P,
    /// Bytes that are in the common account.
    counted: u64,
}

impl<L: Link, P: GuestPages> Worker<'_, '_, L, P> {
    fn serve(mut self) -> Result<(), SourceError> {
        let mut last = 0;
        while let Some(round) = self.streams.next(last, self.channel.link()) {
            self.round(round)?;
            last = round;
        }
        Ok(())
    }

    fn round(&mut self, round: u32) -> Result<(), SourceError> {
        let mut pages = PageCounts::default();
        self.sender.begin_round(self.channel.link());
        while !self.streams.is_cut_short() && self.sender.send(&mut self.channel, &self.memory, round)? {
            pages += self.sender.counts();
            self.streams.sent.add(self.sender.counts());
            self.count();
        }
        let end = RoundEnd { round, pages: pages.sent(), zero_pages: pages.zero };
        self.channel.send(&Frame::RoundEnd(end)).map_err(SourceError::Link)?;
        self.count();
        let (transcript, in_flight) = (self.channel.sent(), self.channel.link().in_flight());
        let share = Share { transcript, in_flight, cpu: self.clock.thread_cpu() };
        self.streams.finish(self.stream, share);
        Ok(())
    }

    fn count(&mut self) {
        let bytes = self.channel.bytes();
        self.streams.sent.further_bytes.fetch_add(bytes - self.counted, Ordering::Relaxed);
        self.counted = bytes;
    }
}
