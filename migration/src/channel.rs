//! Frames over a link, as both ends use it: encoding, reading within bounds, signs of life, and the account of all that
//! went by.

use crate::digest::{Transcript, TranscriptDigest};
use crate::guest::HostError;
use crate::link::{Link, LinkError};
use crate::pacer::Pace;
use crate::wire::{Frame, FrameError, HEADER_BYTES, Header, Kind, Pages};
use std::error::Error;
use std::fmt::Write as _;
use std::time::Duration;
use thiserror::Error;
use vm_memory::VolatileSlice;

/// How long an end that waits keeps quiet: it then sends a sign of life, and looks whether it should still wait.
pub(crate) const TICK: Duration = Duration::from_millis(250);

/// How much of a long body is made room for at once: no more than this is allocated for bytes that do not come.
const BODY_STEP: usize = 1 << 20;

/// Why a frame did not go or come.
#[derive(Debug, Error)]
pub(crate) enum ChannelError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// One end of the conversation.
pub(crate) struct Channel<'l, L> {
    link: &'l mut L,
    sent: Transcript,
    received: Transcript,
    before_last: TranscriptDigest,
    outbox: Vec<u8>,
    bytes: u64,
    pace: Option<Pace<'l>>,
}

impl<'l, L: Link> Channel<'l, L> {
    pub(crate) fn new(link: &'l mut L) -> Self {
        let (sent, received) = (Transcript::new(), Transcript::new());
        let before_last = received.digest();
        Self { link, sent, received, before_last, outbox: Vec::new(), bytes: 0, pace: None }
    }

    /// The same, for what is sent to keep to a pace.
    pub(crate) fn paced(self, pace: Option<Pace<'l>>) -> Self {
        Self { pace, ..self }
    }

    /// Sends a frame that nothing follows.
    pub(crate) fn send(&mut self, frame: &Frame<'_>) -> Result<(), LinkError> {
        self.send_with(frame, &[])
    }

    /// Sends a `Pages` frame and the bytes of its raw runs.
    pub(crate) fn send_pages(&mut self, pages: Pages<'_>, raw: &[VolatileSlice<'_>]) -> Result<(), LinkError> {
        self.send_with(&Frame::Pages(pages), raw)
    }

    fn send_with(&mut self, frame: &Frame<'_>, payload: &[VolatileSlice<'_>]) -> Result<(), LinkError> {
        frame.encode(&mut self.outbox);
        match self.pace {
            None => self.link.send(&self.outbox, payload)?,
            Some(pace) => pace.send(self.link, &self.outbox, payload)?,
        }
        self.sent.add(&self.outbox, &[]);
        self.count(self.outbox.len() + payload.iter().map(VolatileSlice::len).sum::<usize>());
        Ok(())
    }

    /// Receives a frame into `body`. After `Pages`, the bytes of the raw runs must be received next.
    pub(crate) fn receive<'b>(&mut self, body: &'b mut Vec<u8>) -> Result<Frame<'b>, ChannelError> {
        self.receive_if(|_| true, body).map(|frame| frame.expect("every kind is due"))
    }

    /// Receives a frame into `body` if its kind is due. Of another kind only the header is read, so that no room is made for
    /// what nobody waits for; the link is good for nothing then.
    pub(crate) fn receive_if<'b>(
        &mut self,
        due: impl FnOnce(Kind) -> bool,
        body: &'b mut Vec<u8>,
    ) -> Result<Result<Frame<'b>, Kind>, ChannelError> {
        let mut head = [0; HEADER_BYTES];
        self.link.receive(&mut head)?;
        let header = Header::parse(&head)?;
        if !due(header.kind()) {
            return Ok(Err(header.kind()));
        }
        body.clear();
        while body.len() < header.body_bytes() {
            let at = body.len();
            body.resize(header.body_bytes().min(at + BODY_STEP), 0);
            self.link.receive(&mut body[at..])?;
        }
        let frame = Frame::parse(&header, body)?;
        self.before_last = self.received.digest();
        self.received.add(&head, body);
        self.count(HEADER_BYTES + body.len());
        Ok(Ok(frame))
    }

    /// Receives the bytes of raw runs.
    pub(crate) fn receive_pages(&mut self, slices: &[VolatileSlice<'_>]) -> Result<(), LinkError> {
        self.link.receive_pages(slices)?;
        self.count(slices.iter().map(VolatileSlice::len).sum());
        Ok(())
    }

    /// Sends the handle that a frame has announced.
    pub(crate) fn send_handle(&mut self, handle: &L::Handle) -> Result<(), LinkError> {
        self.link.send_handle(handle)?;
        self.count(1);
        Ok(())
    }

    /// Receives the handle that a frame has announced; `None` if it was lost.
    pub(crate) fn receive_handle(&mut self) -> Result<Option<L::Handle>, LinkError> {
        let handle = self.link.receive_handle()?;
        self.count(1);
        Ok(handle)
    }

    /// Reads and drops what still comes, for at most `limit`, so that the last frame sent here is not lost in a reset of
    /// the connection by bytes that nobody read.
    pub(crate) fn linger(&mut self, limit: Duration, now: impl Fn() -> Duration) {
        let (end, mut waste) = (now() + limit, [0; HEADER_BYTES]);
        self.link.set_patience(limit);
        while now() < end && self.link.wait(limit).is_ok_and(|came| came) && self.link.receive(&mut waste).is_ok() {}
    }

    /// The digest of what was sent.
    pub(crate) fn sent(&self) -> TranscriptDigest {
        self.sent.digest()
    }

    /// The digest of what was received before the last frame.
    pub(crate) fn received_before_last(&self) -> TranscriptDigest {
        self.before_last
    }

    /// The digest of what was received.
    pub(crate) fn received(&self) -> TranscriptDigest {
        self.received.digest()
    }

    /// Bytes of all frames in both directions, and of pages.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The link, for waiting and for what it knows of itself.
    pub(crate) fn link(&mut self) -> &mut L {
        self.link
    }

    fn count(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }
}

/// An error and all its causes in one sentence, for the other end and for logs.
pub fn in_words(error: &(dyn Error + 'static)) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(words, ": {error}");
        cause = error.source();
    }
    words
}

/// Takes the type off an error of a guest, host or record.
pub(crate) fn host_error(error: impl Error + Send + Sync + 'static) -> HostError {
    Box::new(error)
}
