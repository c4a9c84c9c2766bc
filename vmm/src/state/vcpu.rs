//! One vCPU's state: what is saved, and the order of saving and restoring it.
//!
//! Both functions run in the vCPU's thread while it stands. The order is KVM's, not taste:
//!
//! - *Saving:* KVM_GET_MP_STATE first, as it lets a pending INIT or start-up IPI happen, which changes registers. The TSC
//!   deadline before the local APIC: a timer that fires in between is then saved twice (a spurious interrupt), where the
//!   other order would lose it. Events last.
//! - *Restoring:* CPUID first, as KVM judges all other values by it; the TSC frequency before the TSC; system registers
//!   before the local APIC (they hold its base and mode); the APIC and the TSC before the TSC deadline, which arms a timer;
//!   events last, since KVM_SET_REGS drops pending exceptions.
//!
//! The values come from a peer or a file: lengths are checked here, and KVM checks the values.

use super::registers::{CpuidEntryV1, DebugRegistersV1, EventsV1, RegistersV1, SystemRegistersV1};
use super::tsc::{self, TscSavedV1, TscStart};
use super::{Facts, msrs, raw, xsave};
use crate::state::msrs::{MAX_MSRS, MsrV1};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_SIPI_RECEIVED, kvm_cpuid_entry2, kvm_lapic_state, kvm_mp_state,
    kvm_vcpu_events, kvm_xcr, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use saved::Saved;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm_sys_util::errno;

/// The length of the local APIC's register page that KVM carries (struct kvm_lapic_state).
pub const LAPIC_BYTES: usize = 1024;
/// The most extended control registers in KVM's structure (KVM_MAX_XCRS).
const MAX_XCRS: usize = 16;

/// The state of one vCPU, version 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuSavedV1 {
    /// KVM's multiprocessing state: runnable, halted, waiting to be started.
    pub mp_state: u32,
    /// General registers.
    pub registers: RegistersV1,
    /// System registers.
    pub system: SystemRegistersV1,
    /// The XSAVE area in the standard format (Intel SDM volume 1, 13.4), as long as the source's KVM makes it.
    pub xsave: Vec<u8>,
    /// Extended control registers, by number.
    pub xcrs: Vec<(u32, u64)>,
    /// Debug registers.
    pub debug: DebugRegistersV1,
    /// IA32_TSC_DEADLINE, if the vCPU has it.
    pub tsc_deadline: Option<u64>,
    /// The local APIC's registers, [`LAPIC_BYTES`] long.
    pub lapic: Vec<u8>,
    /// What CPUID answers.
    pub cpuid: Vec<CpuidEntryV1>,
    /// The time stamp counter.
    pub tsc: TscSavedV1,
    /// Model-specific registers.
    pub msrs: Vec<MsrV1>,
    /// What is about to be delivered.
    pub events: EventsV1,
}

impl Saved for VcpuSavedV1 {
    const KIND: &'static str = "vcpu";
    const VERSION: u16 = 1;
}

/// Why a vCPU's state could not be saved or restored.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum VcpuStateError {
    /// KVM refused.
    #[error("{call} failed")]
    Kvm {
        /// The ioctl.
        call: &'static str,
        /// Its error.
        #[source]
        source: errno::Error,
    },
    /// A part of the saved state has a length that cannot be.
    #[error("The saved {what} has {found} {unit}, where {least} to {most} are possible here")]
    Length {
        /// Which part.
        what: &'static str,
        /// What is counted.
        unit: &'static str,
        /// The length found.
        found: usize,
        /// The least possible.
        least: usize,
        /// The most possible.
        most: usize,
    },
    /// The XSAVE area is not made of whole words.
    #[error("The saved XSAVE area of {found} bytes is not a multiple of {unit}")]
    XsaveUnit {
        /// The length found.
        found: usize,
        /// The size of a word.
        unit: usize,
    },
    /// The multiprocessing state does not exist.
    #[error("The saved multiprocessing state {found} does not exist on x86-64")]
    MpState {
        /// The value found.
        found: u32,
    },
    /// A register that must be there is not.
    #[error("This KVM has no MSR {index:#x}")]
    MsrNotReadable {
        /// The register.
        index: u32,
    },
    /// The saved state has a register that this format does not carry.
    #[error("The saved state sets MSR {index:#x}, which is never carried: {why}")]
    MsrNotCarried {
        /// The register.
        index: u32,
        /// The reason.
        why: &'static str,
    },
    /// KVM did not take a register's value.
    #[error("This KVM does not take the value {value:#x} of MSR {index:#x}{}", has_now(*here))]
    MsrRefused {
        /// The register.
        index: u32,
        /// The saved value.
        value: u64,
        /// The value it has here, if it exists.
        here: Option<u64>,
    },
    /// The TSC frequency cannot be had here.
    #[error(
        "The guest's TSC runs at {saved} kHz, this host's at {here} kHz, and this KVM cannot scale it \
         (no KVM_CAP_TSC_CONTROL): move the guest to a host with the same frequency"
    )]
    TscFrequency {
        /// The guest's frequency in kHz.
        saved: u32,
        /// The host's frequency in kHz.
        here: u32,
    },
    /// KVM shows the guest the host's own TSC, which is behind the guest's.
    #[error(
        "The guest's TSC would step back by {cycles} cycles, since this KVM cannot offset it: move the guest to a host \
         that has been up for longer, or that virtualizes in hardware"
    )]
    TscStepsBack {
        /// By how much.
        cycles: u64,
    },
    /// The vCPUs' saved TSCs differ in frequency.
    #[error("The saved vCPUs have TSC frequencies of {first} kHz and {other} kHz, which must be equal")]
    TscFrequencies {
        /// vCPU 0's, in kHz.
        first: u32,
        /// Another's, in kHz.
        other: u32,
    },
}

fn has_now(here: Option<u64>) -> String {
    here.map_or_else(|| ", which does not exist here".to_owned(), |here| format!(", which is {here:#x} here"))
}

impl VcpuStateError {
    pub(super) fn kvm(call: &'static str, source: errno::Error) -> Self {
        Self::Kvm { call, source }
    }
}

/// Reads a vCPU's state, in its thread.
///
/// # Errors
/// [`VcpuStateError::Kvm`] if KVM refuses, which it does not for a vCPU that can run.
pub fn save_vcpu(vcpu: &VcpuFd, facts: &Facts) -> Result<VcpuSavedV1, VcpuStateError> {
    let failed = |call| move |source| VcpuStateError::kvm(call, source);
    let mp_state = vcpu.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?.mp_state;
    let registers = (&vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?).into();
    let system = save_system(vcpu, facts)?;
    let xsave = xsave::read(vcpu, facts.xsave_bytes)?;
    let xcrs = vcpu.get_xcrs().map_err(failed("KVM_GET_XCRS"))?;
    let xcrs = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).map(|xcr| (xcr.xcr, xcr.value)).collect();
    let debug = (&vcpu.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?).into();
    let tsc_deadline = msrs::read(vcpu, &[msrs::TSC_DEADLINE])?.first().map(|msr| msr.value);
    let lapic = vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
    let lapic = lapic.regs.iter().map(|byte| byte.cast_unsigned()).collect();
    let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_CPUID2"))?;
    let cpuid = without_filler(cpuid.as_slice()).iter().map(CpuidEntryV1::from).collect();
    let tsc = tsc::save(vcpu)?;
    let msrs = msrs::read(vcpu, &facts.msrs)?;
    let events = (&vcpu.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?).into();
    Ok(VcpuSavedV1 { mp_state, registers, system, xsave, xcrs, debug, tsc_deadline, lapic, cpuid, tsc, msrs, events })
}

/// A KVM before Linux 6.3 does not tell how many entries KVM_GET_CPUID2 gave: the table is filled up with zeros.
fn without_filler(table: &[kvm_cpuid_entry2]) -> &[kvm_cpuid_entry2] {
    let filler = kvm_cpuid_entry2::default();
    let used = table.iter().rposition(|entry| *entry != filler).map_or(0, |last| last + 1);
    &table[..used]
}

fn save_system(vcpu: &VcpuFd, facts: &Facts) -> Result<SystemRegistersV1, VcpuStateError> {
    if facts.sregs2 {
        raw::sregs2(vcpu).map(|sregs| (&sregs).into()).map_err(|source| VcpuStateError::kvm("KVM_GET_SREGS2", source))
    } else {
        vcpu.get_sregs().map(|sregs| (&sregs).into()).map_err(|source| VcpuStateError::kvm("KVM_GET_SREGS", source))
    }
}

/// Writes a vCPU's state, in its thread. The TSC goes on at `start`, which is one for all vCPUs.
///
/// # Errors
/// [`VcpuStateError`] if a value is not possible here. The vCPU is then in no state that could run.
pub fn restore_vcpu(vcpu: &VcpuFd, saved: &VcpuSavedV1, start: TscStart, facts: &Facts) -> Result<(), VcpuStateError> {
    check_lengths(saved, facts)?;
    let VcpuSavedV1 { mp_state, registers, system, xsave, xcrs, debug, tsc_deadline, lapic, cpuid, tsc, msrs, events } =
        saved;
    let failed = |call| move |source| VcpuStateError::kvm(call, source);
    vcpu.set_cpuid2(&cpuid_table(cpuid)?).map_err(failed("KVM_SET_CPUID2"))?;
    tsc::set_frequency(vcpu, tsc.khz, facts)?;
    vcpu.set_mp_state(kvm_mp_state { mp_state: *mp_state }).map_err(failed("KVM_SET_MP_STATE"))?;
    vcpu.set_regs(&registers.into()).map_err(failed("KVM_SET_REGS"))?;
    restore_system(vcpu, system, facts)?;
    xsave::write(vcpu, xsave, facts.xsave_bytes)?;
    vcpu.set_xcrs(&xcr_table(xcrs)).map_err(failed("KVM_SET_XCRS"))?;
    vcpu.set_debug_regs(&debug.into()).map_err(failed("KVM_SET_DEBUGREGS"))?;
    vcpu.set_lapic(&lapic_page(lapic)).map_err(failed("KVM_SET_LAPIC"))?;
    tsc::set_value(vcpu, start)?;
    msrs::write(vcpu, msrs)?;
    if let Some(value) = tsc_deadline {
        msrs::write_one(vcpu, MsrV1 { index: msrs::TSC_DEADLINE, value: *value })?;
    }
    vcpu.set_vcpu_events(&kvm_vcpu_events::from(events)).map_err(failed("KVM_SET_VCPU_EVENTS"))
}

fn restore_system(vcpu: &VcpuFd, system: &SystemRegistersV1, facts: &Facts) -> Result<(), VcpuStateError> {
    if facts.sregs2 {
        raw::set_sregs2(vcpu, &system.into()).map_err(|source| VcpuStateError::kvm("KVM_SET_SREGS2", source))
    } else {
        vcpu.set_sregs(&system.into()).map_err(|source| VcpuStateError::kvm("KVM_SET_SREGS", source))
    }
}

fn check_lengths(saved: &VcpuSavedV1, facts: &Facts) -> Result<(), VcpuStateError> {
    let check = |what, unit, found, least, most| {
        if (least..=most).contains(&found) {
            Ok(())
        } else {
            Err(VcpuStateError::Length { what, unit, found, least, most })
        }
    };
    check("XSAVE area", "bytes", saved.xsave.len(), xsave::LEGACY_BYTES, facts.xsave_bytes)?;
    check("XCR list", "registers", saved.xcrs.len(), 0, MAX_XCRS)?;
    check("local APIC", "bytes", saved.lapic.len(), LAPIC_BYTES, LAPIC_BYTES)?;
    check("CPUID table", "entries", saved.cpuid.len(), 0, KVM_MAX_CPUID_ENTRIES)?;
    check("MSR list", "registers", saved.msrs.len(), 0, MAX_MSRS)?;
    if saved.mp_state > KVM_MP_STATE_SIPI_RECEIVED {
        return Err(VcpuStateError::MpState { found: saved.mp_state });
    }
    Ok(())
}

fn cpuid_table(saved: &[CpuidEntryV1]) -> Result<CpuId, VcpuStateError> {
    let entries: Vec<_> = saved.iter().map(Into::into).collect();
    CpuId::from_entries(&entries).map_err(|_| VcpuStateError::Length {
        what: "CPUID table",
        unit: "entries",
        found: saved.len(),
        least: 0,
        most: KVM_MAX_CPUID_ENTRIES,
    })
}

/// KVM's table of at most [`MAX_XCRS`] registers.
fn xcr_table(saved: &[(u32, u64)]) -> kvm_xcrs {
    let mut table = kvm_xcrs::default();
    for (place, (xcr, value)) in table.xcrs.iter_mut().zip(saved) {
        *place = kvm_xcr { xcr: *xcr, value: *value, ..Default::default() };
        table.nr_xcrs += 1;
    }
    table
}

fn lapic_page(saved: &[u8]) -> kvm_lapic_state {
    let mut page = kvm_lapic_state::default();
    for (place, byte) in page.regs.iter_mut().zip(saved) {
        *place = byte.cast_signed();
    }
    page
}
