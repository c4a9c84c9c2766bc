//! Takes time away from vCPUs, in small even slices, so that a guest writes its memory more slowly.
//!
//! Once in a [`PERIOD`] the thread `throttle` sends each vCPU that has a share taken away to nap, by the byte and the
//! signal that park it too ([`Desk`](super::desk::Desk)). A vCPU that overslept has its time to run nevertheless before it
//! naps again, so that no more than its share is taken away, however late threads get a CPU. Whoever parks or ends a
//! napping vCPU wakes it.
//!
//! The thread lives only while something is taken away: a guest that is not throttled pays nothing.

use super::Members;
use crate::seccomp::{self, ThreadKind};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// From the start of one nap to the start of the next. Short against what a guest's network and watchdogs notice, long
/// against the microseconds that it takes to leave the guest and to come back.
pub const PERIOD: Duration = Duration::from_millis(10);

/// The most that can be taken away: a guest that gets nothing at all would be paused, and could not even be shut down.
pub const MOST_SHARE: f64 = 0.99;

/// The length of the naps that take `share` of the time away; what is no share is taken for the nearest one.
fn nap_of(share: f64) -> Duration {
    // Written so that a NaN takes nothing.
    if share > 0.0 { PERIOD.mul_f64(share.min(MOST_SHARE)) } else { Duration::ZERO }
}

/// The throttle of all vCPUs of a guest.
#[derive(Debug, Default)]
pub(super) struct Throttle {
    /// There while something is taken away.
    beat: Mutex<Option<Beat>>,
}

impl Throttle {
    /// Takes `shares` of the time away from now on, one for each of `members`.
    pub(super) fn set(&self, members: &Arc<Members>, shares: &[f64]) -> io::Result<()> {
        let naps: Vec<_> = shares.iter().map(|share| nap_of(*share)).collect();
        let mut beat = self.beat.lock().unwrap_or_else(PoisonError::into_inner);
        if naps.iter().all(Duration::is_zero) {
            drop(beat.take());
        } else if let Some(beat) = &*beat {
            beat.score.set(naps.clone());
        } else {
            *beat = Some(Beat::start(Arc::clone(members), naps.clone())?);
        }
        for (member, _) in members.0.iter().zip(&naps).filter(|(_, nap)| nap.is_zero()) {
            member.desk.wake();
        }
        Ok(())
    }
}

/// The thread that sends vCPUs to nap. It ends on drop.
#[derive(Debug)]
struct Beat {
    score: Arc<Score>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread goes by.
#[derive(Debug)]
struct Score {
    /// How long each vCPU naps in a period; `None` when the thread is to end.
    naps: Mutex<Option<Vec<Duration>>>,
    ending: Condvar,
}

impl Score {
    fn set(&self, naps: Vec<Duration>) {
        *self.lock() = Some(naps);
    }

    fn end(&self) {
        *self.lock() = None;
        self.ending.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<Duration>>> {
        // A change is one assignment: a panic elsewhere leaves nothing half done.
        self.naps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Beat {
    fn start(members: Arc<Members>, naps: Vec<Duration>) -> io::Result<Self> {
        let score = Arc::new(Score { naps: Mutex::new(Some(naps)), ending: Condvar::new() });
        let own = Arc::clone(&score);
        let thread = Builder::new().name("throttle".to_owned()).spawn(move || {
            seccomp::enter(ThreadKind::Throttle);
            beat(&members, &own);
        })?;
        Ok(Self { score, thread: Some(thread) })
    }
}

impl Drop for Beat {
    fn drop(&mut self) {
        self.score.end();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("The thread that throttles vCPUs had panicked");
        }
    }
}

fn beat(members: &Members, score: &Score) {
    // When each vCPU has had its time to run.
    let mut due = vec![Instant::now(); members.0.len()];
    let mut naps = score.lock();
    while let Some(lengths) = &*naps {
        let napping = members.0.iter().zip(lengths).zip(&mut due).filter(|((_, nap), _)| !nap.is_zero());
        let mut next = Instant::now() + PERIOD;
        for ((member, nap), due) in napping {
            if *due <= Instant::now() {
                *due = member.nap(*nap, PERIOD.saturating_sub(*nap));
            }
            next = next.min(*due);
        }
        let left = next.saturating_duration_since(Instant::now());
        let waited = score.ending.wait_timeout_while(naps, left, |naps| naps.is_some());
        naps = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vcpu::VcpuError;
    use crate::vcpu::test_guest::{COUNT, HALT, LONG, Moments, TestGuest};

    /// How many numbers vCPU `vcpu` counts in a while.
    fn progress(guest: &TestGuest, vcpu: usize) -> u32 {
        let before = guest.world.ports[vcpu].writes();
        std::thread::sleep(Duration::from_millis(100));
        guest.world.ports[vcpu].writes() - before
    }

    #[test]
    fn shares_become_naps() {
        assert_eq!(nap_of(0.5), Duration::from_millis(5));
        assert_eq!(nap_of(0.0), Duration::ZERO);
        for odd in [-1.0, f64::NAN, f64::NEG_INFINITY] {
            assert_eq!(nap_of(odd), Duration::ZERO);
        }
        for most in [1.0, 7.0, f64::INFINITY] {
            assert_eq!(nap_of(most), PERIOD.mul_f64(0.99));
        }
    }

    #[test]
    fn a_throttled_vcpu_gets_slower_and_fast_again() {
        let guest = TestGuest::with(COUNT, 1);
        guest.vcpus.run();
        // A busy machine may slow the guest down too, but not always just while it is throttled.
        let shown = (0..20).any(|_| {
            let before = progress(&guest, 0);
            guest.vcpus.throttle(&[0.9]).unwrap();
            let slow = progress(&guest, 0);
            guest.vcpus.throttle(&[0.0]).unwrap();
            let after = progress(&guest, 0);
            println!("{before}, with 0.9 taken away {slow}, then {after}");
            slow > 0 && slow < before / 2 && slow < after / 2
        });
        assert!(shown, "the guest is not slower by 0.9, or not fast again");
        guest.vcpus.park(LONG).unwrap();
        assert!(guest.ends.try_recv().is_err());
    }

    #[test]
    fn only_the_named_vcpu_loses_time_and_not_more_than_its_share() {
        let guest = TestGuest::with(COUNT, 2);
        guest.vcpus.run();
        assert_eq!(guest.vcpus.time_taken(), [Duration::ZERO; 2]);
        let begun = Instant::now();
        guest.vcpus.throttle(&[0.0, 0.5]).unwrap();
        while guest.vcpus.time_taken()[1] < Duration::from_millis(50) {
            assert!(begun.elapsed() < LONG, "nothing is taken away");
            std::thread::sleep(Duration::from_millis(1));
        }
        guest.vcpus.throttle(&[0.0; 2]).unwrap();
        let taken = guest.vcpus.time_taken();
        assert_eq!(taken[0], Duration::ZERO);
        assert!(taken[1] <= begun.elapsed(), "{taken:?}");
        std::thread::sleep(3 * PERIOD);
        assert_eq!(guest.vcpus.time_taken(), taken, "it goes on after it was switched off");
        let (one, two) = (progress(&guest, 0), progress(&guest, 1));
        assert!(one > 0 && two > 0);
    }

    #[test]
    fn a_nap_ends_at_once_for_who_parks_throttles_or_ends() {
        let guest = TestGuest::with(COUNT, 1);
        let hour = Duration::from_secs(3600);
        let member = &guest.vcpus.members.0[0];
        let nap = || {
            guest.vcpus.run();
            member.nap(hour, Duration::ZERO);
            let begun = Instant::now();
            while !member.desk.is_napping() {
                assert!(begun.elapsed() < LONG, "the vCPU does not nap");
                std::thread::sleep(Duration::from_millis(1));
            }
            guest.world.ports[0].writes()
        };
        for _ in 0..20 {
            let before = nap();
            guest.vcpus.park(LONG).unwrap();
            assert_eq!(guest.world.ports[0].writes(), before);
            // The nap is forgotten.
            guest.run_until(|world| world.ports[0].writes() > before);
            let before = nap();
            guest.vcpus.throttle(&[0.0]).unwrap();
            guest.run_until(|world| world.ports[0].writes() > before);
        }
        nap();
        guest.vcpus.end();
    }

    #[test]
    fn throttled_vcpus_are_parked_and_lose_no_access() {
        for program in [COUNT, HALT] {
            let guest = TestGuest::with(program, 2);
            let mut moments = Moments::new();
            for cycle in 0..500 {
                guest.vcpus.throttle(&[f64::from(cycle % 5) / 4.0, 0.7]).unwrap();
                guest.vcpus.run();
                moments.pause(300);
                guest.vcpus.park(LONG).unwrap();
            }
            assert_eq!(guest.world.bell.rings(), 0);
            for (ports, mmio) in guest.world.ports.iter().zip(&guest.world.mmio) {
                assert!(ports.writes() - mmio.writes() <= 1);
            }
            assert!(guest.ends.try_recv().is_err());
        }
    }

    #[test]
    fn each_vcpu_has_its_share() {
        let guest = TestGuest::with(HALT, 2);
        let error = guest.vcpus.throttle(&[0.5]).unwrap_err();
        assert!(matches!(error, VcpuError::Shares { given: 1, vcpus: 2 }), "{error}");
    }
}
