//! The driver of the target: reads frames, moves page data into guest memory, answers, and ends well whatever happens.

use super::install::{Buffers, Wait, install, receive_raw};
use super::intake::Intake;
use super::streams::Doorman;
use super::{Arrived, AwaitStreams, Fault, Filling, Moment, Reply, Target};
use crate::bell::Bell;
use crate::channel::{Channel, TICK, host_error, in_words};
use crate::clock::Clock;
use crate::guest::{Claim, Claims, GuestPages, HandleOf, TargetHost};
use crate::link::{Link, LinkError};
use crate::progress::{Moved, Observer, Phase, Progress};
use crate::report::{PhaseReport, Report, ms, per_second};
use crate::wire::{Frame, Hello, MAX_LACKS, Transfer};
use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use uuid::Uuid;

/// How long to wait for the source to hang up after the last frame.
const LINGER: Duration = Duration::from_secs(5);

/// How long the source may take to say why a further stream broke.
const LAST_WORDS: Duration = Duration::from_secs(1);

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

/// How the further streams of a migration come.
pub struct Further<'a, L> {
    /// Waits for at most so long for one more link.
    pub accept: &'a mut (dyn FnMut(Duration) -> Result<Option<L>, LinkError> + Send),
    /// What the thread of each stream does first.
    pub thread: &'a (dyn Fn() + Sync),
}

impl<L> fmt::Debug for Further<'_, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Further").finish_non_exhaustive()
    }
}

/// What came over a link.
#[derive(Debug, Clone, PartialEq)]
pub enum Arrival {
    /// A guest, which runs here.
    Running(Box<Report>),
    /// A question after the guest of an earlier session. The link was used for nothing else.
    Answered(Claim),
}

/// Serves one link to its end: takes a guest in, or answers a question. The caller should close the link once it tells of
/// the guest: the source waits for that a while. A process in which a guest runs that came by
/// migration should go on to serve links with a host that refuses every offer, so that questions are answered.
///
/// # Errors
/// [`Fault`]. The source has been told, if it can be, the record says that the guest is not this host's, and the host has
/// abandoned it. [`Fault::NotRunning`] alone is different: the guest is this host's, and the host still has it.
pub fn receive<L: Link<Handle = HandleOf<H::Memory>>, H: TargetHost, C: Claims + Sync>(
    link: &mut L,
    host: &mut H,
    claims: &C,
    around: Reception<'_>,
    further: Further<'_, L>,
) -> Result<Arrival, Fault> {
    let Reception { clock, observer, patience } = around;
    let Further { accept, thread } = further;
    thread::scope(|scope| {
        let mut driver = Driver::new(link, Reception { clock, observer, patience });
        let (mut target, mut door, mut crew) = (Target::AwaitHello, Some(Further { accept, thread }), None);
        loop {
            driver.enter(target.phase());
            let next = driver.step(target, host, claims).and_then(|next| {
                if let (Target::Filling(filling), Some(further)) = (&next, door.take_if(|_| next.session().is_some())) {
                    let (session, intake) = (filling.incoming.session, &filling.intake);
                    driver.intake = Some(Arc::clone(intake));
                    let started = Doorman::start(scope, further, session, intake, claims, clock, patience);
                    crew = Some(started.map_err(|error| Fault::Link(error.into()))?);
                }
                Ok(next)
            });
            target = match next {
                Ok(Target::Running(arrived)) => return Ok(Arrival::Running(Box::new(driver.welcome(*arrived)))),
                Ok(Target::Answered(claim)) => {
                    driver.linger();
                    return Ok(Arrival::Answered(claim));
                }
                Ok(next) => next,
                Err(fault) => {
                    drop(crew);
                    return Err(driver.end(fault, host, claims));
                }
            }
        }
    })
}

struct Driver<'a, L, M> {
    channel: Channel<'a, L>,
    around: Reception<'a>,
    body: Vec<u8>,
    buffers: Buffers,
    /// The session, once the host has made room for its guest.
    session: Option<Uuid>,
    /// Where the guest's pages go.
    intake: Option<Arc<Intake<M>>>,
    /// Why a further stream ended, and how long the source may take to say more about it.
    lost_stream: Option<(Fault, Duration)>,
    entered: Option<(Phase, Duration)>,
    /// What this thread's processor time was before the first frame.
    cpu_before: Duration,
    phases: Vec<PhaseReport>,
}

impl<'a, M: GuestPages, L: Link<Handle = M::Handle>> Driver<'a, L, M> {
    fn new(link: &'a mut L, around: Reception<'a>) -> Self {
        link.set_patience(around.patience);
        let cpu_before = around.clock.thread_cpu();
        let (channel, body, phases) = (Channel::new(link), Vec::new(), Vec::new());
        Self {
            channel,
            around,
            body,
            buffers: Buffers::default(),
            session: None,
            intake: None,
            lost_stream: None,
            entered: None,
            cpu_before,
            phases,
        }
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

    /// Goes on from one state to the next.
    fn step<H: TargetHost<Memory = M>, C: Claims>(
        &mut self,
        target: Target<M>,
        host: &mut H,
        claims: &C,
    ) -> Result<Target<M>, Fault> {
        match target {
            Target::AwaitStreams(waiting) => self.await_streams(waiting, host),
            other => self.take_frame(other, host, claims),
        }
    }

    /// Waits for one frame and does what it asks for.
    fn take_frame<H: TargetHost<Memory = M>, C: Claims>(
        &mut self,
        target: Target<M>,
        host: &mut H,
        claims: &C,
    ) -> Result<Target<M>, Fault> {
        self.wait()?;
        let frame = self.channel.receive(&mut self.body)?;
        let pages = if let Frame::Pages(pages) = &frame { Some(*pages) } else { None };
        let passed = match (&target, &frame) {
            (Target::AwaitHello, Frame::Hello(Hello { transfer: Transfer::Passed, .. })) => {
                self.channel.receive_handle().map_err(Fault::Link)?
            }
            _ => None,
        };
        let at = moment(&self.around, &self.channel, self.intake.as_deref(), self.cpu_before);
        let (target, reply) = target.on_frame(frame, passed, at, host, claims)?;
        self.session = target.session();
        match reply {
            Reply::Silence => {}
            Reply::Fill => {
                if let (Target::Filling(filling), Some(pages)) = (&target, pages) {
                    let link = self.channel.link();
                    let mut idle = |bell: &Bell, seen, limit| link.idle(bell, seen, limit);
                    let Reception { clock, observer: _, patience } = &self.around;
                    let wait = Wait { clock: *clock, limit: *patience, idle: &mut idle };
                    install(&filling.intake, pages, &mut self.buffers, wait)?;
                    receive_raw(&filling.intake, pages.records, &mut self.buffers, &mut self.channel)?;
                    self.tell_progress(filling);
                }
            }
            Reply::Send(frame) => self.channel.send(&frame).map_err(Fault::Link)?,
            Reply::Last(frame) => self.say(&frame),
        }
        Ok(target)
    }

    /// Waits until the further streams have ended the round, too.
    fn await_streams<H: TargetHost<Memory = M>>(
        &mut self,
        waiting: AwaitStreams<M>,
        host: &mut H,
    ) -> Result<Target<M>, Fault> {
        let (intake, limit) = (Arc::clone(waiting.intake()), self.around.patience);
        let (mut end, mut bytes) = (self.around.clock.now() + limit, intake.further_bytes());
        loop {
            let seen = intake.news.rung();
            if waiting.is_over() {
                break;
            }
            self.check_streams()?;
            if self.around.clock.now() >= end {
                return Err(Fault::Link(LinkError::TimedOut { limit }));
            }
            self.channel.link().idle(&intake.news, seen, TICK.min(limit));
            if intake.news.rung() == seen {
                self.channel.send(&Frame::Heartbeat).map_err(Fault::Link)?;
            }
            if std::mem::replace(&mut bytes, intake.further_bytes()) != intake.further_bytes() {
                end = self.around.clock.now() + limit;
            }
        }
        let (filling, round) =
            waiting.round_done(moment(&self.around, &self.channel, Some(&intake), self.cpu_before))?;
        host.settle().map_err(|error| Fault::Host { step: "make its disks durable", source: host_error(error) })?;
        self.around.observer.on(Progress::RoundDone(round));
        // Only the first round may bring digests.
        let lacking = if round.round == 1 { intake.lacking.take() } else { Vec::new() };
        for runs in lacking.chunks(MAX_LACKS) {
            self.channel.send(&Frame::Lacks(runs.to_vec())).map_err(Fault::Link)?;
        }
        self.say(&Frame::Installed { round: round.round });
        Ok(Target::Filling(filling))
    }

    /// Waits for the source to say something. Shows signs of life meanwhile, once a migration has begun.
    fn wait(&mut self) -> Result<(), Fault> {
        let limit = self.around.patience;
        let end = self.around.clock.now() + limit;
        self.check_streams()?;
        while !self.channel.link().wait(TICK.min(limit)).map_err(Fault::Link)? {
            self.check_streams()?;
            if self.around.clock.now() >= end {
                return Err(Fault::Link(LinkError::TimedOut { limit }));
            }
            if self.session.is_some() {
                self.channel.send(&Frame::Heartbeat).map_err(Fault::Link)?;
            }
        }
        Ok(())
    }

    /// Whether all further streams are well. If one broke, the source may have more to say of it than that.
    fn check_streams(&mut self) -> Result<(), Fault> {
        if self.intake.as_ref().is_some_and(|intake| intake.is_closed()) {
            // All that they had to bring is here.
            self.lost_stream = None;
            return Ok(());
        }
        let now = self.around.clock.now();
        if let Some(fault) = self.intake.as_ref().and_then(|intake| intake.take_failure()) {
            let explained = matches!(fault, Fault::Link(_));
            let until = if explained { now + LAST_WORDS } else { now };
            self.lost_stream.get_or_insert((fault, until));
        }
        match self.lost_stream.take_if(|(_, until)| *until <= now) {
            Some((fault, _)) => Err(fault),
            None => Ok(()),
        }
    }

    fn tell_progress(&mut self, filling: &Filling<M>) {
        let ((round, pages), (started, bytes_before)) = (filling.intake.progress(), filling.since());
        let time = self.around.clock.now() - started;
        let bytes = self.channel.bytes() + filling.intake.further_bytes();
        let bytes_per_second = per_second(bytes - bytes_before, ms(time));
        self.around.observer.on(Progress::Moved(Moved { round, pages, of: 0, bytes, bytes_per_second }));
    }

    /// The report of a guest that runs here now.
    fn welcome(&mut self, arrived: Arrived) -> Report {
        let at = moment(&self.around, &self.channel, self.intake.as_deref(), self.cpu_before);
        let streams = self.intake.as_ref().map_or(1, |intake| intake.further_streams() + 1);
        let own = arrived.report(at.now, at.bytes, streams, self.leave());
        match self.hear_report(own.session) {
            Some(source) => own.joined(source),
            None => own,
        }
    }

    /// Says what the source may not hear: its last words, if it has given up, are still to be read, and after `Go` it asks.
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
    fn end<H: TargetHost<Memory = M>, C: Claims>(&mut self, fault: Fault, host: &mut H, claims: &C) -> Fault {
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

/// This moment, after the frame that was received last.
fn moment<'a, L: Link, M: GuestPages>(
    around: &Reception<'a>,
    channel: &Channel<'_, L>,
    intake: Option<&Intake<M>>,
    cpu_before: Duration,
) -> Moment<'a> {
    let clock = around.clock;
    let (bytes, cpu) = intake.map(|intake| (intake.further_bytes(), intake.further_cpu())).unwrap_or_default();
    Moment {
        now: clock.now(),
        clock,
        bytes: channel.bytes() + bytes,
        cpu: clock.thread_cpu() - cpu_before + cpu,
        before: channel.received_before_last(),
    }
}
