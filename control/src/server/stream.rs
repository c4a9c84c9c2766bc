//! The body of `GET /v1/events`: events as they happen, heartbeats in between.
//!
//! It is asked for the next piece only when the client has taken the last one, so nothing piles up per subscriber. One
//! that was too slow gets a `lagged` event and then the end of the stream.

use super::ServerEnd;
use crate::event::{Events, Found};
use crate::sse;
use bytes::Bytes;
use hyper::body::{Body, Frame};
use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, watch};

/// One subscriber's place in the events.
#[derive(Debug)]
pub(super) struct Subscriber {
    events: Events,
    published: watch::Receiver<()>,
    end: ServerEnd,
    heartbeat: Duration,
    place: Place,
    _seat: OwnedSemaphorePermit,
}

/// How far a subscriber has come.
#[derive(Clone, Copy, Debug)]
enum Place {
    /// Nothing was sent yet; a gap before the first event is told and then passed over.
    Start(u64),
    /// Everything up to this number was sent; a gap now means that the subscriber is too slow.
    After(u64),
    /// The last word was said.
    End,
}

impl Subscriber {
    /// A subscriber that says that it knows everything up to the event `known`, or one that wants what comes now.
    pub(super) fn new(
        events: Events,
        known: Option<u64>,
        heartbeat: Duration,
        end: ServerEnd,
        seat: OwnedSemaphorePermit,
    ) -> Self {
        let published = events.subscribe();
        let place = known.map_or_else(|| Place::After(events.newest()), Place::Start);
        Self { events, published, end, heartbeat, place, _seat: seat }
    }

    /// The next piece of the stream, and the subscriber that has taken it; `None` at the end.
    async fn next(mut self) -> Option<(Bytes, Self)> {
        loop {
            // Before looking, so that what is published after the look wakes us.
            self.published.borrow_and_update();
            let ending = self.end.has_come();
            if let Some(piece) = self.take() {
                return Some((piece, self));
            }
            if ending || matches!(self.place, Place::End) {
                return None;
            }
            let silent = tokio::select! {
                _ = self.published.changed() => false,
                () = self.end.wait() => false,
                () = tokio::time::sleep(self.heartbeat) => true,
            };
            if silent {
                return Some((Bytes::from_static(sse::HEARTBEAT.as_bytes()), self));
            }
        }
    }

    /// What is there already.
    fn take(&mut self) -> Option<Bytes> {
        let sequence = match self.place {
            Place::Start(sequence) | Place::After(sequence) => sequence,
            Place::End => return None,
        };
        let mut piece = Vec::new();
        let (written, place) = match self.events.after(sequence) {
            Found::Nothing => return None,
            Found::Lagged(event) => {
                let started = matches!(self.place, Place::After(_));
                (sse::write(&event, &mut piece), if started { Place::End } else { Place::After(event.sequence) })
            }
            Found::Events(events) => {
                let last = events.last().map_or(sequence, |event| event.sequence);
                (events.iter().try_for_each(|event| sse::write(event, &mut piece)), Place::After(last))
            }
        };
        self.place = place;
        if let Err(error) = written {
            tracing::error!(%error, "an event could not be written as JSON; its subscriber is sent away");
            self.place = Place::End;
            return None;
        }
        Some(piece.into())
    }
}

/// The next piece under way.
type NextPiece = Pin<Box<dyn Future<Output = Option<(Bytes, Subscriber)>> + Send>>;

/// The subscriber as the body of an answer.
pub(super) struct EventBody {
    /// `None` after the end.
    next: Option<NextPiece>,
}

impl EventBody {
    pub(super) fn new(subscriber: Subscriber) -> Self {
        Self { next: Some(Box::pin(subscriber.next())) }
    }
}

impl fmt::Debug for EventBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventBody").field("ended", &self.next.is_none()).finish()
    }
}

impl Body for EventBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let Some(next) = &mut self.next else { return Poll::Ready(None) };
        let taken = ready!(next.as_mut().poll(context));
        let (piece, next) = taken.map(|(piece, subscriber)| (piece, Self::new(subscriber))).unzip();
        self.next = next.and_then(|body| body.next);
        Poll::Ready(piece.map(|piece| Ok(Frame::data(piece))))
    }
}
