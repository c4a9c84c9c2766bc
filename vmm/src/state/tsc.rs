//! Where the guest's TSC goes on after a move.
//!
//! The choice: **the guest's clocks stand still while the guest does.** A restored TSC goes on from the highest value that
//! any vCPU had when it was saved, and kvmclock from its saved value (see [`clock`](super::clock)); neither is moved
//! forward by the downtime, and neither can step back. What the guest's monotonic clock sees of a move is therefore at
//! most the time between the restore and the run. Moving the clocks forward by the downtime would need the two hosts'
//! wall clocks to agree (KVM_CLOCK_REALTIME): an hour between them would be an hour's jump in the guest, with the timeouts
//! and lockup reports that follow. Wall time in the guest lags by the downtime, which NTP in the guest evens out.
//!
//! A guest that is only parked keeps its host's time: both clocks run on under it.
//!
//! All vCPUs must agree on the TSC to the cycle, as the guest's scheduler compares timestamps across them. So one value is
//! found on vCPU 0 and given to all of them as an *offset* (KVM_VCPU_TSC_OFFSET), which does not depend on when it is
//! written. A guest that set its vCPUs' TSCs apart on purpose, which Linux does not do, finds them together again.
//!
//! Two kinds of KVM do not keep the offset that they are given:
//! - One that runs guests in software may show them the host's own TSC and drop the offset without a word. There the TSC
//!   moves on over the downtime, and a target whose TSC is behind is refused, since the guest's would step back.
//! - On a host whose TSC is unstable (as in a nested lab) KVM makes up the offset anew each time it loads the vCPU, and
//!   before the guest runs brings its TSC forward to the value set here.

use super::raw;
use super::vcpu::VcpuStateError;
use super::{Facts, msrs};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

/// IA32_TIME_STAMP_COUNTER (Intel SDM volume 4, table 2-2).
pub(super) const TSC_MSR: u32 = 0x10;

/// By how much KVM lets the guest's TSC frequency differ from the host's without scaling: its module parameter
/// `tsc_tolerance_ppm` (Linux Documentation/virt/kvm/api.rst, KVM_SET_TSC_KHZ).
const TOLERANCE_PPM: u64 = 250;

/// A vCPU's time stamp counter, version 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TscSavedV1 {
    /// Its frequency in kHz.
    pub khz: u32,
    /// Its value when it was saved.
    pub value: u64,
}

/// Where the guest's TSCs go on, as an offset to this host's TSC.
#[derive(Debug, Clone, Copy)]
pub struct TscStart {
    offset: u64,
}

impl TscStart {
    /// Finds the start for all vCPUs, whose saved TSCs are `saved`, on `vcpu`, which is any of them.
    ///
    /// # Errors
    /// [`VcpuStateError`] if the frequency is not possible here, or KVM fails.
    pub fn find(vcpu: &VcpuFd, saved: &[TscSavedV1], facts: &Facts) -> Result<Self, VcpuStateError> {
        let first = saved.first().copied().unwrap_or_default();
        if let Some(other) = saved.iter().find(|tsc| tsc.khz != first.khz) {
            return Err(VcpuStateError::TscFrequencies { first: first.khz, other: other.khz });
        }
        set_frequency(vcpu, first.khz, facts)?;
        let highest = saved.iter().map(|tsc| tsc.value).max().unwrap_or(0);
        let now = msrs::read_one(vcpu, TSC_MSR)?;
        Ok(Self { offset: offset(vcpu)?.wrapping_add(highest.wrapping_sub(now)) })
    }
}

/// Gives a vCPU the TSC that all of them have.
pub(super) fn set_value(vcpu: &VcpuFd, start: TscStart) -> Result<(), VcpuStateError> {
    let wanted = start.offset;
    let before = offset(vcpu)?;
    raw::set_tsc_offset(vcpu, wanted).map_err(|source| VcpuStateError::kvm("KVM_SET_DEVICE_ATTR (TSC)", source))?;
    let dropped = offset(vcpu)? == before;
    let behind = wanted.wrapping_sub(before).cast_signed();
    if dropped && behind > 0 {
        return Err(VcpuStateError::TscStepsBack { cycles: behind.unsigned_abs() });
    }
    if dropped && behind < 0 {
        tracing::debug!("This KVM does not offset the TSC: the guest's moves on by {} cycles", behind.unsigned_abs());
    }
    Ok(())
}

/// Reads a vCPU's TSC.
pub(super) fn save(vcpu: &VcpuFd) -> Result<TscSavedV1, VcpuStateError> {
    let khz = vcpu.get_tsc_khz().map_err(|source| VcpuStateError::kvm("KVM_GET_TSC_KHZ", source))?;
    Ok(TscSavedV1 { khz, value: msrs::read_one(vcpu, TSC_MSR)? })
}

fn offset(vcpu: &VcpuFd) -> Result<u64, VcpuStateError> {
    raw::tsc_offset(vcpu).map_err(|source| VcpuStateError::kvm("KVM_GET_DEVICE_ATTR (TSC)", source))
}

/// Gives a vCPU the frequency that the guest knows.
pub(super) fn set_frequency(vcpu: &VcpuFd, khz: u32, facts: &Facts) -> Result<(), VcpuStateError> {
    let here = vcpu.get_tsc_khz().map_err(|source| VcpuStateError::kvm("KVM_GET_TSC_KHZ", source))?;
    // Without hardware scaling KVM accepts a higher frequency all the same and emulates it by leaps; refuse it here.
    if khz == 0 || !(facts.tsc_scaling || within_tolerance(khz, here)) {
        return Err(VcpuStateError::TscFrequency { saved: khz, here });
    }
    vcpu.set_tsc_khz(khz).map_err(|source| VcpuStateError::kvm("KVM_SET_TSC_KHZ", source))
}

fn within_tolerance(khz: u32, here: u32) -> bool {
    u64::from(khz.abs_diff(here)) * 1_000_000 <= u64::from(here) * TOLERANCE_PPM
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tolerance_is_kvms() {
        assert!(within_tolerance(2_600_000, 2_600_000));
        assert!(within_tolerance(2_600_650, 2_600_000));
        assert!(!within_tolerance(2_600_651, 2_600_000));
        assert!(!within_tolerance(2_599_349, 2_600_000));
        assert!(!within_tolerance(u32::MAX, 1));
    }
}
