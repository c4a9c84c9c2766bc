//! A channel of a layered disk: what is here is done on the local file, what is not is fetched first.
//!
//! ```text
//!            all here, or all that is missing will be written over
//! request ----------------------------------------------------------> Acting -> completion
//!    |  missing: claimed                                    ^
//!    |------------------> Fetching: base -> local file -----|
//!    |  another's claim                                     |
//!    |------------------> Waiting ----(woken)--> begins anew
//!    |  a short read, all missing, and a puller at work
//!    '------------------> Reading: base -> completion
//! ```
//!
//! A short read of what is all missing is answered by the base itself while a puller brings the rest, and that is asked to bring
//! what lies around it next: on a connection that was idle a few KiB come in one round trip, and a cluster in three (RFC 6928;
//! RFC 5681, 4.1), behind what is on its way already. Whether what is written meanwhile is read, nobody can tell: both are under
//! way.
//!
//! Writes go to the local file alone. A write that covers a missing cluster makes it be here without a fetch; one that covers
//! a part of it fetches it first. Invariant: a request that has claimed clusters settles them, whatever becomes of it.

use super::Shared;
use super::map::{CLUSTER, Claim, Settled, Sleeper, bytes_of, covered, touched};
use crate::backend::{Answer, Backend, Channel, Completion, Durability, Operation, Unmap};
use crate::memory::{Buffers, Scratch};
use rustix::event::epoll;
use slab::Slab;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The most clusters that are fetched by one request to the base: 1 MiB.
pub(super) const RUN: u64 = 16;
/// The longest read that the base answers, in bytes: ten packets, which a connection sends without having heard of any.
const SHORT_READ: u64 = 14 << 10;

#[derive(Debug)]
pub(super) struct LayeredChannel {
    shared: Arc<Shared>,
    local: Box<dyn Channel>,
    /// Not there any more once the disk is whole.
    base: Option<Box<dyn Channel>>,
    sleeper: Arc<Sleeper>,
    events: OwnedFd,
    requests: Slab<Request>,
    steps: Slab<Step>,
    ready: Vec<Completion>,
    done: Vec<Completion>,
}

#[derive(Debug)]
struct Request {
    tag: u64,
    /// What is to be done on the local file; not there any more once that is under way.
    operation: Option<Operation>,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// For another's claim.
    Waiting,
    /// So many runs of these clusters are on their way; those that will be written over are claimed, too.
    Fetching { clusters: Vec<u64>, overwritten: Vec<u64>, left: usize, error: Option<io::Error> },
    /// On the base, without a claim.
    Reading,
    /// On the local file. These clusters are here when that succeeds.
    Acting { overwritten: Vec<u64>, then_flush: bool },
    /// The local file is flushed; these clusters were in it before.
    Flushing { here: Vec<u64> },
}

/// A request to one of the two channels.
#[derive(Debug)]
enum Step {
    Fetch { request: usize, run: Range<u64>, scratch: Arc<Scratch> },
    Store { request: usize },
    Act { request: usize },
    ReadFar { request: usize },
}

impl LayeredChannel {
    pub(super) fn open(shared: &Arc<Shared>) -> io::Result<Self> {
        let (local, sleeper) = (shared.local.channel()?, Sleeper::new()?);
        // Before it is looked whether the disk is whole, so that it is heard when it becomes so afterwards.
        shared.sleepers().push(Arc::downgrade(&sleeper));
        let base = if shared.has_sidecar() { Some(shared.base.channel()?) } else { None };
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let of_base = base.iter().map(|base| base.event());
        for event in [local.event(), sleeper.event()].into_iter().chain(of_base) {
            epoll::add(&events, event, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        }
        let shared = Arc::clone(shared);
        let (requests, steps) = (Slab::new(), Slab::new());
        Ok(Self { shared, local, base, sleeper, events, requests, steps, ready: Vec::new(), done: Vec::new() })
    }

    /// Begins with a request, or begins anew.
    fn begin(&mut self, key: usize) {
        let capacity = self.shared.capacity;
        let Some(operation) = &self.requests[key].operation else { return };
        let ((offset, length), writes) = (operation.range(), operation.writes());
        match operation {
            Operation::Flush => return self.flush(key),
            // All of it is in the local file, which may have become longer since.
            _ if !self.shared.has_sidecar() => return self.act(key, Vec::new()),
            Operation::Status { .. } => return self.tell(key, offset, length),
            Operation::Read { .. }
            | Operation::Write { .. }
            | Operation::Discard { .. }
            | Operation::WriteZeroes { .. } => {}
        }
        if length == 0 {
            return self.act(key, Vec::new());
        }
        if let Operation::Read { into, .. } = operation
            && length <= SHORT_READ
            && self.shared.is_pulled.load(Ordering::Acquire)
            && self.shared.map.lacks(touched(offset, length))
        {
            let into = into.again();
            return self.read_far(key, offset, into);
        }
        let claimed = match self.shared.map.claim(touched(offset, length), &self.sleeper, key) {
            Claim::Waits => {
                self.requests[key].stage = Stage::Waiting;
                return;
            }
            Claim::Here => Vec::new(),
            Claim::Claimed(claimed) => claimed,
        };
        let whole = if writes { covered(offset, length, capacity) } else { 0..0 };
        let (overwritten, clusters): (Vec<u64>, Vec<u64>) =
            claimed.into_iter().partition(|cluster| whole.contains(cluster));
        if clusters.is_empty() {
            return self.act(key, overwritten);
        }
        self.shared.note_demand(&clusters);
        let runs = runs(&clusters);
        self.requests[key].stage = Stage::Fetching { clusters, overwritten, left: runs.len(), error: None };
        for run in runs {
            let (offset, length) = bytes_of(&run, capacity);
            let scratch = Scratch::new(usize::try_from(length).expect("a run is 1 MiB long at most"));
            let into = Buffers::of(&scratch);
            let step = self.steps.insert(Step::Fetch { request: key, run, scratch });
            let base = self.base.as_mut().expect("something is missing, so the disk is not whole");
            base.submit(step as u64, Operation::Read { offset, into });
        }
    }

    /// Has the base answer a read. Once the disk is whole it is begun anew: the base need not be there any more.
    fn read_far(&mut self, key: usize, offset: u64, into: Buffers) {
        self.requests[key].stage = Stage::Reading;
        self.shared.demanded.store(offset / CLUSTER, Ordering::Relaxed);
        let step = self.steps.insert(Step::ReadFar { request: key });
        let base = self.base.as_mut().expect("something is missing, so the disk is not whole");
        base.submit(step as u64, Operation::Read { offset, into });
    }

    /// Does the request on the local file. What it writes over is here afterwards.
    fn act(&mut self, key: usize, overwritten: Vec<u64>) {
        let Request { operation, stage, .. } = &mut self.requests[key];
        let Some(mut operation) = operation.take() else { return };
        // That a cluster is here has to be durable, too: what says so comes after the data.
        let then_flush = self.shared.has_sidecar() && soften(&mut operation);
        *stage = Stage::Acting { overwritten, then_flush };
        let step = self.steps.insert(Step::Act { request: key });
        self.local.submit(step as u64, operation);
    }

    fn flush(&mut self, key: usize) {
        let request = &mut self.requests[key];
        request.operation = None;
        // Of what is here by now the flush says that it is durable, and of no more.
        request.stage = Stage::Flushing { here: self.shared.map.bits() };
        let step = self.steps.insert(Step::Act { request: key });
        self.local.submit(step as u64, Operation::Flush);
    }

    /// Tells of a range as far as it is all here, or all not.
    fn tell(&mut self, key: usize, offset: u64, length: u64) {
        self.requests[key].operation = None;
        self.requests[key].stage = Stage::Acting { overwritten: Vec::new(), then_flush: false };
        let (end, is_here) = self.shared.map.stretch(offset / CLUSTER);
        let length = length.min((end * CLUSTER).saturating_sub(offset));
        let step = self.steps.insert(Step::Act { request: key });
        let whose = match &mut self.base {
            Some(base) if !is_here => base,
            Some(_) | None => &mut self.local,
        };
        whose.submit(step as u64, Operation::Status { offset, length });
    }

    /// Goes on after a step.
    fn settle(&mut self, step: u64, outcome: io::Result<Answer>) {
        let key = usize::try_from(step).expect("it is a key of this address space");
        match self.steps.remove(key) {
            Step::Fetch { request, run, scratch } => match outcome {
                Ok(_) => self.store(request, &run, scratch),
                Err(error) => self.fetched(request, Err(error)),
            },
            Step::Store { request } => self.fetched(request, outcome.map(|_| ())),
            Step::Act { request } => self.acted(request, outcome),
            // What did not come may be here by now, and the base gone.
            Step::ReadFar { request } if outcome.is_err() && !self.shared.has_sidecar() => self.begin(request),
            Step::ReadFar { request } => self.complete(request, outcome),
        }
    }

    /// Puts what was fetched into the local file. What is there is not to be trusted, zeros included.
    fn store(&mut self, request: usize, run: &Range<u64>, mut scratch: Arc<Scratch>) {
        let (offset, length) = bytes_of(run, self.shared.capacity);
        self.shared.note_fetched(length);
        let is_zero = scratch.bytes().is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0));
        let durability = Durability::Cached;
        let operation = if is_zero {
            Operation::WriteZeroes { offset, length, unmap: Unmap::Allowed, durability }
        } else {
            Operation::Write { offset, from: Buffers::of(&scratch), durability }
        };
        let step = self.steps.insert(Step::Store { request });
        self.local.submit(step as u64, operation);
    }

    fn fetched(&mut self, key: usize, outcome: io::Result<()>) {
        let Stage::Fetching { clusters, overwritten, left, error } = &mut self.requests[key].stage else { return };
        *left -= 1;
        if let Err(failure) = outcome {
            error.get_or_insert(failure);
        }
        if *left > 0 {
            return;
        }
        let (clusters, overwritten, error) = (std::mem::take(clusters), std::mem::take(overwritten), error.take());
        match error {
            None => {
                self.shared.map.settle(clusters, Settled::Here);
                self.act(key, overwritten);
            }
            Some(error) => {
                self.shared.map.settle(clusters.into_iter().chain(overwritten), Settled::Missing);
                self.complete(key, Err(error));
            }
        }
    }

    fn acted(&mut self, key: usize, outcome: io::Result<Answer>) {
        match &mut self.requests[key].stage {
            Stage::Acting { overwritten, then_flush } => {
                let settled = if outcome.is_ok() { Settled::Here } else { Settled::Missing };
                self.shared.map.settle(std::mem::take(overwritten), settled);
                if *then_flush && outcome.is_ok() { self.flush(key) } else { self.complete(key, outcome) }
            }
            Stage::Flushing { here } => {
                let here = std::mem::take(here);
                let flushed = self.shared.note_flush(outcome);
                let outcome = flushed.and_then(|_| self.shared.keep(&here)).map(|()| Answer::Done);
                self.complete(key, outcome);
            }
            Stage::Waiting | Stage::Reading | Stage::Fetching { .. } => {
                unreachable!("nothing is done on the local file then")
            }
        }
    }

    fn complete(&mut self, key: usize, outcome: io::Result<Answer>) {
        let tag = self.requests.remove(key).tag;
        self.ready.push(Completion { tag, outcome });
    }

    /// Takes what the two channels have done, and wakes who waited; whether there was anything.
    fn look(&mut self) -> bool {
        let mut done = std::mem::take(&mut self.done);
        self.local.reap(&mut done);
        if let Some(base) = &mut self.base {
            base.reap(&mut done);
        }
        let mut any = !done.is_empty();
        for Completion { tag, outcome } in done.drain(..) {
            self.settle(tag, outcome);
        }
        self.done = done;
        for key in self.sleeper.take() {
            // It may have been woken twice, and be gone.
            if self.requests.get(key).is_some_and(|request| matches!(request.stage, Stage::Waiting)) {
                any = true;
                self.begin(key);
            }
        }
        self.leave_base() || any
    }

    /// Closes the way to the base once the disk is whole; what it has not answered is in the local file. Whether it did.
    fn leave_base(&mut self) -> bool {
        let far = self.steps.iter().filter(|(_, step)| matches!(step, Step::ReadFar { .. })).count();
        if self.shared.has_sidecar() || self.base.as_ref().is_none_or(|base| base.in_flight() > far) {
            return false;
        }
        self.base = None;
        self.steps.retain(|_, step| !matches!(step, Step::ReadFar { .. }));
        let left = self.requests.iter().filter(|(_, request)| matches!(request.stage, Stage::Reading));
        let left: Vec<usize> = left.map(|(key, _)| key).collect();
        left.into_iter().for_each(|key| self.begin(key));
        true
    }
}

impl Channel for LayeredChannel {
    fn submit(&mut self, tag: u64, operation: Operation) {
        if let Err(refused) = operation.check(self.shared.length()) {
            return self.ready.push(Completion { tag, outcome: Err(refused) });
        }
        let key = self.requests.insert(Request { tag, operation: Some(operation), stage: Stage::Waiting });
        self.begin(key);
    }

    fn commit(&mut self) {
        self.local.commit();
        if let Some(base) = &mut self.base {
            base.commit();
        }
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        while self.look() {
            self.commit();
        }
        done.append(&mut self.ready);
    }

    fn in_flight(&self) -> usize {
        self.requests.len() + self.ready.len()
    }
}

impl Drop for LayeredChannel {
    fn drop(&mut self) {
        let left = self.requests.drain().flat_map(|request| match request.stage {
            Stage::Fetching { clusters, overwritten, .. } => [clusters, overwritten].concat(),
            Stage::Acting { overwritten, .. } => overwritten,
            Stage::Waiting | Stage::Reading | Stage::Flushing { .. } => Vec::new(),
        });
        self.shared.map.settle(left.collect::<Vec<_>>(), Settled::Missing);
        self.shared.map.forget(&self.sleeper);
    }
}

/// Makes a write that must be durable one that need not be; whether it was.
fn soften(operation: &mut Operation) -> bool {
    match operation {
        Operation::Write { durability, .. } | Operation::WriteZeroes { durability, .. } => {
            std::mem::replace(durability, Durability::Cached) == Durability::Durable
        }
        Operation::Read { .. } | Operation::Flush | Operation::Discard { .. } | Operation::Status { .. } => false,
    }
}

/// Clusters, which are in order, as runs without gaps, none of them longer than [`RUN`].
fn runs(clusters: &[u64]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for &cluster in clusters {
        match runs.last_mut() {
            Some(run) if run.end == cluster && run.end - run.start < RUN => run.end += 1,
            _ => runs.push(cluster..cluster + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_have_no_gaps_and_an_end() {
        assert_eq!(runs(&[1, 2, 3, 7, 9, 10]), [1..4, 7..8, 9..11]);
        assert_eq!(runs(&(0..40).collect::<Vec<_>>()), [0..16, 16..32, 32..40]);
        assert!(runs(&[]).is_empty());
    }
}
