//! The vCPUs of one guest: a thread each, led together.
//!
//! The machine spawns them standing, lets them run, throttles them, parks them for a pause or a move, saves and restores
//! their state in parallel, and ends them. Parking returns only when each vCPU has left KVM_RUN with no instruction half done and its
//! thread sleeps: from then on nothing but devices and the VMM writes guest memory.

mod crew;
mod desk;
mod end;
mod exit;
mod kick;
#[cfg(test)]
pub(crate) mod test_guest;
#[cfg(test)]
mod tests;
mod thread;
mod throttle;

pub use crew::Crew;
pub use end::{GuestEnd, KvmFailure};
pub use throttle::{MOST_SHARE, PERIOD as THROTTLE_PERIOD};

use crate::state::{Facts, TscStart, VcpuSavedV1, VcpuStateError, restore_vcpu, save_vcpu};
use crew::Seat;
use desk::{Desk, NapOrder, Stance};
use devices::Bus;
use kick::ImmediateExit;
use kvm_ioctls::VcpuFd;
use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use thiserror::Error;
use thread::VcpuThread;
use throttle::Throttle;
use vmm_sys_util::errno;

/// The address spaces in which the guest reaches devices.
#[derive(Debug, Default)]
pub struct Buses {
    /// Ports.
    pub pio: Bus,
    /// Memory-mapped registers, by guest physical address.
    pub mmio: Bus,
}

/// What the vCPU threads tell the machine. Called in a vCPU's thread: parking or ending the vCPUs from here would wait
/// for itself, so pass the word on.
pub trait VcpuEvents: Debug + Send + Sync {
    /// The guest ended on this vCPU, which stands from now on; the others still run.
    fn ended(&self, vcpu: u8, end: GuestEnd);

    /// A vCPU's dirty ring is full. It runs on after the rings have been emptied.
    ///
    /// # Errors
    /// What kept the rings from being emptied; the guest ends by it.
    fn dirty_ring_full(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;
}

/// Why the vCPUs could not be led where they should go.
#[derive(Debug, Error)]
pub enum VcpuError {
    /// More vCPUs than this type counts.
    #[error("{count} vCPUs are more than 255")]
    TooMany {
        /// How many.
        count: usize,
    },
    /// A thread, or the page to interrupt it by, could not be made.
    #[error("The thread of vCPU {vcpu} could not be started")]
    Spawn {
        /// The vCPU.
        vcpu: u8,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The signal that interrupts vCPUs could not be claimed.
    #[error("The signal that interrupts vCPUs could not be set up")]
    Signal(#[source] errno::Error),
    /// A vCPU did not stand in time. All vCPUs run on as before.
    #[error("vCPU {vcpu} still ran {waited:?} after it was told to stand")]
    StillRunning {
        /// The vCPU.
        vcpu: u8,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The operation needs the vCPUs parked.
    #[error("vCPU {vcpu} runs; its state is only accessible while it is parked")]
    NotParked {
        /// The vCPU.
        vcpu: u8,
    },
    /// A vCPU's thread is over.
    #[error("The thread of vCPU {vcpu} is gone")]
    Gone {
        /// The vCPU.
        vcpu: u8,
    },
    /// The saved state is of another number of vCPUs.
    #[error("The saved state has {saved} vCPUs, this guest has {here}")]
    Count {
        /// Number in the saved state.
        saved: usize,
        /// Number here.
        here: usize,
    },
    /// Another number of shares than vCPUs.
    #[error("{given} shares were given to throttle {vcpus} vCPUs")]
    Shares {
        /// How many shares.
        given: usize,
        /// How many vCPUs.
        vcpus: usize,
    },
    /// The thread that throttles vCPUs could not be started.
    #[error("The thread that throttles vCPUs could not be started")]
    Throttle(#[source] io::Error),
    /// A vCPU's state could not be read or written.
    #[error("The state of vCPU {vcpu} could not be saved or restored")]
    State {
        /// The vCPU.
        vcpu: u8,
        /// What went wrong.
        #[source]
        source: VcpuStateError,
    },
}

#[derive(Debug)]
struct Member {
    id: u8,
    desk: Arc<Desk>,
    thread: JoinHandle<()>,
}

impl Member {
    /// Sends the vCPU to nap for `nap`, if it runs and has run for `run` since its last nap. When it will next have.
    fn nap(&self, nap: Duration, run: Duration) -> Instant {
        match self.desk.wish_to_nap(nap, run) {
            NapOrder::Given => {
                kick::signal(&self.thread);
                Instant::now() + nap + run
            }
            NapOrder::TooEarly(due) => due,
            NapOrder::NotRunning => Instant::now() + nap + run,
        }
    }
}

/// The vCPUs in the order of their numbers. Dropping them ends them.
#[derive(Debug)]
struct Members(Vec<Member>);

/// All vCPUs of a guest. Dropping it ends them.
#[derive(Debug)]
pub struct Vcpus {
    // Dropped before the members, which it shares.
    throttle: Throttle,
    members: Arc<Members>,
}

impl Vcpus {
    /// Gives each of `crew` its vCPU, in the order of `vcpus`. They stand until [`run`](Self::run).
    ///
    /// # Errors
    /// [`VcpuError::Spawn`], or [`VcpuError::Gone`] for a vCPU that nobody takes; no thread is left behind.
    pub fn seat(
        mut crew: Crew,
        vcpus: Vec<VcpuFd>,
        buses: &Arc<Buses>,
        events: &Arc<dyn VcpuEvents>,
    ) -> Result<Self, VcpuError> {
        let count = vcpus.len();
        let mut all = Members(Vec::with_capacity(count));
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let id = u8::try_from(index).map_err(|_| VcpuError::TooMany { count })?;
            let immediate_exit = ImmediateExit::of(&vcpu).map_err(|source| VcpuError::Spawn { vcpu: id, source })?;
            let desk = Arc::new(Desk::new(immediate_exit));
            let (buses, events) = (Arc::clone(buses), Arc::clone(events));
            let Seat { thread, work } = crew.next_seat().ok_or(VcpuError::Gone { vcpu: id })?;
            let vcpu = VcpuThread { id, vcpu, desk: Arc::clone(&desk), buses, events };
            all.0.push(Member { id, desk, thread });
            work.send(vcpu).map_err(|_| VcpuError::Gone { vcpu: id })?;
        }
        Ok(Self { throttle: Throttle::default(), members: Arc::new(all) })
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.members.0.len()
    }

    /// Lets all vCPUs run. One on which the guest ended stays where it is until it is restored.
    pub fn run(&self) {
        for member in &self.members.0 {
            member.desk.wish_to_run();
        }
    }

    /// Makes all vCPUs stand and returns when they do: out of KVM_RUN, no instruction half done, threads asleep.
    ///
    /// # Errors
    /// [`VcpuError::StillRunning`] if one does not stand within `within` (a device holds it); then all run on as before.
    /// [`VcpuError::Gone`] if a thread is over.
    pub fn park(&self, within: Duration) -> Result<(), VcpuError> {
        let deadline = Instant::now() + within;
        for member in &self.members.0 {
            member.desk.wish_to_stand();
            kick::signal(&member.thread);
        }
        for member in &self.members.0 {
            match member.desk.await_stance(deadline) {
                Stance::Standing | Stance::Ended => {}
                Stance::Gone => return Err(VcpuError::Gone { vcpu: member.id }),
                Stance::Running => {
                    self.run();
                    return Err(VcpuError::StillRunning { vcpu: member.id, waited: within });
                }
            }
        }
        Ok(())
    }

    /// Takes a share of its time away from each vCPU from now on, in naps of a fraction of [`THROTTLE_PERIOD`]: 0 takes
    /// nothing, [`MOST_SHARE`] the most. Parking does not wait for naps, and vCPUs that run again are throttled as before.
    /// An interrupt for a napping vCPU waits for the nap's end.
    ///
    /// # Errors
    /// [`VcpuError::Shares`] if there is not one for each vCPU, [`VcpuError::Throttle`] if the host has no thread for it;
    /// all is as before then.
    pub fn throttle(&self, shares: &[f64]) -> Result<(), VcpuError> {
        if shares.len() != self.count() {
            return Err(VcpuError::Shares { given: shares.len(), vcpus: self.count() });
        }
        self.throttle.set(&self.members, shares).map_err(VcpuError::Throttle)
    }

    /// How long each vCPU has napped by [`throttle`](Self::throttle) so far. Of a vCPU that was idle it counts too.
    #[must_use]
    pub fn time_taken(&self) -> Vec<Duration> {
        self.members.0.iter().map(|member| member.desk.napped()).collect()
    }

    /// Reads the state of all vCPUs, each in its own thread. They must be parked.
    ///
    /// # Errors
    /// [`VcpuError::NotParked`], [`VcpuError::Gone`] or [`VcpuError::State`].
    pub fn save(&self, facts: &Arc<Facts>) -> Result<Vec<VcpuSavedV1>, VcpuError> {
        self.each(|_| {
            let facts = Arc::clone(facts);
            move |vcpu: &mut VcpuFd| save_vcpu(vcpu, &facts)
        })
    }

    /// Writes the state of all vCPUs, each in its own thread. They must be parked. After an error the vCPUs are in no
    /// state that could run: restore them again, or drop them.
    ///
    /// # Errors
    /// [`VcpuError::Count`] if `saved` is of another number of vCPUs; [`VcpuError::State`] if a value is not possible or
    /// KVM refuses it; [`VcpuError::NotParked`] or [`VcpuError::Gone`].
    pub fn restore(&self, saved: Vec<VcpuSavedV1>, facts: &Arc<Facts>) -> Result<(), VcpuError> {
        if saved.len() != self.count() {
            return Err(VcpuError::Count { saved: saved.len(), here: self.count() });
        }
        let Some(start) = self.tsc_start(&saved, facts)? else { return Ok(()) };
        let mut saved = saved.into_iter();
        self.each(|_| {
            let saved = saved.next();
            let (facts, start) = (Arc::clone(facts), start);
            move |vcpu: &mut VcpuFd| saved.map_or(Ok(()), |saved| restore_vcpu(vcpu, &saved, start, &facts))
        })?;
        for member in &self.members.0 {
            member.desk.revive();
        }
        Ok(())
    }

    /// Does `work` on vCPU 0, such as setting its registers for the first boot. It must be parked.
    ///
    /// # Errors
    /// [`VcpuError::NotParked`] or [`VcpuError::Gone`].
    pub fn on_boot_vcpu<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut VcpuFd) -> T + Send + 'static,
    ) -> Result<T, VcpuError> {
        let Some(member) = self.members.0.first() else { return Err(VcpuError::Gone { vcpu: 0 }) };
        await_answer(member, &ask(member, work)?)
    }

    /// Ends all threads and waits for them.
    pub fn end(self) {
        drop(self);
    }

    /// Where the guest's TSCs go on, found out on vCPU 0 for all of them.
    fn tsc_start(&self, saved: &[VcpuSavedV1], facts: &Arc<Facts>) -> Result<Option<TscStart>, VcpuError> {
        let Some(leader) = self.members.0.first() else { return Ok(None) };
        let tscs: Vec<_> = saved.iter().map(|vcpu| vcpu.tsc).collect();
        let facts = Arc::clone(facts);
        self.on_boot_vcpu(move |vcpu| TscStart::find(vcpu, &tscs, &facts))?
            .map(Some)
            .map_err(|source| VcpuError::State { vcpu: leader.id, source })
    }

    /// Gives each vCPU's thread the work that `make` makes for it, and waits for all of them.
    pub(crate) fn each<T, W>(&self, mut make: impl FnMut(u8) -> W) -> Result<Vec<T>, VcpuError>
    where
        T: Send + 'static,
        W: FnOnce(&mut VcpuFd) -> Result<T, VcpuStateError> + Send + 'static,
    {
        let asked: Vec<_> =
            self.members.0.iter().map(|member| ask(member, make(member.id))).collect::<Result<_, _>>()?;
        // All answers are awaited before the first error is passed on, so that no thread is still at work then.
        let answers: Vec<_> =
            self.members.0.iter().zip(&asked).map(|(member, answer)| await_answer(member, answer)).collect();
        self.members
            .0
            .iter()
            .zip(answers)
            .map(|(member, answer)| answer?.map_err(|source| VcpuError::State { vcpu: member.id, source }))
            .collect()
    }
}

fn ask<T: Send + 'static>(
    member: &Member,
    work: impl FnOnce(&mut VcpuFd) -> T + Send + 'static,
) -> Result<mpsc::Receiver<T>, VcpuError> {
    let (answer, awaited) = mpsc::sync_channel(1);
    let job = Box::new(move |vcpu: &mut VcpuFd| {
        // Nobody listens any more if the asker gave up after another vCPU's refusal.
        let _ = answer.send(work(vcpu));
    });
    match member.desk.leave_job(job) {
        Ok(()) => Ok(awaited),
        Err(Stance::Gone) => Err(VcpuError::Gone { vcpu: member.id }),
        Err(_) => Err(VcpuError::NotParked { vcpu: member.id }),
    }
}

/// The answer comes, or its sender is dropped with the thread.
fn await_answer<T>(member: &Member, awaited: &mpsc::Receiver<T>) -> Result<T, VcpuError> {
    awaited.recv().map_err(|_| VcpuError::Gone { vcpu: member.id })
}

impl Drop for Members {
    fn drop(&mut self) {
        for member in &self.0 {
            member.desk.wish_to_end();
            kick::signal(&member.thread);
        }
        for Member { id, desk: _, thread } in self.0.drain(..) {
            if thread.join().is_err() {
                tracing::error!(vcpu = id, "A vCPU thread had panicked");
            }
        }
    }
}
