//! The target reacts: each frame leads from one state to the next, or is a fault.
//!
//! ```text
//! AwaitHello ──Hello──► Filling ──State──► AwaitSeal ──Seal──► AwaitGo ──Go──► Running
//!     │                  │   ▲ Pages, RoundEnd            Ready sent      Running sent ──Report──► told
//!     │                  │   and AwaitStreams, after a RoundEnd until the further streams are through, too
//!     ├──Hello, with memory──► AwaitState ──State──► AwaitSeal
//!     └──Query──► Answered
//! any state but the last ──wrong frame, Abort, lost link──► fault: the guest is not this host's, and never will be
//! ```
//! The invariant: the guest runs here only after the claim `Mine` of its session stands in the [`Claims`], and a claim
//! that stands never changes. [`receive()`] drives the states over a link.

mod backing;
mod error;
mod filling;
mod install;
mod intake;
mod receive;
mod streams;
#[cfg(test)]
mod tests;

pub use error::Fault;
pub use filling::{Arrived, AwaitStreams, Filling, Incoming, Moment};
pub use receive::{Arrival, Further, Reception, receive};

use crate::channel::host_error;
use crate::guest::{Claim, Claims, GuestPages, HandleOf, Offer, Refusal, TargetHost};
use crate::progress::Phase;
use crate::region::Region;
use crate::wire::{Frame, Hello, Running, Seal, Transfer};
use std::time::Duration;
use uuid::Uuid;

/// Where the target is.
#[derive(Debug)]
pub enum Target<M> {
    /// Nobody has said anything.
    AwaitHello,
    /// The machine is built, and memory comes in.
    Filling(Box<Filling<M>>),
    /// The machine is built around the guest's memory, which was passed, and in which the guest still runs at the source.
    AwaitState(Box<Filling<M>>),
    /// The first stream is through with a round.
    AwaitStreams(AwaitStreams<M>),
    /// The state is here too.
    AwaitSeal(Box<AwaitSeal<M>>),
    /// All is restored; the source has been told.
    AwaitGo(Box<AwaitGo>),
    /// The guest is this host's.
    Running(Box<Arrived>),
    /// A question was answered.
    Answered(Claim),
}

/// Memory and state are here, unchecked.
#[derive(Debug)]
pub struct AwaitSeal<M> {
    filling: Filling<M>,
    state: Vec<u8>,
}

/// The guest could run.
#[derive(Debug)]
pub struct AwaitGo {
    incoming: Incoming,
    /// How long that took.
    restore: Duration,
}

/// What is to be done after a frame.
#[derive(Debug, PartialEq)]
pub enum Reply {
    /// Nothing.
    Silence,
    /// The frame's pages are to be installed, and the bytes of its raw runs come next.
    Fill,
    /// The source is to be told, and cannot go on without.
    Send(Frame<'static>),
    /// The source is to be told, but whether it hears changes nothing: the matter is decided.
    Last(Frame<'static>),
}

impl<M: GuestPages> Target<M> {
    /// Takes one frame, and the memory that came with it.
    ///
    /// # Errors
    /// [`Fault`]; the migration is over then.
    pub fn on_frame<H: TargetHost<Memory = M>, C: Claims>(
        self,
        frame: Frame<'_>,
        passed: Option<HandleOf<M>>,
        at: Moment<'_>,
        host: &mut H,
        claims: &C,
    ) -> Result<(Self, Reply), Fault> {
        match (self, frame) {
            // A source shows signs of life while it waits, so not before it has said anything else.
            (state, Frame::Heartbeat) if !matches!(state, Self::AwaitHello) => Ok((state, Reply::Silence)),
            (_, Frame::Abort { reason }) => Err(Fault::SourceGaveUp { reason: reason.to_owned() }),
            (Self::AwaitHello, Frame::Hello(hello)) => {
                let transfer = if passed.is_some() { Transfer::Passed } else { Transfer::Copied };
                let memory = prepare(&hello, passed, host)?;
                let filling = Box::new(Filling::new(hello, transfer, memory, at));
                let old = filling.intake.old();
                let next = match transfer {
                    Transfer::Copied => Self::Filling(filling),
                    Transfer::Passed => Self::AwaitState(filling),
                };
                Ok((next, Reply::Send(Frame::Accept { claims: claims.identity(), transfer, old })))
            }
            (Self::AwaitHello, Frame::Query { session, claims: asked }) => {
                let stands = verdict(session, asked, claims)?;
                Ok((Self::Answered(stands), Reply::Last(Frame::Verdict(stands))))
            }
            (Self::Filling(mut filling), Frame::Pages(pages)) => {
                filling.pages(pages.records)?;
                Ok((Self::Filling(filling), Reply::Fill))
            }
            (Self::Filling(filling), Frame::RoundEnd(end)) => {
                Ok((Self::AwaitStreams(filling.round_end(end)?), Reply::Silence))
            }
            (Self::Filling(filling) | Self::AwaitState(filling), Frame::State(state)) => {
                let state = AwaitSeal { filling: *filling, state: state.to_vec() };
                Ok((Self::AwaitSeal(Box::new(state)), Reply::Silence))
            }
            (Self::AwaitSeal(whole), Frame::Seal(seal)) => {
                let ready = whole.restore(&seal, host, at)?;
                Ok((Self::AwaitGo(Box::new(ready)), Reply::Send(Frame::Ready)))
            }
            (Self::AwaitGo(ready), Frame::Go) => {
                let AwaitGo { incoming, restore } = *ready;
                take_over(incoming.session, host, claims)?;
                let part = Running { restore, start: at.elapsed(), cpu: at.cpu };
                Ok((Self::Running(Box::new(Arrived { incoming, part })), Reply::Last(Frame::Running(part))))
            }
            (state, frame) => Err(Fault::OutOfTurn { found: frame.kind(), when: state.in_words() }),
        }
    }

    /// The session, from the offer to the end.
    #[must_use]
    pub fn session(&self) -> Option<Uuid> {
        match self {
            Self::AwaitHello | Self::Answered(_) => None,
            Self::Filling(filling) | Self::AwaitState(filling) => Some(filling.incoming.session),
            Self::AwaitStreams(waiting) => Some(waiting.session()),
            Self::AwaitSeal(whole) => Some(whole.filling.incoming.session),
            Self::AwaitGo(ready) => Some(ready.incoming.session),
            Self::Running(arrived) => Some(arrived.incoming.session),
        }
    }

    fn in_words(&self) -> &'static str {
        match self {
            Self::AwaitHello => "before Hello",
            Self::Filling(_) | Self::AwaitStreams(_) => "while its memory came in",
            Self::AwaitState(_) => "when State was due, since its memory was passed",
            Self::AwaitSeal(_) => "between State and Seal",
            Self::AwaitGo(_) => "when Go was due",
            Self::Running(_) => "after Go",
            Self::Answered(_) => "after Query",
        }
    }

    /// The phase that the next frame belongs to.
    fn phase(&self) -> Phase {
        match self {
            Self::AwaitHello | Self::AwaitState(_) | Self::Answered(_) => Phase::Offering,
            Self::Filling(_) | Self::AwaitStreams(_) => Phase::Rounds,
            Self::AwaitSeal(_) => Phase::Restoring,
            Self::AwaitGo(_) | Self::Running(_) => Phase::HandingOver,
        }
    }
}

/// Has the host check the offer and build the machine, and compares its memory with the guest's.
fn prepare<H: TargetHost>(
    hello: &Hello<'_>,
    passed: Option<HandleOf<H::Memory>>,
    host: &mut H,
) -> Result<H::Memory, Fault> {
    let Hello { session, vm, mode, verify: _, streams: _, transfer: _, build, regions, machine } = hello;
    let (session, vm, mode) = (*session, *vm, *mode);
    let offer = Offer { session, vm, mode, build, regions, machine };
    let memory = host.prepare(&offer, passed).map_err(Fault::Refused)?;
    let here = host.regions();
    if here == *regions {
        return Ok(memory);
    }
    let list = |regions: &[Region]| regions.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let (here, there) = (list(&here), list(regions));
    Err(Fault::Refused(Refusal::new(format!("Its memory is {there}, but this machine's would be {here}"))))
}

/// Says whose the guest of a session is, and so decides it if it was open.
fn verdict<C: Claims>(session: Uuid, asked: Uuid, claims: &C) -> Result<Claim, Fault> {
    if asked != claims.identity() {
        return Err(Fault::NotAsked);
    }
    claims.claim(session, Claim::NotMine).map_err(|error| Fault::Claims(host_error(error)))
}

/// Claims the guest, and then lets it run.
fn take_over<H: TargetHost, C: Claims>(session: Uuid, host: &mut H, claims: &C) -> Result<(), Fault> {
    // Where it is not certain that the claim stands, the opposite one tells: if it does not stand, the first does.
    let stands = claims.claim(session, Claim::Mine).or_else(|_| claims.claim(session, Claim::NotMine));
    match stands.map_err(|error| Fault::Claims(host_error(error)))? {
        Claim::Mine => host.run().map_err(|error| Fault::NotRunning(host_error(error))),
        Claim::NotMine => Err(Fault::ClaimedNotMine),
    }
}

impl<M: GuestPages> AwaitSeal<M> {
    /// Checks that all of the guest is here as it was sent, and restores it.
    fn restore<H: TargetHost>(self, seal: &Seal, host: &mut H, at: Moment<'_>) -> Result<AwaitGo, Fault> {
        self.filling.check_seal(seal, at)?;
        self.filling.intake.close();
        host.restore(&self.state)
            .map_err(|error| Fault::Host { step: "restore the guest's state", source: host_error(error) })?;
        Ok(AwaitGo { incoming: self.filling.incoming, restore: at.elapsed() })
    }
}
