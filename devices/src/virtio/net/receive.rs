//! Frames from the port to the driver's receive queue, read straight into its buffers.
//!
//! Before the receiver can know how long the next frame is, it must offer the port buffers for the longest. When the
//! driver has offered fewer, the frame is read all the same, with what does not fit going to a spill buffer; such a frame
//! is then *held* until the driver adds buffers, and nothing else is read from the port, whose own queue then fills and
//! drops as a wire does. Invariant: chains that were popped but not filled are put back before a call returns.

use super::RECEIVE;
use super::counters::NetCounters;
use super::port::{self, HEADER, MAX_FRAME, MAX_PARTS};
use crate::GuestRam;
use crate::virtio::queue::{BrokenRing, Chain, GuestSlice, Virtq, copy_to, slices, total_bytes};
use crate::virtio::{Io, Progress};
use std::collections::VecDeque;
use std::fs::File;
use std::io::ErrorKind;
use std::sync::Arc;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

/// Where `num_buffers` is in the header (virtio 1.3, 5.1.6).
const BUFFER_COUNT: usize = 10;

/// What became of one attempt to receive.
#[derive(Debug, PartialEq, Eq)]
enum Attempt {
    /// A frame was delivered, or dropped because it can never fit.
    Done,
    /// The port has no frame.
    PortEmpty,
    /// The driver must offer more buffers first.
    NoBuffers,
}

/// The receiving half of a NIC.
#[derive(Debug)]
pub(super) struct Receiver {
    /// Of the frame that is being read, the bytes that its buffers lack; of a held frame, all.
    spill: Box<[u8]>,
    /// The length of the frame in `spill`, header included, that waits for buffers.
    held: Option<usize>,
    counters: Arc<NetCounters>,
}

impl Receiver {
    pub(super) fn new(counters: Arc<NetCounters>) -> Self {
        Self { spill: vec![0; MAX_FRAME].into_boxed_slice(), held: None, counters }
    }

    /// Forgets a frame that waits for buffers.
    pub(super) fn clear(&mut self) {
        if self.held.take().is_some() {
            self.counters.dropped();
        }
    }

    /// Moves frames from `port` to the receive queue: until one of them has no more, or as many as the queue is long.
    pub(super) fn receive(&mut self, io: &mut Io, port: &File) -> Result<Progress, BrokenRing> {
        let mergeable = io.has(VIRTIO_NET_F_MRG_RXBUF);
        let queue = &mut io.queues[RECEIVE];
        if !queue.is_ready() {
            return Ok(Progress::Idle);
        }
        let used_before = queue.state().next_used;
        queue.suppress_kicks()?;
        let mut offered = Offered::default();
        let mut progress = Progress::More;
        for _ in 0..queue.state().size {
            let attempt = self.attempt(&io.ram, queue, &mut offered, mergeable, port)?;
            let goes_on = match attempt {
                Attempt::Done => true,
                Attempt::PortEmpty => false,
                // Asked while every chain is popped, so that only one that was added since then counts.
                Attempt::NoBuffers => queue.accept_kicks()?,
            };
            if !goes_on {
                progress = Progress::Idle;
                break;
            }
        }
        offered.put_back(queue);
        if queue.state().next_used != used_before {
            io.signal(RECEIVE)?;
        }
        Ok(progress)
    }

    fn attempt(
        &mut self,
        ram: &GuestRam,
        queue: &mut Virtq,
        offered: &mut Offered,
        mergeable: bool,
        port: &File,
    ) -> Result<Attempt, BrokenRing> {
        offered.fill(queue, if mergeable { self.held.unwrap_or(MAX_FRAME) } else { 1 })?;
        if offered.chains.is_empty() {
            return Ok(Attempt::NoBuffers);
        }
        if let Some(length) = self.held {
            return self.deliver_held(ram, queue, offered, length);
        }
        let usable = if mergeable { offered.chains.len() } else { 1 };
        let chains = offered.chains.iter().take(usable);
        let parts: Vec<_> =
            chains.flat_map(|chain| slices(ram, chain.writable(), 0, MAX_FRAME)).take(MAX_PARTS).collect();
        let capacity: usize = parts.iter().map(GuestSlice::len).sum();
        let spilled = capacity.min(MAX_FRAME);
        match port::receive(port, &parts, &mut self.spill[spilled..]) {
            // An empty read is the end of a socket; a tap has none.
            Ok(0) => return Ok(Attempt::PortEmpty),
            Ok(length) if length < HEADER => {
                tracing::debug!(length, "A frame without header was dropped");
                self.counters.dropped();
            }
            Ok(length) if length <= capacity => self.give(ram, queue, offered, length)?,
            Ok(length) if mergeable => {
                let mut done = 0;
                for part in &parts {
                    done += part.copy_to(&mut self.spill[done..spilled]);
                }
                self.held = Some(length);
            }
            Ok(length) => {
                tracing::debug!(length, capacity, "A frame larger than the driver's buffer was dropped");
                self.counters.dropped();
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Attempt::PortEmpty),
            Err(error) => {
                tracing::warn!(%error, "A NIC's port gives no frames");
                return Ok(Attempt::PortEmpty);
            }
        }
        Ok(Attempt::Done)
    }

    fn deliver_held(
        &mut self,
        ram: &GuestRam,
        queue: &mut Virtq,
        offered: &mut Offered,
        length: usize,
    ) -> Result<Attempt, BrokenRing> {
        if offered.bytes >= length {
            let mut done = 0;
            for chain in &offered.chains {
                done += copy_to(ram, chain.writable(), 0, &self.spill[done..length]);
            }
            self.give(ram, queue, offered, length)?;
        } else if offered.is_whole_ring(queue) {
            tracing::debug!(length, "A frame larger than all of the driver's buffers was dropped");
            self.counters.dropped();
        } else {
            return Ok(Attempt::NoBuffers);
        }
        self.held = None;
        Ok(Attempt::Done)
    }

    /// Gives a frame that is in the offered chains to the driver.
    fn give(&self, ram: &GuestRam, queue: &mut Virtq, offered: &mut Offered, length: usize) -> Result<(), BrokenRing> {
        offered.give(ram, queue, length)?;
        self.counters.received(length);
        Ok(())
    }
}

/// Chains that were popped and hold nothing yet.
#[derive(Debug, Default)]
struct Offered {
    chains: VecDeque<Chain>,
    bytes: usize,
}

impl Offered {
    /// Pops chains until they hold `wanted` bytes or the driver offers no more.
    fn fill(&mut self, queue: &mut Virtq, wanted: usize) -> Result<(), BrokenRing> {
        while self.bytes < wanted {
            let Some(chain) = queue.pop()? else { break };
            let bytes = total_bytes(chain.writable());
            // Each buffer takes at least the header (virtio 1.3, 5.1.6.3.1).
            if bytes < HEADER {
                let (queue, head) = (queue.index(), chain.head());
                return Err(BrokenRing::Incomplete { queue, head, what: "room for the header of a frame" });
            }
            self.bytes += bytes;
            self.chains.push_back(chain);
        }
        Ok(())
    }

    /// Gives a frame of `length` bytes, which is in the first chains, to the driver.
    fn give(&mut self, ram: &GuestRam, queue: &mut Virtq, length: usize) -> Result<(), BrokenRing> {
        let mut filled = Vec::new();
        let mut rest = length;
        while rest > 0
            && let Some(chain) = self.chains.pop_front()
        {
            let room = total_bytes(chain.writable());
            self.bytes -= room;
            let written = rest.min(room);
            rest -= written;
            filled.push((chain, written));
        }
        let count = u16::try_from(filled.len()).expect("a queue has at most 32768 chains");
        if let Some((first, _)) = filled.first() {
            // The tap leaves this field alone. It fits, for `fill` saw room for the whole header.
            let _ = copy_to(ram, first.writable(), BUFFER_COUNT, &count.to_le_bytes());
        }
        for (chain, written) in filled {
            queue.push(&chain, u32::try_from(written).expect("no frame is longer than MAX_FRAME"))?;
        }
        Ok(())
    }

    /// Whether the driver has no descriptor left that it could add.
    fn is_whole_ring(&self, queue: &Virtq) -> bool {
        let size = usize::from(queue.state().size);
        self.chains.iter().map(|chain| chain.writable().len()).sum::<usize>() >= size
    }

    fn put_back(&mut self, queue: &mut Virtq) {
        for _ in self.chains.drain(..) {
            queue.unpop();
        }
        self.bytes = 0;
    }
}
