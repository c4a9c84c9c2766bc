//! Leaves made by hand, so that the results do not depend on the host; and once those of the host.

use super::*;
use crate::config::Topology;
use crate::kvm::KvmHost;

fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, index, flags: 0, eax, ebx, ecx, edx, ..Default::default() }
}

fn word(text: &[u8; 4]) -> u32 {
    u32::from_le_bytes(*text)
}

/// An Intel host with everything that is to be hidden.
/// What IA32_ARCH_CAPABILITIES says where it is not what a test is about.
const TOLD: u64 = 0b11;

fn intel() -> Vec<kvm_cpuid_entry2> {
    vec![
        leaf(0, 0, [0x1f, word(b"Genu"), word(b"ntel"), word(b"ineI")]),
        leaf(1, 0, [0x806f8, 0x0733_0800, u32::MAX, u32::MAX]),
        leaf(4, 0, [0x1fc0_4121, 1, 2, 3]),
        leaf(4, 2, [0x1fc0_4143, 1, 2, 3]),
        leaf(4, 3, [0x1fc0_4163, 1, 2, 3]),
        leaf(4, 4, [0; 4]),
        leaf(6, 0, [0x77, 2, 9, 0]),
        leaf(7, 0, [1, u32::MAX, u32::MAX, u32::MAX]),
        leaf(0xa, 0, [8, 0, 0, 0]),
        leaf(0xb, 0, [1, 2, 0x100, 7]),
        leaf(0xb, 1, [6, 64, 0x201, 7]),
        leaf(0xd, 0, [0x602e7, 0x2b00, 0x2b00, 0]),
        leaf(0xd, 1, [0x1f, 0, 0x1900, 0]),
        leaf(0xd, 2, [256, 576, 0, 0]),
        leaf(0xd, 5, [64, 1088, 0, 0]),
        leaf(0xd, 6, [512, 1152, 0, 0]),
        leaf(0xd, 7, [1024, 1664, 0, 0]),
        leaf(0xd, 9, [8, 2688, 0, 0]),
        leaf(0xd, 11, [16, 0, 1, 0]),
        leaf(0xd, 17, [64, 2752, 2, 0]),
        leaf(0xd, 18, [8192, 2816, 6, 0]),
        leaf(0x1d, 0, [1, 0, 0, 0]),
        leaf(0x1f, 0, [1, 2, 0x100, 7]),
        leaf(0x4000_0000, 0, [0x4000_0001, word(b"KVMK"), word(b"VMKV"), word(b"M\0\0\0")]),
        leaf(0x4000_0001, 0, [u32::MAX, 0, 0, 1]),
        leaf(0x4000_0010, 0, [5, 0, 0, 0]),
        leaf(0x8000_0001, 0, [0, 0, u32::MAX, u32::MAX]),
        leaf(0x8000_0007, 0, [0, 0, 0, 0x100]),
        leaf(0x8000_0008, 0, [0x0030_302e, 0, 0x5005, 0]),
    ]
}

fn amd() -> Vec<kvm_cpuid_entry2> {
    let mut leaves = intel();
    leaves[0] = leaf(0, 0, [0x10, word(b"Auth"), word(b"cAMD"), word(b"enti")]);
    leaves.retain(|leaf| !matches!(leaf.function, 4 | 0x1f));
    leaves.push(leaf(0x8000_000a, 0, [1; 4]));
    leaves.push(leaf(0x8000_001d, 0, [0x121 | 0xfff << 14, 1, 2, 3]));
    leaves.push(leaf(0x8000_001d, 3, [0x163 | 0xfff << 14, 1, 2, 3]));
    leaves.push(leaf(0x8000_001e, 0, [9; 4]));
    leaves
}

fn guest(host: &[kvm_cpuid_entry2], topology: [u32; 3], vcpu: u32) -> Vec<kvm_cpuid_entry2> {
    let [sockets, cores, threads] = topology;
    let cpus = Cpus { count: sockets * cores * threads, topology: Some(Topology { sockets, cores, threads }) };
    for_vcpu(&CpuId::from_entries(host).unwrap(), &cpus, vcpu).unwrap().as_slice().to_vec()
}

fn at(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
    let leaf = leaves.iter().find(|leaf| is(leaf, function, index)).unwrap_or_else(|| panic!("{function:#x}.{index}"));
    [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
}

fn has(leaves: &[kvm_cpuid_entry2], function: u32) -> bool {
    leaves.iter().any(|leaf| leaf.function == function)
}

#[test]
fn what_cannot_move_is_hidden() {
    let leaves = guest(&intel(), [1, 4, 1], 0);
    assert_eq!(at(&leaves, 1, 0)[2] & bits([3, 5, 15]), 0, "monitor, vmx, pdcm");
    assert_eq!(at(&leaves, 1, 0)[2] & bits([21, 24, 31]), bits([21, 24, 31]), "x2apic, deadline, hypervisor");
    assert_eq!(at(&leaves, 6, 0), [4, 2, 0, 0]);
    let [_, ebx, ecx, edx] = at(&leaves, 7, 0);
    assert_eq!((ebx & bits([2, 25]), ecx & bits([7, 30]), edx & bits([19, 20, 22, 24, 25])), (0, 0, 0));
    assert_eq!(ebx & bits([5, 16]), bits([5, 16]), "AVX2 and AVX-512 stay");
    assert_eq!(at(&leaves, 0x8000_0001, 0)[2] & bits([2, 23]), 0, "svm and counters");
    assert_eq!(at(&leaves, 0x8000_0007, 0)[3], 0, "invariant TSC");
    for function in [0xa, 0x1d, 0x4000_0010] {
        assert!(!has(&leaves, function), "{function:#x}");
    }
    assert_eq!(at(&leaves, 0x4000_0001, 0), [KVM_FEATURES, 0, 0, 0]);
}

#[test]
fn the_xsave_area_loses_amx_and_supervisor_state() {
    let leaves = guest(&intel(), [1, 1, 1], 0);
    assert_eq!(at(&leaves, 0xd, 0), [0x2e7, 0x2b00, 2696, 0]);
    assert_eq!(at(&leaves, 0xd, 1), [0x1f, 0, 0, 0]);
    let left: Vec<_> = leaves.iter().filter(|leaf| leaf.function == 0xd).map(|leaf| leaf.index).collect();
    assert_eq!(left, [0, 1, 2, 5, 6, 7, 9]);
}

#[test]
fn an_intel_topology_is_told_in_all_leaves() {
    let leaves = guest(&intel(), [2, 4, 2], 11);
    assert_eq!(at(&leaves, 1, 0)[1], 0x0b08_0800, "APIC id 11, 8 processors, cache line");
    assert_ne!(at(&leaves, 1, 0)[3] & bits([28]), 0, "HTT");
    assert_eq!(at(&leaves, 4, 0)[0], 0x121 | 1 << 14 | 3 << 26, "level 1: two threads; four cores");
    assert_eq!(at(&leaves, 4, 3)[0], 0x163 | 7 << 14 | 3 << 26, "level 3: the socket");
    assert_eq!(at(&leaves, 4, 4)[0], 0);
    for function in [0xb, 0x1f] {
        assert_eq!(at(&leaves, function, 0), [1, 2, 0x100, 11]);
        assert_eq!(at(&leaves, function, 1), [3, 8, 0x201, 11]);
        assert_eq!(at(&leaves, function, 2), [0, 0, 2, 11]);
    }
    assert_eq!(at(&leaves, 0x8000_0008, 0)[2], 0x5005, "AMD's alone");
}

#[test]
fn an_amd_topology_is_told_in_all_leaves() {
    let leaves = guest(&amd(), [2, 4, 2], 11);
    assert_eq!(at(&leaves, 0x8000_0008, 0)[2], 7 | 3 << 12);
    assert_eq!(at(&leaves, 0x8000_001e, 0), [11, 1 | 1 << 8, 1, 0], "core 1 of socket 1");
    assert_eq!(at(&leaves, 0x8000_001d, 0)[0], 0x121 | 1 << 14);
    assert_eq!(at(&leaves, 0x8000_001d, 3)[0], 0x163 | 7 << 14);
    assert_eq!(at(&leaves, 0xb, 1), [3, 8, 0x201, 11], "leaf 0x10 is above 0xb");
    assert!(!has(&leaves, 0x1f) && !has(&leaves, 0x8000_000a));
    assert_eq!(at(&leaves, 0x8000_0001, 0)[2] & 2, 2);
}

#[test]
fn one_processor_is_no_multiprocessor() {
    for host in [intel(), amd()] {
        let leaves = guest(&host, [1, 1, 1], 0);
        assert_eq!(at(&leaves, 1, 0)[1], 0x0001_0800);
        assert_eq!(at(&leaves, 1, 0)[3] & bits([28]), 0);
        assert_eq!(at(&leaves, 0xb, 1), [0, 1, 0x201, 0]);
    }
}

#[test]
fn three_cores_have_room_for_four_ids() {
    let leaves = guest(&intel(), [1, 3, 1], 2);
    assert_eq!(at(&leaves, 0xb, 1), [2, 3, 0x201, 2]);
    assert_eq!(at(&leaves, 1, 0)[1], 0x0204_0800);
    assert_eq!(at(&leaves, 4, 3)[0] >> 14, 3 | 3 << 12);
}

fn check(source: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> Result<(), Vec<String>> {
    let source = GuestCpu::new(&CpuId::from_entries(source).unwrap(), TOLD);
    check_compatible(&source, &CpuId::from_entries(here).unwrap(), TOLD)
}

fn change(
    leaves: &[kvm_cpuid_entry2],
    function: u32,
    index: u32,
    change: fn(&mut kvm_cpuid_entry2),
) -> Vec<kvm_cpuid_entry2> {
    let mut leaves = leaves.to_vec();
    change(leaves.iter_mut().find(|leaf| is(leaf, function, index)).unwrap());
    leaves
}

#[test]
fn a_guest_moves_to_the_same_host_and_to_a_richer_one() {
    let source = guest(&intel(), [1, 4, 1], 0);
    check(&source, &intel()).unwrap();
    let poorer = change(&intel(), 7, 0, |leaf| leaf.ebx &= !bits([5, 16]));
    check(&guest(&poorer, [2, 1, 2], 3), &intel()).unwrap();
    // What the guest's own control registers mirror is no feature of the host.
    let mirrored = change(&source, 7, 0, |leaf| leaf.ecx |= bits([4]));
    check(&mirrored, &change(&intel(), 7, 0, |leaf| leaf.ecx &= !bits([4]))).unwrap();
}

#[test]
fn each_missing_feature_is_named() {
    let source = guest(&intel(), [1, 4, 1], 0);
    let cases: [(Vec<kvm_cpuid_entry2>, &[&str]); 7] = [
        (change(&intel(), 1, 0, |leaf| leaf.ecx &= !bits([24, 12])), &["fma", "tsc_deadline_timer"]),
        (change(&intel(), 7, 0, |leaf| leaf.ebx &= !bits([5])), &["avx2"]),
        (change(&intel(), 0xd, 0, |leaf| leaf.eax &= !bits([9])), &["protection keys state"]),
        (change(&intel(), 0xd, 1, |leaf| leaf.eax &= !bits([3])), &["xsaves"]),
        (change(&intel(), 0x4000_0001, 0, |leaf| leaf.eax &= !bits([24])), &["kvmclock_stable"]),
        (change(&intel(), 6, 0, |leaf| leaf.eax = 0), &["CPUID 0x6.0 Eax bit 2"]),
        (change(&intel(), 0x8000_0008, 0, |leaf| leaf.eax = 40), &["physical addresses of 46 bits (this host has 40)"]),
    ];
    for (here, missing) in cases {
        assert_eq!(check(&source, &here).unwrap_err(), missing);
    }
    let gone: Vec<_> = intel().into_iter().filter(|leaf| leaf.function != 7).collect();
    assert!(check(&source, &gone).unwrap_err().len() > 50);
}

#[test]
fn only_a_guest_that_knows_of_flaws_relies_on_their_absence() {
    let announces = change(&intel(), 7, 0, |leaf| leaf.edx |= bits([29]));
    let here = CpuId::from_entries(&announces).unwrap();
    let source = |leaves: &[kvm_cpuid_entry2]| GuestCpu::new(&CpuId::from_entries(leaves).unwrap(), 0b10_0001);
    let knows = source(&guest(&announces, [1, 1, 1], 0));
    check_compatible(&knows, &here, 0b1110_0001).unwrap();
    assert_eq!(check_compatible(&knows, &here, 0b1).unwrap_err(), ["mds_no"]);
    let unaware = source(&guest(&change(&announces, 7, 0, |leaf| leaf.edx &= !bits([29])), [1, 1, 1], 0));
    assert_eq!(unaware.arch_capabilities, None);
    check_compatible(&unaware, &here, 0).unwrap();
}

#[test]
fn another_vendor_or_layout_is_refused() {
    let source = guest(&intel(), [1, 4, 1], 0);
    let refusal = check(&source, &amd()).unwrap_err();
    assert_eq!(refusal[0], r#"a processor of "GenuineIntel" (this one is of "AuthenticAMD")"#);
    let here = change(&intel(), 0xd, 9, |leaf| leaf.ebx = 832);
    assert_eq!(check(&source, &here).unwrap_err(), ["XSAVE component 9 of 8 bytes at 2688 (here 8 at 832)"]);
}

#[test]
fn nothing_is_found_out_of_nonsense() {
    let nonsense = vec![leaf(0xd, u32::MAX, [u32::MAX; 4]), leaf(0xd, 0, [u32::MAX; 4]), leaf(4, 0, [u32::MAX; 4])];
    check(&nonsense, &intel()).unwrap_err();
    check(&[], &intel()).unwrap_err();
    let _ = guest(&nonsense, [1, 4, 1], 3);
    let many = vec![leaf(2, 0, [0; 4]); 256];
    let cpus = Cpus { count: 1, topology: None };
    let full: Vec<_> = many.into_iter().take(255).chain([leaf(0, 0, [0xb, 0, 0, 0])]).collect();
    let error = for_vcpu(&CpuId::from_entries(&full).unwrap(), &cpus, 0).unwrap_err();
    assert_eq!(error, CpuidError::TooManyLeaves { count: 259 });
}

#[test]
fn the_host_takes_what_is_made_of_its_leaves() {
    let host = KvmHost::open().unwrap();
    let supported = host.supported_cpuid().unwrap();
    let vm = host.create_vm().unwrap();
    let cpus = Cpus { count: 4, topology: Some(Topology { sockets: 1, cores: 2, threads: 2 }) };
    for id in 0..4 {
        let table = for_vcpu(supported, &cpus, id).unwrap();
        vm.create_vcpu(id.into()).unwrap().set_cpuid2(&table).unwrap();
        let here = host.arch_capabilities();
        check_compatible(&GuestCpu::new(&table, here), supported, here).unwrap();
    }
}
