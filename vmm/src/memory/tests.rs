use super::*;
use vm_memory::Bytes;

fn run(region: u16, first: u64, pages: u32) -> PageRun {
    PageRun { region: RegionId(region), first: PageIndex(first), pages }
}

#[test]
fn memory_splits_at_the_gap() {
    let gib = 1 << 30;
    assert_eq!(regions_of(3 * gib).len(), 1);
    let two = regions_of(5 * gib);
    assert_eq!(two[0], RamRegion { start: GuestAddress(0), pages: (3 * gib) / PAGE_SIZE });
    assert_eq!(two[1], RamRegion { start: MMIO_GAP_END, pages: (2 * gib) / PAGE_SIZE });
}

#[test]
fn addresses_and_pages_agree() {
    let memory = GuestMemory::create(5 << 30, false).unwrap();
    let at = |gpa| memory.page_at(GuestAddress(gpa)).map(|(region, page)| (region.0, page.0));
    assert_eq!(at(0x1fff), Some((0, 1)));
    assert_eq!(at(MMIO_GAP_START.0), None);
    assert_eq!(at(MMIO_GAP_END.0), Some((1, 0)));
    assert_eq!(at((6 << 30) - 1), Some((1, (2 << 30) / PAGE_SIZE - 1)));
    assert_eq!(at(6 << 30), None);
    memory.ram().write_obj(0x1234_u16, GuestAddress(MMIO_GAP_END.0 + 0x1000)).unwrap();
    let page = memory.slice(run(1, 1, 1)).unwrap();
    assert_eq!(page.read_obj::<u16>(0).unwrap(), 0x1234);
}

#[test]
fn holes_are_known_without_touching_them() {
    let memory = GuestMemory::create(4 << 30, false).unwrap();
    memory.ram().write_obj(1_u8, GuestAddress(0x5000)).unwrap();
    memory.ram().write_obj(1_u8, GuestAddress(MMIO_GAP_END.0 + 0x2000)).unwrap();
    assert_eq!(memory.leading_hole(run(0, 0, 100)), 5);
    assert_eq!(memory.leading_hole(run(0, 5, 100)), 0);
    assert_eq!(memory.leading_hole(run(0, 6, 100)), 100);
    assert_eq!(memory.leading_hole(run(1, 0, 100)), 2);
    assert_eq!(memory.leading_hole(run(1, 3, 7)), 7);
    assert_eq!(memory.leading_hole(run(0, u64::MAX, 1)), 0);
    assert_eq!(memory.untracked_slice(run(0, 5, 1)).unwrap().read_obj::<u8>(0).unwrap(), 1);
    assert!(memory.untracked_slice(run(0, u64::MAX, 1)).is_err());
}

/// Of each length, with whatever was mapped before, unless another thread maps something in just that moment.
#[test]
fn memory_lies_at_a_multiple_of_the_huge_page() {
    let lies_well = |memory: &GuestMemory| {
        memory.ids().filter(|(_, region)| region.pages >= 512).all(|(_, region)| {
            let address = memory.ram().get_host_address(region.start).unwrap() as u64;
            address.is_multiple_of(HUGE_PAGE_SIZE)
        })
    };
    let mut kept = Vec::new();
    for bytes in [1 << 20, 3 << 20, 1 << 30, 5 << 30] {
        let memories = (0..4).map(|_| GuestMemory::create(bytes, false).unwrap());
        let memory = memories.into_iter().find(lies_well);
        kept.push(memory.unwrap_or_else(|| panic!("none of four mappings of {bytes} bytes does")));
    }
}

/// Linux has done this since 6.1. Where it has no huge page left just now, small ones serve as well.
#[test]
fn populating_keeps_what_is_there_and_backs_the_rest() {
    let memory = GuestMemory::create(8 << 20, false).unwrap();
    memory.ram().write_obj(0x1234_u16, GuestAddress(HUGE_PAGE_SIZE + 0x5000)).unwrap();
    let done = memory.populate(run(0, 512, 1024));
    assert_eq!(memory.ram().read_obj::<u16>(GuestAddress(HUGE_PAGE_SIZE + 0x5000)).unwrap(), 0x1234);
    assert_eq!(memory.ram().read_obj::<u16>(GuestAddress(HUGE_PAGE_SIZE + 0x6000)).unwrap(), 0);
    if done {
        assert_eq!((memory.leading_hole(run(0, 513, 1000)), memory.leading_hole(run(0, 1535, 2))), (0, 0));
    }
    assert_eq!(memory.leading_hole(run(0, 0, 600)), 512);
    assert!(!memory.populate(run(0, 2048, 512)), "there are no such pages");
}

#[test]
fn runs_outside_are_refused() {
    let memory = GuestMemory::create(1 << 20, false).unwrap();
    memory.slice(run(0, 0, 256)).unwrap();
    for bad in [run(0, 0, 257), run(0, 256, 1), run(1, 0, 1), run(0, u64::MAX, 1), run(0, 1 << 52, 1)] {
        assert!(matches!(memory.slice(bad), Err(MemoryError::NoSuchPages { .. })), "{bad:?}");
    }
}

#[test]
fn own_writes_are_harvested_once() {
    let memory = GuestMemory::create(4 << 30, false).unwrap();
    let mut ledger = DirtyLedger::new(&memory.pages_per_region());
    memory.ram().write_slice(&[1; 0x1001], GuestAddress(0x5fff)).unwrap();
    memory.slice(run(1, 7, 1)).unwrap().write_obj(1_u8, 5).unwrap();
    memory.harvest_writes(&mut ledger);
    assert_eq!(ledger.dirty_pages(), 3);
    assert!(ledger.is_dirty(RegionId(0), 5) && ledger.is_dirty(RegionId(0), 6) && ledger.is_dirty(RegionId(1), 7));
    let mut again = DirtyLedger::new(&memory.pages_per_region());
    memory.harvest_writes(&mut again);
    assert_eq!(again.dirty_pages(), 0);
}

#[test]
fn untracked_writes_are_not_harvested() {
    let memory = GuestMemory::create(1 << 20, false).unwrap();
    memory.untracked_slice(run(0, 3, 1)).unwrap().write_obj(7_u8, 0).unwrap();
    assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(3 * PAGE_SIZE)).unwrap(), 7);
    assert!(memory.untracked_slice(run(0, 256, 1)).is_err());
    let mut ledger = DirtyLedger::new(&memory.pages_per_region());
    memory.harvest_writes(&mut ledger);
    assert_eq!(ledger.dirty_pages(), 0);
}

#[test]
fn odd_sizes_are_refused() {
    for (bytes, huge) in [(0, false), (4097, false), (1 << 20, true)] {
        assert!(matches!(GuestMemory::create(bytes, huge), Err(MemoryError::Size { .. })), "{bytes}");
    }
}

#[test]
fn too_few_huge_pages_are_an_error_and_not_a_signal() {
    // No host has this many reserved.
    let error = GuestMemory::create(64 << 40, true).unwrap_err();
    assert!(matches!(error, MemoryError::HugePages { .. } | MemoryError::File { .. }), "{error}");
}

#[test]
fn the_file_cannot_shrink() {
    let memory = GuestMemory::create(1 << 20, false).unwrap();
    assert!(memory.file.set_len(4096).is_err());
}

#[test]
fn memory_that_is_passed_is_the_same_memory() {
    let here = GuestMemory::create(5 << 30, false).unwrap();
    here.ram().write_obj(1_u64, GuestAddress(0x5000)).unwrap();
    let there = GuestMemory::adopt(here.handle().unwrap(), 5 << 30, false).unwrap();
    assert_eq!((there.regions(), there.leading_hole(run(0, 0, 100))), (here.regions(), 5));
    let above = GuestAddress(MMIO_GAP_END.0 + 0x2000);
    there.ram().write_obj(2_u64, above).unwrap();
    let read = |memory: &GuestMemory, at| memory.ram().read_obj::<u64>(at).unwrap();
    assert_eq!((read(&there, GuestAddress(0x5000)), read(&here, above)), (1, 2));
    drop(here);
    assert_eq!(read(&there, above), 2);
}

#[test]
fn what_is_passed_must_be_the_guests_memory() {
    let memory = GuestMemory::create(4 << 20, false).unwrap();
    for (bytes, huge) in [(8 << 20, false), (2 << 20, false), (4 << 20, true)] {
        let error = GuestMemory::adopt(memory.handle().unwrap(), bytes, huge).unwrap_err();
        assert!(matches!(error, MemoryError::Adopt(_)), "{error}");
    }
    // One that cannot be written.
    let path = format!("/proc/self/fd/{}", memory.file().as_raw_fd());
    let error = GuestMemory::adopt(File::open(path).unwrap().into(), 4 << 20, false).unwrap_err();
    assert!(matches!(error, MemoryError::Map { .. }), "{error}");
}

#[test]
fn slots_come_and_go_with_their_owner() {
    let host = crate::kvm::KvmHost::open().unwrap();
    let vm = host.create_vm().unwrap();
    for _ in 0..2 {
        let memory = GuestMemory::create(5 << 30, false).unwrap();
        let slots = Slots::new(vm.clone(), memory).unwrap();
        slots.log_dirty_pages(true).unwrap();
    }
}
