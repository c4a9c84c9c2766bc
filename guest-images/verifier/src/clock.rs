//! The clock mode: does time ever run backwards, on one vCPU or from one to the next, and how long did it not run?
//!
//! One probe per vCPU, bound to it, reads `CLOCK_MONOTONIC` again and again. All probes share the latest time that any
//! of them saw: a reading that began after that and is earlier is a step back, the mark of TSCs that differ after a
//! restore. A gap is the time between two readings of one probe: a pause that the guest's clock went through.
#![expect(unsafe_code, reason = "clock_gettime and sched_setaffinity have no safe wrapper in the standard library")]

use std::io;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::worker::Work;

/// What the clock mode found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ClockReport {
    /// Readings of all probes.
    pub samples: u64,
    /// Readings that were earlier than one that had been made before.
    pub steps_back: u64,
    /// The largest such step.
    pub worst_step_back_ns: u64,
    /// The longest time between two readings of a probe.
    pub max_gap_ms: f64,
    /// When it ended, on the monotonic clock.
    pub max_gap_at_ms: f64,
    /// The monotonic clock now.
    pub monotonic_ms: f64,
    /// How much `CLOCK_BOOTTIME` gained on the monotonic clock since the start.
    pub boottime_gain_ms: f64,
    /// How much the wall clock gained on the monotonic clock since the start: the guest's lag if it is not corrected.
    pub realtime_gain_ms: f64,
}

impl ClockReport {
    /// Adds what another probe found.
    pub fn merge(&mut self, other: Self) {
        let Self {
            samples,
            steps_back,
            worst_step_back_ns,
            max_gap_ms,
            max_gap_at_ms,
            monotonic_ms,
            // All probes read the same clocks.
            boottime_gain_ms: _,
            realtime_gain_ms: _,
        } = other;
        self.samples += samples;
        self.steps_back += steps_back;
        self.worst_step_back_ns = self.worst_step_back_ns.max(worst_step_back_ns);
        if max_gap_ms > self.max_gap_ms {
            self.max_gap_ms = max_gap_ms;
            self.max_gap_at_ms = max_gap_at_ms;
        }
        self.monotonic_ms = self.monotonic_ms.max(monotonic_ms);
    }
}

/// The latest time that any probe has seen, in nanoseconds.
#[derive(Clone, Debug, Default)]
pub struct Latest(Arc<AtomicU64>);

/// One probe.
#[derive(Debug)]
pub struct Probe {
    period: Duration,
    latest: Latest,
    before: Option<u64>,
    samples: u64,
    steps_back: u64,
    worst_step_back: u64,
    max_gap: u64,
    max_gap_at: u64,
    offsets_at_start: Offsets,
}

/// Other clocks minus the monotonic one, in milliseconds.
#[derive(Clone, Copy, Debug)]
struct Offsets {
    boottime: f64,
    realtime: f64,
}

impl Probe {
    /// Makes a probe in the thread that will run it, bound to a vCPU.
    pub fn on_cpu(cpu: usize, period: Duration, latest: Latest) -> Self {
        if let Err(error) = bind_to(cpu) {
            // A vCPU that is offline or forbidden: the probe is as good on another one.
            eprintln!("verifier: the clock probe {cpu} runs anywhere: {error}");
        }
        Self::new(period, latest)
    }

    fn new(period: Duration, latest: Latest) -> Self {
        Self {
            period,
            latest,
            before: None,
            samples: 0,
            steps_back: 0,
            worst_step_back: 0,
            max_gap: 0,
            max_gap_at: 0,
            offsets_at_start: Offsets::now(),
        }
    }

    /// Takes the reading `now` into account; `floor` was the latest time when it began.
    fn note(&mut self, floor: u64, now: u64) {
        self.samples += 1;
        if now < floor {
            self.steps_back += 1;
            self.worst_step_back = self.worst_step_back.max(floor - now);
        }
        let gap = now.saturating_sub(self.before.unwrap_or(now));
        if gap > self.max_gap {
            self.max_gap = gap;
            self.max_gap_at = now;
        }
        self.before = Some(now);
    }
}

impl Work for Probe {
    type Report = ClockReport;

    fn step(&mut self) -> Duration {
        // Sequentially consistent: the load must not move behind the reading, nor the reading before it.
        let floor = self.latest.0.load(Ordering::SeqCst);
        let now = read(libc::CLOCK_MONOTONIC);
        self.latest.0.fetch_max(now, Ordering::SeqCst);
        self.note(floor, now);
        self.period
    }

    fn report(&mut self) -> ClockReport {
        let offsets = Offsets::now();
        ClockReport {
            samples: self.samples,
            steps_back: self.steps_back,
            worst_step_back_ns: self.worst_step_back,
            max_gap_ms: milliseconds(self.max_gap),
            max_gap_at_ms: milliseconds(self.max_gap_at),
            monotonic_ms: milliseconds(read(libc::CLOCK_MONOTONIC)),
            boottime_gain_ms: offsets.boottime - self.offsets_at_start.boottime,
            realtime_gain_ms: offsets.realtime - self.offsets_at_start.realtime,
        }
    }
}

impl Offsets {
    fn now() -> Self {
        let monotonic = read(libc::CLOCK_MONOTONIC);
        let minus_monotonic = |clock| milliseconds(read(clock)) - milliseconds(monotonic);
        Self { boottime: minus_monotonic(libc::CLOCK_BOOTTIME), realtime: minus_monotonic(libc::CLOCK_REALTIME) }
    }
}

/// The monotonic clock in microseconds, for ticks.
pub fn monotonic_microseconds() -> u64 {
    read(libc::CLOCK_MONOTONIC) / 1000
}

/// The number of vCPUs.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// 2^53 ns are 104 days of uptime; beyond that a report rounds.
#[expect(clippy::cast_precision_loss, reason = "a report of milliseconds needs no more digits")]
fn milliseconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e6
}

/// A clock in nanoseconds. The clocks read here cannot fail on Linux and are never negative.
fn read(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec that lives through the call, which writes to nothing else.
    let result = unsafe { libc::clock_gettime(clock, &raw mut time) };
    assert_eq!(result, 0, "clock {clock} does not exist");
    let (seconds, nanoseconds) = (u64::try_from(time.tv_sec), u64::try_from(time.tv_nsec));
    seconds.unwrap_or(0).saturating_mul(1_000_000_000).saturating_add(nanoseconds.unwrap_or(0))
}

fn bind_to(cpu: usize) -> io::Result<()> {
    if cpu >= libc::CPU_SETSIZE.cast_unsigned() as usize {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // SAFETY: a cpu_set_t is an array of integers, for which zeroes are valid: the empty set.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: CPU_SET writes bit `cpu` of `set`, and `cpu` lies within it by the check above.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the kernel reads `size` bytes of `set`, which is that long; 0 means this thread.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe() -> Probe {
        Probe::new(Duration::from_millis(1), Latest::default())
    }

    #[test]
    fn a_sound_clock_never_steps_back() {
        let latest = Latest::default();
        let mut probes = [Probe::on_cpu(0, Duration::ZERO, latest.clone()), Probe::new(Duration::ZERO, latest)];
        for _ in 0..1000 {
            probes.iter_mut().for_each(|probe| assert_eq!(probe.step(), Duration::ZERO));
        }
        let report = probes[0].report();
        assert_eq!((report.samples, report.steps_back), (1000, 0));
        assert!(report.monotonic_ms > 0.0 && report.boottime_gain_ms.abs() < 1.0, "{report:?}");
    }

    #[test]
    fn steps_back_and_gaps_are_measured() {
        let mut probe = probe();
        probe.note(0, 1_000_000);
        probe.note(1_000_000, 2_000_000);
        probe.note(5_000_000, 4_000_000);
        probe.note(4_000_000, 12_000_000);
        probe.note(12_000_000, 13_000_000);
        let report = probe.report();
        assert_eq!((report.samples, report.steps_back, report.worst_step_back_ns), (5, 1, 1_000_000));
        assert_eq!((report.max_gap_ms, report.max_gap_at_ms), (8.0, 12.0));
    }

    #[test]
    fn a_time_seen_by_another_probe_counts() {
        let mut probe = probe();
        probe.latest.0.store(u64::MAX, Ordering::SeqCst);
        probe.step();
        assert_eq!(probe.report().steps_back, 1);
    }

    #[test]
    fn reports_keep_the_worst() {
        let (mut one, mut other) = (probe(), probe());
        one.note(0, 1_000_000);
        one.note(0, 2_000_000);
        other.note(9, 8);
        other.note(0, 7_000_008);
        let mut sum = one.report();
        sum.merge(other.report());
        assert_eq!((sum.samples, sum.steps_back, sum.worst_step_back_ns, sum.max_gap_ms), (4, 1, 1, 7.0));
    }

    #[test]
    fn a_cpu_beyond_the_set_is_refused() {
        bind_to(1 << 20).unwrap_err();
    }
}
