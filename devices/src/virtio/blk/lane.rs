//! One queue of a disk with its thread and its channel to the back end.
//!
//! ```text
//! disk's start --Start(ring)--> thread: pop, submit, commit ... reap, push, signal --Stop--> ring back
//! ```
//!
//! The thread has the ring from `Start` to its report that it has stopped, and nobody else touches it meanwhile. While it
//! has none it waits for orders, and flushes. Invariant: once it has reported that it stopped, nothing of it touches guest
//! memory.

use super::counters::BlkCounters;
use super::limiter::Limiter;
use super::request::{Request, Rules, Status, Work};
use crate::GuestRam;
use crate::virtio::Interrupt;
use crate::virtio::queue::{BrokenRing, Virtq};
use crate::worker::ThreadStart;
use block::{Backend, Channel, Completion, Durability, Operation};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use slab::Slab;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The first tag of flushes that no driver asked for; each has another. Those of requests are far below.
const FIRST_OWN_FLUSH: u64 = 1 << 63;
/// How long such a flush may take. A disk that is flushed for a hand-over has been flushed before.
const FLUSH_WITHIN: Duration = Duration::from_secs(30);

/// What all lanes of a disk share.
#[derive(Debug)]
pub(super) struct Common {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) serial: String,
    /// Length in bytes, as the driver knows it.
    pub(super) capacity: AtomicU64,
    pub(super) counters: Arc<BlkCounters>,
    pub(super) limiter: Limiter,
    /// How a driver broke a ring; told by `broken`.
    pub(super) fault: Mutex<Option<BrokenRing>>,
    pub(super) broken: EventFd,
}

/// A ring that is lent to a lane.
#[derive(Debug)]
pub(super) struct Ring {
    pub(super) virtq: Virtq,
    pub(super) ram: Arc<GuestRam>,
    pub(super) interrupt: Interrupt,
    /// What the driver expects of a write that succeeds.
    pub(super) durability: Durability,
}

#[derive(Debug)]
enum Order {
    Start(Box<Ring>),
    /// Stop by then, or go on.
    Stop(Instant),
    Flush,
    Close,
    Open(Box<dyn Channel>),
}

#[derive(Debug)]
pub(super) enum Report {
    Stopped(Box<Ring>),
    /// So many requests are not done; the lane goes on.
    Busy(usize),
    Flushed(io::Result<()>),
    Closed,
}

/// The disk's end of a lane.
#[derive(Debug)]
pub(super) struct Lane {
    orders: Option<Sender<Order>>,
    reports: Receiver<Report>,
    wake: EventFd,
    /// Whether it was given a channel.
    is_open: AtomicBool,
    thread: Option<JoinHandle<()>>,
}

impl Lane {
    /// Starts the thread. It has no channel before [`reopen`](Self::reopen).
    pub(super) fn new(common: &Arc<Common>, name: String, start: ThreadStart) -> io::Result<Self> {
        let (orders, taken) = channel();
        let (told, reports) = channel();
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let worker = Worker {
            common: Arc::clone(common),
            channel: None,
            orders: taken,
            reports: told,
            wake: wake.try_clone()?,
            open: Slab::new(),
            done: Vec::new(),
            is_held_back: false,
            next_flush: FIRST_OWN_FLUSH,
        };
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            start();
            worker.run();
        })?;
        Ok(Self { orders: Some(orders), reports, wake, is_open: AtomicBool::new(false), thread: Some(thread) })
    }

    /// Lends it a ring, to be served from now on.
    pub(super) fn start(&self, ring: Box<Ring>) {
        self.order(Order::Start(ring));
    }

    /// Asks for the ring, to be given back by `deadline`; the next report answers.
    pub(super) fn stop(&self, deadline: Instant) {
        self.order(Order::Stop(deadline));
    }

    /// Asks for a flush of a lane that has no ring; the next report answers.
    pub(super) fn flush(&self) {
        self.order(Order::Flush);
    }

    /// Closes the channel of a lane that has no ring.
    pub(super) fn close(&self) {
        self.order(Order::Close);
        // A thread that is gone has closed it, too.
        let _ = self.report();
        self.is_open.store(false, Ordering::Release);
    }

    /// Opens a channel for it, if it has none. This is not done on its own thread, which may do little.
    pub(super) fn reopen(&self, backend: &dyn Backend) -> io::Result<()> {
        if !self.is_open.load(Ordering::Acquire) {
            self.order(Order::Open(backend.channel()?));
            self.is_open.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// What answers the last question; `None` if the thread is gone.
    pub(super) fn report(&self) -> Option<Report> {
        self.reports.recv().ok()
    }

    fn order(&self, order: Order) {
        // A thread that is gone gives no report, which is noticed there.
        let _ = self.orders.as_ref().map(|orders| orders.send(order));
        let _ = self.wake.write(1);
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        drop(self.orders.take());
        let _ = self.wake.write(1);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("The thread of a disk's queue had panicked");
        }
    }
}

/// A request that the back end works on.
#[derive(Debug)]
struct Open {
    request: Request,
    /// Operations that are not done.
    left: usize,
    status: Status,
    /// When it was found in the ring.
    found: Instant,
}

/// The thread's end of a lane.
struct Worker {
    common: Arc<Common>,
    /// What `Open` gave and `Close` did not take away.
    channel: Option<Box<dyn Channel>>,
    orders: Receiver<Order>,
    reports: Sender<Report>,
    wake: EventFd,
    open: Slab<Open>,
    done: Vec<Completion>,
    /// Whether it has left requests in the ring because of the limits: it is woken by the clock then, and not by kicks.
    is_held_back: bool,
    /// The tag of the next flush that no driver asked for.
    next_flush: u64,
}

/// Whether anything was done, so that there may be more at once.
type Busy = bool;

impl Worker {
    fn run(mut self) {
        while let Ok(order) = self.orders.recv() {
            match order {
                Order::Start(ring) => {
                    // A disk is started after it was taken back.
                    let Some(mut channel) = self.channel.take() else { return };
                    let report = self.serve(ring, &mut *channel);
                    self.channel = Some(channel);
                    let Some(report) = report else { return };
                    let _ = self.reports.send(report);
                }
                Order::Flush => {
                    let outcome = self.flush();
                    let _ = self.reports.send(Report::Flushed(outcome));
                }
                Order::Close => {
                    self.channel = None;
                    let _ = self.reports.send(Report::Closed);
                }
                Order::Open(channel) => self.channel = Some(channel),
                // It has nothing to stop.
                Order::Stop(_) => {
                    let _ = self.reports.send(Report::Busy(0));
                }
            }
        }
    }

    /// Serves a ring until it is asked for; `None` if the disk is gone.
    fn serve(&mut self, mut ring: Box<Ring>, channel: &mut dyn Channel) -> Option<Report> {
        let (mut is_broken, mut deadline) = (false, None);
        loop {
            let busy = match self.turn(&mut ring, channel, is_broken || deadline.is_some(), is_broken) {
                Ok(busy) => busy,
                Err(fault) => {
                    is_broken = true;
                    self.fail(fault);
                    true
                }
            };
            loop {
                match self.orders.try_recv() {
                    Ok(Order::Stop(by)) => deadline = Some(by),
                    Ok(Order::Start(_) | Order::Flush | Order::Close | Order::Open(_)) => {
                        tracing::error!("A disk's queue is asked for two things at once");
                    }
                    Err(std::sync::mpsc::TryRecvError::Empty) => break,
                    Err(std::sync::mpsc::TryRecvError::Disconnected) => return None,
                }
            }
            if let Some(by) = deadline {
                if self.open.is_empty() {
                    return Some(Report::Stopped(ring));
                }
                if Instant::now() >= by {
                    deadline = None;
                    let _ = self.reports.send(Report::Busy(self.open.len()));
                    continue;
                }
            }
            if !busy {
                self.wait(&ring, channel, deadline);
            }
        }
    }

    /// Takes requests from the ring unless it is about to stop, has the back end work, and gives back what is done; to
    /// nobody, if the ring is broken.
    fn turn(
        &mut self,
        ring: &mut Ring,
        channel: &mut dyn Channel,
        stops: bool,
        is_broken: bool,
    ) -> Result<Busy, BrokenRing> {
        let (mut busy, mut used, mut may_begin) = (false, false, !stops);
        let found = Instant::now();
        if may_begin {
            ring.virtq.suppress_kicks()?;
        }
        while may_begin {
            may_begin = self.common.limiter.wait(Instant::now).is_none();
            let Some(chain) = may_begin.then(|| ring.virtq.pop()).transpose()?.flatten() else { break };
            busy = true;
            let (queue, head) = (ring.virtq.index(), chain.head());
            let what = "a status byte";
            let request = Request::parse(&ring.ram, chain).map_err(|_| BrokenRing::Incomplete { queue, head, what })?;
            used |= self.begin(ring, channel, request, found)?;
        }
        self.is_held_back = !stops && !may_begin;
        channel.commit();
        let mut done = std::mem::take(&mut self.done);
        channel.reap(&mut done);
        busy |= !done.is_empty();
        let (mut outcome, now) = (Ok(()), Instant::now());
        // All of it is settled, also when the ring is found broken by the first.
        for completion in done.drain(..) {
            let Some(Open { request, status, found, .. }) = self.settle(completion) else { continue };
            if !is_broken && outcome.is_ok() {
                outcome = self.answer(ring, &request, status, now.saturating_duration_since(found));
                used = true;
            }
        }
        self.done = done;
        outcome?;
        if used && ring.virtq.wants_interrupt()? {
            ring.interrupt.used_buffers();
        }
        // Who may not begin now is not woken by kicks, but by the clock.
        Ok(busy || may_begin && ring.virtq.accept_kicks()?)
    }

    /// Begins with a request; whether it was answered at once.
    fn begin(
        &mut self,
        ring: &mut Ring,
        channel: &mut dyn Channel,
        request: Request,
        found: Instant,
    ) -> Result<bool, BrokenRing> {
        let common = &self.common;
        common.limiter.charge(request.moved());
        let rules = Rules {
            capacity: common.capacity.load(Ordering::Acquire),
            access: common.backend.geometry().access,
            durability: ring.durability,
            serial: &common.serial,
        };
        let operations = match request.begin(&ring.ram, &rules) {
            Work::Answer(status) => {
                self.answer(ring, &request, status, Duration::ZERO)?;
                return Ok(true);
            }
            Work::Operation(operation) => {
                let key = self.open.insert(Open { request, left: 1, status: Status::Ok, found });
                channel.submit(key as u64, operation);
                return Ok(false);
            }
            Work::Operations(operations) => operations,
        };
        let key = self.open.insert(Open { request, left: operations.len(), status: Status::Ok, found });
        for operation in operations {
            channel.submit(key as u64, operation);
        }
        Ok(false)
    }

    /// Takes note of an operation's end; the request, if that was its last.
    fn settle(&mut self, Completion { tag, outcome }: Completion) -> Option<Open> {
        // One that came too late for whom it was made.
        if tag >= FIRST_OWN_FLUSH {
            return None;
        }
        let key = usize::try_from(tag).expect("it is a key of this address space");
        let open = &mut self.open[key];
        open.left -= 1;
        if let Err(error) = outcome {
            tracing::debug!(%error, "A disk request failed at the host");
            open.status = Status::IoError;
        }
        (open.left == 0).then(|| self.open.remove(key))
    }

    fn answer(&self, ring: &mut Ring, request: &Request, status: Status, took: Duration) -> Result<(), BrokenRing> {
        self.common.counters.note(request.counted(), status, took);
        let written = request.finish(&ring.ram, status);
        ring.virtq.push(request.chain(), written)
    }

    fn fail(&self, fault: BrokenRing) {
        *self.common.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault);
        let _ = self.common.broken.write(1);
    }

    fn wait(&self, ring: &Ring, channel: &dyn Channel, deadline: Option<Instant>) {
        let now = Instant::now();
        let until_deadline = deadline.map(|by| by.saturating_duration_since(now));
        // What has been waited for since then is no wait any more, but no kick comes either.
        let until_allowed = self.is_held_back.then(|| self.common.limiter.wait(|| now).unwrap_or_default());
        let timeout = until_deadline.into_iter().chain(until_allowed).min();
        let timeout = timeout.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        let mut polled = [
            PollFd::from_borrowed_fd(borrow(&self.wake), PollFlags::IN),
            PollFd::from_borrowed_fd(borrow(ring.virtq.notifier()), PollFlags::IN),
            PollFd::from_borrowed_fd(channel.event(), PollFlags::IN),
        ];
        // Whatever it says, all is looked at next.
        let _ = poll(&mut polled, timeout.as_ref());
        let [woken, kicked, _] = polled.map(|fd| !fd.revents().is_empty());
        if woken {
            let _ = self.wake.read();
        }
        if kicked {
            let _ = ring.virtq.notifier().read();
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        // What is closed was flushed before.
        let Some(channel) = &mut self.channel else { return Ok(()) };
        let deadline = Instant::now() + FLUSH_WITHIN;
        let own = self.next_flush;
        self.next_flush += 1;
        channel.submit(own, Operation::Flush);
        channel.commit();
        loop {
            channel.reap(&mut self.done);
            let mut done = self.done.drain(..);
            if let Some(Completion { outcome, .. }) = done.find(|completion| completion.tag == own) {
                return outcome.map(|_| ());
            }
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            drop(done);
            let timeout = Timespec { tv_sec: 1, tv_nsec: 0 };
            let _ = poll(&mut [PollFd::from_borrowed_fd(channel.event(), PollFlags::IN)], Some(&timeout));
        }
    }
}

pub(super) fn gone() -> io::Error {
    io::Error::other("The thread of the disk's queue is gone")
}

#[expect(unsafe_code, reason = "EventFd does not lend its descriptor by AsFd")]
fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as the event lives, of which this is a borrow.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
