//! What the guest's CPUID instruction says: the host's features less those that a guest here must not use, and the
//! topology of the machine. Also whether a guest that was started elsewhere finds all its features on this host.
//!
//! The machine's assembly calls [`for_vcpu`] for each vCPU of a guest that starts; a guest that moves in keeps the leaves
//! it has, after [`check_compatible`] said yes. Invariant: both sides of a move go through [`offered`], so that a guest
//! never depends on what is left out: state that is not saved, or that other hosts cannot have.

mod compare;
mod flaws;
mod names;
mod topology;

pub use compare::check_compatible;
pub(crate) use flaws::ARCH_CAPABILITIES;

use crate::config::Cpus;
use crate::state::CpuidEntryV1;
use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// What a guest was told of its CPU when it started, and relies on wherever it goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestCpu {
    /// What CPUID told its boot vCPU.
    pub cpuid: Vec<CpuidEntryV1>,
    /// IA32_ARCH_CAPABILITIES, if CPUID announces it.
    pub arch_capabilities: Option<u64>,
}

impl GuestCpu {
    /// That of a guest whose boot vCPU has `cpuid`, on a host whose register has `arch_capabilities`.
    pub(crate) fn new(cpuid: &CpuId, arch_capabilities: u64) -> Self {
        let leaves = cpuid.as_slice();
        let announced = leaves.iter().any(|leaf| is(leaf, 7, 0) && leaf.edx & bits([29]) != 0);
        Self {
            cpuid: leaves.iter().map(CpuidEntryV1::from).collect(),
            arch_capabilities: announced.then_some(arch_capabilities),
        }
    }
}

/// Why a vCPU's CPUID could not be made.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CpuidError {
    /// There are more leaves than KVM takes.
    #[error("The CPUID of the host has {count} leaves, more than KVM takes")]
    TooManyLeaves {
        /// How many there are.
        count: usize,
    },
}

/// One of the four result registers of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    fn of(self, leaf: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => leaf.eax,
            Self::Ebx => leaf.ebx,
            Self::Ecx => leaf.ecx,
            Self::Edx => leaf.edx,
        }
    }

    fn of_mut(self, leaf: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Self::Eax => &mut leaf.eax,
            Self::Ebx => &mut leaf.ebx,
            Self::Ecx => &mut leaf.ecx,
            Self::Edx => &mut leaf.edx,
        }
    }
}

/// A register of a leaf: function, index, register.
type Place = (u32, u32, Register);

const fn bits<const N: usize>(positions: [u32; N]) -> u32 {
    let (mut mask, mut at) = (0, 0);
    while at < N {
        mask |= 1 << positions[at];
        at += 1;
    }
    mask
}

/// Features that KVM offers and that no guest here gets. Bit positions are those of the Intel SDM, volume 2, CPUID, and
/// of AMD's APM, volume 3, appendix E.
const HIDDEN: [(Place, u32); 14] = [
    // Debug store, MONITOR, perfmon MSRs, and VMX: a guest's own guests would not move with it.
    ((1, 0, Register::Ecx), bits([2, 3, 4, 5, 15])),
    ((1, 0, Register::Edx), bits([21])),
    // SGX and processor trace.
    ((7, 0, Register::Ebx), bits([2, 25])),
    // Shadow stacks, whose pointer is in no register that is saved, and SGX launch control.
    ((7, 0, Register::Ecx), bits([7, 30])),
    // PCONFIG, last branch records, indirect branch tracking (with shadow stacks), and AMX, which needs a permission.
    ((7, 0, Register::Edx), bits([18, 19, 20, 22, 24, 25])),
    // AMX again.
    ((7, 1, Register::Eax), bits([21])),
    ((7, 1, Register::Edx), bits([8, 18])),
    // Tile state of AMX.
    ((0xd, 0, Register::Eax), bits([17, 18])),
    // Supervisor state: processor trace, shadow stacks, branch records.
    ((0xd, 1, Register::Ecx), u32::MAX),
    ((0xd, 1, Register::Edx), u32::MAX),
    // Only that the APIC timer never stops is kept of power management.
    ((6, 0, Register::Eax), !bits([2])),
    ((6, 0, Register::Ecx), u32::MAX),
    // SVM, instruction-based sampling, and the performance counters.
    ((0x8000_0001, 0, Register::Ecx), bits([2, 10, 23, 24, 28])),
    // The invariant TSC: a guest that trusts it would not follow kvmclock to a host of another frequency.
    ((0x8000_0007, 0, Register::Edx), bits([8])),
];

/// Leaves of which nothing is left: MONITOR, performance counters, SGX, processor trace, TSC and processor frequency,
/// branch records, AMX tiles, extended performance counters, SVM, encrypted memory, counters again, and AMD's newer
/// topology, which the older ones tell as well.
const DROPPED: [u32; 15] = [
    0x5,
    0xa,
    0x12,
    0x14,
    0x15,
    0x16,
    0x1c,
    0x1d,
    0x1e,
    0x23,
    0x8000_000a,
    0x8000_001b,
    0x8000_001f,
    0x8000_0022,
    0x8000_0026,
];

/// KVM's own features that guests get (Documentation/virt/kvm/x86/cpuid.rst): the clocks, no delay for port 0x80, steal
/// time, PV EOI, unhalt, TLB flush, IPIs, poll control, yield, and that the clock is stable. Not asynchronous page faults:
/// what they have in flight cannot be moved.
const KVM_FEATURES: u32 = bits([0, 1, 3, 5, 6, 7, 9, 11, 12, 13, 24]);
/// The leaf that names KVM, and the one with its features.
const KVM_SIGNATURE_LEAF: u32 = 0x4000_0000;
const KVM_FEATURES_LEAF: u32 = 0x4000_0001;

const X2APIC: u32 = bits([21]);
const HYPERVISOR: u32 = bits([31]);
/// The legacy area and the header of XSAVE, before its components.
const XSAVE_FIXED_BYTES: u32 = 512 + 64;

/// The leaves for the vCPU with APIC id `vcpu`, out of what KVM supports.
///
/// # Errors
/// [`CpuidError`].
pub fn for_vcpu(supported: &CpuId, cpus: &Cpus, vcpu: u32) -> Result<CpuId, CpuidError> {
    let mut leaves = offered(supported.as_slice());
    topology::arrange(&mut leaves, cpus.topology(), vcpu);
    CpuId::from_entries(&leaves).map_err(|_| CpuidError::TooManyLeaves { count: leaves.len() })
}

/// The leaves that a guest can have on a host whose KVM supports `supported`, before topology.
fn offered(supported: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
    let mut leaves: Vec<_> = supported.iter().copied().filter(|leaf| !dropped(leaf.function)).collect();
    for leaf in &mut leaves {
        for ((function, index, register), mask) in HIDDEN {
            if is(leaf, function, index) {
                *register.of_mut(leaf) &= !mask;
            }
        }
        match leaf.function {
            1 => leaf.ecx |= X2APIC | HYPERVISOR,
            KVM_SIGNATURE_LEAF => leaf.eax = KVM_FEATURES_LEAF,
            KVM_FEATURES_LEAF => {
                leaf.eax &= KVM_FEATURES;
                leaf.edx = 0;
            }
            _ => {}
        }
    }
    shrink_xsave(&mut leaves);
    leaves
}

fn dropped(function: u32) -> bool {
    // Other hypervisors' leaves lie between KVM's two and the end of the range for them.
    DROPPED.contains(&function) || (KVM_FEATURES_LEAF + 1..0x5000_0000).contains(&function)
}

fn is(leaf: &kvm_cpuid_entry2, function: u32, index: u32) -> bool {
    leaf.function == function && leaf.index == index
}

/// Takes out the XSAVE components that the guest cannot switch on, and the room for them.
fn shrink_xsave(leaves: &mut Vec<kvm_cpuid_entry2>) {
    let Some(main) = leaves.iter().find(|leaf| is(leaf, 0xd, 0)) else { return };
    let components = u64::from(main.eax) | u64::from(main.edx) << 32;
    let switchable = |index: u32| 1_u64.checked_shl(index).is_some_and(|bit| components & bit != 0);
    leaves.retain(|leaf| leaf.function != 0xd || leaf.index < 2 || switchable(leaf.index));
    let ends = leaves.iter().filter(|leaf| leaf.function == 0xd && leaf.index >= 2);
    let end = ends.map(|leaf| leaf.eax.saturating_add(leaf.ebx)).max().unwrap_or(0).max(XSAVE_FIXED_BYTES);
    for main in leaves.iter_mut().filter(|leaf| is(leaf, 0xd, 0)) {
        main.ecx = end;
    }
}

#[cfg(test)]
mod tests;
