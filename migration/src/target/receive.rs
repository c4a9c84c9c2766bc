//! The driver of the target: reads frames, moves page data into guest memory, answers, and ends well whatever happens.

use super::{Fault, Moment, Reply, Target};
use crate::channel::{Channel, TICK, in_words};
use crate::clock::Clock;
use crate::guest::{Claim, Claims, TargetHost, exact_slice};
use crate::link::{Link, LinkError};
use crate::progress::{Moved, Observer, Phase, Progress};
use crate::report::{PhaseReport, Report, ms, per_second};
use crate::wire::{Frame, Records};
use std::fmt;
use std::time::Duration;
use uuid::Uuid;

/// How long to wait for the source to hang up after the last frame.
const LINGER: Duration = Duration::from_secs(5);

/// What the target needs besides the host, the record and the link.
pub struct Reception<'a> {
    /// The time.
    pub clock: &'a dyn Clock,
    /// Who wants to know how it goes.
    pub observer: &'a mut dyn Observer,
    /// How long the source may be silent.
    pub patience: Duration,
}

impl fmt::Debug for Reception<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reception").field("patience", &self.patience).finish_non_exhaustive()
    }
}

/// What came over a link.
#[derive(Debug, Clone, PartialEq)]
pub enum Arrival {
    /// A guest, which runs here.
    Running(Report),
    /// A question after the guest of an earlier session. The link was used for nothing else.
    Answered(Claim),
}

/// Serves one link to its end: takes a guest in, or answers a question. A process in which a guest runs that came by
/// migration should go on to serve links with a host that refuses every offer, so that questions are answered.
///
/// # Errors
/// [`Fault`]. The source has been told, if it can be, the record says that the guest is not this host's, and the host has
/// abandoned it. [`Fault::NotRunning`] alone is different: the guest is this host's, and the host still has it.
pub fn receive<'a, L: Link, H: TargetHost, C: Claims>(
    link: &'a mut L,
    host: &mut H,
    claims: &C,
    around: Reception<'a>,
) -> Result<Arrival, Fault> {
    let mut driver = Driver::new(link, around);
    let mut target = Target::AwaitHello;
    loop {
        driver.enter(target.phase());
        target = match driver.step(target, host, claims) {
            Ok(Target::Running(arrived)) => {
                let (now, bytes) = (driver.around.clock.now(), driver.channel.bytes());
                let own = arrived.report(now, bytes, driver.leave());
                let report = match driver.hear_report(own.session) {
                    Some(source) => own.joined(source),
                    None => own,
                };
                driver.linger();
                return Ok(Arrival::Running(report));
            }
            Ok(Target::Answered(claim)) => {
                driver.linger();
                return Ok(Arrival::Answered(claim));
            }
            Ok(next @ (Target::AwaitHello | Target::Filling(_) | Target::AwaitSeal(_) | Target::AwaitGo(_))) => next,
            Err(fault) => return Err(driver.end(fault, host, claims)),
        }
    }
}

struct Driver<'a, L> {
    channel: Channel<'a, L>,
    around: Reception<'a>,
    body: Vec<u8>,
    /// The session, once the host has made room for its guest.
    session: Option<Uuid>,
    entered: Option<(Phase, Duration)>,
    phases: Vec<PhaseReport>,
}

impl<'a, L: Link> Driver<'a, L> {
    fn new(link: &'a mut L, around: Reception<'a>) -> Self {
        link.set_patience(around.patience);
        Self { channel: Channel::new(link), around, body: Vec::new(), session: None, entered: None, phases: Vec::new() }
    }

    /// Begins a phase, unless it is under way: ends the clock of the last one, logs, tells the onlooker.
    fn enter(&mut self, phase: Phase) {
        if self.entered.is_none_or(|(entered, _)| entered != phase) {
            self.close_phase();
            tracing::debug!(?phase, "incoming migration");
            self.entered = Some((phase, self.around.clock.now()));
            self.around.observer.on(Progress::Entered(phase));
        }
    }

    fn close_phase(&mut self) {
        if let Some((phase, since)) = self.entered.take() {
            self.phases.push(PhaseReport { phase, ms: ms(self.around.clock.now() - since) });
        }
    }

    fn leave(&mut self) -> Vec<PhaseReport> {
        self.close_phase();
        std::mem::take(&mut self.phases)
    }

    /// Waits for one frame and does what it asks for.
    fn step<H: TargetHost, C: Claims>(&mut self, target: Target, host: &mut H, claims: &C) -> Result<Target, Fault> {
        self.wait().map_err(Fault::Link)?;
        let bytes = self.channel.bytes();
        let frame = self.channel.receive(&mut self.body)?;
        let clock = self.around.clock;
        let at = Moment { now: clock.now(), clock, bytes, before: self.channel.received_before_last() };
        let records = if let Frame::Pages(records) = &frame { *records } else { Records::new(&[]) };
        let (target, reply) = target.on_frame(frame, at, host, claims)?;
        self.session = target.session();
        match reply {
            Reply::Silence => {}
            Reply::Fill => {
                let raw: Result<Vec<_>, _> = records.raw_runs().map(|run| exact_slice(host, run)).collect();
                let raw = raw.map_err(super::filling::memory)?;
                self.channel.receive_pages(&raw).map_err(Fault::Link)?;
                self.tell_progress(&target);
            }
            Reply::RoundDone(round) => self.around.observer.on(Progress::RoundDone(round)),
            Reply::Send(frame) => self.channel.send(&frame).map_err(Fault::Link)?,
            Reply::Last(frame) => self.say(&frame),
        }
        Ok(target)
    }

    /// Waits for the source to say something. Shows signs of life meanwhile, once a migration has begun.
    fn wait(&mut self) -> Result<(), LinkError> {
        let limit = self.around.patience;
        let end = self.around.clock.now() + limit;
        while !self.channel.link().wait(TICK.min(limit))? {
            if self.around.clock.now() >= end {
                return Err(LinkError::TimedOut { limit });
            }
            if self.session.is_some() {
                self.channel.send(&Frame::Heartbeat)?;
            }
        }
        Ok(())
    }

    fn tell_progress(&mut self, target: &Target) {
        if let Target::Filling(filling) = target {
            let (round, pages, started, bytes_before) = filling.progress();
            let (time, bytes) = (self.around.clock.now() - started, self.channel.bytes());
            let bytes_per_second = per_second(bytes - bytes_before, ms(time));
            self.around.observer.on(Progress::Moved(Moved { round, pages, of: 0, bytes, bytes_per_second }));
        }
    }

    /// Says the last word. Whether it arrives changes nothing here: the source will ask.
    fn say(&mut self, frame: &Frame<'_>) {
        if let Err(error) = self.channel.send(frame) {
            tracing::warn!(error = in_words(&error), frame = %frame.kind(), "the source was not told");
        }
    }

    /// Waits for the source's report, and passes over what else comes; `None` if it does not come.
    fn hear_report(&mut self, session: Uuid) -> Option<Report> {
        let end = self.around.clock.now() + LINGER;
        self.channel.link().set_patience(LINGER);
        while self.around.clock.now() < end && self.channel.link().wait(LINGER).is_ok_and(|came| came) {
            if let Frame::Report(json) = self.channel.receive(&mut self.body).ok()? {
                return Report::of_source(json, session);
            }
        }
        None
    }

    /// Waits for the source to hang up.
    fn linger(&mut self) {
        self.channel.linger(LINGER, || self.around.clock.now());
    }

    /// Ends a migration that failed. The record and the host come before the source, which then finds its disks free.
    fn end<H: TargetHost, C: Claims>(&mut self, fault: Fault, host: &mut H, claims: &C) -> Fault {
        let reason = in_words(&fault);
        tracing::warn!(reason, "incoming migration failed");
        if !matches!(fault, Fault::NotRunning(_)) {
            let claimed = self.session.map(|session| claims.claim(session, Claim::NotMine));
            if let Some(Err(error)) = claimed {
                tracing::error!(error = in_words(&error), "cannot record that the guest is not this host's");
            }
            if self.session.is_some() || matches!(fault, Fault::Refused(_)) {
                host.abandon(&reason);
            }
        }
        if fault.is_news() {
            let reason = reason.as_str();
            self.say(&if fault.is_refusal() { Frame::Refuse { reason } } else { Frame::Abort { reason } });
            self.linger();
        }
        fault
    }
}
