//! What every back end must do, whatever is behind it: each kind of back end runs this suite.
//!
//! Requests are made at random, many side by side, and compared with a model that does the same in memory. Tests with other
//! programs' servers run it too, by the feature `conformance`.

#![expect(clippy::unwrap_used, reason = "all of it is a test")]

use crate::backend::{Access, Answer, Backend, Channel, Completion, Durability, ExtentKind, Operation, SECTOR, Unmap};
use crate::blocking::Blocking;
use crate::memory::{Buffers, Scratch};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Requests of one batch keep to slots of this length, so that none depends on another.
const SLOT: u64 = 32 << 10;
const BATCHES: u64 = 120;
const IN_FLIGHT: u64 = 24;
/// A request takes milliseconds; a suite that waits for ever tells nothing.
const WITHIN: Duration = Duration::from_secs(30);

/// Numbers that look random and are the same each time (xorshift64*, Vigna 2016).
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % limit
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| u8::try_from(self.below(256)).unwrap()).collect()
    }
}

/// The disk as it should be.
struct Model {
    bytes: Vec<u8>,
    /// Offset and length of what was discarded in this batch.
    discarded: Vec<(u64, u64)>,
}

/// A request that is in flight, and what is to be looked at afterwards.
enum Asked {
    Read { scratch: Arc<Scratch>, offset: u64, length: u64 },
    Write { offset: u64, bytes: Vec<u8> },
    Zero { offset: u64, length: u64 },
    Discard { offset: u64, length: u64 },
    Status { offset: u64, length: u64 },
    Flush,
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

/// Memory in pieces of odd lengths.
fn scattered(random: &mut Random, scratch: &Arc<Scratch>) -> Buffers {
    let mut cuts = Vec::new();
    let mut at = 0;
    while at < scratch.length() {
        let length = index(1 + random.below(9000)).min(scratch.length() - at);
        cuts.push((at, length));
        at += length;
    }
    Buffers::scattered(scratch, &cuts)
}

/// Runs the whole suite on a disk that may be written, whose length is a multiple of 32 KiB, and 64 KiB at least. What is on
/// it is lost.
///
/// # Panics
/// If the back end breaks a rule.
pub fn holds(backend: &dyn Backend) {
    keeps_its_bytes(backend);
    durable_requests(backend);
    what_lies_outside_is_refused(backend);
    nothing_is_nothing(backend);
    a_released_disk_is_only_read(backend);
    channels_see_each_other(backend);
}

/// Runs the part of the suite that compares the disk with a model, with many requests in flight.
///
/// # Panics
/// If the back end breaks a rule.
pub fn keeps_its_bytes(backend: &dyn Backend) {
    let capacity = backend.geometry().capacity;
    let mut one = Blocking::open(backend).unwrap();
    let mut model = Model { bytes: vec![0; index(capacity)], discarded: Vec::new() };
    one.read(0, &mut model.bytes).unwrap();
    drop(one);
    let mut channel = backend.channel().unwrap();
    for batch in 0..BATCHES {
        let mut random = Random::new(batch + 1);
        let mut asked = BTreeMap::new();
        let slots = capacity / SLOT;
        let first = random.below(slots);
        for tag in 0..(1 + random.below(IN_FLIGHT)).min(slots) {
            let slot = (first + tag) % slots * SLOT;
            let start = random.below(SLOT / SECTOR);
            let length = (1 + random.below(SLOT / SECTOR - start)) * SECTOR;
            let (operation, what) = make(&mut random, slot + start * SECTOR, length);
            channel.submit(tag, operation);
            assert!(asked.insert(tag, what).is_none());
        }
        channel.commit();
        assert_eq!(channel.in_flight(), asked.len());
        let deadline = Instant::now() + WITHIN;
        while !asked.is_empty() {
            let mut done = Vec::new();
            channel.reap(&mut done);
            let any = !done.is_empty();
            for Completion { tag, outcome } in done {
                let what = asked.remove(&tag).expect("each is completed once");
                model.look(what, outcome.unwrap_or_else(|error| panic!("batch {batch}, request {tag}: {error}")));
            }
            if !any && !asked.is_empty() {
                assert!(Instant::now() < deadline, "batch {batch} does not end");
                let timeout = Timespec { tv_sec: 1, tv_nsec: 0 };
                poll(&mut [PollFd::from_borrowed_fd(channel.event(), PollFlags::IN)], Some(&timeout)).unwrap();
            }
        }
        assert_eq!(channel.in_flight(), 0);
        for (offset, length) in std::mem::take(&mut model.discarded) {
            let scratch = Scratch::new(index(length));
            read_whole(&mut *channel, offset, &scratch);
            let mut scratch = scratch;
            model.range(offset, length).copy_from_slice(scratch.bytes().unwrap());
        }
    }
    drop(channel);
    let mut bytes = vec![0xff; index(capacity)];
    Blocking::open(backend).unwrap().read(0, &mut bytes).unwrap();
    assert!(bytes == model.bytes, "the disk is as the model");
}

/// One read, waited for.
fn read_whole(channel: &mut dyn Channel, offset: u64, scratch: &Arc<Scratch>) {
    channel.submit(0, Operation::Read { offset, into: Buffers::of(scratch) });
    channel.commit();
    let (mut done, deadline) = (Vec::new(), Instant::now() + WITHIN);
    loop {
        channel.reap(&mut done);
        if let Some(Completion { outcome, .. }) = done.pop() {
            outcome.unwrap();
            return;
        }
        assert!(Instant::now() < deadline, "a read does not end");
        let timeout = Timespec { tv_sec: 1, tv_nsec: 0 };
        poll(&mut [PollFd::from_borrowed_fd(channel.event(), PollFlags::IN)], Some(&timeout)).unwrap();
    }
}

fn make(random: &mut Random, offset: u64, length: u64) -> (Operation, Asked) {
    let durability = if random.below(4) == 0 { Durability::Durable } else { Durability::Cached };
    match random.below(12) {
        0..4 => {
            let scratch = Scratch::new(index(length));
            let into = scattered(random, &scratch);
            (Operation::Read { offset, into }, Asked::Read { scratch, offset, length })
        }
        4..8 => {
            let bytes = random.bytes(index(length));
            let scratch = Scratch::copy_of(&bytes);
            let from = scattered(random, &scratch);
            (Operation::Write { offset, from, durability }, Asked::Write { offset, bytes })
        }
        8 => {
            let unmap = if random.below(2) == 0 { Unmap::Allowed } else { Unmap::Forbidden };
            (Operation::WriteZeroes { offset, length, unmap, durability }, Asked::Zero { offset, length })
        }
        9 => (Operation::Discard { offset, length }, Asked::Discard { offset, length }),
        10 => (Operation::Status { offset, length }, Asked::Status { offset, length }),
        _ => (Operation::Flush, Asked::Flush),
    }
}

impl Model {
    fn range(&mut self, offset: u64, length: u64) -> &mut [u8] {
        &mut self.bytes[index(offset)..index(offset + length)]
    }

    fn look(&mut self, asked: Asked, answer: Answer) {
        match asked {
            Asked::Read { mut scratch, offset, length } => {
                assert_eq!(answer, Answer::Done);
                let read = scratch.bytes().expect("the request has let go of its memory");
                assert!(read == self.range(offset, length), "a read of {length} at {offset}");
            }
            Asked::Write { offset, bytes } => {
                assert_eq!(answer, Answer::Done);
                self.range(offset, bytes.len() as u64).copy_from_slice(&bytes);
            }
            Asked::Zero { offset, length } => {
                assert_eq!(answer, Answer::Done);
                self.range(offset, length).fill(0);
            }
            Asked::Discard { offset, length } => {
                assert_eq!(answer, Answer::Done);
                // Anything may be there now, but the model has to know.
                self.discarded.push((offset, length));
            }
            Asked::Status { offset, length } => {
                let Answer::Extents(extents) = answer else { panic!("a status brings extents") };
                let mut at = offset;
                for extent in extents {
                    assert!(extent.length > 0 && at + extent.length <= offset + length, "{extent:?} at {at}");
                    let zeroes = self.range(at, extent.length).iter().all(|byte| *byte == 0);
                    assert!(extent.kind == ExtentKind::Data || zeroes, "{extent:?} at {at}");
                    at += extent.length;
                }
                assert!(at > offset);
            }
            Asked::Flush => assert_eq!(answer, Answer::Done),
        }
    }
}

fn durable_requests(backend: &dyn Backend) {
    let mut one = Blocking::open(backend).unwrap();
    one.write(SECTOR, &[0x5a; 3 * 512], Durability::Durable).unwrap();
    one.write_zeroes(2 * SECTOR, SECTOR, Unmap::Forbidden, Durability::Durable).unwrap();
    one.flush().unwrap();
    let mut bytes = [0; 3 * 512];
    one.read(SECTOR, &mut bytes).unwrap();
    let expected = [[0x5a; 512], [0; 512], [0x5a; 512]].concat();
    assert_eq!(bytes, *expected);
}

fn what_lies_outside_is_refused(backend: &dyn Backend) {
    let capacity = backend.geometry().capacity;
    let mut one = Blocking::open(backend).unwrap();
    for offset in [capacity, u64::MAX - 511, 1 << 63] {
        assert!(one.read(offset, &mut [0; 512]).is_err(), "{offset}");
    }
    for offset in [u64::MAX - 511, 1 << 63] {
        assert!(one.write(offset, &[0; 512], Durability::Cached).is_err(), "{offset}");
        assert!(one.discard(offset, 512).is_err() && one.extents(offset, 512).is_err(), "{offset}");
    }
    one.read(0, &mut [0; 512]).unwrap();
}

fn nothing_is_nothing(backend: &dyn Backend) {
    let mut one = Blocking::open(backend).unwrap();
    one.discard(0, 0).unwrap();
    one.write_zeroes(0, 0, Unmap::Allowed, Durability::Cached).unwrap();
    let nothing = || Buffers::part_of(&Scratch::new(1), 0, 0);
    one.run(Operation::Read { offset: 0, into: nothing() }).unwrap();
    one.run(Operation::Write { offset: 0, from: nothing(), durability: Durability::Cached }).unwrap();
}

fn a_released_disk_is_only_read(backend: &dyn Backend) {
    assert_eq!(backend.geometry().access, Access::ReadWrite);
    let mut one = Blocking::open(backend).unwrap();
    one.write(0, &[1; 512], Durability::Cached).unwrap();
    backend.release();
    let refused = |outcome: io::Result<()>| assert!(outcome.is_err());
    refused(one.write(0, &[2; 512], Durability::Cached));
    refused(one.discard(0, 512));
    refused(one.write_zeroes(0, 512, Unmap::Allowed, Durability::Cached));
    let mut bytes = [0; 512];
    one.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [1; 512]);
    backend.reacquire().unwrap();
    one.write(0, &[3; 512], Durability::Cached).unwrap();
}

fn channels_see_each_other(backend: &dyn Backend) {
    if backend.geometry().channels < 2 {
        assert!({
            let _held = backend.channel().unwrap();
            backend.channel().is_err()
        });
        backend.channel().unwrap();
        return;
    }
    let mut two = [Blocking::open(backend).unwrap(), Blocking::open(backend).unwrap()];
    for turn in 0..20_u8 {
        let [writer, reader] = &mut two;
        writer.write(u64::from(turn) * SECTOR, &[turn; 512], Durability::Cached).unwrap();
        let mut bytes = [0xff; 512];
        reader.read(u64::from(turn) * SECTOR, &mut bytes).unwrap();
        assert_eq!(bytes, [turn; 512]);
        two.swap(0, 1);
    }
}
