//! Threads for vCPUs that do not exist yet.
//!
//! To start a thread and to confine it takes longer than to make a vCPU. The machine starts its crew first, and while KVM
//! makes the VM, which is waiting for the most part, the threads get ready and wait for their vCPUs.

use super::thread::VcpuThread;
use super::{VcpuError, kick};
use std::collections::VecDeque;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

/// A thread that waits for its vCPU.
#[derive(Debug)]
pub(super) struct Seat {
    pub(super) thread: JoinHandle<()>,
    pub(super) work: SyncSender<VcpuThread>,
}

/// A thread per vCPU, named `vcpu0` and so on, all waiting. Dropping it ends them.
#[derive(Debug)]
pub struct Crew {
    seats: VecDeque<Seat>,
}

impl Crew {
    /// Starts `count` threads.
    ///
    /// # Errors
    /// [`VcpuError::Spawn`], [`VcpuError::Signal`] or [`VcpuError::TooMany`]; no thread is left behind.
    pub fn start(count: u32) -> Result<Self, VcpuError> {
        kick::install_handler().map_err(VcpuError::Signal)?;
        let count = u8::try_from(count).map_err(|_| VcpuError::TooMany { count: count as usize })?;
        let mut crew = Self { seats: VecDeque::with_capacity(count.into()) };
        for vcpu in 0..count {
            let (work, awaited) = sync_channel(1);
            let thread = Builder::new().name(format!("vcpu{vcpu}")).spawn(move || VcpuThread::main(&awaited));
            let thread = thread.map_err(|source| VcpuError::Spawn { vcpu, source })?;
            crew.seats.push_back(Seat { thread, work });
        }
        Ok(crew)
    }

    /// The thread of the next vCPU, in the order of their numbers.
    pub(super) fn next_seat(&mut self) -> Option<Seat> {
        self.seats.pop_front()
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        for Seat { thread, work } in self.seats.drain(..) {
            drop(work);
            if thread.join().is_err() {
                tracing::error!("A vCPU thread had panicked before it had a vCPU");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::KvmHost;
    use crate::vcpu::test_guest::Ends;
    use crate::vcpu::{VcpuEvents, Vcpus};
    use std::sync::{Arc, Mutex};

    #[test]
    fn a_crew_without_vcpus_goes_home() {
        drop(Crew::start(3).unwrap());
    }

    #[test]
    fn a_crew_has_at_most_255() {
        assert!(matches!(Crew::start(256), Err(VcpuError::TooMany { count: 256 })));
    }

    #[test]
    fn a_vcpu_without_a_thread_is_an_error() {
        let vm = KvmHost::open().unwrap().create_vm().unwrap();
        let vcpus = (0..2).map(|id| vm.create_vcpu(id).unwrap()).collect();
        let events = Arc::new(Ends(Mutex::new(std::sync::mpsc::channel().0))) as Arc<dyn VcpuEvents>;
        let error = Vcpus::seat(Crew::start(1).unwrap(), vcpus, &Arc::default(), &events).unwrap_err();
        assert!(matches!(error, VcpuError::Gone { vcpu: 1 }), "{error}");
    }
}
