//! What was asked for and is not answered: requests of the caller, and the commands that each of them is.
//!
//! A request is one command, or several where the server takes none as long; one that must be durable is followed by a flush
//! where the server cannot do both at once. Commands outlive connections: those that are not over are sent again on the
//! next. Invariant: a request is completed once, when the last of its commands is over.

use super::super::wire::{command, transmission};
use super::haggling::Agreement;
use crate::backend::{Answer, Completion, Durability, Extent, ExtentKind, Operation, SECTOR, Unmap};
use crate::memory::Buffers;
use slab::Slab;
use std::io;
use std::time::Instant;

/// The longest range of one command without data, in bytes.
const MAX_RANGE: u64 = 1 << 30;
/// The longest range whose status is asked for: as many extents of 4 KiB as an answer has room for.
const MAX_STATUS: u64 = 64 << 20;
/// The most pieces with gaps between them in which the data of one read may come.
const MAX_PIECES: usize = 1024;
/// A command's cookie is its order, and below that its key.
const KEY_BITS: u32 = 20;

/// What a command does.
#[derive(Debug)]
pub(super) enum Verb {
    Read { offset: u64, into: Buffers },
    Write { offset: u64, from: Buffers, flags: u16 },
    Flush,
    Trim { offset: u64, length: u64 },
    WriteZeroes { offset: u64, length: u64, flags: u16 },
    Status { offset: u64, length: u64 },
}

/// One command.
#[derive(Debug)]
pub(super) struct Command {
    request: usize,
    order: u64,
    pub(super) since: Instant,
    pub(super) verb: Verb,
    /// What has come of a read's data: begin and end of each stretch within the command's memory, in order.
    filled: Vec<(usize, usize)>,
    pub(super) error: Option<io::Error>,
}

#[derive(Debug)]
struct Request {
    tag: u64,
    /// Commands that are not over.
    left: usize,
    error: Option<io::Error>,
    extents: Vec<Extent>,
    /// Whether a flush follows.
    then_flush: bool,
}

/// All of a channel's requests.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    requests: Slab<Request>,
    commands: Slab<Command>,
    made: u64,
    ready: Vec<Completion>,
}

impl Command {
    /// Takes note that `length` bytes of its data from `start` on have come.
    ///
    /// # Errors
    /// What is wrong with that.
    pub(super) fn fill(&mut self, start: usize, length: usize) -> Result<(), &'static str> {
        let end = start + length;
        let place = self.filled.partition_point(|&(begin, _)| begin < start);
        let overlaps = self.filled[..place].last().is_some_and(|&(_, before)| before > start)
            || self.filled.get(place).is_some_and(|&(after, _)| after < end);
        if overlaps {
            return Err("it sends data of a read twice");
        }
        match place.checked_sub(1).filter(|&before| self.filled[before].1 == start) {
            Some(before) => self.filled[before].1 = end,
            None if self.filled.len() == MAX_PIECES => return Err("it sends the data of a read in too many pieces"),
            None => self.filled.insert(place, (start, end)),
        }
        Ok(())
    }

    /// Whether all data of a read have come; all else has none.
    pub(super) fn is_full(&self) -> bool {
        let Verb::Read { into, .. } = &self.verb else { return true };
        self.filled.iter().map(|(start, end)| end - start).sum::<usize>() == into.length()
    }
}

impl Ledger {
    /// How many requests are not reaped.
    pub(super) fn in_flight(&self) -> usize {
        self.requests.len() + self.ready.len()
    }

    pub(super) fn reap(&mut self, done: &mut Vec<Completion>) {
        done.append(&mut self.ready);
    }

    /// Completes a request that never became one.
    pub(super) fn refuse(&mut self, tag: u64, error: io::Error) {
        self.ready.push(Completion { tag, outcome: Err(error) });
    }

    /// Takes a request on, and gives the keys of its commands, which are to be sent.
    pub(super) fn take_on(&mut self, tag: u64, operation: Operation, agreed: &Agreement) -> Vec<usize> {
        let Plan { verbs, then_flush, extents } = plan(operation, agreed);
        let request = self.requests.insert(Request { tag, left: verbs.len(), error: None, extents, then_flush });
        if verbs.is_empty() {
            return self.end(request).into_iter().collect();
        }
        verbs.into_iter().map(|verb| self.add(request, verb)).collect()
    }

    fn add(&mut self, request: usize, verb: Verb) -> usize {
        self.made += 1;
        let since = Instant::now();
        self.commands.insert(Command { request, order: self.made, since, verb, filled: Vec::new(), error: None })
    }

    pub(super) fn command(&self, key: usize) -> &Command {
        &self.commands[key]
    }

    pub(super) fn command_mut(&mut self, key: usize) -> &mut Command {
        &mut self.commands[key]
    }

    /// The cookie by which the server names a command.
    pub(super) fn cookie(&self, key: usize) -> u64 {
        self.commands[key].order << KEY_BITS | key as u64
    }

    /// The command with this cookie, if there is one.
    pub(super) fn find(&self, cookie: u64) -> Option<usize> {
        let key = usize::try_from(cookie & ((1 << KEY_BITS) - 1)).ok()?;
        let command = self.commands.get(key)?;
        (command.order == cookie >> KEY_BITS).then_some(key)
    }

    /// Notes what the server knows of the range that a command asked about.
    pub(super) fn learn(&mut self, key: usize, extents: Vec<Extent>) {
        let request = self.commands[key].request;
        self.requests[request].extents = extents;
    }

    /// Ends a command. If its request is to be flushed now, that command's key is given, to be sent.
    pub(super) fn over(&mut self, key: usize, outcome: io::Result<()>) -> Option<usize> {
        let Command { request: key, .. } = self.commands.remove(key);
        let request = &mut self.requests[key];
        request.left -= 1;
        if let Err(error) = outcome {
            request.error.get_or_insert(error);
        }
        if request.left == 0 { self.end(key) } else { None }
    }

    /// Ends a request whose commands are over, or begins with its flush.
    fn end(&mut self, key: usize) -> Option<usize> {
        let request = &mut self.requests[key];
        if request.error.is_none() && std::mem::take(&mut request.then_flush) {
            request.left = 1;
            return Some(self.add(key, Verb::Flush));
        }
        let Request { tag, error, extents, .. } = self.requests.remove(key);
        let outcome = match (error, extents.is_empty()) {
            (Some(error), _) => Err(error),
            (None, true) => Ok(Answer::Done),
            (None, false) => Ok(Answer::Extents(extents)),
        };
        self.ready.push(Completion { tag, outcome });
        None
    }

    /// The keys of all commands, in the order in which they were made, as though nothing had come of them yet.
    pub(super) fn begin_again(&mut self) -> Vec<usize> {
        let mut order: Vec<(u64, usize)> = Vec::with_capacity(self.commands.len());
        for (key, command) in &mut self.commands {
            command.filled.clear();
            command.error = None;
            order.push((command.order, key));
        }
        order.sort_unstable();
        order.into_iter().map(|(_, key)| key).collect()
    }

    /// Fails all requests.
    pub(super) fn fail(&mut self, why: impl Fn() -> io::Error) {
        self.commands.clear();
        for request in self.requests.drain() {
            self.ready.push(Completion { tag: request.tag, outcome: Err(why()) });
        }
    }

    /// Since when the oldest command is waiting.
    pub(super) fn oldest(&self) -> Option<Instant> {
        self.commands.iter().map(|(_, command)| command.since).min()
    }
}

/// How a request is done by a server.
struct Plan {
    verbs: Vec<Verb>,
    then_flush: bool,
    extents: Vec<Extent>,
}

fn plan(operation: Operation, agreed: &Agreement) -> Plan {
    let is_durable = |durability| durability == Durability::Durable;
    let fua = |durability| if is_durable(durability) && agreed.has(transmission::FUA) { command::FUA } else { 0 };
    let then_flush =
        |durability| is_durable(durability) && !agreed.has(transmission::FUA) && agreed.has(transmission::FLUSH);
    let verbs = |verbs| Plan { verbs, then_flush: false, extents: Vec::new() };
    let longest = u64::from(agreed.maximum) / SECTOR * SECTOR;
    match operation {
        Operation::Read { offset, into } => {
            let part = |(at, length)| Verb::Read { offset: offset + at, into: part_of(&into, at, length) };
            verbs(parts(into.length() as u64, longest).map(part).collect())
        }
        Operation::Write { offset, from, durability } => {
            writes(offset, &from, longest, fua(durability), then_flush(durability))
        }
        // Who has nothing to flush has no cache.
        Operation::Flush if !agreed.has(transmission::FLUSH) => verbs(Vec::new()),
        Operation::Flush => verbs(vec![Verb::Flush]),
        Operation::Discard { .. } if !agreed.has(transmission::TRIM) => verbs(Vec::new()),
        Operation::Discard { offset, length } => {
            let part = |(at, length)| Verb::Trim { offset: offset + at, length };
            verbs(parts(length, MAX_RANGE).map(part).collect())
        }
        Operation::WriteZeroes { offset, length, unmap: _, durability } if !agreed.has(transmission::WRITE_ZEROES) => {
            writes(offset, &Buffers::zeroes(length), longest, fua(durability), then_flush(durability))
        }
        Operation::WriteZeroes { offset, length, unmap, durability } => {
            let no_hole = match unmap {
                Unmap::Allowed => 0,
                Unmap::Forbidden => command::NO_HOLE,
            };
            let flags = no_hole | fua(durability);
            let part = |(at, length)| Verb::WriteZeroes { offset: offset + at, length, flags };
            let verbs = parts(length, MAX_RANGE).map(part).collect();
            Plan { verbs, then_flush: then_flush(durability), extents: Vec::new() }
        }
        Operation::Status { length, .. } if agreed.allocation.is_none() => {
            let extents = vec![Extent { length, kind: ExtentKind::Data }];
            Plan { verbs: Vec::new(), then_flush: false, extents }
        }
        Operation::Status { offset, length } => verbs(vec![Verb::Status { offset, length: length.min(MAX_STATUS) }]),
    }
}

fn writes(offset: u64, from: &Buffers, longest: u64, flags: u16, then_flush: bool) -> Plan {
    let part = |(at, length)| Verb::Write { offset: offset + at, from: part_of(from, at, length), flags };
    let verbs = parts(from.length() as u64, longest).map(part).collect();
    Plan { verbs, then_flush, extents: Vec::new() }
}

/// A length cut into parts of at most `longest`: where each begins, and its length.
fn parts(length: u64, longest: u64) -> impl Iterator<Item = (u64, u64)> {
    let step = usize::try_from(longest).expect("parts are at most 1 GiB long");
    (0..length).step_by(step).map(move |at| (at, longest.min(length - at)))
}

fn part_of(memory: &Buffers, at: u64, length: u64) -> Buffers {
    let within = |bytes| usize::try_from(bytes).expect("it lies within memory");
    memory.part(within(at), within(length))
}
