//! One stream's part in sending pages: it asks how to make a frame, fills it out of the ledger, sends it, and where the codecs
//! are chosen by measurement tells the policy what became of it. A log at level trace has the same of every frame.

use super::error::SourceError;
use super::streams::Streams;
use crate::batch::Batch;
use crate::channel::Channel;
use crate::clock::Clock;
use crate::counts::PageCounts;
use crate::guest::{GuestPages, HostError};
use crate::link::Link;
use crate::policy::{Choice, Measured};
use std::time::Duration;

/// Makes and sends the frames of one stream.
pub(super) struct Sender<'a> {
    streams: &'a Streams,
    watch: Watch<'a>,
    batch: Batch,
    last: Option<Sent>,
    round_trip: Duration,
}

/// The last frame: when it was sent, and how many bytes the peer had not received then.
#[derive(Debug, Clone, Copy)]
struct Sent {
    at: Duration,
    queued: u64,
}

/// Reads clocks where somebody wants to know.
#[derive(Clone, Copy)]
struct Watch<'a>(Option<&'a dyn Clock>);

impl Watch<'_> {
    fn now(self) -> Duration {
        self.0.map_or(Duration::ZERO, Clock::now)
    }

    fn cpu(self) -> Duration {
        self.0.map_or(Duration::ZERO, Clock::thread_cpu)
    }

    fn in_flight(self, link: &impl Link) -> u64 {
        self.0.map_or(0, |_| link.in_flight())
    }
}

impl<'a> Sender<'a> {
    pub(super) fn new(streams: &'a Streams, clock: &'a dyn Clock) -> Self {
        let watch = Watch(streams.measures().then_some(clock));
        Self { streams, watch, batch: streams.batch(), last: None, round_trip: Duration::ZERO }
    }

    /// Begins a round over this link.
    pub(super) fn begin_round(&mut self, link: &impl Link) {
        if self.watch.0.is_some() {
            self.round_trip = link.round_trip().unwrap_or_default();
        }
        // What passed between rounds was not spent on a frame.
        self.last = None;
    }

    /// The pages of the last frame.
    pub(super) fn counts(&self) -> PageCounts {
        self.batch.counts()
    }

    /// Sends one frame of the pages that the ledger holds. `false` if there were none.
    pub(super) fn send<L: Link, P: GuestPages>(
        &mut self,
        channel: &mut Channel<'_, L>,
        memory: &P,
        round: u32,
    ) -> Result<bool, SourceError> {
        let failed = |step| move |source: HostError| SourceError::Guest { step, source };
        let access = failed("give access to its memory");
        let Self { streams, watch, .. } = *self;
        let choice @ Choice { codecs, .. } = streams.choose();
        let method = streams.method(round, choice).map_err(failed("get memory for its codecs"))?;
        let begun = (watch.now(), watch.cpu());
        if !self.batch.fill(&streams.ledger, memory, method).map_err(access)? {
            return Ok(false);
        }
        let (pages, encoded, filled_cpu) = (self.batch.counts(), self.batch.encoded(), watch.cpu());
        let first = || Sent { at: begun.0, queued: watch.in_flight(channel.link()) };
        let last = self.last.unwrap_or_else(first);
        let mut measured = Measured {
            pages,
            rle_bytes: encoded.rle,
            delta_bytes: encoded.delta,
            pages_cpu: filled_cpu.saturating_sub(begun.1),
            queued_last: last.queued,
            round_trip: self.round_trip,
            ..Measured::default()
        };
        if pages.sent() > 0 {
            let (frame, raw) = self.batch.pages(&codecs, memory).map_err(access)?;
            (measured.block, measured.packed) = (frame.block.unpacked as u64, frame.block.bytes.len() as u64);
            measured.queued_before = watch.in_flight(channel.link());
            let (packed, packed_cpu, bytes) = (watch.now(), watch.cpu(), channel.bytes());
            channel.send_pages(frame, &raw).map_err(SourceError::Link)?;
            let sent = Sent { at: watch.now(), queued: watch.in_flight(channel.link()) };
            measured.pack_cpu = packed_cpu.saturating_sub(filled_cpu);
            measured.send_cpu = watch.cpu().saturating_sub(packed_cpu);
            measured.send = sent.at.saturating_sub(packed);
            measured.between = packed.saturating_sub(last.at);
            measured.bytes = channel.bytes() - bytes;
            measured.queued_after = sent.queued;
            self.last = Some(sent);
        }
        // What digests cost says nothing of codecs.
        if pages.kept == 0 {
            streams.note(round, &codecs, &measured);
        }
        Ok(true)
    }
}
