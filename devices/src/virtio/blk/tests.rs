//! The disk by its requests, on a back end in memory that can be told to fail, and to keep requests in flight.

use super::*;
use crate::virtio::testing::{Bench, Driver, DriverRing, FREE, RAM_BYTES, REGION_BORDER, VERSION_1, ram, wait_until};
use crate::virtio::{BrokenRing, FailureListener, Mmio, MmioParts, QueueSavedV1};
use crate::worker::Worker;
use crate::{Device, GuestRam};
use block::{Answer, Channel, Completion, Geometry, Operation};
use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};
use saved::SavedState;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

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
    /// Whether requests stay in flight.
    holds: bool,
    /// How many channels are open.
    channels: usize,
}

#[derive(Debug, Clone)]
struct MemoryBackend {
    disk: Arc<Mutex<Disk>>,
    access: Access,
    held_by_channels: bool,
}

impl MemoryBackend {
    fn new(access: Access) -> Self {
        let bytes = (0..SECTORS * SECTOR).map(|at| u8::try_from(at / SECTOR).unwrap()).collect();
        let disk = Disk { bytes, calls: Vec::new(), fails: false, holds: false, channels: 0 };
        Self { disk: Arc::new(Mutex::new(disk)), access, held_by_channels: false }
    }
}

impl Disk {
    fn call(&mut self, call: String) -> io::Result<Answer> {
        self.calls.push(call);
        if self.fails { Err(io::Error::other("EIO")) } else { Ok(Answer::Done) }
    }

    fn execute(&mut self, operation: Operation) -> io::Result<Answer> {
        match operation {
            Operation::Read { offset, into } => {
                let done = self.call(format!("read {offset}"));
                into.write(0, &self.bytes[index(offset)..index(offset) + into.length()]);
                done
            }
            Operation::Write { offset, from, durability } => {
                let done = self.call(format!("write {offset} {durability:?}"));
                let end = index(offset) + from.length();
                from.read(0, &mut self.bytes[index(offset)..end]);
                done
            }
            Operation::Flush => self.call("flush".into()),
            Operation::Discard { offset, length } => self.call(format!("discard {offset} {length}")),
            Operation::WriteZeroes { offset, length, unmap, durability } => {
                self.call(format!("zero {offset} {length} {unmap:?} {durability:?}"))
            }
            Operation::Status { .. } => unreachable!("no driver asks for that"),
        }
    }
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

impl Backend for MemoryBackend {
    fn geometry(&self) -> Geometry {
        Geometry { capacity: SECTORS * SECTOR, access: self.access, channels: 8 }
    }
    fn channel(&self) -> io::Result<Box<dyn Channel>> {
        self.disk.lock().unwrap().channels += 1;
        let event = eventfd(0, EventfdFlags::empty())?;
        Ok(Box::new(MemoryChannel { disk: Arc::clone(&self.disk), submitted: Vec::new(), event }))
    }
    fn grow(&self, capacity: u64) -> io::Result<u64> {
        let mut disk = self.disk.lock().unwrap();
        if capacity < disk.bytes.len() as u64 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        disk.bytes.resize(index(capacity), 9);
        Ok(capacity)
    }
    fn is_held_by_channels(&self) -> bool {
        self.held_by_channels
    }
    fn release(&self) {
        self.disk.lock().unwrap().call("release".into()).unwrap();
    }
    fn reacquire(&self) -> io::Result<()> {
        self.disk.lock().unwrap().call("reacquire".into()).map(|_| ())
    }
}

#[derive(Debug)]
struct MemoryChannel {
    disk: Arc<Mutex<Disk>>,
    submitted: Vec<(u64, Operation)>,
    event: OwnedFd,
}

impl Channel for MemoryChannel {
    fn submit(&mut self, tag: u64, operation: Operation) {
        self.submitted.push((tag, operation));
    }
    fn commit(&mut self) {}
    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
    fn reap(&mut self, done: &mut Vec<Completion>) {
        let mut disk = self.disk.lock().unwrap();
        if !disk.holds {
            let execute = |(tag, operation)| Completion { tag, outcome: disk.execute(operation) };
            done.extend(self.submitted.drain(..).map(execute));
        }
    }
    fn in_flight(&self) -> usize {
        self.submitted.len()
    }
}

impl Drop for MemoryChannel {
    fn drop(&mut self) {
        self.disk.lock().unwrap().channels -= 1;
    }
}

struct Rig {
    bench: Bench,
    blk: Blk,
    backend: MemoryBackend,
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = self.blk.stop(&mut self.bench.io, Duration::from_secs(1));
    }
}

fn blk_parts(backend: &MemoryBackend) -> BlkParts {
    BlkParts {
        backend: Arc::new(backend.clone()),
        serial: "a-disk".into(),
        queues: 1,
        write_cache: WriteCache::Back,
        limits: Limits::default(),
        thread_start: || {},
    }
}

impl Rig {
    /// What was counted; how long it took is another matter.
    fn counts(&self) -> BlkCounts {
        BlkCounts { read_time: Duration::ZERO, write_time: Duration::ZERO, ..self.blk.counters().now() }
    }

    fn new() -> Self {
        Self::with(MemoryBackend::new(Access::ReadWrite), 1 << VIRTIO_BLK_F_FLUSH)
    }

    fn with(backend: MemoryBackend, features: u64) -> Self {
        let mut blk = Blk::new(blk_parts(&backend)).unwrap();
        let mut bench = Bench::new(&[64], VERSION_1 | features);
        blk.start(&mut bench.io).unwrap();
        Self { bench, blk, backend }
    }

    fn ram(&self) -> &GuestRam {
        &self.bench.io.ram
    }

    fn header(&self, kind: u32, sector: u64) {
        self.ram().write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.ram().write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        self.ram().write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
    }

    fn kick(&self) {
        self.bench.io.queues[0].kick();
    }

    /// Offers a chain and has it processed: the status byte, and the bytes in the used ring.
    fn chain(&mut self, buffers: &[(u64, u32, bool)]) -> (u8, u32) {
        let head = self.bench.rings[0].offer(buffers);
        self.kick();
        let mut completed = Vec::new();
        wait_until("the request is answered", || {
            completed = self.bench.rings[0].completed();
            !completed.is_empty()
        });
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

    /// The fault that the transport would hear of.
    fn fault(&mut self) -> Option<Fault> {
        self.blk.on_source(&mut self.bench.io, BROKEN).err()
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
    assert_eq!(disk.calls, ["read 2560", "write 32256 Cached"]);
    let moved = BlkCounts { reads: 1, read_bytes: 1024, writes: 1, written_bytes: 512, ..BlkCounts::default() };
    assert_eq!(rig.counts(), moved);
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
    assert_eq!(rig.counts(), BlkCounts { errors: 12, ..BlkCounts::default() });
}

#[test]
fn a_transfer_has_an_end() {
    let backend = MemoryBackend::new(Access::ReadWrite);
    let mut rig = Rig::with(backend, 1 << VIRTIO_BLK_F_FLUSH);
    rig.blk.grow(&mut rig.bench.io, 64 << 20).unwrap();
    // Buffers that are the same memory, 704 KiB each.
    let mut read = |count: usize| {
        rig.header(READ, 0);
        rig.chain(&[&[(HEADER, 16, false)], &vec![(DATA, 0xb_0000, true); count][..], &[(STATUS, 1, true)]].concat()).0
    };
    assert_eq!([read(46), read(47)], [OK, IOERR]);
    assert!((46..47).contains(&(MAX_TRANSFER / 0xb_0000)));
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
    assert_eq!(rig.counts(), BlkCounts { flushes: 1, errors: 5, ..BlkCounts::default() });
}

#[test]
fn cut_headers_are_errors_and_a_missing_status_breaks_the_device() {
    let mut rig = Rig::new();
    rig.header(READ, 0);
    assert_eq!(rig.chain(&[(HEADER, 15, false), (STATUS, 1, true)]), (IOERR, 1));
    assert_eq!(rig.chain(&[(STATUS, 1, true)]), (IOERR, 1));
    rig.bench.rings[0].offer(&[(HEADER, 16, false), (DATA, 512, false)]);
    rig.kick();
    let mut fault = None;
    wait_until("the device is broken", || {
        fault = rig.fault();
        fault.is_some()
    });
    assert!(matches!(fault, Some(Fault::Ring(BrokenRing::Incomplete { queue: 0, .. }))), "{fault:?}");
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
    assert_eq!(rig.calls(), ["zero 512 32256 Forbidden Cached", "zero 0 32768 Allowed Cached"]);
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
    let mut rig = Rig::with(MemoryBackend::new(Access::ReadOnly), 1 << VIRTIO_BLK_F_RO);
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
    let mut rig = Rig::with(MemoryBackend::new(Access::ReadWrite), 0);
    assert_eq!(rig.request(WRITE, 0, 512, false), (OK, 1));
    assert_eq!(rig.calls(), ["write 0 Durable"]);
    let length = put_ranges(&rig, &[(0, 8, 1)]);
    assert_eq!(rig.request(WRITE_ZEROES, 0, length, false), (OK, 1));
    assert_eq!(rig.calls(), ["zero 0 4096 Allowed Durable"]);
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
    assert_eq!((word(8), word(12), word(20)), (SEGMENT, SEGMENTS, 512));
    assert_eq!((word(36), word(40), word(44)), (MAX_DISCARD, MAX_RANGES, 8));
    assert_eq!((word(48), word(52), config[56]), (MAX_WRITE_ZEROES, MAX_RANGES, 1));
    assert_eq!(word(60), 0, "beyond its end");
    assert_eq!(rig.blk.device_type(), 2);
}

#[test]
fn a_full_ring_is_answered_with_few_interrupts() {
    let mut rig = Rig::new();
    rig.header(FLUSH, 0);
    for _ in 0..32 {
        rig.bench.rings[0].offer(&[(HEADER, 16, false), (STATUS, 1, true)]);
    }
    rig.kick();
    let mut answered = 0;
    wait_until("all are answered", || {
        answered += rig.bench.rings[0].completed().len();
        answered == 32
    });
    wait_until("the driver is interrupted", || rig.bench.interrupted());
}

#[test]
fn what_is_read_into_memory_is_marked_dirty_and_nothing_else() {
    let mut rig = Rig::new();
    let is_dirty = |rig: &Rig, address: u64| {
        let mut slices = GuestMemoryBackend::get_slices(rig.ram(), GuestAddress(address), 1);
        slices.all(|slice| slice.unwrap().bitmap().dirty_at(0))
    };
    assert_eq!(rig.request(WRITE, 0, 4096, false), (OK, 1));
    assert!(!is_dirty(&rig, DATA), "a write to the disk reads memory");
    assert_eq!(rig.request(READ, 0, 0x1800, true), (OK, 0x1801));
    let dirty = [0, 0x1000, 0x2000].map(|offset| is_dirty(&rig, DATA + offset));
    assert_eq!(dirty, [true, true, false]);
}

#[test]
fn a_disk_stops_when_its_requests_are_done_and_not_before() {
    let mut rig = Rig::new();
    rig.backend.disk.lock().unwrap().holds = true;
    rig.header(READ, 1);
    rig.bench.rings[0].offer(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    rig.kick();
    let mut busy = 0;
    wait_until("the request is in flight", || {
        busy = rig.blk.stop(&mut rig.bench.io, Duration::from_millis(20)).err().unwrap_or(0);
        if busy == 0 {
            rig.blk.start(&mut rig.bench.io).unwrap();
            rig.kick();
        }
        busy == 1
    });
    assert!(rig.bench.rings[0].completed().is_empty());
    rig.backend.disk.lock().unwrap().holds = false;
    rig.blk.stop(&mut rig.bench.io, Duration::from_secs(5)).unwrap();
    assert_eq!(rig.bench.rings[0].completed(), [(0, 513)]);
    rig.header(READ, 2);
    rig.bench.rings[0].offer(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    rig.kick();
    std::thread::sleep(Duration::from_millis(20));
    assert!(rig.bench.rings[0].completed().is_empty(), "a stopped disk does nothing");
    rig.blk.flush().unwrap();
    rig.blk.start(&mut rig.bench.io).unwrap();
    rig.kick();
    wait_until("it goes on where it was", || rig.bench.rings[0].completed() == [(3, 513)]);
}

#[test]
fn what_holds_the_disk_is_closed_when_it_is_given_up() {
    let backend = MemoryBackend { held_by_channels: true, ..MemoryBackend::new(Access::ReadWrite) };
    let channels = || backend.disk.lock().unwrap().channels;
    let mut rig = Rig::with(backend.clone(), 1 << VIRTIO_BLK_F_FLUSH);
    assert_eq!(rig.request(READ, 5, 512, true), (OK, 513));
    rig.blk.stop(&mut rig.bench.io, Duration::from_secs(5)).unwrap();
    rig.blk.flush().unwrap();
    assert_eq!(channels(), 1);
    rig.blk.release();
    assert_eq!(channels(), 0);
    rig.blk.reacquire().unwrap();
    rig.blk.start(&mut rig.bench.io).unwrap();
    assert_eq!((rig.request(READ, 6, 512, true), channels()), ((OK, 513), 1));
}

#[test]
fn queues_are_served_side_by_side() {
    let backend = MemoryBackend::new(Access::ReadWrite);
    let mut blk = Blk::new(BlkParts { queues: 4, ..blk_parts(&backend) }).unwrap();
    assert_eq!((blk.queue_max_sizes(), blk.features() & 1 << VIRTIO_BLK_F_MQ), (&[256; 4][..], 1 << VIRTIO_BLK_F_MQ));
    let mut config = [0; 36];
    blk.read_config(0, &mut config);
    assert_eq!(u16::from_le_bytes(config[34..36].try_into().unwrap()), 4);
    let mut bench = Bench::new(&[64; 4], VERSION_1 | 1 << VIRTIO_BLK_F_FLUSH);
    blk.start(&mut bench.io).unwrap();
    for queue in 0..4_u64 {
        let at = |offset| FREE + 0x4000 * queue + offset;
        bench.io.ram.write_obj(READ, GuestAddress(at(0))).unwrap();
        bench.io.ram.write_obj(queue, GuestAddress(at(8))).unwrap();
        bench.rings[index(queue)].offer(&[(at(0), 16, false), (at(0x1000), 512, true), (at(0x800), 1, true)]);
        bench.io.queues[index(queue)].kick();
    }
    for queue in 0..4_u64 {
        wait_until("it is read", || bench.rings[index(queue)].completed() == [(0, 513)]);
        let first: u8 = bench.io.ram.read_obj(GuestAddress(FREE + 0x4000 * queue + 0x1000)).unwrap();
        assert_eq!(u64::from(first), queue);
    }
    blk.stop(&mut bench.io, Duration::from_secs(5)).unwrap();
}

#[test]
fn limits_hold() {
    let backend = MemoryBackend::new(Access::ReadWrite);
    let limits = Limits { bytes: None, requests: std::num::NonZeroU64::new(100) };
    let mut blk = Blk::new(BlkParts { limits, ..blk_parts(&backend) }).unwrap();
    let mut bench = Bench::new(&[64], VERSION_1 | 1 << VIRTIO_BLK_F_FLUSH);
    blk.start(&mut bench.io).unwrap();
    bench.io.ram.write_obj(FLUSH, GuestAddress(HEADER)).unwrap();
    for _ in 0..20 {
        bench.rings[0].offer(&[(HEADER, 16, false), (STATUS, 1, true)]);
    }
    let begun = Instant::now();
    bench.io.queues[0].kick();
    let mut answered = 0;
    wait_until("all are answered", || {
        answered += bench.rings[0].completed().len();
        answered == 20
    });
    assert!(begun.elapsed() >= Duration::from_millis(80), "ten at once, then ten in a tenth of a second");
    blk.stop(&mut bench.io, Duration::from_secs(5)).unwrap();
}

/// No kick comes while a queue is held back, and it may be free to go on between two looks at the clock.
#[test]
fn who_is_held_back_for_a_moment_goes_on() {
    let backend = MemoryBackend::new(Access::ReadWrite);
    let limits = Limits { bytes: None, requests: std::num::NonZeroU64::new(50_000) };
    let mut blk = Blk::new(BlkParts { limits, ..blk_parts(&backend) }).unwrap();
    let mut bench = Bench::new(&[64], VERSION_1 | 1 << VIRTIO_BLK_F_FLUSH);
    blk.start(&mut bench.io).unwrap();
    bench.io.ram.write_obj(FLUSH, GuestAddress(HEADER)).unwrap();
    for request in 0..40_000 {
        bench.rings[0].offer(&[(HEADER, 16, false), (STATUS, 1, true)]);
        std::sync::atomic::fence(Ordering::SeqCst);
        if bench.rings[0].used_flags() == 0 {
            bench.io.queues[0].kick();
        }
        let until = Instant::now() + Duration::from_secs(10);
        while bench.rings[0].completed().is_empty() {
            assert!(Instant::now() < until, "request {request} is never answered");
            std::thread::yield_now();
        }
    }
    blk.stop(&mut bench.io, Duration::from_secs(5)).unwrap();
}

#[test]
fn a_disk_that_grows_says_so() {
    let mut rig = Rig::new();
    assert_eq!(rig.request(READ, 64, 512, true), (IOERR, 1));
    rig.bench.interrupted();
    assert!(rig.blk.grow(&mut rig.bench.io, 1).is_err() && !rig.bench.interrupted());
    assert_eq!(rig.blk.grow(&mut rig.bench.io, 128 * 512).unwrap(), 128 * 512);
    assert!(rig.bench.interrupted());
    let mut capacity = [0; 8];
    rig.blk.read_config(0, &mut capacity);
    assert_eq!((u64::from_le_bytes(capacity), rig.blk.capacity()), (128, 128 * 512));
    assert_eq!(rig.request(READ, 127, 512, true), (OK, 513));
}

#[test]
fn a_disk_without_a_cache_offers_no_flush() {
    let backend = MemoryBackend::new(Access::ReadWrite);
    let blk = Blk::new(BlkParts { write_cache: WriteCache::Through, ..blk_parts(&backend) }).unwrap();
    assert_eq!(blk.features() & (1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_MQ), 0);
}

fn parts(ram: &GuestRam) -> MmioParts {
    let irq = EventFd::new(0).unwrap();
    let (worker, on_failure) = (Worker::spawn("blk0", || {}).unwrap(), FailureListener::new(|_| {}));
    MmioParts { id: "blk0".into(), ram: ram.clone(), irq, worker, on_failure }
}

#[test]
fn a_disk_moves_with_its_requests() {
    let (ram, backend) = (ram(), MemoryBackend::new(Access::ReadWrite));
    let mut rings = [DriverRing::new(&ram, 0, 64)];
    let mmio = Mmio::new(Blk::new(blk_parts(&backend)).unwrap(), parts(&ram)).unwrap();
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
    mmio.quiesce(Duration::from_secs(1)).unwrap();
    assert_eq!(ram.read_obj::<u8>(GuestAddress(DATA)).unwrap(), 7);
    assert_eq!(backend.disk.lock().unwrap().calls, ["flush", "release", "reacquire", "read 3584", "flush"]);
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
    let backend = MemoryBackend::new(Access::ReadWrite);
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
        rig.kick();
        // It stops when all that it took is done, or broke.
        prop_assert_eq!(rig.blk.stop(&mut rig.bench.io, Duration::from_secs(5)), Ok(()));
        if let Some(fault) = rig.fault() {
            prop_assert!(matches!(fault, Fault::Ring(_)));
        }
    }
}
