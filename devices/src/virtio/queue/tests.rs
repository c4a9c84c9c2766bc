//! What a device sees of a queue, without a transport.

use super::*;
use crate::virtio::testing::{Bench, EVENT_IDX, FREE, REGION_BORDER, ram};

#[test]
fn a_chain_comes_with_its_buffers_in_order() {
    let mut bench = Bench::new(&[8], 0);
    let head = bench.rings[0].offer(&[(FREE, 1, false), (FREE + 8, 2, false), (FREE + 16, 3, true), (FREE, 4, true)]);
    let chain = bench.io.queues[0].pop().unwrap().unwrap();
    assert_eq!(chain.head(), head);
    assert_eq!(chain.readable().iter().map(|buffer| buffer.length).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(chain.writable().iter().map(|buffer| buffer.length).collect::<Vec<_>>(), [3, 4]);
    assert_eq!(total_bytes(chain.writable()), 7);
    assert_eq!(bench.io.queues[0].pop().unwrap(), None);
    bench.io.queues[0].unpop();
    assert_eq!(bench.io.queues[0].pop().unwrap(), Some(chain));
}

#[test]
fn indices_wrap() {
    let mut bench = Bench::new(&[4], 0);
    let queue = bench.io.queues[0].queue_mut();
    queue.set_next_avail(u16::MAX);
    queue.set_next_used(u16::MAX);
    bench.rings[0].set_available_index(u16::MAX);
    for _ in 0..2 {
        let head = bench.rings[0].offer(&[(FREE, 1, false)]);
        let chain = bench.io.queues[0].pop().unwrap().unwrap();
        assert_eq!(chain.head(), head);
        bench.io.queues[0].push(&chain, 0).unwrap();
    }
    assert_eq!(bench.io.queues[0].state().next_used, 1);
}

#[test]
fn a_long_chain_is_bounded() {
    let mut bench = Bench::new(&[8], 0);
    let table = FREE;
    for index in 0..=u16::try_from(MAX_CHAIN).unwrap() {
        let place = table + 16 * u64::from(index);
        crate::virtio::testing::write_descriptor(&bench.io.ram, place, 0x1000, 1, 1, index + 1);
    }
    bench.rings[0].descriptor(0, table, 16 * 2000, 4, 0);
    bench.rings[0].make_available(0);
    assert!(matches!(bench.io.queues[0].pop(), Err(BrokenRing::TooLong { queue: 0, head: 0 })));
}

#[test]
fn a_queue_that_is_not_ready_or_held_gives_nothing() {
    let mut bench = Bench::new(&[8], 0);
    bench.rings[0].offer(&[(FREE, 1, false)]);
    bench.io.queues[0].hold.store(true, Ordering::Release);
    assert_eq!(bench.io.queues[0].pop().unwrap(), None);
    assert!(!bench.io.queues[0].accept_kicks().unwrap());
    bench.io.queues[0].hold.store(false, Ordering::Release);
    assert!(bench.io.queues[0].accept_kicks().unwrap());
    bench.io.queues[0].queue_mut().set_ready(false);
    assert_eq!(bench.io.queues[0].pop().unwrap(), None);
    bench.io.signal(0).unwrap();
    assert!(!bench.interrupted());
}

fn complete_one(bench: &mut Bench) {
    bench.rings[0].offer(&[(FREE, 1, false)]);
    let chain = bench.io.queues[0].pop().unwrap().unwrap();
    bench.io.queues[0].push(&chain, 0).unwrap();
    bench.io.signal(0).unwrap();
}

#[test]
fn the_driver_can_ask_for_no_interrupts() {
    let mut bench = Bench::new(&[8], 0);
    complete_one(&mut bench);
    assert!(bench.interrupted());
    bench.rings[0].set_available_flags(1);
    complete_one(&mut bench);
    assert!(!bench.interrupted());
    bench.rings[0].set_available_flags(0);
    complete_one(&mut bench);
    assert!(bench.interrupted());
}

#[test]
fn the_driver_can_say_which_completion_interrupts_it() {
    let mut bench = Bench::new(&[8], EVENT_IDX);
    bench.rings[0].set_used_event(2);
    let interrupts = [(); 4].map(|()| {
        complete_one(&mut bench);
        bench.interrupted()
    });
    assert_eq!(interrupts, [false, false, true, false]);
}

#[test]
fn kicks_are_suppressed_by_the_flag() {
    let mut bench = Bench::new(&[8], 0);
    bench.io.queues[0].suppress_kicks().unwrap();
    assert_eq!(bench.rings[0].used_flags(), 1);
    bench.rings[0].offer(&[(FREE, 1, false)]);
    assert!(bench.io.queues[0].accept_kicks().unwrap(), "one came in between");
    assert_eq!(bench.rings[0].used_flags(), 0);
}

#[test]
fn buffers_across_two_regions_are_copied_whole_and_marked() {
    let ram = ram();
    let buffers = [
        Buffer { address: GuestAddress(REGION_BORDER - 3), length: 8 },
        Buffer { address: GuestAddress(FREE), length: 4 },
    ];
    assert_eq!(slices(&ram, &buffers, 0, usize::MAX).len(), 3);
    assert_eq!(copy_to(&ram, &buffers, 1, b"across the border"), 11);
    let mut back = [0; 16];
    assert_eq!(copy_from(&ram, &buffers, 1, &mut back), 11);
    assert_eq!(&back[..11], b"across the ");
    assert_eq!(copy_from(&ram, &buffers, 12, &mut back), 0);
    let slices = slices(&ram, &buffers, 2, 7);
    assert_eq!(slices.iter().map(VolatileSlice::len).collect::<Vec<_>>(), [1, 5, 1]);
    assert!(slices.iter().all(|slice| vm_memory::bitmap::Bitmap::dirty_at(slice.bitmap(), 0)));
}

fn is_dirty(ram: &GuestRam, address: u64) -> bool {
    GuestMemoryBackend::get_slices(ram, GuestAddress(address), 1)
        .all(|slice| vm_memory::bitmap::Bitmap::dirty_at(slice.unwrap().bitmap(), 0))
}

#[test]
fn what_the_device_writes_to_the_rings_is_marked_dirty() {
    let mut bench = Bench::new(&[8], 0);
    let used = bench.rings[0].used;
    bench.rings[0].offer(&[(FREE, 1, true)]);
    let chain = bench.io.queues[0].pop().unwrap().unwrap();
    assert!(!is_dirty(&bench.io.ram, used));
    bench.io.queues[0].push(&chain, 0).unwrap();
    assert!(is_dirty(&bench.io.ram, used) && !is_dirty(&bench.io.ram, FREE));
    let mut bench = Bench::new(&[8], EVENT_IDX);
    bench.io.queues[0].accept_kicks().unwrap();
    assert!(is_dirty(&bench.io.ram, used), "avail_event");
}
