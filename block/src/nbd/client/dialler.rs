//! The thread that connects for channels, whose own threads wait for nothing.

use super::Shared;
use super::error::NbdError;
use super::haggling::Agreement;
use crate::nbd::transport::Transport;
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// A connection on which requests may be sent.
#[derive(Debug)]
pub(super) struct Connected {
    pub(super) transport: Transport,
    pub(super) agreement: Agreement,
}

/// Where a channel's connection, or why there is none, is put.
#[derive(Debug)]
pub(super) struct Call {
    outcome: Mutex<Option<Result<Connected, NbdError>>>,
    answered: OwnedFd,
}

impl Call {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        let answered = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Arc::new(Self { outcome: Mutex::default(), answered }))
    }

    /// Readable when there is an outcome.
    pub(super) fn answered(&self) -> BorrowedFd<'_> {
        self.answered.as_fd()
    }

    /// The outcome, once.
    pub(super) fn take(&self) -> Option<Result<Connected, NbdError>> {
        let outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner).take();
        if outcome.is_some() {
            let _ = rustix::io::read(&self.answered, &mut [0; 8]);
        }
        outcome
    }

    fn put(&self, outcome: Result<Connected, NbdError>) {
        *self.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        // The only refusal is a counter at its end, and then it is readable.
        let _ = rustix::io::write(&self.answered, &1_u64.to_ne_bytes());
    }
}

#[derive(Debug)]
pub(super) struct Dialler {
    calls: Option<Sender<Arc<Call>>>,
    thread: Option<JoinHandle<()>>,
}

impl Dialler {
    pub(super) fn start(shared: Arc<Shared>) -> io::Result<Self> {
        let (sender, calls) = channel::<Arc<Call>>();
        let thread = std::thread::Builder::new().name("nbd-dial".to_owned()).spawn(move || {
            (shared.options.thread_start)();
            // Those whose channel is gone are not called.
            for call in calls.iter().filter(|call| Arc::strong_count(call) > 1) {
                call.put(shared.connect());
            }
        })?;
        Ok(Self { calls: Some(sender), thread: Some(thread) })
    }

    /// Has a connection made for `call`.
    pub(super) fn dial(&self, call: &Arc<Call>) {
        // It ends with the last of who could ask.
        let _ = self.calls.as_ref().map(|calls| calls.send(Arc::clone(call)));
    }
}

impl Drop for Dialler {
    fn drop(&mut self) {
        drop(self.calls.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("The thread that connects to an NBD server had panicked");
        }
    }
}
