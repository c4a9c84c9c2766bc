//! For tests: a back end over another whose reads wait, or fail.

use crate::backend::{Backend, Channel, Completion, Geometry, Operation};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// What is wrong with a back end now.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    failing: AtomicUsize,
    holds: AtomicBool,
    channels: AtomicUsize,
}

impl Faults {
    /// Has the next `count` reads fail.
    pub(crate) fn fail_reads(&self, count: usize) {
        self.failing.store(count, Ordering::SeqCst);
    }

    /// How many channels are open.
    pub(crate) fn channels(&self) -> usize {
        self.channels.load(Ordering::SeqCst)
    }

    /// Has reads wait, or no longer.
    pub(crate) fn hold_reads(&self, holds: bool) {
        self.holds.store(holds, Ordering::SeqCst);
    }
}

#[derive(Debug)]
pub(crate) struct FaultyBackend {
    inner: Arc<dyn Backend>,
    faults: Arc<Faults>,
}

impl FaultyBackend {
    pub(crate) fn new(inner: Arc<dyn Backend>, faults: Arc<Faults>) -> Self {
        Self { inner, faults }
    }
}

impl Backend for FaultyBackend {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }
    fn channel(&self) -> io::Result<Box<dyn Channel>> {
        // Always readable: who waits looks again.
        let event = eventfd(1, EventfdFlags::empty())?;
        let (inner, faults) = (self.inner.channel()?, Arc::clone(&self.faults));
        faults.channels.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(FaultyChannel { inner, faults, held: Vec::new(), failed: Vec::new(), event }))
    }
    fn grow(&self, capacity: u64) -> io::Result<u64> {
        self.inner.grow(capacity)
    }
    fn is_held_by_channels(&self) -> bool {
        self.inner.is_held_by_channels()
    }
    fn release(&self) {
        self.inner.release();
    }
    fn reacquire(&self) -> io::Result<()> {
        self.inner.reacquire()
    }
}

#[derive(Debug)]
struct FaultyChannel {
    inner: Box<dyn Channel>,
    faults: Arc<Faults>,
    held: Vec<(u64, Operation)>,
    failed: Vec<u64>,
    event: OwnedFd,
}

impl Drop for FaultyChannel {
    fn drop(&mut self) {
        self.faults.channels.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Channel for FaultyChannel {
    fn submit(&mut self, tag: u64, operation: Operation) {
        let less = |count: usize| count.checked_sub(1);
        if !matches!(operation, Operation::Read { .. }) {
            self.inner.submit(tag, operation);
        } else if self.faults.failing.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok() {
            self.failed.push(tag);
        } else {
            self.held.push((tag, operation));
        }
    }
    fn commit(&mut self) {
        if !self.faults.holds.load(Ordering::SeqCst) {
            for (tag, operation) in self.held.drain(..) {
                self.inner.submit(tag, operation);
            }
        }
        self.inner.commit();
    }
    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.commit();
        self.inner.reap(done);
        let lost = |tag| Completion { tag, outcome: Err(io::Error::other("The base is lost")) };
        done.extend(self.failed.drain(..).map(lost));
    }
    fn in_flight(&self) -> usize {
        self.held.len() + self.failed.len() + self.inner.in_flight()
    }
}

/// All that a channel has in flight, as it is completed.
pub(crate) fn reap_all(channel: &mut dyn Channel) -> Vec<Completion> {
    let (mut done, deadline) = (Vec::new(), Instant::now() + Duration::from_secs(20));
    loop {
        channel.reap(&mut done);
        if channel.in_flight() == 0 {
            return done;
        }
        assert!(Instant::now() < deadline, "requests do not end");
        let timeout = Timespec { tv_sec: 1, tv_nsec: 0 };
        poll(&mut [PollFd::from_borrowed_fd(channel.event(), PollFlags::IN)], Some(&timeout)).unwrap();
    }
}
