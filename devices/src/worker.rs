//! Threads that devices work on: one loop of `epoll` each, by event-manager.
//!
//! The machine spawns a worker for each disk and NIC and one that the light devices share, and hands them to the devices
//! it builds. A device attaches a [`Task`] and detaches it by dropping the [`Attachment`]. Invariant: after that drop the
//! task has been dropped too, and its thread touches nothing of the device any more.
//!
//! Everything is polled edge-triggered: a task that must stand still can ignore an event without making the loop spin,
//! provided that it looks again by itself when it goes on.

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId};
use std::fmt;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use thiserror::Error;

/// Why a worker could not be had or used.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// The host gives no thread.
    #[error("Could not start worker thread {name}")]
    Spawn {
        /// The thread.
        name: String,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// The host polls nothing, or not this.
    #[error("Could not poll a device's file descriptors")]
    Poll(#[from] event_manager::Error),
}

/// Work that waits for file descriptors. Runs on the worker's thread only.
pub trait Task: Send + 'static {
    /// Says what to poll. Called once, before anything else. A descriptor must stay open until it is removed, or the
    /// task is dropped.
    ///
    /// # Errors
    /// What the host refuses and the task cannot do without.
    fn begin(&mut self, polls: &mut Polls<'_, '_>) -> Result<(), WorkerError>;

    /// The descriptor with `token` became ready. It must be read until it has no more.
    fn ready(&mut self, token: u32, polls: &mut Polls<'_, '_>);
}

/// What a task polls: each descriptor for input, edge-triggered, with a token of the task's choice.
#[derive(Debug)]
pub struct Polls<'a, 'b> {
    ops: &'a mut EventOps<'b>,
}

impl Polls<'_, '_> {
    /// Polls `fd` from now on. If it is ready already, the task hears of it.
    ///
    /// # Errors
    /// [`WorkerError::Poll`] if it cannot be polled; a regular file, for instance.
    pub fn add(&mut self, fd: RawFd, token: u32) -> Result<(), WorkerError> {
        self.ops.add(interest(fd, token)).map_err(WorkerError::Poll)
    }

    /// Stops polling `fd`, which must be open still.
    ///
    /// # Errors
    /// [`WorkerError::Poll`] if it was not polled.
    pub fn remove(&mut self, fd: RawFd, token: u32) -> Result<(), WorkerError> {
        self.ops.remove(interest(fd, token)).map_err(WorkerError::Poll)
    }
}

fn interest(fd: RawFd, token: u32) -> Events {
    Events::with_data_raw(fd, token, EventSet::IN | EventSet::EDGE_TRIGGERED)
}

struct Subscriber {
    task: Box<dyn Task>,
    refused: Option<WorkerError>,
}

impl MutEventSubscriber for Subscriber {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        self.task.ready(events.data(), &mut Polls { ops });
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.refused = self.task.begin(&mut Polls { ops }).err();
    }
}

struct Thread {
    name: String,
    endpoint: RemoteEndpoint<Subscriber>,
    ends: Arc<AtomicBool>,
    join: Option<JoinHandle<()>>,
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Release);
        let woken = self.endpoint.kick().is_ok();
        if let Some(join) = self.join.take().filter(|_| woken)
            && join.join().is_err()
        {
            tracing::error!(worker = self.name, "A worker thread had panicked");
        }
    }
}

/// What a thread does before anything else; its process's way to confine it.
pub type ThreadStart = fn();

/// A handle to a worker thread. Clones share it, and it ends with the last of them.
#[derive(Clone)]
pub struct Worker {
    thread: Arc<Thread>,
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("name", &self.thread.name).finish_non_exhaustive()
    }
}

impl Worker {
    /// Starts a thread, which calls `start` first. Linux shows the first 15 bytes of its `name`.
    ///
    /// # Errors
    /// [`WorkerError`] if the host refuses a thread or its epoll descriptor.
    pub fn spawn(name: &str, start: ThreadStart) -> Result<Self, WorkerError> {
        let mut manager = EventManager::<Subscriber>::new()?;
        let endpoint = manager.remote_endpoint();
        let ends = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&ends);
        let join = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                start();
                while !told.load(Ordering::Acquire) {
                    if let Err(error) = manager.run() {
                        tracing::error!(%error, "A worker's event loop failed; its devices stand still");
                        return;
                    }
                }
            })
            .map_err(|source| WorkerError::Spawn { name: name.to_owned(), source })?;
        Ok(Self { thread: Arc::new(Thread { name: name.to_owned(), endpoint, ends, join: Some(join) }) })
    }

    /// Gives `task` to the thread until the attachment is dropped. Not from a task of the same worker, which would wait
    /// for itself; the same holds for the drop.
    ///
    /// # Errors
    /// [`WorkerError::Poll`] if a descriptor of the task cannot be polled.
    pub fn attach(&self, task: Box<dyn Task>) -> Result<Attachment, WorkerError> {
        let subscriber = Subscriber { task, refused: None };
        let id = self.thread.endpoint.call_blocking(move |ops| {
            let id = ops.add_subscriber(subscriber);
            match ops.subscriber_mut(id)?.refused.take() {
                None => Ok(id),
                Some(error) => {
                    ops.remove_subscriber(id)?;
                    Err(error)
                }
            }
        })?;
        Ok(Attachment { worker: self.clone(), id })
    }
}

/// A task's stay on a worker; dropping it detaches the task and drops it.
#[derive(Debug)]
pub struct Attachment {
    worker: Worker,
    id: SubscriberId,
}

impl Drop for Attachment {
    fn drop(&mut self) {
        let id = self.id;
        let gone: Result<(), WorkerError> = self.worker.thread.endpoint.call_blocking(move |ops| {
            ops.remove_subscriber(id)?;
            Ok(())
        });
        // An error means that the loop has ended, and every task with it.
        if let Err(error) = gone {
            tracing::debug!(%error, worker = self.worker.thread.name, "A task was detached from an ended worker");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::os::fd::AsRawFd;
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    thread_local!(static STARTED: Cell<bool> = const { Cell::new(false) });

    struct Echo {
        event: EventFd,
        heard: Sender<(u32, String, bool)>,
    }
    impl Task for Echo {
        fn begin(&mut self, polls: &mut Polls<'_, '_>) -> Result<(), WorkerError> {
            polls.add(self.event.as_raw_fd(), 7)
        }
        fn ready(&mut self, token: u32, _: &mut Polls<'_, '_>) {
            self.event.read().unwrap();
            let name = std::thread::current().name().unwrap_or_default().to_owned();
            self.heard.send((token, name, STARTED.get())).unwrap();
        }
    }

    #[test]
    fn events_reach_the_task_on_its_thread_until_it_is_detached() {
        let worker = Worker::spawn("blk0", || STARTED.set(true)).unwrap();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let (heard, hears) = channel();
        let attachment = worker.attach(Box::new(Echo { event: event.try_clone().unwrap(), heard })).unwrap();
        event.write(1).unwrap();
        assert_eq!(hears.recv_timeout(Duration::from_secs(5)).unwrap(), (7, "blk0".to_owned(), true));
        drop(attachment);
        assert!(hears.recv().is_err(), "the task is dropped with its attachment");
        event.write(1).unwrap();
        assert!(format!("{worker:?}").contains("blk0"));
    }

    #[test]
    fn what_cannot_be_polled_is_refused() {
        struct File(std::fs::File);
        impl Task for File {
            fn begin(&mut self, polls: &mut Polls<'_, '_>) -> Result<(), WorkerError> {
                polls.add(self.0.as_raw_fd(), 0)
            }
            fn ready(&mut self, _: u32, _: &mut Polls<'_, '_>) {}
        }
        let worker = Worker::spawn("files", || {}).unwrap();
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(worker.attach(Box::new(File(file))), Err(WorkerError::Poll(_))));
    }

    #[test]
    fn the_thread_ends_with_its_last_handle() {
        let worker = Worker::spawn("short", || {}).unwrap();
        let ends = Arc::clone(&worker.thread.ends);
        let other = worker.clone();
        drop(worker);
        assert!(!ends.load(Ordering::Acquire));
        drop(other);
        assert!(ends.load(Ordering::Acquire));
        assert_eq!(Arc::strong_count(&ends), 1, "the thread has been joined");
    }
}
