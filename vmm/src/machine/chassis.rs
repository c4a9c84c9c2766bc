//! The part of a machine without devices: the VM, its memory and slots, the dirty tracker, the vCPUs' descriptors.

use super::MachineError;
use crate::config::{DirtyTracking, MachineConfig};
use crate::dirty::{DirtyLog, DirtyRing, DirtyTracker};
use crate::kvm::KvmHost;
use crate::memory::{GuestMemory, Slots};
use crate::state::Facts;
use kvm_ioctls::{VcpuFd, VmFd};
use std::sync::Arc;

/// A VM with memory, without vCPU threads and devices.
#[derive(Debug)]
pub(crate) struct Chassis {
    pub(crate) slots: Arc<Slots>,
    pub(crate) tracker: Arc<dyn DirtyTracker>,
    pub(crate) facts: Arc<Facts>,
}

impl Chassis {
    /// Makes the VM of `config` around `memory`, and its vCPUs in their power-on state.
    pub(crate) fn build(
        host: &KvmHost,
        config: &MachineConfig,
        memory: GuestMemory,
    ) -> Result<(Self, Vec<VcpuFd>), MachineError> {
        // The slots come before the chips: the other way round, KVM waits for an SRCU grace period, up to 10 ms.
        let vm = host.create_vm_without_chips()?;
        let facts = Arc::new(Facts::of(host.kvm(), &vm)?);
        let slots = Arc::new(Slots::new(vm, memory)?);
        host.create_chips(slots.vm())?;
        let tracker: Arc<dyn DirtyTracker> = match config.dirty {
            DirtyTracking::Log => Arc::new(DirtyLog::new(Arc::clone(&slots))?),
            DirtyTracking::Ring { entries } => Arc::new(DirtyRing::new(Arc::clone(&slots), entries)?),
        };
        let vcpus = (0..config.cpus.count)
            .map(|id| {
                let vcpu = slots
                    .vm()
                    .create_vcpu(id.into())
                    .map_err(|source| MachineError::Kvm { action: "create a vCPU", source })?;
                tracker.attach(&vcpu)?;
                Ok(vcpu)
            })
            .collect::<Result<_, MachineError>>()?;
        Ok((Self { slots, tracker, facts }, vcpus))
    }

    pub(crate) fn vm(&self) -> &VmFd {
        self.slots.vm()
    }

    pub(crate) fn memory(&self) -> &GuestMemory {
        self.slots.memory()
    }
}
