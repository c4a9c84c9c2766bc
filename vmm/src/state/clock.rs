//! kvmclock, the paravirtual clock of the whole VM. See [`tsc`](super::tsc) for what a move does to time.

use kvm_bindings::kvm_clock_data;
use kvm_ioctls::VmFd;
use saved::Saved;
use serde::{Deserialize, Serialize};
use vmm_sys_util::errno;

/// A VM's kvmclock, version 1. The source's wall clock and TSC, which KVM tells beside it, stay behind: nothing here
/// goes by them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockSavedV1 {
    /// Nanoseconds since the guest's start, without the times it stood still for moves.
    pub nanoseconds: u64,
}

impl Saved for ClockSavedV1 {
    const KIND: &'static str = "clock";
    const VERSION: u16 = 1;
}

/// The latest time that a clock is accepted with: 2^62 ns, 146 years. KVM computes with signed nanoseconds.
pub(super) const LATEST: u64 = 1 << 62;

/// Reads the clock. All vCPUs are parked.
///
/// # Errors
/// KVM's refusal.
pub fn save_clock(vm: &VmFd) -> Result<ClockSavedV1, errno::Error> {
    vm.get_clock().map(|clock| ClockSavedV1 { nanoseconds: clock.clock })
}

/// Sets the clock, from which moment on it runs. Last of all, before any vCPU runs.
///
/// # Errors
/// KVM's refusal, or EINVAL for a time after [`LATEST`].
pub fn restore_clock(vm: &VmFd, saved: ClockSavedV1) -> Result<(), errno::Error> {
    let ClockSavedV1 { nanoseconds } = saved;
    if nanoseconds > LATEST {
        return Err(errno::Error::new(libc::EINVAL));
    }
    // No KVM_CLOCK_REALTIME: the clock goes on where it stood.
    vm.set_clock(&kvm_clock_data { clock: nanoseconds, ..Default::default() })
}
