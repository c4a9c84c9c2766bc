//! A disk that was given away, and is read from here until its new host has all of it.
//!
//! Once its lock is taken for the new host it stays taken, however often that host loses its connection: nobody else may
//! write what has not come there yet.
//!
//! It takes no writes. A discard says that the new host does not need a range any more: when that has been said of all of
//! it, from its beginning to its end, the copy that is here is nobody's, and whoever lends it is told. What is discarded
//! stays as it is.

use crate::backend::{Access, Answer, Backend, Channel, Completion, Geometry, Operation};
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How much of a disk was given up.
#[derive(Default)]
struct GivenUp {
    /// All before this.
    bytes: u64,
    /// Who hears when that is all.
    on_free: Option<Box<dyn FnOnce() + Send>>,
}

struct Ledger {
    capacity: u64,
    given_up: Mutex<GivenUp>,
}

impl fmt::Debug for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ledger").field("given_up", &self.given_up().bytes).finish_non_exhaustive()
    }
}

impl Ledger {
    fn given_up(&self) -> MutexGuard<'_, GivenUp> {
        self.given_up.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note that a range is not needed. One that does not join what was given up before says nothing: so a range may
    /// come twice, and none is taken for another.
    fn give_up(&self, offset: u64, length: u64) {
        let mut given_up = self.given_up();
        if offset <= given_up.bytes {
            given_up.bytes = given_up.bytes.max(offset + length);
        }
        let on_free = if given_up.bytes == self.capacity { given_up.on_free.take() } else { None };
        drop(given_up);
        if let Some(tell) = on_free {
            tell();
        }
    }
}

/// A disk that is lent.
#[derive(Debug)]
pub struct LentBackend {
    inner: Arc<dyn Backend>,
    ledger: Arc<Ledger>,
}

impl LentBackend {
    /// Lends `inner`. `on_free` hears when all of it was given up, on a thread that serves it.
    #[must_use]
    pub fn new(inner: Arc<dyn Backend>, on_free: impl FnOnce() + Send + 'static) -> Self {
        let capacity = inner.geometry().capacity;
        let given_up = Mutex::new(GivenUp { bytes: 0, on_free: Some(Box::new(on_free)) });
        Self { inner, ledger: Arc::new(Ledger { capacity, given_up }) }
    }

    /// Gives up its lock. Nobody is to be served any more.
    pub fn end(&self) {
        self.inner.release();
    }

    /// Whether all of it was given up.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.ledger.given_up().bytes == self.ledger.capacity
    }
}

impl Backend for LentBackend {
    fn geometry(&self) -> Geometry {
        // What is read only takes no discards.
        Geometry { access: Access::ReadWrite, ..self.inner.geometry() }
    }

    fn channel(&self) -> io::Result<Box<dyn Channel>> {
        Ok(Box::new(LentChannel { inner: self.inner.channel()?, ledger: Arc::clone(&self.ledger), ready: Vec::new() }))
    }

    fn grow(&self, _: u64) -> io::Result<u64> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "A disk that is lent keeps its length"))
    }

    fn is_held_by_channels(&self) -> bool {
        self.inner.is_held_by_channels()
    }

    fn release(&self) {
        // See `end`.
    }

    fn reacquire(&self) -> io::Result<()> {
        self.inner.reacquire()
    }
}

#[derive(Debug)]
struct LentChannel {
    inner: Box<dyn Channel>,
    ledger: Arc<Ledger>,
    /// What was answered at once.
    ready: Vec<Completion>,
}

impl Channel for LentChannel {
    fn submit(&mut self, tag: u64, operation: Operation) {
        let outcome = match operation {
            Operation::Discard { offset, length } => operation.check(self.ledger.capacity).map(|()| {
                self.ledger.give_up(offset, length);
                Answer::Done
            }),
            Operation::Write { .. } | Operation::WriteZeroes { .. } => Err(io::ErrorKind::PermissionDenied.into()),
            Operation::Read { .. } | Operation::Flush | Operation::Status { .. } => {
                return self.inner.submit(tag, operation);
            }
        };
        self.ready.push(Completion { tag, outcome });
    }

    fn commit(&mut self) {
        self.inner.commit();
    }

    fn event(&self) -> BorrowedFd<'_> {
        // Who has submitted something looks for what is complete, whether this says so or not.
        self.inner.event()
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.ready);
        self.inner.reap(done);
    }

    fn in_flight(&self) -> usize {
        self.ready.len() + self.inner.in_flight()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Durability, Unmap};
    use crate::blocking::Blocking;
    use crate::file::{FileBackend, FileOptions};
    use std::sync::mpsc::channel;

    #[test]
    fn it_is_free_when_all_of_it_was_given_up_and_stays_as_it_is() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [7; 4096]).unwrap();
        let inner = FileBackend::open(file.path(), FileOptions::new(Access::ReadOnly)).unwrap();
        let (tell, told) = channel();
        let disk = LentBackend::new(Arc::new(inner), move || tell.send(()).unwrap());
        let mut one = Blocking::open(&disk).unwrap();
        one.discard(2048, 2048).unwrap();
        one.discard(0, 1024).unwrap();
        one.discard(0, 1024).unwrap();
        one.discard(2048, 2048).unwrap();
        assert!(!disk.is_free(), "there is a gap");
        one.discard(512, 2048).unwrap();
        assert!(!disk.is_free() && told.try_recv().is_err());
        assert!(one.discard(2048, 4096).is_err(), "it is not as long");
        one.discard(2048, 2048).unwrap();
        assert!(disk.is_free() && told.try_recv().is_ok());
        one.discard(0, 4096).unwrap();
        let mut bytes = [0; 4096];
        one.read(0, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 4096]);
        // Nobody else may write it before the lender lets go.
        let writer = || FileBackend::open(file.path(), FileOptions::new(Access::ReadWrite));
        disk.release();
        writer().unwrap_err();
        disk.end();
        writer().unwrap();
        let denied = |outcome: io::Result<()>| outcome.unwrap_err().kind() == io::ErrorKind::PermissionDenied;
        assert!(denied(one.write(0, &[1; 512], Durability::Cached)));
        assert!(denied(one.write_zeroes(0, 512, Unmap::Allowed, Durability::Cached)));
    }
}
