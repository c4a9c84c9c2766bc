//! What can go wrong with a machine, by who said so.

use super::{LineError, ResourceError};
use crate::acpi::AcpiError;
use crate::boot::BootError;
use crate::boot::entry::EntryError;
use crate::cpuid::CpuidError;
use crate::dirty::DirtyError;
use crate::kvm::KvmError;
use crate::layout::VIRTIO_GSIS;
use crate::memory::MemoryError;
use crate::state::StateError;
use crate::vcpu::{GuestEnd, VcpuError};
use devices::power::PowerError;
use devices::serial::SerialError;
use devices::virtio::mmio::MmioError;
use devices::virtio::net::{MacError, VhostError};
use devices::worker::WorkerError;
use devices::{BusError, QuiesceError};
use saved::SavedError;
use thiserror::Error;
use vmm_sys_util::errno;

/// Why a machine could not be built, led or restored.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "each variant is the word of the module that it names")]
pub enum MachineError {
    #[error(transparent)]
    Hypervisor(#[from] KvmError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Entry(#[from] EntryError),
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error(transparent)]
    Resource(#[from] ResourceError),
    #[error(transparent)]
    Vhost(#[from] VhostError),
    #[error(transparent)]
    Mac(#[from] MacError),
    #[error(transparent)]
    Line(#[from] LineError),
    #[error(transparent)]
    Virtio(#[from] MmioError),
    #[error(transparent)]
    Serial(#[from] SerialError),
    #[error(transparent)]
    Power(#[from] PowerError),
    #[error(transparent)]
    Worker(#[from] WorkerError),
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error(transparent)]
    Quiesce(#[from] QuiesceError),
    #[error(transparent)]
    Saved(#[from] SavedError),
    #[error("The host refused a device what it needs")]
    Host(#[from] std::io::Error),
    #[error("KVM could not {action}")]
    Kvm {
        action: &'static str,
        #[source]
        source: errno::Error,
    },
    #[error("A machine has room for {} virtio devices", VIRTIO_GSIS.len())]
    TooManyDevices,
    #[error("The guest has ended: {0}")]
    Ended(GuestEnd),
}
