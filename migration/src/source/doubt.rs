//! The source after `Go` whose answer did not come: it cannot know whether the target runs the guest.
//!
//! The guest stays paused. The target knows; [`InDoubt::ask`] asks it over a new link, as often as it takes. Where the
//! target is gone for good, the operator decides by [`InDoubt::settle`].

use super::custody::Custody;
use super::drive::{Answer, Drive};
use super::streams::{Chooser, Streams};
use super::{Outcome, Plan, SourceError, Surroundings};
use crate::cancel::CancelToken;
use crate::clock::Clock;
use crate::codec::Codecs;
use crate::guest::{Claim, SourceGuest};
use crate::link::Link;
use crate::progress::Unobserved;
use crate::report::{Ending, Report};
use crate::wire::{Frame, Kind};
use std::num::NonZeroU16;
use std::time::Duration;
use uuid::Uuid;

/// Who the operator says owns the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// This host. If the target runs the guest after all, it now runs twice: say so only of a target that is off.
    Source,
    /// The target.
    Target,
}

/// A guest that is paused because nobody here knows whose it is.
#[derive(Debug)]
pub struct InDoubt<G> {
    custody: Custody<G>,
    claims: Uuid,
    cause: SourceError,
    report: Box<Report>,
    patience: Duration,
}

impl<G: SourceGuest> InDoubt<G> {
    pub(super) fn new(
        custody: Custody<G>,
        claims: Uuid,
        cause: SourceError,
        report: Report,
        patience: Duration,
    ) -> Self {
        Self { custody, claims, cause, report: Box::new(report), patience }
    }

    /// Why there is doubt, or why the last question was not answered.
    #[must_use]
    pub fn cause(&self) -> &SourceError {
        &self.cause
    }

    /// The migration session that is in doubt.
    #[must_use]
    pub fn session(&self) -> Uuid {
        self.report.session
    }

    /// The guest. It must not run.
    #[must_use]
    pub fn guest(&self) -> &G {
        &self.custody.guest
    }

    /// Asks the target over a new link. Still in doubt if no answer comes, or one from somebody who does not know.
    pub fn ask<L: Link>(self, link: &mut L, clock: &dyn Clock) -> Outcome<G> {
        let plan = Plan { patience: self.patience, ..Plan::new(self.session(), self.report.mode) };
        let around = Surroundings { clock, cancel: &CancelToken::new(), observer: &mut Unobserved };
        let streams = Streams::new(NonZeroU16::MIN, Chooser::User(Codecs::NONE), None);
        let mut drive = Drive::new(link, &plan, &streams, around);
        let query = Frame::Query { session: plan.session, claims: self.claims };
        match drive.send(&query).and_then(|()| drive.answer_regardless(Kind::Verdict)) {
            Ok(Answer::Verdict(Claim::Mine)) => self.at_target(Ending::ConfirmedLater),
            Ok(Answer::Verdict(Claim::NotMine)) => self.stays(SourceError::NotTaken, clock),
            Ok(Answer::Accept { .. } | Answer::Ready | Answer::Running(_)) => Outcome::InDoubt(self),
            Err(cause) => Outcome::InDoubt(Self { cause, ..self }),
        }
    }

    /// Ends the doubt by the operator's word.
    pub fn settle(self, owner: Owner, clock: &dyn Clock) -> Outcome<G> {
        match owner {
            Owner::Target => self.at_target(Ending::Settled),
            Owner::Source => self.stays(SourceError::Settled, clock),
        }
    }

    fn at_target(self, ending: Ending) -> Outcome<G> {
        Outcome::HandedOver(Report { ending, ..*self.report })
    }

    fn stays(self, cause: SourceError, clock: &dyn Clock) -> Outcome<G> {
        Outcome::StillOurs(self.custody.hand_back(cause, clock, self.patience))
    }
}
