//! A device stands still, is saved, and goes on elsewhere.

use super::*;
use proptest::prelude::*;

#[test]
fn nothing_happens_between_quiesce_and_resume() {
    let mut rig = Rig::up();
    rig.mmio.quiesce(Duration::from_secs(1)).unwrap();
    rig.mmio.quiesce(Duration::from_secs(1)).unwrap();
    assert_eq!(rig.calls(), ["start", "stop", "flush"]);
    rig.rings[0].offer(&[(FREE, 4, false)]);
    rig.mmio.queue_notifiers().unwrap()[0].write(1).unwrap();
    rig.source.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(rig.rings[0].completed().is_empty() && rig.calls().is_empty());
    rig.mmio.resume();
    wait_until("the chain is used", || rig.rings[0].completed() == [(0, 0)]);
    wait_until("the source is looked at", || rig.calls().contains(&"source"));
}

#[test]
fn a_device_that_does_not_stand_still_goes_on() {
    let mut rig = Rig::up();
    rig.script.lock().unwrap().does_not_stop = true;
    let error = rig.mmio.quiesce(Duration::from_millis(5)).unwrap_err();
    assert!(matches!(error, QuiesceError::StillBusy { in_flight: 3, .. }), "{error}");
    rig.echo(b"running");
    rig.script.lock().unwrap().does_not_stop = false;
    rig.script.lock().unwrap().does_not_flush = true;
    let error = rig.mmio.quiesce(Duration::from_millis(5)).unwrap_err();
    assert!(matches!(error, QuiesceError::Flush { .. }), "{error}");
    rig.echo(b"running still");
    rig.script.lock().unwrap().does_not_flush = false;
    rig.mmio.quiesce(Duration::from_millis(5)).unwrap();
}

#[test]
fn quiesce_does_not_wait_longer_than_it_may() {
    let mut rig = Rig::up();
    let core = rig.mmio.shared.core.lock().unwrap();
    let error = rig.mmio.quiesce(Duration::from_millis(5)).unwrap_err();
    assert!(matches!(error, QuiesceError::StillBusy { in_flight: 1, .. }), "{error}");
    drop(core);
    rig.echo(b"running");
}

#[test]
fn a_moved_device_goes_on_where_it_was() {
    let mut rig = Rig::up();
    rig.echo(b"here");
    rig.driver().write(0x64, 3);
    rig.mmio.with(|_, io| io.interrupt.config_changed());
    let mut rig = rig.moved();
    assert!(rig.irq.read().is_err() && rig.calls().is_empty(), "it stands still");
    // A chain that was offered at the old place, without its kick.
    rig.ram.write_slice(b"there", GuestAddress(FREE)).unwrap();
    let head = rig.rings[0].offer(&[(FREE, 5, false), (FREE + 0x1000, 5, true)]);
    rig.mmio.resume();
    wait_until("the chain is used", || rig.rings[0].completed() == [(head.into(), 5)]);
    assert_eq!(rig.calls(), ["start"]);
    assert!(rig.irq.read().is_ok(), "a pending interrupt is raised again");
    assert_eq!(rig.driver().status(), 0xf);
    assert_eq!(rig.driver().read(0x60) & 2, 2);
    assert_eq!(rig.driver().read(0xfc), 1);
    rig.echo(b"and on");
    rig.mmio.announce();
    assert!(rig.calls().contains(&"announce"));
}

#[test]
fn every_stage_of_the_setup_can_move() {
    let mut rig = Rig::new();
    rig = rig.moved();
    assert_eq!(rig.driver().status(), 0);
    rig.mmio.resume();
    assert!(rig.driver().negotiate(VERSION_1 | EVENT_IDX));
    rig.driver().write(0x30, 1);
    rig.driver().write(0x38, 4);
    rig = rig.moved();
    rig.mmio.resume();
    assert_eq!(rig.driver().status(), 0xb);
    rig.driver().write(0x44, 0);
    assert_eq!(rig.mmio.with(|_, io| io.features), VERSION_1 | EVENT_IDX);
    for (index, ring) in (0..).zip(&rig.rings) {
        rig.driver().set_up(index, ring);
    }
    rig = rig.moved();
    rig.mmio.resume();
    assert!(rig.driver().add_status(4));
    rig.rings[0].make_available(99);
    rig.driver().kick(0);
    rig.wait_for_needs_reset();
    rig = rig.moved();
    rig.mmio.resume();
    assert_eq!(rig.driver().status(), 0x4f, "a broken device moves broken");
    assert!(rig.calls().is_empty());
    assert!(rig.irq.read().is_ok());
}

#[test]
fn power_on_forgets_the_driver() {
    let rig = Rig::up();
    rig.mmio.quiesce(Duration::from_secs(1)).unwrap();
    rig.mmio.reset();
    rig.mmio.resume();
    assert_eq!(rig.calls(), ["start", "stop", "flush", "reset"]);
    assert_eq!(rig.driver().status(), 0);
    rig.driver().bring_up(VERSION_1, &rig.rings);
}

#[test]
fn the_machine_reaches_the_device() {
    let rig = Rig::new();
    rig.mmio.release();
    rig.mmio.reacquire().unwrap();
    rig.mmio.log_dirty(true).unwrap();
    rig.mmio.log_dirty(false).unwrap();
    assert_eq!(rig.calls(), ["release", "reacquire", "log on", "log off"]);
    let mut pages = Vec::new();
    rig.mmio.harvest_dirty(&mut |page| pages.push(page));
    assert_eq!(pages, [GuestAddress(0x3000)]);
    assert_eq!(rig.mmio.id(), "echo0");
}

fn saved() -> MmioSavedV1 {
    let mut rig = Rig::up();
    rig.echo(b"saved");
    rig.driver().write(0x64, 3);
    rig.mmio.quiesce(Duration::from_secs(1)).unwrap();
    rig.mmio.shared.lock().save()
}

fn restored(transport: MmioSavedV1) -> Result<Mmio<Echo>, MmioError> {
    let ram = ram();
    let mut state = SavedState::new();
    state.put("echo0", &EchoSavedV1 { transport }).unwrap();
    Mmio::restore(&mut state, Arc::default(), parts(&ram, &Arc::default()).0)
}

#[test]
fn what_is_saved() {
    let queue = |descriptors, size, next| QueueSavedV1 {
        size,
        ready: true,
        descriptors,
        available: descriptors + 0x1000,
        used: descriptors + 0x2000,
        next_available: next,
        next_used: next,
        event_index: false,
    };
    let expected = MmioSavedV1 {
        device_status: 0xf,
        device_features_select: 0,
        driver_features_select: 1,
        driver_features: VERSION_1 | OWN_FEATURE,
        queue_select: 1,
        interrupt_status: 0,
        config_generation: 0,
        queues: vec![queue(0x1000, 16, 1), queue(0x4000, 8, 0)],
    };
    assert_eq!(saved(), expected);
    restored(expected).unwrap();
}

/// The bytes of the first released version: a change here is a break of the format.
#[test]
fn golden_bytes() {
    let mut state = SavedState::new();
    state.put("echo0", &EchoSavedV1 { transport: saved() }).unwrap();
    let golden: &[u8] = &[
        b'G', b'W', b'S', b'T', b'A', b'T', b'E', b'1', 1, 0, 0, 0, 5, 0, b'e', b'c', b'h', b'o', b'0', 4, 0, b'e',
        b'c', b'h', b'o', 1, 0, 37, 0, 0, 0, // body:
        15, 0, 1, 0x88, 0x80, 0x80, 0x80, 0x10, 1, 0, 0, 2, // registers
        16, 1, 0x80, 0x20, 0x80, 0x40, 0x80, 0x60, 1, 1, 0, // queue 0
        8, 1, 0x80, 0x80, 1, 0x80, 0xa0, 1, 0x80, 0xc0, 1, 0, 0, 0, // queue 1
    ];
    assert_eq!(state.encode(), golden);
}

#[test]
fn impossible_states_are_refused() {
    type Spoil = fn(&mut MmioSavedV1);
    let spoils: [(&str, Spoil); 16] = [
        ("device status", |saved| saved.device_status = 0x1f),
        ("device status", |saved| saved.device_status = 0x7),
        ("device status", |saved| saved.device_status = 0xd),
        ("features", |saved| saved.driver_features = OWN_FEATURE),
        ("features", |saved| saved.driver_features |= 1 << 40),
        ("interrupt status", |saved| saved.interrupt_status = 4),
        ("number of queues", |saved| saved.queues.truncate(1)),
        ("number of queues", |saved| saved.queues.push(saved.queues[0].clone())),
        ("queue ready", |saved| saved.device_status = 3),
        ("queue setup", |saved| saved.queues[0].size = 3),
        ("queue setup", |saved| saved.queues[0].size = 32),
        ("queue setup", |saved| saved.queues[1].descriptors += 1),
        ("ring addresses", |saved| saved.queues[1].used = RAM_BYTES),
        ("ring addresses", |saved| saved.queues[0].available = u64::MAX - 1),
        ("chains in flight", |saved| saved.queues[0].next_available = 100),
        ("event index", |saved| saved.queues[0].event_index = true),
    ];
    for (field, spoil) in spoils {
        let mut transport = saved();
        spoil(&mut transport);
        let error = restored(transport).unwrap_err();
        assert!(matches!(error, MmioError::Restore(_)), "{error}");
        assert!(error.to_string().contains(field) && error.to_string().contains("echo0"), "{field}: {error}");
    }
}

#[test]
fn a_missing_section_is_an_error() {
    let error =
        Mmio::<Echo>::restore(&mut SavedState::new(), Arc::default(), parts(&ram(), &Arc::default()).0).unwrap_err();
    assert!(matches!(error, MmioError::Section(SavedError::Missing { .. })), "{error}");
}

fn register() -> impl Strategy<Value = (u64, u32)> {
    let setup =
        prop::sample::select(vec![0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x90, 0xa0, 0x100]);
    let value = prop_oneof![0..16u32, Just(0x1000), Just(0x2000), any::<u32>()];
    (prop_oneof![9 => setup, 1 => 0..0x1000u64], value)
}

fn queue_saved() -> impl Strategy<Value = QueueSavedV1> {
    let address = || prop_oneof![Just(0x1000), 0..RAM_BYTES, any::<u64>()];
    let size = prop_oneof![Just(8), any::<u16>()];
    let state = (any::<bool>(), any::<bool>(), 0..20u16, 0..20u16);
    (size, address(), address(), address(), state).prop_map(|(size, descriptors, available, used, state)| {
        let (ready, event_index, next_available, next_used) = state;
        QueueSavedV1 { size, ready, descriptors, available, used, next_available, next_used, event_index }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a guest writes to the registers in whatever order, a reset brings the device back.
    #[test]
    fn any_order_of_writes_is_survived(writes in prop::collection::vec(register(), 1..200)) {
        let mut rig = Rig::new();
        for (offset, value) in writes {
            rig.driver().write(offset, value);
            rig.driver().read(offset);
            let status = rig.driver().status();
            prop_assert!(status & 4 == 0 || status & 0xb == 0xb, "DRIVER_OK without the steps before: {status:#x}");
        }
        rig.driver().write(0x70, 0);
        prop_assert_eq!(rig.driver().status(), 0);
        rig.rings = vec![DriverRing::new(&rig.ram, 0, 16), DriverRing::new(&rig.ram, 1, 8)];
        for ring in &mut rig.rings {
            ring.set_available_index(0);
            rig.ram.write_obj(0u32, GuestAddress(ring.used)).unwrap();
        }
        rig.driver().bring_up(VERSION_1, &rig.rings);
        rig.echo(b"after it all");
    }

    /// Whatever a peer sends as state makes a device that works as far as it goes, or an error.
    #[test]
    fn any_saved_state_is_survived(
        device_status in prop_oneof![Just(0xf), 0..0x100u32, any::<u32>()],
        driver_features in prop_oneof![Just(VERSION_1), any::<u64>()],
        interrupt_status in 0..5u32,
        queue_select: u32,
        queues in prop::collection::vec(queue_saved(), 2..=3),
    ) {
        let saved = MmioSavedV1 {
            device_status,
            device_features_select: queue_select,
            driver_features_select: queue_select,
            driver_features,
            queue_select,
            interrupt_status,
            config_generation: queue_select,
            queues,
        };
        if let Ok(mmio) = restored(saved) {
            mmio.resume();
            mmio.quiesce(Duration::from_secs(5)).unwrap();
        }
    }
}
