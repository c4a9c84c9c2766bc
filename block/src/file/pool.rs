//! A channel whose requests are done by threads, one call each: for hosts without io_uring.

use super::raw::RawFile;
use crate::backend::{Answer, Channel, Completion, Operation};
use rustix::event::{EventfdFlags, eventfd};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// How many requests of a channel are done side by side. More of them wait for the same disk.
const THREADS: usize = 4;

#[derive(Debug)]
struct Shared {
    file: Arc<RawFile>,
    work: Mutex<Work>,
    /// There is work, or the channel ends.
    wake: Condvar,
    event: OwnedFd,
}

#[derive(Debug, Default)]
struct Work {
    queue: VecDeque<(u64, Operation)>,
    done: Vec<(u64, io::Result<Answer>)>,
    ends: bool,
}

impl Shared {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut work = self.work();
        loop {
            if let Some((tag, operation)) = work.queue.pop_front() {
                drop(work);
                let outcome = self.file.execute(operation);
                work = self.work();
                work.done.push((tag, outcome));
                // The only refusal is a counter at its end, and then it is readable.
                let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
            } else if work.ends {
                return;
            } else {
                work = self.wake.wait(work).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

#[derive(Debug)]
pub(super) struct PoolChannel {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    submitted: Vec<(u64, Operation)>,
    in_flight: usize,
}

impl PoolChannel {
    pub(super) fn open(file: Arc<RawFile>, thread_start: fn()) -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let shared = Arc::new(Shared { file, work: Mutex::default(), wake: Condvar::new(), event });
        let mut channel = Self { shared, threads: Vec::new(), submitted: Vec::new(), in_flight: 0 };
        for _ in 0..THREADS {
            let shared = Arc::clone(&channel.shared);
            let serve = move || {
                thread_start();
                shared.serve();
            };
            channel.threads.push(std::thread::Builder::new().name("disk".to_owned()).spawn(serve)?);
        }
        Ok(channel)
    }
}

impl Channel for PoolChannel {
    fn submit(&mut self, tag: u64, operation: Operation) {
        self.in_flight += 1;
        self.submitted.push((tag, operation));
    }

    fn commit(&mut self) {
        if self.submitted.is_empty() {
            return;
        }
        let count = self.submitted.len();
        self.shared.work().queue.extend(self.submitted.drain(..));
        if count == 1 { self.shared.wake.notify_one() } else { self.shared.wake.notify_all() }
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        let mut counter = [0; 8];
        // Read before the work is looked at: what is done afterwards makes it readable again.
        let _ = rustix::io::read(&self.shared.event, &mut counter);
        let ready = std::mem::take(&mut self.shared.work().done);
        self.in_flight -= ready.len();
        done.extend(ready.into_iter().map(|(tag, outcome)| Completion { tag, outcome }));
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl Drop for PoolChannel {
    fn drop(&mut self) {
        let mut work = self.shared.work();
        work.ends = true;
        work.queue.clear();
        drop(work);
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("A thread of a disk had panicked");
            }
        }
    }
}
