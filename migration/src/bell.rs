//! A bell: how threads of one end of a migration wake each other.
//!
//! Who waits reads [`Bell::rung`] first, then looks whether what it waits for is so, and then waits for the count to
//! change; so nothing that happens in between is missed. Who changes something rings afterwards.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// A count of rings that can be waited on.
#[derive(Debug, Default)]
pub struct Bell {
    rings: Arc<AtomicU64>,
    /// Held while it rings, so that nobody falls asleep at that moment.
    ringing: Mutex<()>,
    rang: Condvar,
}

impl Bell {
    /// A bell that has never rung.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How often it has rung.
    pub fn rung(&self) -> u64 {
        self.rings.load(Ordering::SeqCst)
    }

    /// Rings, and wakes all who wait.
    pub fn ring(&self) {
        let ringing = self.ringing.lock().unwrap_or_else(PoisonError::into_inner);
        self.rings.fetch_add(1, Ordering::SeqCst);
        drop(ringing);
        self.rang.notify_all();
    }

    /// Waits until it has rung more often than `seen` times, for at most `limit`.
    pub fn wait(&self, seen: u64, limit: Duration) {
        let ringing = self.ringing.lock().unwrap_or_else(PoisonError::into_inner);
        // A wait that another thread's panic ended is over, too.
        drop(self.rang.wait_timeout_while(ringing, limit, |()| self.rung() == seen));
    }

    /// The count itself, for those who watch the bell without waiting on it.
    #[cfg(test)]
    pub(crate) fn count(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.rings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_before_the_wait_is_not_missed() {
        let bell = Bell::new();
        let seen = bell.rung();
        bell.ring();
        bell.wait(seen, Duration::from_secs(3600));
        assert_eq!(bell.rung(), seen + 1);
    }

    #[test]
    fn a_ring_wakes_another_thread() {
        let bell = Bell::new();
        let seen = bell.rung();
        std::thread::scope(|scope| {
            scope.spawn(|| bell.wait(seen, Duration::from_secs(3600)));
            bell.ring();
        });
    }

    #[test]
    fn a_silent_bell_is_not_waited_for_for_ever() {
        let bell = Bell::new();
        bell.wait(bell.rung(), Duration::from_millis(1));
        assert_eq!(bell.rung(), 0);
    }
}
