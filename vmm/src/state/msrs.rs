//! Which model-specific registers travel, and what happens where the other end lacks one.
//!
//! Saved are the registers that KVM lists as guest state (KVM_GET_MSR_INDEX_LIST), the paravirtual ones and the MTRRs,
//! which older KVMs do not list; not those of [`LEFT_OUT`], each for its reason. On restore a register that KVM does not
//! take is an error that names it, unless the guest cannot tell the difference ([`write()`]).

use super::tsc::TSC_MSR;
use super::vcpu::VcpuStateError;
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::ops::RangeInclusive;

/// The most registers in one vCPU's state. KVM lists up to 256.
pub const MAX_MSRS: usize = 512;

/// IA32_FEATURE_CONTROL: other registers only exist once it is set (Intel SDM volume 4, table 2-2).
const FEATURE_CONTROL: u32 = 0x3a;
/// IA32_TSC_DEADLINE: arms the timer, so it needs the TSC and the local APIC in place (Intel SDM volume 3, 12.5.4.1).
pub(super) const TSC_DEADLINE: u32 = 0x6e0;
/// Async page faults: enabling them wakes all waiters, by the vector that ASYNC_PF_INT (0x4b564d06) tells (Linux
/// Documentation/virt/kvm/x86/msr.rst).
const ASYNC_PF_EN: u32 = 0x4b56_4d02;

/// KVM's paravirtual registers: wall clock, system time, async page faults, steal time, PV EOI, poll control, the vector
/// and acknowledgement of async page faults (Linux Documentation/virt/kvm/x86/msr.rst).
const PARAVIRTUAL: RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4d07;
/// The memory type range registers (Intel SDM volume 3, 13.11.2): 8 variable pairs, 11 fixed, and the default type.
const MTRRS: [RangeInclusive<u32>; 5] = [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];

/// Registers that do not travel, and why.
const LEFT_OUT: &[(RangeInclusive<u32>, &str)] = &[
    (TSC_MSR..=TSC_MSR, "the TSC is carried beside the registers, for all vCPUs alike"),
    (TSC_DEADLINE..=TSC_DEADLINE, "the deadline is read earlier than the others, see VcpuSavedV1"),
    (0x11..=0x11, "a command, not a state: writing it makes KVM write wall time to the guest's memory"),
    (0x4b56_4d00..=0x4b56_4d00, "as 0x11"),
    (0x12..=0x12, "the old name of 0x4b564d01, which is carried"),
    (0x4000_0000..=0x4000_01ff, "Hyper-V's; no guest here is shown that interface"),
];

/// One model-specific register, version 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsrV1 {
    /// Which register.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// The registers to save, of those that KVM `listed`.
pub(super) fn to_save(listed: &[u32]) -> Vec<u32> {
    let wanted = listed.iter().copied().chain(PARAVIRTUAL).chain(MTRRS.into_iter().flatten());
    wanted.filter(|index| left_out(*index).is_none()).collect::<BTreeSet<_>>().into_iter().collect()
}

fn left_out(index: u32) -> Option<&'static str> {
    LEFT_OUT.iter().find(|(range, _)| range.contains(&index)).map(|(_, why)| *why)
}

/// Reads the registers of `wanted`. One that KVM does not let be read for this guest is not there for the guest either.
pub(super) fn read(vcpu: &VcpuFd, wanted: &[u32]) -> Result<Vec<MsrV1>, VcpuStateError> {
    let mut saved = Vec::with_capacity(wanted.len());
    let mut rest = wanted;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<_> = chunk.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).expect("the chunk has at most KVM's maximum of entries");
        let done = vcpu.get_msrs(&mut msrs).map_err(|source| VcpuStateError::kvm("KVM_GET_MSRS", source))?;
        saved.extend(msrs.as_slice().iter().take(done).map(|msr| MsrV1 { index: msr.index, value: msr.data }));
        let refused = chunk.get(done);
        if let Some(index) = refused {
            tracing::trace!("MSR {index:#x} is not readable for this guest");
        }
        rest = &rest[done + usize::from(refused.is_some())..];
    }
    Ok(saved)
}

/// Reads one register that must be there.
pub(super) fn read_one(vcpu: &VcpuFd, index: u32) -> Result<u64, VcpuStateError> {
    read(vcpu, &[index])?.first().map(|msr| msr.value).ok_or(VcpuStateError::MsrNotReadable { index })
}

/// Writes the registers, in an order that holds what they need of each other, all but the TSC and its deadline.
///
/// A register that KVM refuses is passed over where the guest cannot tell: it has that value already (a read-only one),
/// or this KVM has no such register and the value is zero, so the guest never used it. Anything else is an error.
pub(super) fn write(vcpu: &VcpuFd, saved: &[MsrV1]) -> Result<(), VcpuStateError> {
    if let Some((index, why)) = saved.iter().find_map(|msr| Some((msr.index, left_out(msr.index)?))) {
        return Err(VcpuStateError::MsrNotCarried { index, why });
    }
    let mut ordered = saved.to_vec();
    ordered.sort_by_key(|msr| match msr.index {
        FEATURE_CONTROL => 0,
        ASYNC_PF_EN => 2,
        _ => 1,
    });
    let mut rest = ordered.as_slice();
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES)];
        let done = write_some(vcpu, chunk)?;
        let refused = chunk.get(done);
        if let Some(msr) = refused {
            pass_over(vcpu, *msr)?;
        }
        rest = &rest[done + usize::from(refused.is_some())..];
    }
    Ok(())
}

/// Writes one register that must be there.
pub(super) fn write_one(vcpu: &VcpuFd, msr: MsrV1) -> Result<(), VcpuStateError> {
    if write_some(vcpu, &[msr])? == 1 { Ok(()) } else { pass_over(vcpu, msr) }
}

/// KVM_SET_MSRS writes until it meets a register that it refuses and answers how many it wrote.
fn write_some(vcpu: &VcpuFd, msrs: &[MsrV1]) -> Result<usize, VcpuStateError> {
    let entries: Vec<_> =
        msrs.iter().map(|msr| kvm_msr_entry { index: msr.index, data: msr.value, ..Default::default() }).collect();
    let msrs = Msrs::from_entries(&entries).expect("the caller gives at most KVM's maximum of entries");
    vcpu.set_msrs(&msrs).map_err(|source| VcpuStateError::kvm("KVM_SET_MSRS", source))
}

fn pass_over(vcpu: &VcpuFd, msr: MsrV1) -> Result<(), VcpuStateError> {
    let MsrV1 { index, value } = msr;
    match read(vcpu, &[index])?.first() {
        Some(here) if here.value == value => Ok(()),
        None if value == 0 => Ok(()),
        here => Err(VcpuStateError::MsrRefused { index, value, here: here.map(|msr| msr.value) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paravirtual_and_mtrr_registers_travel_even_if_not_listed() {
        let wanted = to_save(&[0x174, 0x10, 0x6e0, 0x11, 0x12, 0x4000_0000, 0x174]);
        for index in [0x174, 0x4b56_4d01, 0x4b56_4d07, 0x200, 0x20f, 0x2ff] {
            assert!(wanted.contains(&index), "{index:#x}");
        }
        for index in [0x10, 0x6e0, 0x11, 0x12, 0x4b56_4d00, 0x4000_0000] {
            assert!(!wanted.contains(&index), "{index:#x}");
        }
        assert_eq!(wanted.iter().filter(|index| **index == 0x174).count(), 1);
        assert!(wanted.len() <= MAX_MSRS);
    }
}
