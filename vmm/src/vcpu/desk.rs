//! Where one vCPU's thread takes its orders, and where its owner sees what it does.
//!
//! ```text
//!            wish Run                    EINTR and wish Stand
//! Standing ------------> Running ---------------------------------> Standing
//!    | ^ jobs (save, restore, ...)      \---- the guest ended ----> Ended --restore--> Standing
//!    | wish End
//!    v
//!  Gone
//! ```
//! The wish and the vCPU's `immediate_exit` byte change together under one lock: the byte is 1 exactly when the wish is
//! not to run, or to run after a nap. A napping vCPU counts as running; any other wish ends its nap. A thread leaves
//! [`Stance::Running`] only after a KVM_RUN that returned EINTR, and KVM completes the instruction of the last PIO or MMIO
//! exit before it looks at the byte: a standing vCPU has nothing pending.

use super::kick::ImmediateExit;
use kvm_ioctls::VcpuFd;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Work that needs the vCPU's file descriptor, done by its thread while it stands.
pub(super) type Job = Box<dyn FnOnce(&mut VcpuFd) + Send>;

/// What the owner wants of the thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Stand,
    Run,
    End,
}

/// What the thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stance {
    /// Asleep or at a job, with no instruction pending in KVM.
    Standing,
    /// In KVM_RUN, or serving an exit.
    Running,
    /// As standing, and there is nothing to run: the guest ended on this vCPU.
    Ended,
    /// The thread is over.
    Gone,
}

/// What the thread does next.
pub(super) enum Task {
    Run,
    Job(Job),
    End,
}

struct Orders {
    wish: Wish,
    stance: Stance,
    jobs: VecDeque<Job>,
    nap: Nap,
    /// The sum of all naps that have ended.
    napped: Duration,
}

/// What the vCPU has of the naps by which it is throttled.
#[derive(Debug, Clone, Copy)]
enum Nap {
    /// Nothing yet.
    Never,
    /// It is to nap before it runs on, until this moment.
    Due(Instant),
    /// It naps.
    Taken { since: Instant, end: Instant },
    /// The last one ended at this moment.
    Over(Instant),
}

/// What became of the wish that a vCPU naps.
#[derive(Debug, Clone, Copy)]
pub(super) enum NapOrder {
    /// The vCPU is to nap; the caller sends the signal.
    Given,
    /// It will have run long enough at this moment.
    TooEarly(Instant),
    /// There is nothing to take from it.
    NotRunning,
}

/// See the module's text.
pub(super) struct Desk {
    orders: Mutex<Orders>,
    changed: Condvar,
    immediate_exit: ImmediateExit,
}

impl Desk {
    pub(super) fn new(immediate_exit: ImmediateExit) -> Self {
        immediate_exit.set(true);
        let orders = Orders {
            wish: Wish::Stand,
            stance: Stance::Standing,
            jobs: VecDeque::new(),
            nap: Nap::Never,
            napped: Duration::ZERO,
        };
        Self { orders: Mutex::new(orders), changed: Condvar::new(), immediate_exit }
    }

    // The owner's side.

    pub(super) fn wish_to_run(&self) {
        self.wish(Wish::Run);
    }

    /// The caller sends the signal afterwards.
    pub(super) fn wish_to_stand(&self) {
        self.wish(Wish::Stand);
    }

    /// The caller sends the signal afterwards. There is no way back.
    pub(super) fn wish_to_end(&self) {
        self.wish(Wish::End);
    }

    /// Has the vCPU nap for `nap` before it runs on, if it runs and has run for `run` since its last nap.
    pub(super) fn wish_to_nap(&self, nap: Duration, run: Duration) -> NapOrder {
        let mut orders = self.lock();
        let now = Instant::now();
        let has_run_at = match orders.nap {
            Nap::Due(end) | Nap::Taken { since: _, end } => end.max(now) + run,
            Nap::Over(at) => at + run,
            Nap::Never => now,
        };
        if orders.wish != Wish::Run || orders.stance != Stance::Running {
            NapOrder::NotRunning
        } else if has_run_at > now {
            NapOrder::TooEarly(has_run_at)
        } else {
            orders.nap = Nap::Due(now + nap);
            self.immediate_exit.set(true);
            NapOrder::Given
        }
    }

    /// Ends the nap, if the vCPU is at one or is to take one.
    pub(super) fn wake(&self) {
        self.end_nap(&mut self.lock());
        self.changed.notify_all();
    }

    /// How long the vCPU has napped so far.
    pub(super) fn napped(&self) -> Duration {
        let orders = self.lock();
        match orders.nap {
            Nap::Taken { since, end: _ } => orders.napped + since.elapsed(),
            Nap::Never | Nap::Due(_) | Nap::Over(_) => orders.napped,
        }
    }

    #[cfg(test)]
    pub(super) fn is_napping(&self) -> bool {
        matches!(self.lock().nap, Nap::Taken { .. })
    }

    /// Waits until the thread does not run. The answer is what it does then, or `Running` when the deadline passed.
    pub(super) fn await_stance(&self, deadline: Instant) -> Stance {
        let mut orders = self.lock();
        while orders.stance == Stance::Running {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            orders = self.changed.wait_timeout(orders, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        orders.stance
    }

    /// Leaves `job` for the thread, if it stands.
    pub(super) fn leave_job(&self, job: Job) -> Result<(), Stance> {
        let mut orders = self.lock();
        match orders.stance {
            Stance::Standing | Stance::Ended if orders.wish == Wish::Stand => {
                orders.jobs.push_back(job);
                self.changed.notify_all();
                Ok(())
            }
            Stance::Standing | Stance::Ended | Stance::Running => Err(Stance::Running),
            Stance::Gone => Err(Stance::Gone),
        }
    }

    /// Lets a vCPU on which the guest ended run again: it was given another state.
    pub(super) fn revive(&self) {
        let mut orders = self.lock();
        if orders.stance == Stance::Ended {
            orders.stance = Stance::Standing;
        }
    }

    fn wish(&self, wish: Wish) {
        let mut orders = self.lock();
        if orders.wish != Wish::End {
            orders.wish = wish;
            self.end_nap(&mut orders);
            // A vCPU that is about to run counts as running from here on, so that a park right after is not answered by
            // the stance of before.
            if wish == Wish::Run && orders.stance == Stance::Standing {
                orders.stance = Stance::Running;
            }
            self.changed.notify_all();
        }
    }

    // The thread's side.

    /// Sleeps until there is something to do. Jobs come before running, running before the end.
    pub(super) fn next_task(&self) -> Task {
        let mut orders = self.lock();
        loop {
            if let Some(job) = orders.jobs.pop_front() {
                return Task::Job(job);
            }
            match (orders.wish, orders.stance) {
                (Wish::End, _) => return Task::End,
                (Wish::Run, Stance::Running) => return Task::Run,
                (Wish::Stand, Stance::Running) => self.set_stance(&mut orders, Stance::Standing),
                (Wish::Run | Wish::Stand, Stance::Standing | Stance::Ended | Stance::Gone) => {
                    orders = self.changed.wait(orders).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// After a KVM_RUN that returned EINTR: takes the nap that is wished, then stands if that is wished. Where neither is,
    /// the signal was not meant for the vCPU.
    pub(super) fn leave_if_wished(&self) -> bool {
        let mut orders = self.nap(self.lock());
        let leave = orders.wish != Wish::Run;
        if leave {
            self.set_stance(&mut orders, Stance::Standing);
        }
        leave
    }

    fn nap<'a>(&self, mut orders: MutexGuard<'a, Orders>) -> MutexGuard<'a, Orders> {
        if let Nap::Due(end) = orders.nap {
            orders.nap = Nap::Taken { since: Instant::now(), end };
        }
        while let Nap::Taken { since: _, end } = orders.nap {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.end_nap(&mut orders);
            } else {
                orders = self.changed.wait_timeout(orders, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        orders
    }

    /// Sleeps until the vCPU is no longer wanted to run.
    pub(super) fn await_leave(&self) {
        let mut orders = self.lock();
        while orders.wish == Wish::Run {
            orders = self.changed.wait(orders).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn take_stance(&self, stance: Stance) {
        self.set_stance(&mut self.lock(), stance);
    }

    fn set_stance(&self, orders: &mut Orders, stance: Stance) {
        orders.stance = stance;
        if stance == Stance::Gone {
            // Whoever waits for an answer learns from the dropped job that none will come.
            orders.jobs.clear();
        }
        self.changed.notify_all();
    }

    /// Ends the nap, whether or not it has begun. The byte says what is wished without it.
    fn end_nap(&self, orders: &mut Orders) {
        let now = Instant::now();
        match orders.nap {
            Nap::Taken { since, end: _ } => {
                orders.napped += now - since;
                orders.nap = Nap::Over(now);
            }
            Nap::Due(_) => orders.nap = Nap::Over(now),
            Nap::Never | Nap::Over(_) => {}
        }
        self.immediate_exit.set(orders.wish != Wish::Run);
    }

    fn lock(&self) -> MutexGuard<'_, Orders> {
        // Each change under the lock is one assignment: a panic elsewhere leaves nothing half done.
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let orders = self.lock();
        f.debug_struct("Desk").field("wish", &orders.wish).field("stance", &orders.stance).finish_non_exhaustive()
    }
}
