//! The leaves that tell sockets, cores, threads and shared caches. APIC ids have no holes, which the rules for a
//! [`Topology`] in `config` see to: the id is socket, core and thread from high to low bits, and the vCPU's number.

use crate::config::Topology;
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// "AuthenticAMD" and "HygonGenuine", EBX of leaf 0: both describe their topology in AMD's way.
const AMD_VENDORS: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];
const HYPERTHREADING: u32 = 1 << 28;
const CORE_MULTIPROCESSING_LEGACY: u32 = 1 << 1;
/// Level types of leaves 0xB and 0x1F (Intel SDM volume 2, CPUID).
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Rewrites the leaves for the vCPU with APIC id `vcpu`.
pub(super) fn arrange(leaves: &mut Vec<kvm_cpuid_entry2>, topology: Topology, vcpu: u32) {
    let first = leaves.iter().find(|leaf| leaf.function == 0);
    let (highest, amd) = first.map_or((0, false), |leaf| (leaf.eax, AMD_VENDORS.contains(&leaf.ebx)));
    let per_socket = topology.per_socket();
    for leaf in leaves.iter_mut() {
        match leaf.function {
            0x1 => basic(leaf, per_socket, vcpu),
            0x4 => cache(leaf, topology, u32::next_power_of_two, Some(topology.cores)),
            0x8000_001d => cache(leaf, topology, |sharers| sharers, None),
            0x8000_0001 if amd => set(&mut leaf.ecx, CORE_MULTIPROCESSING_LEGACY, per_socket > 1),
            0x8000_0008 if amd => leaf.ecx = (per_socket - 1) | width(per_socket) << 12,
            0x8000_001e => {
                let core = vcpu / topology.threads % topology.cores;
                (leaf.eax, leaf.ebx) = (vcpu, core | (topology.threads - 1) << 8);
                (leaf.ecx, leaf.edx) = (vcpu / per_socket, 0);
            }
            _ => {}
        }
    }
    for function in [0xb, 0x1f] {
        let had = leaves.iter().any(|leaf| leaf.function == function);
        leaves.retain(|leaf| leaf.function != function);
        if had || (function == 0xb && highest >= 0xb) {
            leaves.extend(levels(function, topology, vcpu));
        }
    }
}

fn basic(leaf: &mut kvm_cpuid_entry2, per_socket: u32, vcpu: u32) {
    leaf.ebx = (leaf.ebx & 0xffff) | per_socket.next_power_of_two() << 16 | vcpu << 24;
    set(&mut leaf.edx, HYPERTHREADING, per_socket > 1);
}

/// Threads of a core share levels 1 and 2, all processors of a socket the rest. `ids` makes the number that the leaf wants
/// out of the number of sharers, less one.
fn cache(leaf: &mut kvm_cpuid_entry2, topology: Topology, ids: fn(u32) -> u32, cores: Option<u32>) {
    if leaf.eax & 0x1f == 0 {
        return;
    }
    let sharers = if leaf.eax >> 5 & 7 <= 2 { topology.threads } else { topology.per_socket() };
    leaf.eax = (leaf.eax & !(0xfff << 14)) | (ids(sharers) - 1) << 14;
    if let Some(cores) = cores {
        leaf.eax = (leaf.eax & !(0x3f << 26)) | (ids(cores) - 1) << 26;
    }
}

/// The leaf's three indices: threads, cores, and the end.
fn levels(function: u32, topology: Topology, vcpu: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index, kind, processors: u32, shift| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: index | kind << 8,
        edx: vcpu,
        ..Default::default()
    };
    let per_socket = topology.per_socket();
    [
        level(0, LEVEL_THREAD, topology.threads, width(topology.threads)),
        level(1, LEVEL_CORE, per_socket, width(per_socket)),
        level(2, 0, 0, 0),
    ]
}

/// Bits that tell `count` ids apart.
fn width(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on { *register | bit } else { *register & !bit };
}
