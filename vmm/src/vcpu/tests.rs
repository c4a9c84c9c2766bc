//! The vCPU threads on the machine's own KVM, which may emulate: all guests here are small and in real mode.

use super::test_guest::{
    COUNT, Counter, HALT, JUMP_AWAY, LONG, Moments, Program, SPIN, STRINGS, TRIPLE_FAULT, TestGuest, World,
};
use super::{GuestEnd, KvmFailure, VcpuError};
use devices::BusDevice;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

/// Runs and parks `cycles` times at moments that vary, and answers how often.
fn run_and_park(program: Program, vcpus: u8, cycles: usize, longest: u64) -> TestGuest {
    let guest = TestGuest::with(program, vcpus);
    let mut moments = Moments::new();
    for _ in 0..cycles {
        guest.vcpus.run();
        moments.pause(longest);
        guest.vcpus.park(LONG).unwrap();
    }
    guest
}

#[test]
fn no_kick_is_lost_in_thousands() {
    run_and_park(SPIN, 1, 5000, 200);
    run_and_park(SPIN, 4, 1000, 200);
}

#[test]
fn a_kick_right_after_run_is_not_lost() {
    run_and_park(SPIN, 1, 5000, 1);
    run_and_park(HALT, 4, 1000, 1);
}

#[test]
fn halted_vcpus_and_those_not_started_are_parked_too() {
    run_and_park(HALT, 4, 1000, 100);
    // No program has set these going: they wait for the start-up IPI, but for vCPU 0, which has nothing at its reset vector.
    let guest = TestGuest::empty(World::new(4));
    for _ in 0..200 {
        guest.vcpus.run();
        guest.vcpus.park(LONG).unwrap();
    }
}

#[test]
fn no_port_or_mmio_access_is_lost_or_doubled_by_parking() {
    for (vcpus, cycles) in [(1, 2000), (4, 500)] {
        let guest = run_and_park(COUNT, vcpus, cycles, 300);
        guest.run_until(|world| world.ports.iter().all(|port| port.writes() > 1000));
        assert_eq!(guest.world.bell.rings(), 0);
        for (ports, mmio) in guest.world.ports.iter().zip(&guest.world.mmio) {
            assert!(ports.writes() - mmio.writes() <= 1);
        }
        assert!(guest.ends.try_recv().is_err());
    }
}

#[test]
fn no_item_of_a_string_access_is_lost_or_doubled_by_parking() {
    let guest = run_and_park(STRINGS, 1, 1000, 300);
    guest.run_until(|world| world.ports[0].writes() > 3000);
}

#[test]
fn a_guest_without_faults_left_ends_by_triple_fault() {
    let guest = TestGuest::with(TRIPLE_FAULT, 1);
    guest.vcpus.run();
    assert_eq!(guest.ends.recv_timeout(LONG).unwrap(), (0, GuestEnd::TripleFault));
    // The vCPU stands and stays where it is.
    guest.vcpus.park(LONG).unwrap();
    guest.vcpus.run();
    guest.vcpus.park(LONG).unwrap();
    assert!(guest.ends.recv_timeout(Duration::from_millis(20)).is_err());
}

#[test]
fn an_instruction_that_kvm_cannot_emulate_is_told_with_its_place() {
    let guest = TestGuest::with(JUMP_AWAY, 1);
    guest.vcpus.run();
    let (vcpu, end) = guest.ends.recv_timeout(LONG).unwrap();
    let GuestEnd::KvmFailure(KvmFailure::InternalError { suberror, rip, .. }) = &end else { panic!("{end}") };
    assert_eq!((vcpu, *suberror, *rip), (0, 1, Some(0)));
    assert_eq!(end.exit_status(), 1);
}

#[test]
fn state_is_out_of_reach_while_vcpus_run() {
    let guest = TestGuest::with(SPIN, 2);
    guest.vcpus.run();
    assert!(matches!(guest.vcpus.save(&guest.facts), Err(VcpuError::NotParked { vcpu: 0 })));
    guest.vcpus.park(LONG).unwrap();
    let saved = guest.vcpus.save(&guest.facts).unwrap();
    assert_eq!(saved.len(), 2);
    let one = saved[..1].to_vec();
    assert!(matches!(guest.vcpus.restore(one, &guest.facts), Err(VcpuError::Count { saved: 1, here: 2 })));
}

/// A device that holds the vCPU that touches it.
#[derive(Debug, Default)]
struct Slow {
    hold: AtomicBool,
    touched: AtomicU32,
}

impl BusDevice for Slow {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, _: u64, _: &[u8]) {
        self.touched.fetch_add(1, Ordering::SeqCst);
        while self.hold.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// COUNT on a bus whose first port does something else.
fn with_device(device: Arc<dyn BusDevice>, vcpus: u8) -> TestGuest {
    let world = World::new(vcpus);
    let mut buses = super::Buses::default();
    buses.pio.insert(0x500, 8, device).unwrap();
    buses.pio.insert(0x508, 8, Arc::clone(&world.ports[1]) as Arc<dyn BusDevice>).unwrap();
    buses.mmio.insert(0x2_1000, 0x1000, Arc::clone(&world.mmio[1]) as Arc<dyn BusDevice>).unwrap();
    TestGuest::with_buses(COUNT, world, buses)
}

#[test]
fn a_device_that_holds_a_vcpu_makes_parking_fail_and_all_run_on() {
    let slow = Arc::new(Slow { hold: AtomicBool::new(true), touched: AtomicU32::new(0) });
    let guest = with_device(Arc::clone(&slow) as Arc<dyn BusDevice>, 2);
    guest.vcpus.run();
    while slow.touched.load(Ordering::SeqCst) == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let short = Duration::from_millis(20);
    match guest.vcpus.park(short) {
        Err(VcpuError::StillRunning { vcpu: 0, waited }) => assert_eq!(waited, short),
        other => panic!("{other:?}"),
    }
    // The other vCPU was told to stand and runs again.
    let before = guest.world.ports[1].writes();
    while guest.world.ports[1].writes() == before {
        std::thread::sleep(Duration::from_millis(1));
    }
    slow.hold.store(false, Ordering::SeqCst);
    guest.vcpus.park(LONG).unwrap();
}

#[derive(Debug)]
struct Broken;
impl BusDevice for Broken {
    fn read(&self, _: u64, _: &mut [u8]) {
        panic!("a bug in a device (this test provokes it)");
    }
    fn write(&self, _: u64, _: &[u8]) {}
}

#[test]
fn a_panic_in_a_device_is_an_end_and_not_a_hang() {
    let guest = with_device(Arc::new(Broken), 2);
    guest.vcpus.run();
    let end = guest.ends.recv_timeout(LONG).unwrap();
    assert_eq!(end, (0, GuestEnd::KvmFailure(KvmFailure::ThreadPanicked)));
    assert!(matches!(guest.vcpus.park(LONG), Err(VcpuError::Gone { vcpu: 0 })));
    assert!(matches!(guest.vcpus.save(&guest.facts), Err(VcpuError::Gone { vcpu: 0 })));
}

#[test]
fn threads_have_names_and_end_in_any_stance() {
    let name =
        |guest: &TestGuest| guest.vcpus.on_boot_vcpu(|_| std::thread::current().name().map(str::to_owned)).unwrap();
    let running = TestGuest::with(SPIN, 4);
    assert_eq!(name(&running).as_deref(), Some("vcpu0"));
    running.vcpus.run();
    running.vcpus.end();
    TestGuest::with(HALT, 4).vcpus.end();
    let ended = TestGuest::with(TRIPLE_FAULT, 1);
    ended.vcpus.run();
    ended.ends.recv_timeout(LONG).unwrap();
    ended.vcpus.end();
}

#[test]
fn the_test_counter_sees_a_doubled_write() {
    let counter = Counter::default();
    counter.write(4, &[0]);
    counter.write(4, &[0]);
    assert!(std::panic::catch_unwind(|| counter.writes()).is_err());
}
