//! Guests that move: out of one VM into a new one in this process, or through power-on on the same file descriptors.

use super::*;
use crate::vcpu::GuestEnd;
use crate::vcpu::test_guest::{
    COUNT, DEADLINE, LONG, Moments, PROGRAM_CHIPS, READ_TSC, SPIN, STRINGS, TRIPLE_FAULT, TestGuest,
};
use kvm_ioctls::VcpuFd;
use std::time::{Duration, Instant};

/// Saves the guest as the bytes that would travel.
fn saved_bytes(guest: &TestGuest) -> Vec<u8> {
    let mut state = SavedState::new();
    save(&guest.vm, &guest.vcpus, &guest.facts, &mut state).unwrap();
    state.encode()
}

fn restore_bytes(guest: &TestGuest, bytes: &[u8]) -> Result<(), StateError> {
    let mut state = SavedState::decode(bytes)?;
    restore(&guest.vm, &guest.vcpus, &guest.facts, &mut state)?;
    Ok(state.finish()?)
}

/// Moves a parked guest into a new VM with the same memory and devices.
fn moved(guest: TestGuest) -> TestGuest {
    let bytes = saved_bytes(&guest);
    let mut target = TestGuest::empty(guest.world.clone());
    target.facts = Arc::clone(&guest.facts);
    drop(guest);
    restore_bytes(&target, &bytes).unwrap();
    target
}

/// Lets the guest run for moments that vary, and between them does `change` to it, `times` times.
fn run_through(mut guest: TestGuest, times: usize, change: impl Fn(TestGuest) -> TestGuest) -> TestGuest {
    let mut moments = Moments::new();
    for _ in 0..times {
        guest.vcpus.run();
        moments.pause(2000);
        guest.vcpus.park(LONG).unwrap();
        guest = change(guest);
    }
    guest
}

/// Checks that all counters still go up, from where they are, without a fault.
fn expect_progress(guest: &TestGuest) {
    let before: Vec<_> = guest.world.ports.iter().map(|port| port.writes()).collect();
    guest.run_until(|world| world.ports.iter().zip(&before).all(|(port, before)| port.writes() > before + 5));
    assert_eq!(guest.world.bell.rings(), 0);
    assert!(guest.ends.try_recv().is_err());
}

#[test]
fn no_access_is_lost_or_doubled_by_moving() {
    for (program, vcpus, times) in [(COUNT, 1, 100), (COUNT, 4, 40), (STRINGS, 1, 60)] {
        expect_progress(&run_through(TestGuest::with(program, vcpus), times, moved));
    }
}

#[test]
fn a_kvm_without_sregs2_moves_guests_too() {
    let mut guest = TestGuest::with(COUNT, 1);
    guest.facts = Arc::new(Facts { sregs2: false, ..(*guest.facts).clone() });
    expect_progress(&run_through(guest, 10, moved));
}

/// Through power-on and back, in place.
fn pulsed(guest: TestGuest) -> TestGuest {
    let bytes = saved_bytes(&guest);
    reset(&guest.kvm, &guest.vm, &guest.vcpus, &guest.facts).unwrap();
    restore_bytes(&guest, &bytes).unwrap();
    guest
}

#[test]
fn a_guest_survives_power_on_and_restore_in_place() {
    for (program, vcpus, times) in [(COUNT, 1, 60), (COUNT, 4, 20), (DEADLINE, 1, 40)] {
        expect_progress(&run_through(TestGuest::with(program, vcpus), times, pulsed));
    }
}

#[test]
fn reset_leaves_nothing_of_the_guest() {
    let guest = TestGuest::with(PROGRAM_CHIPS, 2);
    guest.run_until(|world| world.bell.rings() == 2);
    reset(&guest.kvm, &guest.vm, &guest.vcpus, &guest.facts).unwrap();
    let fresh = TestGuest::empty(crate::vcpu::test_guest::World::new(2));
    let (reset, fresh_vcpus) = (guest.vcpus.save(&guest.facts).unwrap(), fresh.vcpus.save(&fresh.facts).unwrap());
    for (reset, fresh) in reset.into_iter().zip(fresh_vcpus) {
        expect_equal(&reset, &fresh);
    }
    assert_eq!(save_chips(&guest.vm).unwrap(), save_chips(&fresh.vm).unwrap());
}

#[test]
fn a_timer_that_runs_out_during_a_move_is_not_lost() {
    expect_progress(&run_through(TestGuest::with(DEADLINE, 1), 150, moved));
}

/// Compares what of two vCPUs does not depend on when it is looked at.
fn expect_equal(first: &VcpuSavedV1, second: &VcpuSavedV1) {
    let VcpuSavedV1 {
        mp_state,
        registers,
        system,
        xsave,
        xcrs,
        debug,
        tsc_deadline: _,
        lapic,
        cpuid,
        tsc: TscSavedV1 { khz, value: _ },
        msrs,
        events,
    } = first;
    assert_eq!((mp_state, registers, system), (&second.mp_state, &second.registers, &second.system));
    assert_eq!((xcrs, debug, khz, events), (&second.xcrs, &second.debug, &second.tsc.khz, &second.events));
    assert_eq!((cpuid, msrs), (&second.cpuid, &second.msrs));
    assert!(*xsave == second.xsave, "the XSAVE areas differ");
    for (at, (first, second)) in lapic.iter().zip(&second.lapic).enumerate() {
        // The timer's current count, and the processor priority, which KVM works out when it needs it (Intel SDM volume 3,
        // table 12-1).
        if !(0x390..0x394).contains(&at) && !(0xa0..0xa4).contains(&at) {
            assert_eq!(first, second, "local APIC register {at:#x}");
        }
    }
}

#[test]
fn what_was_restored_is_saved_again() {
    for (program, vcpus) in [(COUNT, 4), (DEADLINE, 1), (SPIN, 1)] {
        let guest = run_through(TestGuest::with(program, vcpus), 1, |guest| guest);
        let first = guest.vcpus.save(&guest.facts).unwrap();
        let chips = save_chips(&guest.vm).unwrap();
        let target = moved(guest);
        let second = target.vcpus.save(&target.facts).unwrap();
        for (first, second) in first.into_iter().zip(second) {
            assert!(first.msrs.len() > 30 && first.cpuid.len() > 5);
            expect_equal(&first, &second);
        }
        assert_eq!(chips, save_chips(&target.vm).unwrap());
    }
}

#[test]
fn what_the_guest_programmed_into_the_chips_moves_along() {
    let guest = TestGuest::with(PROGRAM_CHIPS, 1);
    guest.run_until(|world| world.bell.rings() == 1);
    // A device holds the level-triggered pin 5, which the guest has masked, and an edge waits at pin 3.
    guest.vm.set_irq_line(5, true).unwrap();
    guest.vm.set_irq_line(3, true).unwrap();
    let chips = save_chips(&guest.vm).unwrap();
    assert_eq!((chips.pic_master.imr, chips.pic_master.irq_base), (0xfb, 0x20));
    assert_eq!((chips.pic_slave.imr, chips.pic_slave.irq_base), (0x5a, 0x28));
    assert_eq!(chips.pic_slave.elcr, 0x0e);
    assert_eq!(chips.ioapic.redirections[5] & !(1 << 14), 0x0100_0000_0001_8055);
    assert_ne!(chips.ioapic.irr & (1 << 5), 0);
    assert_eq!((chips.pit_channels[2].count, chips.pit_channels[2].mode, chips.pit_channels[2].gate), (0x1234, 3, 1));
    assert_eq!((chips.pit_channels[0].count, chips.pit_channels[0].mode), (0x8000, 2));
    assert_eq!(chips.pit_flags, 2);
    let target = moved(guest);
    assert_eq!(save_chips(&target.vm).unwrap(), chips);
}

#[test]
fn the_tsc_never_steps_back_and_is_one_for_all_vcpus() {
    expect_progress(&run_through(TestGuest::with(READ_TSC, 4), 40, |guest| {
        let target = moved(guest);
        if keeps_tsc_offsets(&target) {
            let offsets = tsc_offsets(&target);
            assert!(offsets.iter().all(|offset| *offset == offsets[0]), "{offsets:?}");
        }
        target
    }));
    expect_progress(&run_through(TestGuest::with(READ_TSC, 2), 20, pulsed));
}

#[test]
fn the_clocks_go_on_where_they_stood_and_not_over_the_downtime() {
    let guest = run_through(TestGuest::with(SPIN, 2), 2, |guest| guest);
    let bytes = saved_bytes(&guest);
    let mut state = SavedState::decode(&bytes).unwrap();
    let clock: ClockSavedV1 = state.take(CLOCK).unwrap();
    let vcpus: Vec<VcpuSavedV1> = (0..2).map(|index| state.take(&vcpu_section(index)).unwrap()).collect();
    std::thread::sleep(Duration::from_millis(700));
    let target = TestGuest::empty(guest.world.clone());
    let restoring = Instant::now();
    restore_bytes(&target, &bytes).unwrap();
    let clock_now = save_clock(&target.vm).unwrap();
    let vcpus_now = target.vcpus.save(&target.facts).unwrap();
    // A millisecond for what the host's clocks disagree by.
    let at_most = restoring.elapsed() + Duration::from_millis(1);
    let clock_went = Duration::from_nanos(clock_now.nanoseconds.checked_sub(clock.nanoseconds).unwrap());
    assert!(clock_went <= at_most, "{clock_went:?} of {at_most:?}");
    let highest = vcpus.iter().map(|vcpu| vcpu.tsc.value).max().unwrap();
    for now in vcpus_now.iter().filter(|_| keeps_tsc_offsets(&target)) {
        let cycles = now.tsc.value.checked_sub(highest).unwrap();
        let tsc_went = Duration::from_micros(cycles * 1000 / u64::from(now.tsc.khz));
        assert!(tsc_went <= at_most, "{tsc_went:?} of {at_most:?}");
    }
}

/// Whether this KVM keeps a TSC offset as it is given. One that runs guests in software may drop it; one on a host with
/// an unstable TSC makes up its own.
fn keeps_tsc_offsets(guest: &TestGuest) -> bool {
    let kept = guest.vcpus.on_boot_vcpu(|vcpu| {
        let before = raw::tsc_offset(vcpu).unwrap();
        let wanted = before.wrapping_add(12345);
        raw::set_tsc_offset(vcpu, wanted).unwrap();
        let kept = raw::tsc_offset(vcpu).unwrap() == wanted;
        raw::set_tsc_offset(vcpu, before).unwrap();
        kept
    });
    kept.unwrap()
}

/// The offsets of all vCPUs.
fn tsc_offsets(guest: &TestGuest) -> Vec<u64> {
    guest.vcpus.each(|_| |vcpu: &mut VcpuFd| Ok(raw::tsc_offset(vcpu).unwrap())).unwrap()
}

#[test]
fn a_tsc_that_would_step_back_is_refused() {
    let guest = TestGuest::with(SPIN, 2);
    let mut saved = guest.vcpus.save(&guest.facts).unwrap();
    let day = 86_400_000 * u64::from(saved[0].tsc.khz);
    for vcpu in &mut saved {
        vcpu.tsc.value += day;
    }
    let values: Vec<_> = saved.iter().map(|vcpu| vcpu.tsc.value).collect();
    match guest.vcpus.restore(saved, &guest.facts) {
        Ok(()) => {
            guest.run_until(|_| true);
            let again = guest.vcpus.save(&guest.facts).unwrap();
            assert!(again.iter().zip(values).all(|(vcpu, before)| vcpu.tsc.value >= before));
        }
        Err(VcpuError::State { source: VcpuStateError::TscStepsBack { cycles }, .. }) => {
            assert!(!keeps_tsc_offsets(&guest));
            assert!((day / 2..=day).contains(&cycles));
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn a_restored_guest_runs_although_it_had_ended_here() {
    let guest = TestGuest::with(TRIPLE_FAULT, 1);
    let before = guest.vcpus.save(&guest.facts).unwrap();
    for _ in 0..2 {
        guest.vcpus.run();
        assert_eq!(guest.ends.recv_timeout(LONG).unwrap(), (0, GuestEnd::TripleFault));
        guest.vcpus.park(LONG).unwrap();
        guest.vcpus.restore(before.clone(), &guest.facts).unwrap();
    }
}

/// What a restore of one vCPU answers after `change` to its good state.
fn refusal(guest: &TestGuest, good: &[VcpuSavedV1], change: impl Fn(&mut VcpuSavedV1)) -> VcpuStateError {
    let mut bad = good.to_vec();
    change(bad.last_mut().unwrap());
    match guest.vcpus.restore(bad, &guest.facts) {
        Err(VcpuError::State { source, .. }) => source,
        other => panic!("{other:?}"),
    }
}

#[test]
fn impossible_vcpu_states_are_refused_by_name() {
    let guest = run_through(TestGuest::with(COUNT, 2), 1, |guest| guest);
    let good = guest.vcpus.save(&guest.facts).unwrap();
    let here = good[0].tsc.khz;
    let no = |change: &dyn Fn(&mut VcpuSavedV1)| refusal(&guest, &good, change);
    for (length, change) in [
        (0, &(|bad: &mut VcpuSavedV1| bad.xsave.clear()) as &dyn Fn(&mut VcpuSavedV1)),
        (1 << 19, &|bad| bad.xsave.resize(1 << 19, 0)),
        (LAPIC_BYTES - 1, &|bad| bad.lapic.truncate(LAPIC_BYTES - 1)),
        (LAPIC_BYTES + 1, &|bad| bad.lapic.push(0)),
        (17, &|bad| bad.xcrs.resize(17, (0, 1))),
        (257, &|bad| bad.cpuid.resize(257, CpuidEntryV1::default())),
        (MAX_MSRS + 1, &|bad| bad.msrs.resize(MAX_MSRS + 1, MsrV1 { index: 0x174, value: 0 })),
    ] {
        assert!(matches!(no(change), VcpuStateError::Length { found, .. } if found == length), "{length}");
    }
    assert_eq!(no(&|bad| bad.mp_state = 5), VcpuStateError::MpState { found: 5 });
    assert_eq!(no(&|bad| bad.tsc.khz = 1), VcpuStateError::TscFrequencies { first: here, other: 1 });
    let msr = |index, value| no(&|bad| bad.msrs.push(MsrV1 { index, value }));
    assert!(matches!(msr(0x10, 0), VcpuStateError::MsrNotCarried { index: 0x10, .. }));
    assert!(matches!(msr(0x4b56_4d00, 0x1000), VcpuStateError::MsrNotCarried { .. }));
    assert_eq!(msr(0xdead_beef, 7), VcpuStateError::MsrRefused { index: 0xdead_beef, value: 7, here: None });
    // IA32_MTRRCAP is read-only.
    assert!(matches!(msr(0xfe, u64::MAX), VcpuStateError::MsrRefused { index: 0xfe, here: Some(_), .. }));
    // Values that KVM itself checks: a reserved XCR0 bit, an unknown XSAVE component, a reserved CR4 bit.
    assert!(matches!(no(&|bad| bad.xcrs = vec![(0, 1 << 62)]), VcpuStateError::Kvm { call: "KVM_SET_XCRS", .. }));
    assert!(matches!(no(&|bad| bad.xsave[512..520].fill(0xff)), VcpuStateError::Kvm { call: "KVM_SET_XSAVE", .. }));
    assert!(matches!(no(&|bad| bad.system.cr4 = u64::MAX), VcpuStateError::Kvm { call: "KVM_SET_SREGS2", .. }));
    assert!(matches!(no(&|bad| bad.events.flags = u32::MAX), VcpuStateError::Kvm { call: "KVM_SET_VCPU_EVENTS", .. }));
    // A register that is not there and was never used is passed over; after all of that the good state still runs.
    let mut good = good.clone();
    good[1].msrs.push(MsrV1 { index: 0xdead_beef, value: 0 });
    guest.vcpus.restore(good, &guest.facts).unwrap();
    expect_progress(&guest);
}

#[test]
fn a_tsc_frequency_of_another_host_is_refused_with_the_remedy() {
    let mut guest = TestGuest::with(SPIN, 1);
    guest.facts = Arc::new(Facts { tsc_scaling: false, ..(*guest.facts).clone() });
    let good = guest.vcpus.save(&guest.facts).unwrap();
    let here = good[0].tsc.khz;
    for khz in [0, here / 2, here + here / 1000, u32::MAX] {
        let refused = refusal(&guest, &good, |bad| bad.tsc.khz = khz);
        assert_eq!(refused, VcpuStateError::TscFrequency { saved: khz, here });
        assert!(refused.to_string().contains(&format!("at {khz} kHz, this host's at {here} kHz")));
    }
    let mut near = good.clone();
    near[0].tsc.khz = here + here / 10_000;
    guest.vcpus.restore(near, &guest.facts).unwrap();
}

#[test]
fn impossible_chips_and_clocks_are_refused_by_name() {
    let guest = TestGuest::with(SPIN, 1);
    let good = save_chips(&guest.vm).unwrap();
    let no = |change: &dyn Fn(&mut ChipsSavedV1)| {
        let mut bad = good.clone();
        change(&mut bad);
        match restore_chips(&guest.vm, &bad) {
            Err(ChipsError::Value { chip, field, .. }) => (chip, field),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(no(&|bad| bad.pic_slave.priority_add = 8), ("PIC", "priority"));
    assert_eq!(no(&|bad| bad.pic_master.init_state = 4), ("PIC", "initialization state"));
    assert_eq!(no(&|bad| bad.ioapic.irr = 1 << 24), ("I/O APIC", "request register"));
    assert_eq!(no(&|bad| bad.ioapic.id = 16), ("I/O APIC", "id"));
    assert_eq!(no(&|bad| bad.ioapic.ioregsel = 256), ("I/O APIC", "selected register"));
    assert_eq!(no(&|bad| bad.pit_channels[2].count = 0x1_0001), ("PIT", "count"));
    assert_eq!(no(&|bad| bad.pit_channels[1].mode = 6), ("PIT", "mode"));
    assert_eq!(no(&|bad| bad.pit_channels[0].rw_mode = 4), ("PIT", "access mode"));
    assert_eq!(no(&|bad| bad.pit_flags = 4), ("PIT", "flags"));
    restore_chips(&guest.vm, &good).unwrap();
    let late = ClockSavedV1 { nanoseconds: clock::LATEST + 1 };
    assert_eq!(restore_clock(&guest.vm, late).unwrap_err().errno(), libc::EINVAL);
    restore_clock(&guest.vm, ClockSavedV1 { nanoseconds: clock::LATEST }).unwrap();
}

#[test]
fn missing_and_left_over_sections_are_errors() {
    let two = TestGuest::with(SPIN, 2);
    let bytes = saved_bytes(&two);
    let one = TestGuest::with(SPIN, 1);
    assert!(matches!(restore_bytes(&one, &bytes), Err(StateError::Saved(SavedError::LeftOver { .. }))));
    let three = TestGuest::with(SPIN, 3);
    let missing = restore_bytes(&three, &bytes);
    assert!(matches!(missing, Err(StateError::Saved(SavedError::Missing { id })) if id == "vcpu2"));
}

#[test]
fn damaged_states_never_panic() {
    let guest = run_through(TestGuest::with(COUNT, 1), 1, |guest| guest);
    let good = saved_bytes(&guest);
    let target = TestGuest::empty(guest.world.clone());
    for step in 0..600 {
        let mut bytes = good.clone();
        let at = step * 7919 % bytes.len();
        bytes[at] ^= 1 << (step % 8);
        let _ = restore_bytes(&target, &bytes);
    }
    restore_bytes(&target, &good).unwrap();
    drop(guest);
    expect_progress(&target);
}

const GOLDEN: &str = "\
    47575354415445310300000005006368697073050063686970730100960000000000fb000020000000000000000000f80000\
    fb000020000000000000000000f8000120808004808004808004808004808004808004808004808004808004808004808004\
    8080048080048080048080048080048080048080048080048080048080048080048080048080048080040000000000000000\
    03000180800400000000000000000300018080040000000000000000030001020500636c6f636b0500636c6f636b01000200\
    0000e807050076637075300400766370750100c60000000301000000000000000800000000000000802002808004ffff0308\
    0b01000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000\
    00000000000000000000000000000000000000000000000000000000000000000000000000000000000000800a1f00001100\
    00000000809280f70f0101020304027f0301000701020304050601ac02030102030101020304050607c0d89e010901f4020b\
    0d0000000000000000000000000000010000000001";

/// The bytes of the first released version: a change here is a break of the format.
#[test]
fn golden_bytes() {
    let vcpu = VcpuSavedV1 {
        mp_state: 3,
        registers: RegistersV1 { rax: 1, r8: 8, rip: 0x1000, rflags: 2, ..Default::default() },
        system: SystemRegistersV1 {
            cs: SegmentV1 { base: 0x1_0000, limit: 0xffff, selector: 8, type_: 11, present: 1, ..Default::default() },
            gdt: TableV1 { base: 0x500, limit: 0x1f },
            cr0: 0x11,
            apic_base: 0xfee0_0900,
            pdptrs: Some([1, 2, 3, 4]),
            ..Default::default()
        },
        xsave: vec![0x7f, 3],
        xcrs: vec![(0, 7)],
        debug: DebugRegistersV1 { db: [1, 2, 3, 4], dr6: 5, dr7: 6 },
        tsc_deadline: Some(300),
        lapic: vec![1, 2, 3],
        cpuid: vec![CpuidEntryV1 { function: 1, index: 2, flags: 3, eax: 4, ebx: 5, ecx: 6, edx: 7 }],
        tsc: TscSavedV1 { khz: 2_600_000, value: 9 },
        msrs: vec![MsrV1 { index: 0x174, value: 11 }],
        events: EventsV1 { flags: 13, sipi_vector: 1, triple_fault_pending: 1, ..Default::default() },
    };
    let pic = PicV1 { imr: 0xfb, irq_base: 0x20, elcr_mask: 0xf8, ..Default::default() };
    let counter = PitChannelV1 { count: 0x1_0000, mode: 3, gate: 1, ..Default::default() };
    let chips = ChipsSavedV1 {
        pic_master: pic,
        pic_slave: pic,
        ioapic: IoApicV1 { id: 1, irr: 32, redirections: [0x1_0000; 24], ..Default::default() },
        pit_channels: [counter; 3],
        pit_flags: 2,
    };
    let mut state = SavedState::new();
    state.put("vcpu0", &vcpu).unwrap();
    state.put("chips", &chips).unwrap();
    state.put("clock", &ClockSavedV1 { nanoseconds: 1000 }).unwrap();
    let hex: String = state.encode().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, GOLDEN);
    let mut back = SavedState::decode(&state.encode()).unwrap();
    assert_eq!(back.take::<VcpuSavedV1>("vcpu0").unwrap(), vcpu);
    assert_eq!(back.take::<ChipsSavedV1>("chips").unwrap(), chips);
}
