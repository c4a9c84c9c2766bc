//! Whether a guest that knows the features of one host can run on another: everything it was told must be here too.

use super::{GuestCpu, Place, Register, bits, flaws, is, names, offered};
use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// The registers whose bits are features, with the bits that are none: OSXSAVE and OSPKE mirror the guest's own control
/// registers, and the others tell the topology.
const FEATURES: [(Place, u32); 23] = [
    ((0x1, 0, Register::Ecx), bits([27])),
    ((0x1, 0, Register::Edx), bits([28])),
    ((0x6, 0, Register::Eax), 0),
    ((0x7, 0, Register::Ebx), 0),
    ((0x7, 0, Register::Ecx), bits([4])),
    ((0x7, 0, Register::Edx), 0),
    ((0x7, 1, Register::Eax), 0),
    ((0x7, 1, Register::Ebx), 0),
    ((0x7, 1, Register::Ecx), 0),
    ((0x7, 1, Register::Edx), 0),
    ((0x7, 2, Register::Edx), 0),
    ((0xd, 0, Register::Eax), 0),
    ((0xd, 0, Register::Edx), 0),
    ((0xd, 1, Register::Eax), 0),
    ((0xd, 1, Register::Ecx), 0),
    ((0xd, 1, Register::Edx), 0),
    ((0x8000_0001, 0, Register::Ecx), bits([1])),
    ((0x8000_0001, 0, Register::Edx), 0),
    ((0x8000_0007, 0, Register::Edx), 0),
    ((0x8000_0008, 0, Register::Ebx), 0),
    ((0x8000_0021, 0, Register::Eax), 0),
    ((0x8000_0021, 0, Register::Ecx), 0),
    ((super::KVM_FEATURES_LEAF, 0, Register::Eax), 0),
];

/// Checks that a guest with the CPU `guest` can run where KVM supports `supported`, and IA32_ARCH_CAPABILITIES is
/// `arch_capabilities`.
///
/// # Errors
/// What is missing here, in words, most telling first.
pub fn check_compatible(guest: &GuestCpu, supported: &CpuId, arch_capabilities: u64) -> Result<(), Vec<String>> {
    let source: Vec<kvm_cpuid_entry2> = guest.cpuid.iter().map(Into::into).collect();
    let here = offered(supported.as_slice());
    let mut missing = vec![];
    missing.extend(other_vendor(&source, &here));
    missing.extend(narrower_addresses(&source, &here));
    for leaf in &source {
        missing.extend(missing_features(leaf, &here));
        missing.extend(other_xsave_layout(leaf, &here));
    }
    missing.extend(guest.arch_capabilities.into_iter().flat_map(|told| flaws::missing(told, arch_capabilities)));
    if missing.is_empty() { Ok(()) } else { Err(missing) }
}

fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
    // What CPUID does not list, it answers with zeroes.
    leaves.iter().copied().find(|leaf| is(leaf, function, index)).unwrap_or_default()
}

fn other_vendor(source: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Option<String> {
    let (theirs, ours) = (vendor(source), vendor(here));
    (theirs != ours).then(|| format!("a processor of {theirs:?} (this one is of {ours:?})"))
}

fn vendor(leaves: &[kvm_cpuid_entry2]) -> String {
    let leaf = find(leaves, 0, 0);
    let name = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    String::from_utf8_lossy(&name).into_owned()
}

fn narrower_addresses(source: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Option<String> {
    let width = |leaves| find(leaves, 0x8000_0008, 0).eax & 0xff;
    let (theirs, ours) = (width(source), width(here));
    (theirs > ours).then(|| format!("physical addresses of {theirs} bits (this host has {ours})"))
}

fn missing_features(leaf: &kvm_cpuid_entry2, here: &[kvm_cpuid_entry2]) -> Vec<String> {
    let ours = find(here, leaf.function, leaf.index);
    let registers = FEATURES.iter().filter(|((function, index, _), _)| is(leaf, *function, *index));
    let missing = registers.flat_map(|((_, _, register), ignored)| {
        let lost = register.of(leaf) & !register.of(&ours) & !ignored;
        let place = (leaf.function, leaf.index, *register);
        (0..32).filter(move |bit| lost & (1 << bit) != 0).map(move |bit| names::describe(place, bit))
    });
    missing.collect()
}

/// A component of XSAVE must have its place: guests keep its state in memory in the layout that they were told.
fn other_xsave_layout(leaf: &kvm_cpuid_entry2, here: &[kvm_cpuid_entry2]) -> Option<String> {
    if leaf.function != 0xd || leaf.index < 2 || leaf.eax == 0 {
        return None;
    }
    let ours = find(here, 0xd, leaf.index);
    let differs = ours.eax != 0 && (ours.eax, ours.ebx) != (leaf.eax, leaf.ebx);
    differs.then(|| {
        let (index, size, offset) = (leaf.index, leaf.eax, leaf.ebx);
        format!("XSAVE component {index} of {size} bytes at {offset} (here {} at {})", ours.eax, ours.ebx)
    })
}
