//! How fast a disk may be used: so many bytes and so many requests in a second, over all of its queues.
//!
//! Two token buckets. A request is let in when neither is in debt, and is charged afterwards: so one that is longer than a
//! bucket is deep is let in, too, and those after it wait the longer.

use std::num::NonZeroU64;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What can be used at once after a rest, as a share of a second's worth.
const BURST: Duration = Duration::from_millis(100);

/// The most that is done in a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Bytes read and written.
    pub bytes: Option<NonZeroU64>,
    /// Requests of any kind.
    pub requests: Option<NonZeroU64>,
}

/// Tells when the next request may begin.
#[derive(Debug)]
pub(super) struct Limiter {
    buckets: Option<Mutex<Buckets>>,
}

#[derive(Debug)]
struct Buckets {
    bytes: Option<Bucket>,
    requests: Option<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    per_second: f64,
    /// What may be used now; less than 0 is debt.
    level: f64,
    filled: Instant,
}

impl Bucket {
    fn new(per_second: NonZeroU64, now: Instant) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "a rate need not be exact to the byte")]
        let per_second = per_second.get() as f64;
        Self { per_second, level: per_second * BURST.as_secs_f64(), filled: now }
    }

    fn fill(&mut self, now: Instant) {
        let since = now.saturating_duration_since(self.filled).as_secs_f64();
        self.level = (self.level + since * self.per_second).min(self.per_second * BURST.as_secs_f64());
        self.filled = now;
    }

    /// How long the debt lasts.
    fn debt(&self) -> Duration {
        if self.level >= 0.0 { Duration::ZERO } else { Duration::from_secs_f64(-self.level / self.per_second) }
    }
}

impl Limiter {
    pub(super) fn new(limits: Limits, now: Instant) -> Self {
        let Limits { bytes, requests } = limits;
        let bucket = |rate: Option<NonZeroU64>| rate.map(|rate| Bucket::new(rate, now));
        let any = bytes.is_some() || requests.is_some();
        Self { buckets: any.then(|| Mutex::new(Buckets { bytes: bucket(bytes), requests: bucket(requests) })) }
    }

    /// How long the next request has to wait; `None` if it may begin. The clock is not looked at where there is no limit.
    pub(super) fn wait(&self, now: impl FnOnce() -> Instant) -> Option<Duration> {
        let mut buckets = self.lock()?;
        let now = now();
        let Buckets { bytes, requests } = &mut *buckets;
        let debts = [bytes, requests].into_iter().flatten().map(|bucket| {
            bucket.fill(now);
            bucket.debt()
        });
        debts.max().filter(|debt| !debt.is_zero())
    }

    /// Charges a request that moves so many bytes.
    pub(super) fn charge(&self, moved: u64) {
        let Some(mut buckets) = self.lock() else { return };
        let Buckets { bytes, requests } = &mut *buckets;
        #[expect(clippy::cast_precision_loss, reason = "a rate need not be exact to the byte")]
        let moved = moved as f64;
        for (bucket, cost) in [(bytes, moved), (requests, 1.0)] {
            if let Some(bucket) = bucket {
                bucket.level -= cost;
            }
        }
    }

    fn lock(&self) -> Option<MutexGuard<'_, Buckets>> {
        self.buckets.as_ref().map(|buckets| buckets.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(bytes: u64, requests: u64, now: Instant) -> Limiter {
        Limiter::new(Limits { bytes: NonZeroU64::new(bytes), requests: NonZeroU64::new(requests) }, now)
    }

    /// How many requests of `length` bytes begin within `time`, if each begins as soon as it may.
    fn begun(limiter: &Limiter, length: u64, start: Instant, time: Duration) -> u64 {
        let (mut now, mut count) = (start, 0);
        loop {
            while let Some(wait) = limiter.wait(|| now) {
                now += wait.max(Duration::from_nanos(1));
            }
            if now >= start + time {
                return count;
            }
            limiter.charge(length);
            count += 1;
        }
    }

    #[test]
    fn rates_hold_over_seconds() {
        let now = Instant::now();
        for (bytes, requests, length, expected) in
            [(1 << 20, 0, 4096, 256), (0, 100, 4096, 100), (1 << 20, 100, 4096, 100), (1 << 20, 1000, 65_536, 16)]
        {
            let in_ten = begun(&limiter(bytes, requests, now), length, now, Duration::from_secs(10));
            let goal = expected * 10 + expected / 10;
            assert!(in_ten.abs_diff(goal) <= expected / 10 + 1, "{bytes} {requests} {length}: {in_ten} for {goal}");
        }
    }

    #[test]
    fn one_that_is_longer_than_a_second_is_let_in_and_paid_for() {
        let now = Instant::now();
        let limiter = limiter(1 << 20, 0, now);
        assert_eq!(limiter.wait(|| now), None);
        limiter.charge(4 << 20);
        let wait = limiter.wait(|| now).unwrap();
        assert!((Duration::from_millis(3890)..Duration::from_millis(3910)).contains(&wait), "{wait:?}");
        assert_eq!(limiter.wait(|| now + Duration::from_secs(4)), None);
    }

    #[test]
    fn without_limits_nothing_waits() {
        let now = Instant::now();
        let limiter = limiter(0, 0, now);
        for _ in 0..1000 {
            limiter.charge(u64::MAX);
            assert_eq!(limiter.wait(|| now), None);
        }
    }
}
