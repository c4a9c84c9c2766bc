//! A mode in a thread of its own.
//!
//! Called by the session. A mode owns all its state and does a small step at a time; between two steps it answers who
//! asks for its report. So nothing is shared, and a unit test steps a mode by hand.

use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// What a mode does.
pub trait Work {
    /// What it knows at some moment.
    type Report: Send + 'static;

    /// Does some work, at most some milliseconds of it, and says how long to rest before the next step.
    fn step(&mut self) -> Duration;

    /// Verifies everything that it has, and reports.
    fn report(&mut self) -> Self::Report;
}

/// A running mode; it ends when this value is dropped.
#[derive(Debug)]
pub struct Worker<R> {
    name: String,
    /// `None` only while this value is being dropped.
    requests: Option<Sender<Sender<R>>>,
    thread: Option<JoinHandle<()>>,
}

impl<R: Send + 'static> Worker<R> {
    /// Starts a mode. `build` makes it in its own thread, so that it may bind itself to a vCPU.
    pub fn start<W: Work<Report = R>>(name: String, build: impl FnOnce() -> W + Send + 'static) -> io::Result<Self> {
        let (requests, asked) = mpsc::channel();
        let thread = thread::Builder::new().name(name.clone()).spawn(move || work(build(), &asked))?;
        Ok(Self { name, requests: Some(requests), thread: Some(thread) })
    }

    /// Asks for a report and waits for it, `limit` at most. `None` if the mode is stuck or has panicked.
    pub fn report(&self, limit: Duration) -> Option<R> {
        let (reply, answer) = mpsc::channel();
        self.requests.as_ref()?.send(reply).ok()?;
        answer.recv_timeout(limit).ok()
    }

    /// Its thread's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl<R> Drop for Worker<R> {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            // A panic has been printed by the thread itself, and its missing report is a fault already.
            let _ = thread.join();
        }
    }
}

fn work<W: Work>(mut work: W, asked: &Receiver<Sender<W::Report>>) {
    let mut next_step = Instant::now();
    loop {
        // However often somebody asks, a step that is due is done.
        if next_step <= Instant::now() {
            let rest = work.step();
            next_step = Instant::now() + rest;
        }
        match asked.recv_timeout(next_step.saturating_duration_since(Instant::now())) {
            // Who asked may have given up waiting.
            Ok(reply) => drop(reply.send(work.report())),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counter(u32);

    /// Longer than it takes to ask for a report and to get it.
    const REST: Duration = Duration::from_millis(5);

    impl Work for Counter {
        type Report = u32;

        fn step(&mut self) -> Duration {
            self.0 += 1;
            assert!(self.0 < 1_000_000, "the counter runs over");
            REST
        }

        fn report(&mut self) -> u32 {
            self.0
        }
    }

    #[test]
    fn it_works_and_answers() {
        let worker = Worker::start("counter".to_owned(), || Counter(5)).unwrap();
        let first = worker.report(Duration::from_secs(10)).unwrap();
        let (mut later, start) = (first, Instant::now());
        while later == first && start.elapsed() < Duration::from_secs(10) {
            later = worker.report(Duration::from_secs(10)).unwrap();
        }
        assert!(first >= 5 && later > first, "{first} {later}");
        assert_eq!(worker.name(), "counter");
    }

    #[test]
    fn a_panic_is_a_missing_report() {
        let worker = Worker::start("breaks".to_owned(), || Counter(999_999)).unwrap();
        while worker.report(Duration::from_secs(10)).is_some() {}
    }
}
