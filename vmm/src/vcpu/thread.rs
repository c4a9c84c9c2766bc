//! The thread of one vCPU: takes its orders from the [`Desk`], runs the guest, does jobs on the `VcpuFd` in between.
//! Nothing else ever issues an ioctl on that file descriptor.

use super::desk::{Desk, Stance, Task};
use super::end::{GuestEnd, KvmFailure};
use super::exit::{Step, step};
use super::{Buses, VcpuEvents, kick};
use crate::seccomp::{self, ThreadKind};
use kvm_ioctls::VcpuFd;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

pub(super) struct VcpuThread {
    pub(super) id: u8,
    pub(super) vcpu: VcpuFd,
    pub(super) desk: Arc<Desk>,
    pub(super) buses: Arc<Buses>,
    pub(super) events: Arc<dyn VcpuEvents>,
}

impl VcpuThread {
    /// Confines the thread, then waits for its vCPU. It ends if there will be none.
    pub(super) fn main(awaited: &Receiver<Self>) {
        kick::unblock();
        seccomp::enter(ThreadKind::Vcpu);
        if let Ok(vcpu) = awaited.recv() {
            vcpu.serve();
        }
    }

    fn serve(mut self) {
        let _leaving = Leaving { id: self.id, desk: Arc::clone(&self.desk), events: Arc::clone(&self.events) };
        loop {
            match self.desk.next_task() {
                Task::Run => self.run(),
                Task::Job(job) => job(&mut self.vcpu),
                Task::End => return,
            }
        }
    }

    /// Runs the guest until the vCPU is to stand or the guest ends.
    fn run(&mut self) {
        self.tell_clock_stood();
        loop {
            match step(&mut self.vcpu, &self.buses) {
                Step::Again => {}
                Step::Interrupted => {
                    if self.desk.leave_if_wished() {
                        return;
                    }
                }
                Step::Halted => self.desk.await_leave(),
                Step::RingFull => {
                    if let Err(reason) = self.events.dirty_ring_full() {
                        let reason = reason.to_string();
                        return self.ended(GuestEnd::KvmFailure(KvmFailure::RingFull { reason }));
                    }
                }
                Step::Ended(end) => return self.ended(end),
            }
        }
    }

    fn ended(&self, end: GuestEnd) {
        self.desk.take_stance(Stance::Ended);
        self.events.ended(self.id, end);
    }

    /// Tells a guest that uses kvmclock that it stood still, so that its watchdogs do not take the pause for a lockup
    /// (Linux Documentation/virt/kvm/api.rst, KVM_KVMCLOCK_CTRL). A guest without kvmclock is answered with EINVAL.
    fn tell_clock_stood(&self) {
        if let Err(error) = self.vcpu.kvmclock_ctrl()
            && error.errno() != libc::EINVAL
        {
            tracing::warn!(vcpu = self.id, %error, "The guest was not told that it stood still");
        }
    }
}

/// Leaves word when the thread ends, by order or by a panic.
struct Leaving {
    id: u8,
    desk: Arc<Desk>,
    events: Arc<dyn VcpuEvents>,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        self.desk.take_stance(Stance::Gone);
        if std::thread::panicking() {
            self.events.ended(self.id, GuestEnd::KvmFailure(KvmFailure::ThreadPanicked));
        }
    }
}
