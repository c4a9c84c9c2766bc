//! Both trackers against a small guest on the host's KVM: they must tell exactly the pages that it wrote.

use super::*;
use crate::boot::Entry;
use crate::boot::entry::set_registers;
use crate::kvm::KvmHost;
use crate::memory::{GuestMemory, Slots};
use kvm_ioctls::VcpuExit;
use migration::RegionId;
use std::collections::BTreeSet;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};

/// 64-bit code: writes `ecx` words from `rdi` on, `rdx` bytes apart, and counts `ebx` down after each of them; then says
/// so at port 0xf4.
const CODE: [u8; 17] = [
    0x89, 0x0f, // mov [rdi], ecx
    0x48, 0x01, 0xd7, // add rdi, rdx
    0x89, 0xd8, // mov eax, ebx
    0xff, 0xc8, // dec eax
    0x75, 0xfc, // jnz to dec eax
    0xff, 0xc9, // dec ecx
    0x75, 0xf1, // jnz to mov [rdi], ecx
    0xe6, 0xf4, // out 0xf4, al
];
const CODE_AT: u64 = 0x1000;
/// Page tables: the top, the second level, and one directory for the first GiB and one for the GiB from 4 GiB on.
const TABLES_AT: u64 = 0x2000;

struct Guest {
    name: &'static str,
    vcpu: VcpuFd,
    tracker: Box<dyn DirtyTracker>,
    memory: GuestMemory,
    /// What the guest counts down between two writes.
    delay: u64,
    full: u32,
}

type Make = fn(Arc<Slots>) -> (&'static str, Box<dyn DirtyTracker>);

fn log(slots: Arc<Slots>) -> (&'static str, Box<dyn DirtyTracker>) {
    ("log", Box::new(DirtyLog::new(slots).unwrap()))
}

fn ring(slots: Arc<Slots>) -> (&'static str, Box<dyn DirtyTracker>) {
    ("ring", Box::new(DirtyRing::new(slots, 1024).unwrap()))
}

const BOTH: [Make; 2] = [log, ring];

impl Guest {
    fn new(bytes: u64, make: Make) -> Self {
        let host = KvmHost::open().unwrap();
        let vm = host.create_vm().unwrap();
        let memory = GuestMemory::create(bytes, false).unwrap();
        let slots = Arc::new(Slots::new(vm.clone(), memory.clone()).unwrap());
        let (name, tracker) = make(slots);
        let vcpu = vm.create_vcpu(0).unwrap();
        tracker.attach(&vcpu).unwrap();
        vcpu.set_cpuid2(host.supported_cpuid().unwrap()).unwrap();
        memory.ram().write_slice(&CODE, GuestAddress(CODE_AT)).unwrap();
        let mut guest = Self { name, vcpu, tracker, memory, delay: 1, full: 0 };
        guest.enter_long_mode();
        guest
    }

    fn enter_long_mode(&mut self) {
        let put = |table: u64, index: u64, entry: u64| {
            self.memory.ram().write_obj(entry, GuestAddress(TABLES_AT + table * 4096 + index * 8)).unwrap();
        };
        // All entries are accessed and dirty from the start, or else the walk itself would write to these pages.
        let table = |table: u64| (TABLES_AT + table * 4096) | 0b110_0011;
        put(0, 0, table(1));
        for (directory, gib) in [(2, 0), (3, 4)] {
            put(1, gib, table(directory));
            (0..512).for_each(|index| put(directory, index, gib << 30 | index << 21 | 0b1110_0011));
        }
        set_registers(&self.vcpu, &Entry::Long64 { rip: CODE_AT, boot_params: 0 }).unwrap();
        let mut special = self.vcpu.get_sregs().unwrap();
        special.cr3 = TABLES_AT;
        self.vcpu.set_sregs(&special).unwrap();
    }

    /// Lets the guest write one word in each of `count` pages, `step` pages apart.
    fn write(&mut self, first: u64, count: u64, step: u64) {
        let mut regs = self.vcpu.get_regs().unwrap();
        (regs.rip, regs.rdi, regs.rcx, regs.rdx, regs.rbx) = (CODE_AT, first, count, step * 4096, self.delay);
        self.vcpu.set_regs(&regs).unwrap();
        loop {
            match self.vcpu.run().unwrap() {
                VcpuExit::IoOut(0xf4, _) => break,
                VcpuExit::Unsupported(kvm_bindings::KVM_EXIT_DIRTY_RING_FULL) => {
                    self.full += 1;
                    self.tracker.ring_full().unwrap();
                }
                other => panic!("{other:?}"),
            }
        }
        self.vcpu.set_kvm_immediate_exit(1);
        assert_eq!(self.vcpu.run().unwrap_err().errno(), libc::EINTR);
        self.vcpu.set_kvm_immediate_exit(0);
    }

    fn harvest(&self) -> BTreeSet<(u16, u64)> {
        let pages = self.memory.pages_per_region();
        let mut ledger = DirtyLedger::new(&pages);
        self.tracker.harvest(&mut ledger).unwrap();
        let all = pages.iter().zip(0..).flat_map(|(&pages, region)| (0..pages).map(move |page| (region, page)));
        let dirty: BTreeSet<_> = all.filter(|&(region, page)| ledger.is_dirty(RegionId(region), page)).collect();
        assert_eq!(dirty.len() as u64, ledger.dirty_pages());
        dirty
    }

    fn assert_harvest(&self, expected: &BTreeSet<(u16, u64)>) {
        let found = self.harvest();
        let (lost, wrong) = (expected - &found, &found - expected);
        assert!(lost.is_empty() && wrong.is_empty(), "{}: lost {lost:?}, wrong {wrong:?}", self.name);
    }
}

fn pages(region: u16, first: u64, count: u64, step: u64) -> BTreeSet<(u16, u64)> {
    (0..count).map(|index| (region, first + index * step)).collect()
}

#[test]
fn exactly_the_written_pages_are_told() {
    for make in BOTH {
        let mut guest = Guest::new(64 << 20, make);
        guest.write(0x10_0000, 100, 1);
        guest.tracker.start().unwrap();
        guest.assert_harvest(&BTreeSet::new());
        guest.write(0x20_0000, 1000, 3);
        guest.assert_harvest(&pages(0, 0x200, 1000, 3));
        guest.assert_harvest(&BTreeSet::new());
        // The same pages again, and others: a page that was told is watched again.
        guest.write(0x20_0000, 10, 3);
        guest.write(0x10_0000, 10, 1);
        let both = &pages(0, 0x200, 10, 3) | &pages(0, 0x100, 10, 1);
        guest.assert_harvest(&both);
    }
}

#[test]
fn writes_between_two_harvests_are_told_once() {
    for make in BOTH {
        let mut guest = Guest::new(64 << 20, make);
        guest.tracker.start().unwrap();
        for _ in 0..5 {
            guest.write(0x20_0000, 50, 1);
        }
        guest.assert_harvest(&pages(0, 0x200, 50, 1));
    }
}

#[test]
fn both_sides_of_the_gap_are_told() {
    for make in BOTH {
        let mut guest = Guest::new(5 << 30, make);
        guest.tracker.start().unwrap();
        guest.write((4 << 30) + 0x10_0000, 200, 7);
        guest.write(0x30_0000, 5, 1);
        let both = &pages(1, 0x100, 200, 7) | &pages(0, 0x300, 5, 1);
        guest.assert_harvest(&both);
    }
}

#[test]
fn tracking_stops_and_starts_afresh() {
    for make in BOTH {
        let mut guest = Guest::new(64 << 20, make);
        guest.tracker.start().unwrap();
        guest.write(0x20_0000, 30, 1);
        guest.tracker.stop().unwrap();
        guest.write(0x30_0000, 30, 1);
        guest.tracker.start().unwrap();
        guest.assert_harvest(&BTreeSet::new());
        guest.write(0x10_0000, 30, 1);
        guest.assert_harvest(&pages(0, 0x100, 30, 1));
        guest.tracker.stop().unwrap();
    }
}

#[test]
fn an_odd_number_of_pages_is_no_problem() {
    for make in BOTH {
        let mut guest = Guest::new((64 << 20) - 5 * 4096, make);
        guest.tracker.start().unwrap();
        let last = (16 << 10) - 6;
        guest.write(last * 4096, 1, 1);
        guest.assert_harvest(&pages(0, last, 1, 1));
    }
}

#[test]
fn full_rings_lose_nothing() {
    let mut guest = Guest::new(64 << 20, ring);
    // A KVM that emulates looks for full rings every 1024 instructions only; 64 entries are in reserve.
    guest.delay = 40;
    guest.tracker.start().unwrap();
    guest.write(0x10_0000, 10_000, 1);
    assert!(guest.full > 5, "1024 entries were full {} times", guest.full);
    guest.assert_harvest(&pages(0, 0x100, 10_000, 1));
}

#[test]
fn a_ring_tells_how_much_its_vcpu_wrote() {
    let mut guest = Guest::new(64 << 20, ring);
    guest.delay = 40;
    guest.tracker.start().unwrap();
    assert_eq!(guest.tracker.written_by_vcpu(), Some(vec![0]));
    guest.write(0x10_0000, 5000, 1);
    assert!(guest.full > 0, "the ring of 1024 entries was never full");
    guest.write(0x10_0000 + 5000 * 4096, 100, 1);
    assert_eq!(guest.tracker.written_by_vcpu(), Some(vec![0]), "nothing was harvested yet");
    guest.harvest();
    assert_eq!(guest.tracker.written_by_vcpu(), Some(vec![5100]));
    for _ in 0..3 {
        guest.write(0x10_0000, 10, 1);
    }
    guest.harvest();
    assert_eq!(guest.tracker.written_by_vcpu(), Some(vec![10]), "a page counts once");
    guest.harvest();
    assert_eq!(guest.tracker.written_by_vcpu(), Some(vec![0]));
    assert_eq!(Guest::new(64 << 20, log).tracker.written_by_vcpu(), None);
}

#[test]
fn an_overrun_ring_is_told_and_the_guest_goes_on() {
    let mut guest = Guest::new(64 << 20, ring);
    guest.tracker.start().unwrap();
    guest.write(0x10_0000, 10_000, 1);
    let mut ledger = DirtyLedger::new(&guest.memory.pages_per_region());
    match guest.tracker.harvest(&mut ledger) {
        Ok(()) => assert_eq!(ledger.dirty_pages(), 10_000, "a KVM that keeps its promise"),
        Err(error) => {
            assert!(matches!(error, DirtyError::Overrun { entries: 1024 }), "{error}");
            guest.tracker.stop().unwrap();
            guest.write(0x10_0000, 10_000, 1);
            assert!(matches!(guest.tracker.start(), Err(DirtyError::Overrun { .. })));
        }
    }
}

#[test]
fn a_ring_can_be_full_after_tracking_stopped() {
    let mut guest = Guest::new(64 << 20, ring);
    guest.tracker.start().unwrap();
    guest.write(0x10_0000, 100, 1);
    guest.tracker.stop().unwrap();
    guest.tracker.ring_full().unwrap();
    guest.write(0x10_0000, 2000, 1);
    assert_eq!(guest.full, 0);
}

#[test]
fn impossible_rings_are_refused() {
    let slots = || {
        let vm = KvmHost::open().unwrap().create_vm().unwrap();
        Arc::new(Slots::new(vm, GuestMemory::create(1 << 20, false).unwrap()).unwrap())
    };
    for entries in [0, 1000, 1 << 31] {
        assert!(matches!(DirtyRing::new(slots(), entries), Err(DirtyError::Unsupported { .. })), "{entries}");
    }
    assert!(matches!(DirtyRing::new(slots(), 2), Err(DirtyError::Refused { .. })));
    let late = slots();
    let _vcpu = late.vm().create_vcpu(0).unwrap();
    assert!(matches!(DirtyRing::new(late, 1024), Err(DirtyError::Refused { .. })));
}
