//! Back to power-on, on the same file descriptors: what `pulse` does between saving and restoring in place, so that what
//! the guest finds afterwards can only have come from the saved state.
//!
//! What a vCPU and the chips are at power-on is not written down here: a scratch VM without memory is made with the same
//! CPUID, and its state is taken. KVM itself is the reference.

use super::{Facts, StateError, VcpuSavedV1, chips, restore_chips, save_chips, save_vcpu};
use crate::vcpu::{VcpuError, Vcpus};
use kvm_bindings::{CpuId, kvm_pit_config};
use kvm_ioctls::{Kvm, VmFd};
use std::sync::Arc;

/// Brings the vCPUs and chips of `vm` to their power-on state. The vCPUs are parked; only a restore makes them a running
/// guest again.
///
/// # Errors
/// [`StateError`] if KVM refuses, which leaves the guest unusable until it is restored.
pub fn reset(kvm: &Kvm, vm: &VmFd, vcpus: &Vcpus, facts: &Arc<Facts>) -> Result<(), StateError> {
    let cpuids = vcpus.save(facts)?.into_iter().map(|saved| saved.cpuid);
    let cpuids: Vec<_> = cpuids.map(|table| table.iter().map(Into::into).collect::<Vec<_>>()).collect();
    let (fresh_vcpus, fresh_chips) = power_on(kvm, &cpuids, facts)?;
    vcpus.restore(fresh_vcpus, facts)?;
    restore_chips(vm, &fresh_chips)?;
    Ok(())
}

fn power_on(
    kvm: &Kvm,
    cpuids: &[Vec<kvm_bindings::kvm_cpuid_entry2>],
    facts: &Facts,
) -> Result<(Vec<VcpuSavedV1>, chips::ChipsSavedV1), StateError> {
    let failed = |call| move |source| StateError::Kvm { call, source };
    let scratch = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    scratch.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
    scratch.create_pit2(kvm_pit_config::default()).map_err(failed("KVM_CREATE_PIT2"))?;
    let mut saved = Vec::with_capacity(cpuids.len());
    for (id, table) in (0_u8..).zip(cpuids) {
        let vcpu = scratch.create_vcpu(u64::from(id)).map_err(failed("KVM_CREATE_VCPU"))?;
        let table = CpuId::from_entries(table).expect("the table came from KVM");
        vcpu.set_cpuid2(&table).map_err(failed("KVM_SET_CPUID2"))?;
        let state = save_vcpu(&vcpu, facts).map_err(|source| VcpuError::State { vcpu: id, source })?;
        saved.push(state);
    }
    Ok((saved, save_chips(&scratch)?))
}
