//! Time as the engine sees it: a monotonic reading and a way to wait, so that tests can run without either.

use rustix::time::{ClockId, clock_gettime};
use std::time::{Duration, Instant};

/// A clock that never goes back.
pub trait Clock: Sync {
    /// Time since some fixed moment in the past.
    fn now(&self) -> Duration;

    /// Lets `time` pass.
    fn sleep(&self, time: Duration);

    /// Processor time that the calling thread has taken, since some fixed moment in the past.
    fn thread_cpu(&self) -> Duration;
}

/// The host's monotonic clock.
#[derive(Debug, Clone, Copy)]
pub struct HostClock {
    start: Instant,
}

impl HostClock {
    /// A clock that reads zero now.
    #[must_use]
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Default for HostClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for HostClock {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }

    fn thread_cpu(&self) -> Duration {
        // The kernel counts it from 0.
        clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap_or_default()
    }
}
