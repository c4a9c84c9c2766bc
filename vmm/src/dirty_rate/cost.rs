//! What a measurement costs, by the clocks of the thread that makes it.

#![expect(unsafe_code, reason = "the standard library does not read a thread's CPU time")]

use std::time::{Duration, Instant};

/// The cost so far.
#[derive(Debug, Default)]
pub(super) struct Cost {
    /// Time in calls that switch and read the log, by the wall.
    pub(super) log: Duration,
    /// The longest of these.
    pub(super) longest_log: Duration,
    /// CPU time of all of it.
    pub(super) cpu: Duration,
}

impl Cost {
    /// Does `work` on the log, and counts it.
    pub(super) fn of_log<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let done = self.of_sample(work);
        let took = begun.elapsed();
        self.log += took;
        self.longest_log = self.longest_log.max(took);
        done
    }

    /// Does `work` that the guest does not wait for, and counts it.
    pub(super) fn of_sample<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let before = thread_cpu_time();
        let done = work();
        self.cpu += thread_cpu_time().saturating_sub(before);
        done
    }
}

/// The CPU time of the calling thread so far; zero on a host that does not tell.
fn thread_cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec, a local (clock_gettime(2)).
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    let (seconds, nanoseconds) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
    Duration::new(seconds.unwrap_or(0), nanoseconds.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_costs_cpu_time_and_the_longest_call_is_known() {
        let mut cost = Cost::default();
        let spin = |times: u64| (0..times).fold(0, |sum: u64, number| std::hint::black_box(sum ^ number));
        cost.of_log(|| spin(1_000_000));
        cost.of_log(|| spin(10));
        assert!(cost.longest_log < cost.log, "{cost:?}");
        let before = cost.cpu;
        assert!(before > Duration::ZERO, "{cost:?}");
        let log = cost.log;
        cost.of_sample(|| spin(1_000_000));
        assert!(cost.cpu > before && cost.log == log, "{cost:?}");
    }
}
