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
//! not to run. A thread leaves [`Stance::Running`] only after a KVM_RUN that returned EINTR, and KVM completes the
//! instruction of the last PIO or MMIO exit before it looks at the byte: a standing vCPU has nothing pending.

use super::kick::ImmediateExit;
use kvm_ioctls::VcpuFd;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

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
        let orders = Orders { wish: Wish::Stand, stance: Stance::Standing, jobs: VecDeque::new() };
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
            self.immediate_exit.set(wish != Wish::Run);
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

    /// After a KVM_RUN that returned EINTR: stands if that is wished. Otherwise the signal was not meant for the vCPU.
    pub(super) fn leave_if_wished(&self) -> bool {
        let mut orders = self.lock();
        let leave = orders.wish != Wish::Run;
        if leave {
            self.set_stance(&mut orders, Stance::Standing);
        }
        leave
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
