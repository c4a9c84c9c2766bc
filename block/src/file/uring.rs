//! A channel by io_uring: requests go to the kernel in batches, one system call for many, and come back the same way.
//!
//! ```text
//! submit -> step --push--> submission ring --commit--> kernel --reap--> step is over: the next one, or the completion
//! ```
//!
//! A request is one step for the kernel, or a few: the rest of a short transfer, zeros that have to be written out, a sync
//! after zeros. Invariant: the memory of a step stays in `requests` until its completion was seen, also when the channel is
//! dropped.

#![expect(unsafe_code, reason = "the kernel works on memory by pointers after the call has returned")]

use super::raw::{PUNCH, RawFile, has_no_holes, vectors, zeroing_mode};
use crate::backend::{Answer, Channel, Completion, Durability, Operation, Unmap};
use crate::memory::Buffers;
use io_uring::register::Restriction;
use io_uring::squeue::Entry;
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, Probe, opcode};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use slab::Slab;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

/// Steps that the kernel may be given with one call. A queue of a guest's disk has as many requests.
const ENTRIES: u32 = 256;
/// The longest transfer of one step in bytes, as the kernel moves no more by one call.
const LONGEST: usize = 1 << 30;
/// All that a ring is used for.
const STEPS: [u8; 6] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
];
/// How long is waited when the kernel takes nothing and owes nothing.
const PAUSE: Duration = Duration::from_millis(1);

pub(super) struct UringChannel {
    file: Arc<RawFile>,
    ring: IoUring,
    requests: Slab<Request>,
    /// Steps that wait for room in the submission ring, the oldest first.
    waiting: VecDeque<usize>,
    /// Steps in the submission ring that the kernel has not taken yet.
    pushed: usize,
    /// Steps that the kernel has taken and not answered.
    in_kernel: usize,
    /// What was over at once.
    ready: Vec<Completion>,
}

impl std::fmt::Debug for UringChannel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { file, ring: _, requests, waiting, pushed, in_kernel, ready } = self;
        f.debug_struct("UringChannel")
            .field("file", file)
            .field("requests", requests)
            .field("waiting", waiting)
            .field("pushed", pushed)
            .field("in_kernel", in_kernel)
            .field("ready", ready)
            .finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Request {
    tag: u64,
    step: Step,
}

/// What the kernel does next for a request.
#[derive(Debug)]
enum Step {
    Read { offset: u64, into: Buffers },
    Write { offset: u64, from: Buffers, durability: Durability },
    Sync,
    Discard { offset: u64, length: u64 },
    Zero { offset: u64, length: u64, unmap: Unmap, durability: Durability },
}

/// How a request goes on after a step.
enum Next {
    /// The same step again, with what is left of it.
    Again,
    Step(Step),
    Over(io::Result<Answer>),
}

impl UringChannel {
    /// # Errors
    /// That the kernel has no io_uring, permits none, or has one that lacks what is needed.
    pub(super) fn open(file: Arc<RawFile>) -> io::Result<Self> {
        let ring = IoUring::builder().setup_cqsize(2 * ENTRIES).setup_r_disabled().build(ENTRIES)?;
        let lacks = |what| io::Error::new(io::ErrorKind::Unsupported, format!("The kernel's io_uring lacks {what}"));
        // Completions are not dropped, and what the kernel was told is its own after the call (since 5.5).
        if !ring.params().is_feature_nodrop() || !ring.params().is_feature_submit_stable() {
            return Err(lacks("stable submissions"));
        }
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !STEPS.into_iter().all(|code| probe.is_supported(code)) {
            return Err(lacks("reads and writes without vectors"));
        }
        // What a ring does is not seen by filters of system calls: so it does nothing else, whoever gets hold of it.
        let mut restrictions = STEPS.map(Restriction::sqe_op);
        ring.submitter().register_restrictions(&mut restrictions)?;
        ring.submitter().register_enable_rings()?;
        Ok(Self {
            file,
            ring,
            requests: Slab::new(),
            waiting: VecDeque::new(),
            pushed: 0,
            in_kernel: 0,
            ready: Vec::new(),
        })
    }

    /// The first step of a request, or its end.
    fn first(&self, operation: Operation) -> Next {
        if let Err(refused) = self.file.admit(&operation) {
            return Next::Over(Err(refused));
        }
        match operation {
            Operation::Read { into: memory, .. } | Operation::Write { from: memory, .. } if memory.length() == 0 => {
                Next::Over(Ok(Answer::Done))
            }
            // The kernel refuses nothing as a mistake.
            Operation::Discard { length: 0, .. } | Operation::WriteZeroes { length: 0, .. } => {
                Next::Over(Ok(Answer::Done))
            }
            Operation::Read { offset, into } => Next::Step(Step::Read { offset, into }),
            Operation::Write { offset, from, durability } => Next::Step(Step::Write { offset, from, durability }),
            Operation::Flush => Next::Step(Step::Sync),
            Operation::Discard { offset, length } => Next::Step(Step::Discard { offset, length }),
            Operation::WriteZeroes { offset, length, unmap, durability } => {
                Next::Step(Step::Zero { offset, length, unmap, durability })
            }
            // The file system knows it by heart.
            Operation::Status { offset, length } => Next::Over(self.file.extents(offset, length).map(Answer::Extents)),
        }
    }

    /// What the kernel is told of the step of request `key`.
    fn entry(&self, key: usize) -> Entry {
        let entry = match &self.requests[key].step {
            Step::Read { offset, into } => {
                let file = Fd(self.file.descriptor(into, *offset));
                match into.pieces() {
                    [piece] => opcode::Read::new(file, piece.start(), length(piece.length())).offset(*offset).build(),
                    pieces => {
                        let (vectors, count) = vectors(pieces);
                        opcode::Readv::new(file, vectors, count.unsigned_abs()).offset(*offset).build()
                    }
                }
            }
            Step::Write { offset, from, durability } => {
                let file = Fd(self.file.descriptor(from, *offset));
                let flags = match durability {
                    Durability::Cached => 0,
                    Durability::Durable => libc::RWF_DSYNC,
                };
                match from.pieces() {
                    [piece] => opcode::Write::new(file, piece.start(), length(piece.length()))
                        .offset(*offset)
                        .rw_flags(flags)
                        .build(),
                    pieces => {
                        let (vectors, count) = vectors(pieces);
                        opcode::Writev::new(file, vectors, count.unsigned_abs()).offset(*offset).rw_flags(flags).build()
                    }
                }
            }
            Step::Sync => opcode::Fsync::new(Fd(self.file.plain_descriptor())).flags(FsyncFlags::DATASYNC).build(),
            Step::Discard { offset, length } => self.fallocate(PUNCH, *offset, *length),
            Step::Zero { offset, length, unmap, durability: _ } => {
                self.fallocate(zeroing_mode(*unmap), *offset, *length)
            }
        };
        entry.user_data(key as u64)
    }

    fn fallocate(&self, mode: FallocateFlags, offset: u64, length: u64) -> Entry {
        let mode = i32::try_from(mode.bits()).expect("modes are small");
        opcode::Fallocate::new(Fd(self.file.plain_descriptor()), length).offset(offset).mode(mode).build()
    }

    /// Puts the step of request `key` into the submission ring, if there is room.
    fn try_push(&mut self, key: usize) -> bool {
        let entry = self.entry(key);
        // SAFETY: the memory that the entry names belongs to a request in `requests`, which holds on to it until the
        // completion was seen: `reap` and `drop` take nothing out before. The vectors are needed only until the kernel has
        // taken the entry, and are in the request too. Descriptors are open as long as `file` lives.
        let pushed = unsafe { self.ring.submission().push(&entry) }.is_ok();
        self.pushed += usize::from(pushed);
        pushed
    }

    /// Puts the step of request `key` into the submission ring, or behind those that wait for room there.
    fn push(&mut self, key: usize) {
        if !self.waiting.is_empty() || !self.try_push(key) {
            self.waiting.push_back(key);
        }
    }

    /// Gives the kernel what was pushed, as far as it takes it.
    fn give(&mut self) {
        while self.pushed > 0 {
            match self.ring.submit() {
                Ok(taken) => {
                    self.pushed -= taken;
                    self.in_kernel += taken;
                    if taken == 0 && self.in_kernel > 0 {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // It is short of memory or of room for completions. It comes round when some of those are fetched.
                Err(_) if self.in_kernel > 0 => return,
                Err(error) => {
                    tracing::warn!(%error, "The kernel takes no requests for a disk; trying again");
                    std::thread::sleep(PAUSE);
                }
            }
            while let Some(&key) = self.waiting.front()
                && self.try_push(key)
            {
                self.waiting.pop_front();
            }
        }
    }

    /// What comes after a step of which the kernel says `result`.
    fn after(step: &mut Step, result: i32) -> Next {
        let Ok(moved) = usize::try_from(result) else {
            return Self::after_failure(step, io::Error::from_raw_os_error(-result));
        };
        match step {
            Step::Read { offset, into: memory } | Step::Write { offset, from: memory, durability: _ } => {
                if moved == 0 {
                    return Next::Over(Err(io::ErrorKind::UnexpectedEof.into()));
                }
                *offset += moved as u64;
                memory.advance(moved);
                if memory.length() > 0 { Next::Again } else { Next::Over(Ok(Answer::Done)) }
            }
            Step::Zero { durability: Durability::Durable, .. } => Next::Step(Step::Sync),
            Step::Sync | Step::Discard { .. } | Step::Zero { .. } => Next::Over(Ok(Answer::Done)),
        }
    }

    fn after_failure(step: &Step, error: io::Error) -> Next {
        let has_no_holes = Errno::from_io_error(&error).is_some_and(has_no_holes);
        match (error.kind(), step) {
            (io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock, _) => Next::Again,
            (_, Step::Discard { .. }) if has_no_holes => Next::Over(Ok(Answer::Done)),
            (_, &Step::Zero { offset, length, unmap: _, durability }) if has_no_holes => {
                Next::Step(Step::Write { offset, from: Buffers::zeroes(length), durability })
            }
            _ => Next::Over(Err(error)),
        }
    }

    fn settle(&mut self, key: usize, result: i32) {
        let request = &mut self.requests[key];
        match Self::after(&mut request.step, result) {
            Next::Again => self.push(key),
            Next::Step(step) => {
                request.step = step;
                self.push(key);
            }
            Next::Over(outcome) => {
                let tag = self.requests.remove(key).tag;
                self.ready.push(Completion { tag, outcome });
            }
        }
    }

    fn next_completion(&mut self) -> Option<(u64, i32)> {
        let entry = self.ring.completion().next()?;
        Some((entry.user_data(), entry.result()))
    }

    /// Looks at what the kernel has completed; whether there was anything.
    fn look(&mut self) -> bool {
        let mut any = false;
        // One at a time, because what comes next for it may need the ring.
        while let Some((key, result)) = self.next_completion() {
            any = true;
            self.in_kernel -= 1;
            self.settle(usize::try_from(key).expect("it is a key of this address space"), result);
        }
        any
    }
}

impl Channel for UringChannel {
    fn submit(&mut self, tag: u64, operation: Operation) {
        match self.first(operation) {
            Next::Step(step) => {
                let key = self.requests.insert(Request { tag, step });
                self.push(key);
            }
            Next::Over(outcome) => self.ready.push(Completion { tag, outcome }),
            Next::Again => unreachable!("no request begins with a step that was there already"),
        }
    }

    fn commit(&mut self) {
        self.give();
    }

    fn event(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring's descriptor is open as long as the ring lives, and `self` is borrowed as long as this.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    fn reap(&mut self, done: &mut Vec<Completion>) {
        while self.look() {
            self.give();
        }
        done.append(&mut self.ready);
    }

    fn in_flight(&self) -> usize {
        self.requests.len() + self.ready.len()
    }
}

impl Drop for UringChannel {
    fn drop(&mut self) {
        // Closing a ring does not wait for what is in it.
        while self.in_kernel > 0 {
            match self.ring.submit_and_wait(1) {
                Ok(taken) => {
                    self.pushed -= taken;
                    self.in_kernel += taken;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "A disk's requests do not end; their memory is left to the kernel");
                    std::mem::forget(std::mem::take(&mut self.requests));
                    return;
                }
            }
            self.in_kernel -= self.ring.completion().count();
        }
    }
}

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes.min(LONGEST)).expect("1 GiB fits")
}
