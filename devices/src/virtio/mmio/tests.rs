//! Conformance of the transport: its registers, the order of the setup, hostile rings, standing still and moving.

mod moves;

use super::*;
use crate::virtio::queue::{copy_from, copy_to, total_bytes};
use crate::virtio::testing::{Driver, DriverRing, EVENT_IDX, FREE, INDIRECT, NEXT, RAM_BYTES, VERSION_1, WRITE};
use crate::virtio::testing::{ram, wait_until, write_descriptor};
use crate::virtio::{Fault, MmioSavedV1, Progress, QueueSavedV1, Source, read_bytes};
use saved::Saved;
use serde::{Deserialize, Serialize};
use std::os::fd::AsRawFd;
use vm_memory::{Bytes, GuestAddress};

const OWN_FEATURE: u64 = 1 << 3;
const QUEUE_SIZES: [u16; 2] = [16, 8];
const SOURCE: u32 = 5;

/// What a test sees and says behind the device's back.
#[derive(Debug, Default)]
struct Script {
    /// What the listener was told.
    failures: Vec<String>,
    calls: Vec<&'static str>,
    does_not_stop: bool,
    does_not_flush: bool,
    does_not_start: bool,
}

/// Copies each chain's readable bytes to its writable ones; queue 1 belongs to nobody.
#[derive(Debug)]
struct Echo {
    script: Arc<Mutex<Script>>,
    source: EventFd,
    config: [u8; 6],
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct EchoSavedV1 {
    transport: MmioSavedV1,
}
impl Saved for EchoSavedV1 {
    const KIND: &'static str = "echo";
    const VERSION: u16 = 1;
}

impl Echo {
    fn new(script: &Arc<Mutex<Script>>) -> Self {
        let source = EventFd::new(EFD_NONBLOCK).unwrap();
        Self { script: Arc::clone(script), source, config: *b"config" }
    }

    fn called(&self, call: &'static str) -> MutexGuard<'_, Script> {
        let mut script = self.script.lock().unwrap();
        script.calls.push(call);
        script
    }

    fn note(&self, call: &'static str) {
        drop(self.called(call));
    }
}

impl VirtioDevice for Echo {
    type Saved = EchoSavedV1;
    type Parts = Arc<Mutex<Script>>;

    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        OWN_FEATURE
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }
    fn queue_owner(&self, queue: usize) -> QueueOwner {
        if queue == 0 { QueueOwner::Worker } else { QueueOwner::Accelerator }
    }
    fn sources(&self) -> Vec<Source> {
        vec![Source { token: SOURCE, fd: self.source.as_raw_fd() }]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config, offset, data);
    }
    fn write_config(&mut self, _: &mut Io, offset: u64, data: &[u8]) {
        let offset = usize::try_from(offset).unwrap();
        if let Some(place) = self.config.get_mut(offset..offset + data.len()) {
            place.copy_from_slice(data);
        }
    }
    fn start(&mut self, _: &mut Io) -> Result<(), Fault> {
        if self.called("start").does_not_start {
            return Err(Fault::Host { what: "The tap is gone", source: std::io::Error::other("ENODEV") });
        }
        Ok(())
    }
    fn process(&mut self, io: &mut Io, queue: usize) -> Result<Progress, Fault> {
        assert_eq!(queue, 0, "queue 1 is an accelerator's");
        let Some(chain) = io.queues[0].pop()? else { return Ok(Progress::Idle) };
        let mut data = vec![0; total_bytes(chain.readable()).min(0x1000)];
        let read = copy_from(&io.ram, chain.readable(), 0, &mut data);
        let written = copy_to(&io.ram, chain.writable(), 0, &data[..read]);
        io.queues[0].push(&chain, u32::try_from(written).unwrap())?;
        io.signal(0)?;
        Ok(Progress::More)
    }
    fn on_source(&mut self, io: &mut Io, token: u32) -> Result<(), Fault> {
        assert_eq!(token, SOURCE);
        if self.source.read().is_ok() {
            self.note("source");
            self.config[0] += 1;
            io.interrupt.config_changed();
        }
        Ok(())
    }
    fn stop(&mut self, _: &mut Io, _: Duration) -> Result<(), usize> {
        if self.called("stop").does_not_stop { Err(3) } else { Ok(()) }
    }
    fn flush(&mut self) -> std::io::Result<()> {
        if self.called("flush").does_not_flush { Err(std::io::Error::other("EIO")) } else { Ok(()) }
    }
    fn reset(&mut self) {
        self.note("reset");
    }
    fn release(&mut self) {
        self.note("release");
    }
    fn reacquire(&mut self) -> std::io::Result<()> {
        self.note("reacquire");
        Ok(())
    }
    fn announce(&mut self, _: &mut Io) {
        self.note("announce");
    }
    fn log_dirty(&mut self, _: &mut Io, on: bool) -> std::io::Result<()> {
        self.note(if on { "log on" } else { "log off" });
        Ok(())
    }
    fn harvest_dirty(&mut self, mark: &mut dyn FnMut(Gpa)) {
        mark(GuestAddress(0x3000));
    }
    fn save(&self, transport: MmioSavedV1) -> EchoSavedV1 {
        EchoSavedV1 { transport }
    }
    fn restore(_: &str, saved: EchoSavedV1, script: Self::Parts) -> Result<(Self, MmioSavedV1), RestoreError> {
        Ok((Self::new(&script), saved.transport))
    }
}

struct Rig {
    mmio: Mmio<Echo>,
    ram: GuestRam,
    rings: Vec<DriverRing>,
    irq: EventFd,
    script: Arc<Mutex<Script>>,
    source: EventFd,
}

fn parts(ram: &GuestRam, script: &Arc<Mutex<Script>>) -> (MmioParts, EventFd) {
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    let worker = Worker::spawn("echo0", || {}).unwrap();
    let script = Arc::clone(script);
    let on_failure = FailureListener::new(move |cause| script.lock().unwrap().failures.push(cause.to_owned()));
    (MmioParts { id: "echo0".into(), ram: ram.clone(), irq: irq.try_clone().unwrap(), worker, on_failure }, irq)
}

impl Rig {
    fn new() -> Self {
        let (ram, script) = (ram(), Arc::default());
        let (parts, irq) = parts(&ram, &script);
        let device = Echo::new(&script);
        let source = device.source.try_clone().unwrap();
        let rings = vec![DriverRing::new(&ram, 0, 16), DriverRing::new(&ram, 1, 8)];
        Self { mmio: Mmio::new(device, parts).unwrap(), ram, rings, irq, script, source }
    }

    fn up() -> Self {
        let rig = Self::new();
        rig.driver().bring_up(VERSION_1 | OWN_FEATURE, &rig.rings);
        // Drivers begin with a reset.
        assert_eq!(rig.script.lock().unwrap().calls.remove(0), "reset");
        rig
    }

    /// The other end of a move: a new transport on the same memory, made of the state of this one.
    fn moved(self) -> Self {
        self.mmio.quiesce(Duration::from_secs(1)).unwrap();
        let mut state = SavedState::new();
        self.mmio.save(&mut state).unwrap();
        let script = Arc::default();
        let (parts, irq) = parts(&self.ram, &script);
        let mmio = Mmio::<Echo>::restore(&mut state, Arc::clone(&script), parts).unwrap();
        state.finish().unwrap();
        let source = mmio.with(|device, _| device.source.try_clone().unwrap());
        Self { mmio, irq, script, source, ..self }
    }

    fn driver(&self) -> Driver<'_, Echo> {
        Driver { mmio: &self.mmio }
    }

    fn calls(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.script.lock().unwrap().calls)
    }

    /// Sends `text` through queue 0 and back.
    fn echo(&mut self, text: &[u8]) {
        let (from, to) = (FREE, FREE + 0x1000);
        self.ram.write_slice(text, GuestAddress(from)).unwrap();
        let length = u32::try_from(text.len()).unwrap();
        let head = self.rings[0].offer(&[(from, length, false), (to, length, true)]);
        self.driver().kick(0);
        let rings = &mut self.rings;
        wait_until("the echo comes back", || rings[0].completed() == [(head.into(), length)]);
        let mut back = vec![0; text.len()];
        self.ram.read_slice(&mut back, GuestAddress(to)).unwrap();
        assert_eq!(back, text);
    }

    fn wait_for_needs_reset(&self) {
        wait_until("DEVICE_NEEDS_RESET", || self.driver().status() & 0x40 != 0);
        wait_until("the configuration interrupt", || self.driver().read(0x60) & 2 != 0);
        assert!(self.irq.read().is_ok());
    }
}

#[test]
fn registers_at_power_on() {
    let rig = Rig::new();
    let driver = rig.driver();
    for (offset, value) in [(0x00, 0x7472_6976), (0x04, 2), (0x08, 42), (0x70, 0), (0x60, 0), (0xfc, 0), (0x44, 0)] {
        assert_eq!(driver.read(offset), value, "{offset:#x}");
    }
    assert_eq!(driver.offered(), VERSION_1 | EVENT_IDX | 1 << 28 | OWN_FEATURE);
    driver.write(0x14, 2);
    assert_eq!(driver.read(0x10), 0, "there are only 64 features here");
    for (queue, size) in [(0, 16), (1, 8), (2, 0), (u32::MAX, 0)] {
        driver.write(0x30, queue);
        assert_eq!(driver.read(0x34), size, "queue {queue}");
        assert_eq!(driver.read(0x44), 0, "queue {queue}");
    }
    for offset in [0xb0, 0xb4, 0xb8, 0xbc] {
        assert_eq!(driver.read(offset), u32::MAX, "no shared memory: {offset:#x}");
    }
    for offset in [0x14, 0x20, 0x24, 0x30, 0x38, 0x50, 0x64, 0x80, 0x94, 0xa4, 0xac, 0xc0, 0xf8] {
        assert_eq!(driver.read(offset), 0, "write-only or absent: {offset:#x}");
    }
}

#[test]
fn only_aligned_words_are_registers_but_the_configuration_has_any_width() {
    let rig = Rig::new();
    for (offset, length) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 2), (0xfe, 4)] {
        let mut data = vec![0xff; length];
        rig.mmio.read(offset, &mut data);
        assert_eq!(data, vec![0; length], "{offset:#x}");
        rig.mmio.write(offset, &data);
    }
    rig.mmio.write(0x70, &[1]);
    rig.mmio.write(0x71, &[1, 0, 0, 0]);
    assert_eq!(rig.driver().status(), 0);
    let mut data = [0xff; 8];
    rig.mmio.read(0x102, &mut data[..1]);
    assert_eq!(data[0], b'n');
    rig.mmio.read(0x104, &mut data);
    assert_eq!(&data, b"ig\0\0\0\0\0\0");
    rig.mmio.read(0xfff, &mut data[..1]);
    assert_eq!(data[0], 0);
    rig.mmio.write(0x100, b"X");
    rig.driver().negotiate(VERSION_1);
    rig.mmio.write(0x105, b"Y");
    rig.mmio.read(0x100, &mut data[..6]);
    assert_eq!(&data[..6], b"confiY", "writes count from DRIVER on");
}

#[test]
fn the_setup_in_its_order_ends_in_a_working_queue() {
    let mut rig = Rig::up();
    assert_eq!(rig.driver().status(), 0xf);
    assert_eq!(rig.calls(), ["start"]);
    rig.echo(b"all is well");
    wait_until("the interrupt", || rig.irq.read().is_ok());
    assert_eq!(rig.driver().read(0x60), 1);
    rig.driver().write(0x64, 1);
    assert_eq!(rig.driver().read(0x60), 0);
}

#[test]
fn a_kick_through_the_notifier_is_a_kick() {
    let mut rig = Rig::up();
    let notifiers = rig.mmio.queue_notifiers().unwrap();
    assert_eq!(notifiers.len(), 2);
    rig.rings[0].offer(&[(FREE, 4, false)]);
    notifiers[0].write(1).unwrap();
    wait_until("the chain is used", || rig.rings[0].completed() == [(0, 0)]);
    rig.driver().kick(2);
    rig.driver().kick(u32::MAX);
}

#[test]
fn steps_out_of_order_are_not_taken() {
    let rig = Rig::new();
    let driver = rig.driver();
    assert!(!driver.add_status(8), "FEATURES_OK without DRIVER");
    assert!(!driver.add_status(4), "DRIVER_OK without FEATURES_OK");
    driver.write(0x20, 8);
    assert!(driver.add_status(1) && driver.add_status(2));
    assert!(!driver.add_status(8), "VERSION_1 was not accepted");
    driver.write(0x24, 1);
    driver.write(0x20, 1);
    driver.set_up(0, &rig.rings[0]);
    assert_eq!(driver.read(0x44), 0, "a queue before FEATURES_OK");
    assert!(driver.add_status(8));
    driver.write(0x20, 0);
    driver.write(0x70, 1);
    assert_eq!(driver.status(), 0xb, "a bit is taken back by a reset only");
    assert!(driver.add_status(4));
    driver.set_up(0, &rig.rings[0]);
    assert_eq!(driver.read(0x44), 0, "a queue after DRIVER_OK");
    assert!(driver.add_status(0x80), "FAILED is noted");
    assert_eq!(rig.mmio.with(|_, io| io.features), VERSION_1);
}

#[test]
fn unknown_features_are_refused_and_can_be_corrected() {
    let rig = Rig::new();
    assert!(!rig.driver().negotiate(VERSION_1 | 1 << 5));
    assert!(!rig.driver().negotiate(OWN_FEATURE));
    assert!(rig.driver().negotiate(VERSION_1 | OWN_FEATURE));
    assert!(rig.mmio.with(|_, io| io.has(3) && !io.has(29)));
}

#[test]
fn a_ready_queue_does_not_change_until_it_is_withdrawn() {
    let mut rig = Rig::up();
    let driver = rig.driver();
    driver.write(0x30, 0);
    driver.write(0x38, 4);
    driver.write(0x80, 0);
    assert_eq!(rig.mmio.with(|_, io| (io.queues[0].state().size, io.queues[0].state().desc_table)), (16, 0x1000));
    rig.echo(b"still there");
    rig.calls();
    let driver = rig.driver();
    driver.write(0x44, 0);
    assert_eq!(driver.read(0x44), 0);
    assert_eq!(rig.calls(), ["stop", "start"]);
    rig.rings[0].offer(&[(FREE, 4, false)]);
    rig.driver().kick(0);
    std::thread::sleep(Duration::from_millis(20));
    assert!(rig.rings[0].completed().is_empty(), "the queue is not used any more");
    assert_eq!(rig.driver().status(), 0xf);
}

#[test]
fn impossible_queues_break_the_device_until_it_is_reset() {
    type Spoil = fn(&mut DriverRing);
    let spoils: [(&str, Spoil); 8] = [
        ("size 0", |ring| ring.size = 0),
        ("size 3", |ring| ring.size = 3),
        ("size over the maximum", |ring| ring.size = 32),
        ("descriptors not aligned", |ring| ring.descriptors += 8),
        ("available not aligned", |ring| ring.available += 1),
        ("used not aligned", |ring| ring.used += 2),
        ("used across the end of memory", |ring| ring.used = RAM_BYTES - 8),
        ("descriptors at the end of the address space", |ring| ring.descriptors = u64::MAX - 15),
    ];
    let mut rig = Rig::new();
    for (what, spoil) in spoils {
        let driver = rig.driver();
        assert!(driver.negotiate(VERSION_1));
        let mut ring = DriverRing::new(&rig.ram, 0, 16);
        spoil(&mut ring);
        driver.set_up(0, &ring);
        assert_eq!(driver.read(0x44), 0, "{what}");
        assert_eq!(driver.status(), 0x4b, "{what}");
        assert!(!driver.add_status(4), "{what}");
    }
    rig.driver().bring_up(VERSION_1, &rig.rings);
    rig.echo(b"recovered");
}

#[test]
fn a_queue_size_over_16_bits_is_impossible_too() {
    let rig = Rig::new();
    assert!(rig.driver().negotiate(VERSION_1));
    rig.driver().write(0x38, 0x1_0010);
    rig.driver().write(0x44, 1);
    assert_eq!(rig.driver().status(), 0x4b);
}

#[test]
fn hostile_rings_cost_the_device_and_nothing_else() {
    type Spoil = fn(&mut DriverRing, &GuestRam);
    let spoils: [(&str, Spoil); 14] = [
        ("a loop", |ring, _| {
            ring.descriptor(0, FREE, 4, NEXT, 1);
            ring.descriptor(1, FREE, 4, NEXT, 0);
            ring.make_available(0);
        }),
        ("a descriptor that is its own next", |ring, _| {
            ring.descriptor(0, FREE, 4, NEXT, 0);
            ring.make_available(0);
        }),
        ("a next outside of the table", |ring, _| {
            ring.descriptor(0, FREE, 4, NEXT, 16);
            ring.make_available(0);
        }),
        ("a head outside of the table", |ring, _| ring.make_available(999)),
        ("a buffer outside of memory", |ring, _| {
            ring.offer(&[(RAM_BYTES, 4, false)]);
        }),
        ("a buffer at the end of the address space", |ring, _| {
            ring.offer(&[(u64::MAX - 1, 16, true)]);
        }),
        ("a buffer across the end of memory", |ring, _| {
            ring.offer(&[(FREE, 4, false), (RAM_BYTES - 4, 8, true)]);
        }),
        ("a huge buffer", |ring, _| {
            ring.offer(&[(FREE, u32::MAX, false)]);
        }),
        ("an empty buffer", |ring, _| {
            ring.offer(&[(FREE, 0, false)]);
        }),
        ("a readable buffer after a writable one", |ring, _| {
            ring.offer(&[(FREE, 4, true), (FREE, 4, false)]);
        }),
        ("an available index that jumps", |ring, _| ring.set_available_index(17)),
        ("an available index that goes back", |ring, _| ring.set_available_index(u16::MAX)),
        ("an indirect table in an indirect table", |ring, ram| {
            write_descriptor(ram, FREE, FREE + 0x100, 16, INDIRECT, 0);
            ring.descriptor(0, FREE, 16, INDIRECT, 0);
            ring.make_available(0);
        }),
        ("an indirect table without end", |ring, ram| {
            write_descriptor(ram, FREE, FREE, 1, NEXT, 0);
            ring.descriptor(0, FREE, 16, INDIRECT, 0);
            ring.make_available(0);
        }),
    ];
    let mut rig = Rig::up();
    for (what, spoil) in spoils {
        rig.calls();
        spoil(&mut rig.rings[0], &rig.ram);
        rig.driver().kick(0);
        rig.wait_for_needs_reset();
        assert_eq!(rig.calls(), ["stop"], "{what}");
        rig.driver().kick(0);
        std::thread::sleep(Duration::from_millis(2));
        assert!(rig.rings[0].completed().is_empty(), "{what}: nothing is used any more");

        rig.driver().write(0x70, 0);
        assert_eq!((rig.driver().status(), rig.driver().read(0x60)), (0, 0), "{what}");
        rig.rings = vec![DriverRing::new(&rig.ram, 0, 16), DriverRing::new(&rig.ram, 1, 8)];
        for ring in &mut rig.rings {
            ring.set_available_index(0);
            rig.ram.write_obj(0u32, GuestAddress(ring.used)).unwrap();
        }
        rig.driver().bring_up(VERSION_1 | EVENT_IDX, &rig.rings);
        rig.echo(what.as_bytes());
        let _ = rig.irq.read();
    }
}

#[test]
fn bad_indirect_tables_are_broken_rings() {
    for (what, address, length) in
        [("unaligned", FREE, 17), ("empty", FREE, 0), ("outside", RAM_BYTES, 16), ("too long", FREE, 16 * 0x1_0000)]
    {
        let mut rig = Rig::up();
        rig.rings[0].descriptor(0, address, length, INDIRECT, 0);
        rig.rings[0].make_available(0);
        rig.driver().kick(0);
        rig.wait_for_needs_reset();
        assert_eq!(rig.driver().status(), 0x4f, "{what}");
        let failures = rig.script.lock().unwrap().failures.clone();
        assert!(matches!(&failures[..], [why] if why.contains("descriptor")), "{what}: {failures:?}");
    }
}

#[test]
fn a_driver_that_breaks_its_device_again_and_again_is_told_of_some_times() {
    let rig = Rig::new();
    rig.script.lock().unwrap().does_not_start = true;
    for _ in 0..100 {
        rig.driver().write(0x70, 0);
        assert!(rig.driver().negotiate(VERSION_1));
        rig.driver().add_status(4);
        rig.wait_for_needs_reset();
    }
    assert_eq!(rig.script.lock().unwrap().failures.len(), 16);
}

#[test]
fn a_good_indirect_chain_is_served() {
    let mut rig = Rig::up();
    rig.ram.write_slice(b"indirectly", GuestAddress(FREE)).unwrap();
    write_descriptor(&rig.ram, FREE + 0x100, FREE, 10, NEXT, 1);
    write_descriptor(&rig.ram, FREE + 0x110, FREE + 0x200, 10, WRITE, 0);
    rig.rings[0].descriptor(0, FREE + 0x100, 32, INDIRECT, 0);
    rig.rings[0].make_available(0);
    rig.driver().kick(0);
    wait_until("the chain is used", || rig.rings[0].completed() == [(0, 10)]);
}

#[test]
fn a_device_that_cannot_start_needs_a_reset() {
    let rig = Rig::new();
    rig.script.lock().unwrap().does_not_start = true;
    assert!(rig.driver().negotiate(VERSION_1));
    rig.driver().add_status(4);
    assert_eq!(rig.driver().status(), 0x4f);
    rig.wait_for_needs_reset();
    rig.script.lock().unwrap().does_not_start = false;
    rig.driver().bring_up(VERSION_1, &rig.rings);
}

#[test]
fn a_reset_waits_for_the_device_to_stop() {
    let rig = Rig::up();
    rig.script.lock().unwrap().does_not_stop = true;
    rig.driver().write(0x70, 0);
    assert_eq!(rig.driver().status(), 0x4f, "the driver sees that it is not reset yet");
    rig.script.lock().unwrap().does_not_stop = false;
    rig.driver().write(0x70, 0);
    assert_eq!(rig.driver().status(), 0);
    assert_eq!(rig.calls(), ["start", "stop", "stop", "reset"]);
    assert!(rig.mmio.with(|_, io| io.queues.iter().all(|queue| !queue.is_ready()) && io.features == 0));
}

#[test]
fn sources_are_served_while_the_driver_is_there() {
    let rig = Rig::new();
    rig.source.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(rig.calls().is_empty());
    rig.driver().bring_up(VERSION_1, &rig.rings);
    wait_until("the source is looked at after the start", || rig.driver().read(0xfc) == 1);
    rig.source.write(1).unwrap();
    wait_until("the source is polled", || rig.driver().read(0xfc) == 2);
    assert_eq!(rig.driver().read(0x60), 2, "a configuration interrupt");
    assert_eq!(rig.driver().read(0x100) & 0xff, u32::from(b'c') + 2);
}

#[test]
fn an_accelerator_gets_its_kicks_itself() {
    let rig = Rig::up();
    let kicks = rig.mmio.queue_notifiers().unwrap();
    assert_eq!(kicks[1].read().unwrap(), 1, "one after the start");
    rig.driver().kick(1);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(kicks[1].read().unwrap(), 1, "the worker has not taken it");
    rig.mmio.with(|_, io| {
        rig.ram.write_obj(7u16, GuestAddress(rig.rings[1].used + 2)).unwrap();
        io.queues[1].take_back(9).unwrap();
        let state = io.queues[1].state();
        assert_eq!((state.next_avail, state.next_used), (9, 7));
    });
}
