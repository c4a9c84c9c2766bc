//! What makes up a guest besides its memory and devices: vCPUs, interrupt chips and clock, saved and restored.
//!
//! The machine calls [`save`] and [`restore`] while the vCPUs are parked and the devices stand still. The types that end
//! in `SavedV1` are frozen: they are what released versions of godwit wrote. Nothing in them is trusted on restore.
//!
//! ```text
//! save:     chips -> vCPUs (in parallel) -> clock           with the flow of interrupts
//! restore:  vCPUs (in parallel) -> chips -> clock -> run    against it, time last
//! ```

mod chips;
mod clock;
mod msrs;
mod power_on;
mod raw;
mod registers;
#[cfg(test)]
mod tests;
mod tsc;
mod vcpu;
mod xsave;

pub use chips::{ChipsError, ChipsSavedV1, IoApicV1, PicV1, PitChannelV1, restore_chips, save_chips};
pub use clock::{ClockSavedV1, restore_clock, save_clock};
pub use msrs::{MAX_MSRS, MsrV1};
pub use power_on::reset;
pub use registers::{
    CpuidEntryV1, DebugRegistersV1, EventsV1, ExceptionV1, InterruptV1, NmiV1, RegistersV1, SegmentV1, SmiV1,
    SystemRegistersV1, TableV1,
};
pub use tsc::{TscSavedV1, TscStart};
pub use vcpu::{LAPIC_BYTES, VcpuSavedV1, VcpuStateError, restore_vcpu, save_vcpu};

use crate::vcpu::{VcpuError, Vcpus};
use kvm_bindings::KVM_CAP_SREGS2;
use kvm_ioctls::{Cap, Kvm, VmFd};
use saved::{SavedError, SavedState};
use std::sync::Arc;
use thiserror::Error;
use vmm_sys_util::errno;

/// The id of the chips' section.
const CHIPS: &str = "chips";
/// The id of the clock's section.
const CLOCK: &str = "clock";

/// What saving and restoring need to know of this KVM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The model-specific registers to save.
    msrs: Vec<u32>,
    /// The length of the XSAVE area.
    xsave_bytes: usize,
    /// KVM_GET_SREGS2 and KVM_SET_SREGS2 are there (Linux 5.14).
    sregs2: bool,
    /// The guest's TSC may have a frequency of its own.
    tsc_scaling: bool,
}

impl Facts {
    /// Asks KVM.
    ///
    /// # Errors
    /// [`StateError::Kvm`] if it does not list its registers.
    pub fn of(kvm: &Kvm, vm: &VmFd) -> Result<Self, StateError> {
        let listed =
            kvm.get_msr_index_list().map_err(|source| StateError::Kvm { call: "KVM_GET_MSR_INDEX_LIST", source })?;
        Ok(Self {
            msrs: msrs::to_save(listed.as_slice()),
            xsave_bytes: usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(xsave::LEGACY_BYTES),
            sregs2: vm.check_extension_raw(u64::from(KVM_CAP_SREGS2)) > 0,
            tsc_scaling: vm.check_extension(Cap::TscControl),
        })
    }
}

/// Why the guest's state could not be saved or restored.
#[derive(Debug, Error)]
pub enum StateError {
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A chip.
    #[error(transparent)]
    Chips(#[from] ChipsError),
    /// A section is missing, malformed or too long.
    #[error(transparent)]
    Saved(#[from] SavedError),
    /// KVM refused.
    #[error("{call} failed")]
    Kvm {
        /// The ioctl.
        call: &'static str,
        /// Its error.
        #[source]
        source: errno::Error,
    },
}

/// Puts the sections `chips`, `vcpu0` and so on, and `clock` into `state`. The vCPUs are parked.
///
/// # Errors
/// [`StateError`]; the guest is as before and can run on.
pub fn save(vm: &VmFd, vcpus: &Vcpus, facts: &Arc<Facts>, state: &mut SavedState) -> Result<(), StateError> {
    state.put(CHIPS, &save_chips(vm)?)?;
    for (index, saved) in vcpus.save(facts)?.iter().enumerate() {
        state.put(&vcpu_section(index), saved)?;
    }
    let clock = save_clock(vm).map_err(|source| StateError::Kvm { call: "KVM_GET_CLOCK", source })?;
    state.put(CLOCK, &clock)?;
    Ok(())
}

/// Takes the sections of [`save`] out of `state` and puts them into effect. The vCPUs are parked; memory, chips and vCPUs
/// of the VM exist. Sections of more vCPUs than there are stay in `state`, where its `finish` finds them.
///
/// # Errors
/// [`StateError`]; the guest cannot run then, until another restore.
pub fn restore(vm: &VmFd, vcpus: &Vcpus, facts: &Arc<Facts>, state: &mut SavedState) -> Result<(), StateError> {
    // All sections are decoded before the first takes effect.
    let saved = (0..vcpus.count()).map(|index| state.take(&vcpu_section(index))).collect::<Result<Vec<_>, _>>()?;
    let chips = state.take(CHIPS)?;
    let clock = state.take(CLOCK)?;
    vcpus.restore(saved, facts)?;
    restore_chips(vm, &chips)?;
    restore_clock(vm, clock).map_err(|source| StateError::Kvm { call: "KVM_SET_CLOCK", source })
}

fn vcpu_section(index: usize) -> String {
    format!("vcpu{index}")
}
