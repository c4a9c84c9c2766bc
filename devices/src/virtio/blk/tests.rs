//! The disk by its requests, on a back end in memory that can be told to fail.

use super::*;
use crate::virtio::testing::{Bench, Driver, DriverRing, FREE, RAM_BYTES, REGION_BORDER, VERSION_1, ram, wait_until};
use crate::virtio::{FailureListener, GuestSlice, Mmio, MmioParts, QueueSavedV1};
use crate::worker::Worker;
use crate::{Device, GuestRam};
use proptest::prelude::*;
use saved::SavedState;
use std::io;
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const SECTORS: u64 = 64;
const HEADER: u64 = FREE;
const STATUS: u64 = FREE + 0x800;
const DATA: u64 = FREE + 0x1000;

/// What the back end holds, and was asked for.
#[derive(Debug)]
struct Disk {
    bytes: Vec<u8>,
    calls: Vec<String>,
    fails: bool,
}

#[derive(Debug, Clone)]
struct MemoryBackend {
    disk: Arc<Mutex<Disk>>,
    read_only: bool,
}

impl MemoryBackend {
    fn new(read_only: bool) -> Self {
        let bytes = (0..SECTORS * SECTOR).map(|at| u8::try_from(at / SECTOR).unwrap()).collect();
        Self { disk: Arc::new(Mutex::new(Disk { bytes, calls: Vec::new(), fails: false })), read_only }
    }

    fn call(&self, call: String) -> io::Result<()> {
        let mut disk = self.disk.lock().unwrap();
        disk.calls.push(call);
        if disk.fails { Err(io::Error::other("EIO")) } else { Ok(()) }
    }
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

impl BlockBackend for MemoryBackend {
    fn capacity(&self) -> u64 {
        SECTORS * SECTOR
    }
    fn is_read_only(&self) -> bool {
        self.read_only
    }
    fn read_vectored_at(&self, into: &[GuestSlice<'_>], offset: u64) -> io::Result<()> {
        self.call(format!("read {offset}"))?;
        let mut offset = index(offset);
        for slice in into {
            slice.copy_from(&self.disk.lock().unwrap().bytes[offset..offset + slice.len()]);
            offset += slice.len();
        }
        Ok(())
    }
    fn write_vectored_at(&self, from: &[GuestSlice<'_>], offset: u64) -> io::Result<()> {
        self.call(format!("write {offset}"))?;
        let mut offset = index(offset);
        for slice in from {
            slice.copy_to(&mut self.disk.lock().unwrap().bytes[offset..offset + slice.len()]);
            offset += slice.len();
        }
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.call("flush".into())
    }
    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.call(format!("discard {offset} {length}"))
    }
    fn write_zeroes(&self, offset: u64, length: u64, unmap: Unmap) -> io::Result<()> {
        self.call(format!("zero {offset} {length} {unmap:?}"))
    }
    fn release(&mut self) {
        self.call("release".into()).unwrap();
    }
    fn reacquire(&mut self) -> io::Result<()> {
        self.call("reacquire".into())
    }
}

struct Rig {
    bench: Bench,
    blk: Blk,
    backend: MemoryBackend,
}

impl Rig {
    fn new() -> Self {
        Self::with(MemoryBackend::new(false), 1 << VIRTIO_BLK_F_FLUSH)
    }

    fn with(backend: MemoryBackend, features: u64) -> Self {
        let blk = Blk::new(BlkParts { backend: Box::new(backend.clone()), serial: "a-disk".into() });
        Self { bench: Bench::new(&[64], VERSION_1 | features), blk, backend }
    }

    fn ram(&self) -> &GuestRam {
        &self.bench.io.ram
    }

    fn header(&self, kind: u32, sector: u64) {
        self.ram().write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.ram().write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        self.ram().write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
    }

    /// Offers a chain and has it processed: the status byte, and the bytes in the used ring.
    fn chain(&mut self, buffers: &[(u64, u32, bool)]) -> (u8, u32) {
        let head = self.bench.rings[0].offer(buffers);
        assert_eq!(self.blk.process(&mut self.bench.io, 0).unwrap(), Progress::Idle);
        let completed = self.bench.rings[0].completed();
        let [(used, written)] = completed[..] else { panic!("{completed:?}") };
        assert_eq!(used, u32::from(head));
        (self.ram().read_obj(GuestAddress(STATUS)).unwrap(), written)
    }

    /// A request with one data buffer.
    fn request(&mut self, kind: u32, sector: u64, length: u32, into_guest: bool) -> (u8, u32) {
        self.header(kind, sector);
        match length {
            0 => self.chain(&[(HEADER, 16, false), (STATUS, 1, true)]),
            _ => self.chain(&[(HEADER, 16, false), (DATA, length, into_guest), (STATUS, 1, true)]),
        }
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.backend.disk.lock().unwrap().calls)
    }
}

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

#[test]
fn reads_and_writes_reach_their_sectors() {
    let mut rig = Rig::new();
    assert_eq!(rig.request(READ, 5, 1024, true), (OK, 1025));
    let mut data = [0; 1024];
    rig.ram().read_slice(&mut data, GuestAddress(DATA)).unwrap();
    assert!(data[..512].iter().all(|byte| *byte == 5) && data[512..].iter().all(|byte| *byte == 6));
    rig.ram().write_slice(&[0xaa; 512], GuestAddress(DATA)).unwrap();
    assert_eq!(rig.request(WRITE, 63, 512, false), (OK, 1));
    let disk = rig.backend.disk.lock().unwrap();
    assert!(disk.bytes[63 * 512..].iter().all(|byte| *byte == 0xaa));
    assert_eq!(disk.calls, ["read 2560", "write 32256"]);
    let moved = BlkCounts { reads: 1, read_bytes: 1024, writes: 1, written_bytes: 512, ..BlkCounts::default() };
    assert_eq!(rig.blk.counters().now(), moved);
}

#[test]
fn every_framing_is_the_same_request() {
    let mut rig = Rig::new();
    rig.header(READ, 1);
    let framed = rig.chain(&[
        (HEADER, 3, false),
        (HEADER + 3, 13, false),
        (DATA, 100, true),
        (REGION_BORDER - 10, 400, true),
        (DATA + 100, 12, true),
        (STATUS, 1, true),
    ]);
    assert_eq!(framed, (OK, 513));
    assert_eq!(rig.ram().read_obj::<u8>(GuestAddress(REGION_BORDER + 5)).unwrap(), 1);
    rig.header(WRITE, 2);
    rig.ram().write_slice(&[9; 512], GuestAddress(HEADER + 16)).unwrap();
    assert_eq!(rig.chain(&[(HEADER, 16 + 512, false), (STATUS, 1, true)]), (OK, 1));
    assert!(rig.backend.disk.lock().unwrap().bytes[1024..1536].iter().all(|byte| *byte == 9));
    rig.header(READ, 3);
    // The status is the last byte of the data's buffer.
    assert_eq!(rig.chain(&[(HEADER, 16, false), (STATUS - 512, 513, true)]), (OK, 513));
}

#[test]
fn ranges_outside_of_the_disk_are_errors() {
    let mut rig = Rig::new();
    for (sector, length) in [(64, 512), (63, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (1 << 55, 512), (0, 511)] {
        assert_eq!(rig.request(READ, sector, length, true), (IOERR, 1), "{sector} {length}");
        assert_eq!(rig.request(WRITE, sector, length, false), (IOERR, 1), "{sector} {length}");
    }
    assert!(rig.calls().is_empty());
    assert_eq!(rig.blk.counters().now(), BlkCounts { errors: 12, ..BlkCounts::default() });
}

#[test]
fn flush_id_and_unknown_requests() {
    let mut rig = Rig::new();
    assert_eq!(rig.request(FLUSH, 0, 0, false), (OK, 1));
    assert_eq!(rig.calls(), ["flush"]);
    rig.ram().write_slice(&[0xff; 32], GuestAddress(DATA)).unwrap();
    assert_eq!(rig.request(GET_ID, 0, 20, true), (OK, 21));
    let mut id = [0; 21];
    rig.ram().read_slice(&mut id, GuestAddress(DATA)).unwrap();
    assert_eq!(&id, b"a-disk\0\0\0\0\0\0\0\0\0\0\0\0\0\0\xff");
    assert_eq!(rig.request(GET_ID, 0, 3, true), (OK, 4), "a short buffer gets a part");
    for kind in [2, 5, 10, 14, u32::MAX] {
        assert_eq!(rig.request(kind, 0, 512, true), (UNSUPP, 1), "{kind}");
    }
    assert_eq!(rig.blk.counters().now(), BlkCounts { flushes: 1, errors: 5, ..BlkCounts::default() });
}

#[test]
fn cut_headers_are_errors_and_a_missing_status_breaks_the_device() {
    let mut rig = Rig::new();
    rig.header(READ, 0);
    assert_eq!(rig.chain(&[(HEADER, 15, false), (STATUS, 1, true)]), (IOERR, 1));
    assert_eq!(rig.chain(&[(STATUS, 1, true)]), (IOERR, 1));
    rig.bench.rings[0].offer(&[(HEADER, 16, false), (DATA, 512, false)]);
    let fault = rig.blk.process(&mut rig.bench.io, 0).unwrap_err();
    assert!(matches!(fault, Fault::Ring(BrokenRing::Incomplete { queue: 0, .. })), "{fault}");
}

fn put_ranges(rig: &Rig, ranges: &[(u64, u32, u32)]) -> u32 {
    for (place, &(sector, sectors, flags)) in (DATA..).step_by(16).zip(ranges) {
        rig.ram().write_obj(sector, GuestAddress(place)).unwrap();
        rig.ram().write_obj(sectors, GuestAddress(place + 8)).unwrap();
        rig.ram().write_obj(flags, GuestAddress(place + 12)).unwrap();
    }
    u32::try_from(ranges.len() * 16).unwrap()
}

#[test]
fn discards_and_zeroes_reach_their_ranges() {
    let mut rig = Rig::new();
    let length = put_ranges(&rig, &[(8, 8, 0), (0, 1, 0), (64, 0, 0)]);
    assert_eq!(rig.request(DISCARD, 0, length, false), (OK, 1));
    assert_eq!(rig.calls(), ["discard 4096 4096", "discard 0 512", "discard 32768 0"]);
    let length = put_ranges(&rig, &[(1, 63, 0), (0, 64, 1)]);
    assert_eq!(rig.request(WRITE_ZEROES, 0, length, false), (OK, 1));
    assert_eq!(rig.calls(), ["zero 512 32256 Forbidden", "zero 0 32768 Allowed"]);
}

#[test]
fn bad_ranges_are_refused() {
    let mut rig = Rig::new();
    for kind in [DISCARD, WRITE_ZEROES] {
        for range in [(64, 1, 0), (0, 65, 0), (u64::MAX, 1, 0), (0, u32::MAX, 0)] {
            let length = put_ranges(&rig, &[range]);
            assert_eq!(rig.request(kind, 0, length, false), (IOERR, 1), "{kind} {range:?}");
        }
        for length in [0, 8, 17, 16 * (MAX_RANGES + 1)] {
            assert_eq!(rig.request(kind, 0, length, false), (IOERR, 1), "{kind} {length}");
        }
        let length = put_ranges(&rig, &[(0, 1, 2)]);
        assert_eq!(rig.request(kind, 0, length, false), (UNSUPP, 1), "{kind}");
    }
    let length = put_ranges(&rig, &[(0, 1, 1)]);
    assert_eq!(rig.request(DISCARD, 0, length, false), (UNSUPP, 1), "a discard has no unmap flag");
    assert!(rig.calls().is_empty());
}

#[test]
fn a_read_only_disk_takes_no_writes() {
    let mut rig = Rig::with(MemoryBackend::new(true), 1 << VIRTIO_BLK_F_RO);
    assert_eq!(rig.blk.features() & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_RO), 1 << VIRTIO_BLK_F_RO);
    assert_eq!(rig.request(READ, 0, 512, true), (OK, 513));
    rig.calls();
    let length = put_ranges(&rig, &[(0, 1, 0)]);
    for (kind, length) in [(WRITE, 512), (DISCARD, length), (WRITE_ZEROES, length)] {
        assert_eq!(rig.request(kind, 0, length, false), (IOERR, 1), "{kind}");
    }
    assert_eq!(rig.request(FLUSH, 0, 0, false), (OK, 1));
    rig.blk.flush().unwrap();
    assert!(rig.calls().is_empty());
}

#[test]
fn failures_of_the_host_are_errors_of_the_request() {
    let mut rig = Rig::new();
    rig.backend.disk.lock().unwrap().fails = true;
    assert_eq!(rig.request(READ, 0, 512, true), (IOERR, 1));
    assert_eq!(rig.request(WRITE, 0, 512, false), (IOERR, 1));
    assert_eq!(rig.request(FLUSH, 0, 0, false), (IOERR, 1));
    let length = put_ranges(&rig, &[(0, 1, 0)]);
    assert_eq!(rig.request(DISCARD, 0, length, false), (IOERR, 1));
    assert_eq!(rig.request(WRITE_ZEROES, 0, length, false), (IOERR, 1));
    rig.backend.disk.lock().unwrap().fails = false;
    assert_eq!(rig.request(READ, 0, 512, true), (OK, 513));
}

#[test]
fn without_the_flush_feature_every_write_is_durable() {
    let mut rig = Rig::with(MemoryBackend::new(false), 0);
    assert_eq!(rig.request(WRITE, 0, 512, false), (OK, 1));
    assert_eq!(rig.calls(), ["write 0", "flush"]);
    assert_eq!(rig.request(READ, 0, 512, true), (OK, 513));
    assert_eq!(rig.calls(), ["read 0"]);
}

#[test]
fn the_configuration_space_says_what_is_enforced() {
    let rig = Rig::new();
    let mut config = [0xff; 64];
    rig.blk.read_config(0, &mut config);
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(word(0), 64);
    assert_eq!((word(12), word(20)), (SEGMENTS, 512));
    assert_eq!((word(36), word(40), word(44)), (MAX_DISCARD, MAX_RANGES, 8));
    assert_eq!((word(48), word(52), config[56]), (MAX_WRITE_ZEROES, MAX_RANGES, 1));
    assert_eq!(word(60), 0, "beyond its end");
    assert_eq!(rig.blk.device_type(), 2);
}

#[test]
fn a_long_queue_is_served_in_turns() {
    let mut rig = Rig::new();
    rig.header(FLUSH, 0);
    for _ in 0..32 {
        rig.bench.rings[0].offer(&[(HEADER, 16, false), (STATUS, 1, true)]);
    }
    assert_eq!(rig.blk.process(&mut rig.bench.io, 0).unwrap(), Progress::Idle);
    assert_eq!(rig.bench.rings[0].completed().len(), 32);
    assert!(rig.bench.interrupted());
}

fn parts(ram: &GuestRam) -> MmioParts {
    let irq = EventFd::new(0).unwrap();
    let (worker, on_failure) = (Worker::spawn("blk0", || {}).unwrap(), FailureListener::new(|_| {}));
    MmioParts { id: "blk0".into(), ram: ram.clone(), irq, worker, on_failure }
}

fn blk_parts(backend: &MemoryBackend) -> BlkParts {
    BlkParts { backend: Box::new(backend.clone()), serial: "blk0".into() }
}

#[test]
fn a_disk_moves_with_its_requests() {
    let (ram, backend) = (ram(), MemoryBackend::new(false));
    let mut rings = [DriverRing::new(&ram, 0, 64)];
    let mmio = Mmio::new(Blk::new(blk_parts(&backend)), parts(&ram)).unwrap();
    let driver = Driver { mmio: &mmio };
    driver.bring_up(VERSION_1 | 1 << VIRTIO_BLK_F_FLUSH, &rings);
    mmio.quiesce(Duration::from_secs(1)).unwrap();
    ram.write_obj(READ, GuestAddress(HEADER)).unwrap();
    ram.write_obj(7u64, GuestAddress(HEADER + 8)).unwrap();
    rings[0].offer(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    let mut state = SavedState::new();
    mmio.save(&mut state).unwrap();
    mmio.release();
    drop(mmio);

    let mut state = SavedState::decode(&state.encode()).unwrap();
    let mmio = Mmio::<Blk>::restore(&mut state, blk_parts(&backend), parts(&ram)).unwrap();
    mmio.reacquire().unwrap();
    mmio.resume();
    wait_until("the read is done", || rings[0].completed() == [(0, 513)]);
    assert_eq!(ram.read_obj::<u8>(GuestAddress(DATA)).unwrap(), 7);
    assert_eq!(backend.disk.lock().unwrap().calls, ["flush", "release", "reacquire", "read 3584"]);
}

fn saved() -> BlkSavedV1 {
    let queue = QueueSavedV1 {
        size: 256,
        ready: false,
        descriptors: 0,
        available: 0,
        used: 0,
        next_available: 0,
        next_used: 0,
        event_index: false,
    };
    let transport = MmioSavedV1 {
        device_status: 1,
        device_features_select: 0,
        driver_features_select: 0,
        driver_features: 0,
        queue_select: 0,
        interrupt_status: 0,
        config_generation: 0,
        queues: vec![queue],
    };
    BlkSavedV1 { transport, capacity: SECTORS, read_only: false }
}

/// The bytes of the first released version: a change here is a break of the format.
#[test]
fn golden_bytes() {
    let mut state = SavedState::new();
    state.put("blk0", &saved()).unwrap();
    let golden = b"GWSTATE1\x01\0\0\0\x04\0blk0\x0a\0virtio-blk\x01\0\x13\0\0\0\
        \x01\0\0\0\0\0\0\x01\x80\x02\0\0\0\0\0\0\0\x40\0";
    assert_eq!(state.encode(), golden);
}

#[test]
fn another_disk_than_the_saved_one_is_refused() {
    let backend = MemoryBackend::new(false);
    let differs = |saved| Blk::restore("blk0", saved, blk_parts(&backend)).unwrap_err().to_string();
    let error = differs(BlkSavedV1 { capacity: 128, ..saved() });
    assert_eq!(error, "Device blk0 was saved with a capacity in sectors of 0x80, but here it has 0x40");
    assert!(differs(BlkSavedV1 { read_only: true, ..saved() }).contains("read-only"));
    assert_eq!(Blk::restore("blk0", saved(), blk_parts(&backend)).unwrap().1, saved().transport);
}

/// Addresses and lengths in and around memory.
fn place() -> impl Strategy<Value = u64> {
    prop_oneof![Just(HEADER), Just(DATA), Just(STATUS), 0..RAM_BYTES, RAM_BYTES - 32..RAM_BYTES + 32, any::<u64>()]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![Just(1), Just(16), Just(512), 0..2048u32, any::<u32>()]
}

proptest! {
    /// Whatever a driver writes, a request is answered or the device breaks; it neither panics nor hangs.
    #[test]
    fn any_ring_is_survived(
        descriptors in prop::collection::vec((place(), length(), 0..8u16, 0..18u16), 16),
        heads in prop::collection::vec(0..18u16, 1..16),
        header in (0..16u32, prop_oneof![0..70u64, any::<u64>()]),
        jump in prop_oneof![9 => Just(0), 1 => any::<u16>()],
    ) {
        let mut rig = Rig::new();
        rig.header(header.0, header.1);
        let ring = &mut rig.bench.rings[0];
        for (index, (address, length, flags, next)) in (0..).zip(descriptors) {
            ring.descriptor(index, address, length, flags, next);
        }
        let offered = u16::try_from(heads.len()).unwrap();
        heads.into_iter().for_each(|head| ring.make_available(head));
        ring.set_available_index(offered.wrapping_add(jump));
        match rig.blk.process(&mut rig.bench.io, 0) {
            Ok(progress) => prop_assert_eq!(progress, Progress::Idle),
            Err(fault) => prop_assert!(matches!(fault, Fault::Ring(_))),
        }
    }
}
