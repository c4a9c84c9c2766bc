//! The source's side of the conversation, and its account of the migration: everything about one run that is not the
//! guest.

mod lag;

use super::error::SourceError;
use super::sender::Sender;
use super::steering::{Course, Left, Steering, Then, timed};
use super::streams::Streams;
use super::{Plan, Surroundings};
use crate::cancel::CancelToken;
use crate::channel::{Channel, TICK, in_words};
use crate::clock::Clock;
use crate::convergence::Round;
use crate::digest::TranscriptDigest;
use crate::guest::{Claim, GuestPages};
use crate::link::{Link, LinkError};
use crate::progress::{Moved, Observer, Phase, Progress};
use crate::region::{PageRun, Region};
use crate::report::{CpuReport, Ending, PhaseReport, Report, Role, RoundReport, ms, per_second};
use crate::wire::{Frame, Kind, MAX_REPORT, Mode, RoundEnd, Running, Transfer};
use std::time::Duration;
use uuid::Uuid;

/// How long the last words of a migration that failed may take to send.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What the target may answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Accept { claims: Uuid, transfer: Transfer, old: u64 },
    Ready,
    Running(Running),
    Verdict(Claim),
}

impl Answer {
    pub(super) fn kind(self) -> Kind {
        match self {
            Self::Accept { .. } => Kind::Accept,
            Self::Ready => Kind::Ready,
            Self::Running(_) => Kind::Running,
            Self::Verdict(_) => Kind::Verdict,
        }
    }
}

/// One run of the source.
pub(super) struct Drive<'a, L> {
    pub(super) plan: &'a Plan,
    pub(super) clock: &'a dyn Clock,
    cancel: &'a CancelToken,
    observer: &'a mut dyn Observer,
    channel: Channel<'a, L>,
    inbox: Vec<u8>,
    sender: Sender<'a>,
    pub(super) streams: &'a Streams,
    steering: Steering,
    started: Duration,
    /// What this thread's processor time was then.
    cpu_before: Duration,
    entered: Option<(Phase, Duration)>,
    paused: Option<Duration>,
    /// The last round of which the target has installed all pages.
    installed: u32,
    /// Whether it had by the time that it was last waited for.
    target_keeps_up: bool,
    account: Account,
}

/// What will be in the report.
#[derive(Debug, Clone)]
struct Account {
    vm: Uuid,
    transfer: Transfer,
    rounds: Vec<RoundReport>,
    phases: Vec<PhaseReport>,
}

impl<'a, L: Link> Drive<'a, L> {
    pub(super) fn new(link: &'a mut L, plan: &'a Plan, streams: &'a Streams, around: Surroundings<'a>) -> Self {
        let Surroundings { clock, cancel, observer } = around;
        let (rounds, phases) = (Vec::new(), Vec::new());
        let account = Account { vm: Uuid::nil(), transfer: Transfer::Copied, rounds, phases };
        let started = clock.now();
        Self {
            plan,
            clock,
            cancel,
            observer,
            channel: Channel::new(link).paced(streams.pace(clock)),
            inbox: Vec::new(),
            sender: Sender::new(streams, clock),
            streams,
            steering: Steering::new(plan.goal, plan.bandwidth, started),
            started,
            cpu_before: clock.thread_cpu(),
            entered: None,
            paused: None,
            installed: 0,
            target_keeps_up: false,
            account,
        }
    }

    /// Begins a phase: ends the clock of the last one, logs, tells the onlooker.
    pub(super) fn enter(&mut self, phase: Phase) {
        self.leave();
        tracing::info!(session = %self.plan.session, ?phase, "migration");
        self.entered = Some((phase, self.clock.now()));
        self.observer.on(Progress::Entered(phase));
    }

    fn leave(&mut self) {
        if let Some((phase, since)) = self.entered.take() {
            self.account.phases.push(PhaseReport { phase, ms: ms(self.clock.now() - since) });
        }
    }

    /// Notes which guest this is about.
    pub(super) fn is_about(&mut self, vm: Uuid) {
        self.account.vm = vm;
    }

    /// Notes how the guest's memory gets to the target, and gets ready to send its pages if they are to be sent. Of the
    /// regions of `old`, a bit for each, the target says that it has an old copy.
    pub(super) fn memory_goes(&mut self, transfer: Transfer, regions: &[Region], old: u64) {
        self.account.transfer = transfer;
        match transfer {
            Transfer::Passed => {}
            Transfer::Copied => {
                let pages: Vec<_> = regions.iter().map(Region::pages).collect();
                let disks = (0..).zip(regions).filter(|(_, region)| matches!(region, Region::Disk { .. }));
                let disks = disks.fold(0, |all, (disk, _)| all | 1 << disk);
                self.streams.prepare(&pages, old & disks, self.plan.delta_cache);
            }
        }
    }

    /// Whether a handle to memory can go to the target.
    pub(super) fn carries_handles(&mut self) -> bool {
        self.channel.link().carries_handles()
    }

    /// Sends the handle that a frame has announced.
    pub(super) fn send_handle(&mut self, handle: &L::Handle) -> Result<(), SourceError> {
        self.channel.send_handle(handle).map_err(|error| self.explain(error))
    }

    /// Notes that nobody runs the guest from now on.
    pub(super) fn pausing(&mut self) {
        self.paused = Some(self.clock.now());
    }

    /// Whether the migration may go on: nobody cancelled, time is left, no stream failed, and the target has not ended it.
    pub(super) fn check(&mut self) -> Result<(), SourceError> {
        self.check_wishes()?;
        if let Some(failure) = self.streams.take_failure() {
            return Err(self.explain_stream(failure));
        }
        while self.channel.link().wait(Duration::ZERO).map_err(SourceError::Link)? {
            if let Some(answer) = self.read_answer()? {
                return Err(SourceError::OutOfTurn { found: answer.kind(), expected: Kind::Heartbeat });
            }
        }
        Ok(())
    }

    fn check_wishes(&mut self) -> Result<(), SourceError> {
        if self.cancel.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        let left = self.time_left();
        match self.plan.timeout {
            Some(limit) if left.is_zero() => Err(SourceError::OutOfTime { limit }),
            Some(_) | None => {
                self.channel.link().set_patience(left);
                Ok(())
            }
        }
    }

    /// How long one thing may take: no longer than patience lasts, nor than the migration may take.
    pub(super) fn time_left(&self) -> Duration {
        let left = self.plan.timeout.map(|limit| (self.started + limit).saturating_sub(self.clock.now()));
        left.map_or(self.plan.patience, |left| left.min(self.plan.patience))
    }

    /// Sends a frame.
    pub(super) fn send(&mut self, frame: &Frame<'_>) -> Result<(), SourceError> {
        self.channel.send(frame).map_err(|error| self.explain(error))
    }

    /// A target that ends a further stream has a reason, which comes over the first one.
    fn explain_stream(&mut self, failure: SourceError) -> SourceError {
        let SourceError::Link(error) = failure else { return failure };
        let end = self.clock.now() + LAST_WORDS;
        while self.clock.now() < end && self.channel.link().wait(LAST_WORDS).is_ok_and(|came| came) {
            match self.read_answer() {
                Ok(None) => {}
                Err(reason) if reason.is_targets_word() => return reason,
                Ok(Some(_)) | Err(_) => break,
            }
        }
        self.explain(error)
    }

    /// A link that fails may still hold the target's reason, which says more. That of a migration that was cancelled was
    /// cut, and one that is silent until the migration's time is over is not waited for any longer.
    fn explain(&mut self, error: LinkError) -> SourceError {
        if self.cancel.is_cancelled() {
            return SourceError::Cancelled;
        }
        if let (LinkError::TimedOut { .. }, Some(limit)) = (&error, self.plan.timeout)
            && self.clock.now() >= self.started + limit
        {
            return SourceError::OutOfTime { limit };
        }
        self.channel.link().set_patience(LAST_WORDS);
        while self.channel.link().wait(Duration::ZERO).is_ok_and(|came| came) {
            match self.read_answer() {
                Ok(None) => {}
                Err(reason @ (SourceError::Refused { .. } | SourceError::TargetGaveUp { .. })) => return reason,
                Ok(Some(_)) | Err(_) => break,
            }
        }
        SourceError::Link(error)
    }

    /// Waits for an answer that is due, as long as the migration may go on.
    pub(super) fn answer(&mut self, expected: Kind) -> Result<Answer, SourceError> {
        self.await_answer(expected, Self::check_wishes)
    }

    /// Waits for an answer that is due, whatever anybody wishes: after `Go`, and to a question.
    pub(super) fn answer_regardless(&mut self, expected: Kind) -> Result<Answer, SourceError> {
        self.channel.link().set_patience(self.plan.patience);
        self.await_answer(expected, |_| Ok(()))
    }

    fn await_answer(
        &mut self,
        expected: Kind,
        check: impl Fn(&mut Self) -> Result<(), SourceError>,
    ) -> Result<Answer, SourceError> {
        let limit = self.plan.patience;
        let end = self.clock.now() + limit;
        while self.clock.now() < end {
            check(self)?;
            if !self.channel.link().wait(TICK.min(limit)).map_err(SourceError::Link)? {
                self.send(&Frame::Heartbeat)?;
                continue;
            }
            match self.read_answer()? {
                Some(answer) if answer.kind() == expected => return Ok(answer),
                Some(answer) => return Err(SourceError::OutOfTurn { found: answer.kind(), expected }),
                None => {}
            }
        }
        check(self)?;
        Err(SourceError::Link(LinkError::TimedOut { limit }))
    }

    /// Reads one frame; `None` for a sign of life, or of how far the target is.
    fn read_answer(&mut self) -> Result<Option<Answer>, SourceError> {
        let frame = self.channel.receive(&mut self.inbox)?;
        let found = frame.kind();
        match frame {
            Frame::Accept { claims, transfer, old } => Ok(Some(Answer::Accept { claims, transfer, old })),
            Frame::Ready => Ok(Some(Answer::Ready)),
            Frame::Running(part) => Ok(Some(Answer::Running(part))),
            Frame::Verdict(claim) => Ok(Some(Answer::Verdict(claim))),
            Frame::Heartbeat => Ok(None),
            Frame::Installed { round } => {
                self.installed = self.installed.max(round);
                Ok(None)
            }
            // Only of the first round anything may be lacking, and it is told before that is installed.
            Frame::Lacks(runs) if self.streams.has_old() && self.installed == 0 => {
                let mut ledger = self.streams.ledger.lock();
                match runs.into_iter().find(|run| !ledger.put_back(*run)) {
                    None => Ok(None),
                    Some(PageRun { region, first, pages }) => Err(SourceError::NoSuchPages { region, first, pages }),
                }
            }
            Frame::Refuse { reason } => Err(SourceError::Refused { reason: reason.to_owned() }),
            Frame::Abort { reason } => Err(SourceError::TargetGaveUp { reason: reason.to_owned() }),
            Frame::Hello(_)
            | Frame::Pages(_)
            | Frame::RoundEnd(_)
            | Frame::State(_)
            | Frame::Seal(_)
            | Frame::Go
            | Frame::Query { .. }
            | Frame::Report(_)
            | Frame::Join(_)
            | Frame::Lacks(_) => Err(SourceError::OutOfTurn { found, expected: Kind::Heartbeat }),
        }
    }

    /// Sends every page that the ledger holds, as round `round`, over all streams, and waits for no answer. What is not sent
    /// at `cut_at` stays in the ledger.
    pub(super) fn send_round<P: GuestPages>(
        &mut self,
        round: u32,
        memory: &P,
        cut_at: Option<Duration>,
    ) -> Result<RoundReport, SourceError> {
        let streams = self.streams;
        let of = streams.ledger.lock().dirty_pages();
        let (start, bytes_before, in_flight_before) = (self.clock.now(), self.bytes(), self.in_flight());
        let moved = |drive: &mut Self| {
            let (pages, bytes) = (streams.sent.pages().all(), drive.bytes());
            let bytes_per_second = per_second(bytes - bytes_before, ms(drive.clock.now() - start));
            drive.observer.on(Progress::Moved(Moved { round, pages, of, bytes, bytes_per_second }));
        };
        let cut = |drive: &Self| {
            if cut_at.is_some_and(|at| drive.clock.now() >= at) {
                streams.cut_short();
            }
        };
        streams.order(round);
        self.sender.begin_round(self.channel.link());
        while !streams.is_cut_short() && self.send_batch(memory, round)? {
            streams.sent.add(self.sender.counts());
            moved(self);
            self.check()?;
            cut(self);
        }
        while self.others_send()? {
            moved(self);
            cut(self);
        }
        self.check()?;
        let kinds = streams.sent.pages();
        let (pages, zero_pages) = (kinds.sent(), kinds.zero);
        self.send(&Frame::RoundEnd(RoundEnd { round, pages, zero_pages }))?;
        let (time, bytes) = (self.clock.now() - start, self.bytes() - bytes_before);
        let in_flight = self.in_flight();
        let received = (bytes + in_flight_before).saturating_sub(in_flight);
        self.steering.sent(Round { number: round, kinds, bytes, received, time });
        let chosen = Some(streams.chosen());
        Ok(RoundReport { round, pages, zero_pages, kinds, bytes, ms: ms(time), dirty_at_end: 0, chosen })
    }

    /// Waits a moment for the further streams; whether they still send.
    fn others_send(&mut self) -> Result<bool, SourceError> {
        let seen = self.streams.news.rung();
        self.check()?;
        if self.streams.done() {
            return Ok(false);
        }
        self.channel.link().idle(&self.streams.news, seen, TICK);
        if self.streams.news.rung() == seen {
            self.send(&Frame::Heartbeat)?;
        }
        Ok(true)
    }

    /// Sends one batch over the first stream. `false` if no page was left.
    fn send_batch<P: GuestPages>(&mut self, memory: &P, round: u32) -> Result<bool, SourceError> {
        match self.sender.send(&mut self.channel, memory, round) {
            Err(SourceError::Link(error)) => Err(self.explain(error)),
            sent => sent,
        }
    }

    /// Bytes that went over all streams, in both directions.
    fn bytes(&self) -> u64 {
        self.channel.bytes() + self.streams.sent.further_bytes()
    }

    /// Bytes under way on all streams.
    fn in_flight(&mut self) -> u64 {
        self.channel.link().in_flight() + self.streams.in_flight()
    }

    /// Notes a round that is over.
    pub(super) fn round_done(&mut self, round: RoundReport) {
        tracing::debug!(?round, "migration round");
        self.account.rounds.push(round);
        self.observer.on(Progress::RoundDone(round));
    }

    /// When the round that begins now is to be cut short, if ever.
    pub(super) fn cut_at(&self) -> Option<Duration> {
        self.steering.cut_at(self.clock.now())
    }

    /// Does what keeps the guest waiting if it writes meanwhile: something with its dirty log.
    pub(super) fn log<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        let clock = self.clock;
        let (done, time) = timed(clock, || work(self));
        self.steering.logged(time);
        done
    }

    /// What comes after a round in which so many pages were written, and that did not come to so many.
    pub(super) fn next(&mut self, round: u32, dirty_pages: u64, unsent_pages: u64) -> Result<Then, SourceError> {
        let in_flight = self.in_flight();
        let round_trip = self.channel.link().round_trip().unwrap_or_default();
        self.steering.next(round, self.clock.now(), Left { dirty_pages, unsent_pages, in_flight, round_trip })
    }

    /// The share of its time that each vCPU loses from now on; see [`Steering::slow_down`].
    pub(super) fn slow_down(&mut self, written: Option<&[u64]>, taken: &[Duration]) -> Vec<f64> {
        let shares = self.steering.slow_down(written, taken, self.clock.now()).to_vec();
        let share = self.steering.throttled_share();
        tracing::info!(session = %self.plan.session, share, ?shares, "the guest is throttled");
        self.observer.on(Progress::Throttled(share));
        shares
    }

    /// Notes that the guest is not throttled any more.
    pub(super) fn unthrottled(&mut self, taken: &[Duration]) {
        self.steering.unthrottled(taken, self.clock.now());
        self.observer.on(Progress::Throttled(0.0));
    }

    /// The digest of all that was sent so far.
    pub(super) fn sent(&self) -> TranscriptDigest {
        self.channel.sent()
    }

    /// Tells the target that it is over, if it does not know and can hear.
    pub(super) fn tell(&mut self, cause: &SourceError) {
        if cause.is_news() {
            self.channel.link().set_patience(LAST_WORDS);
            let _ = self.channel.send(&Frame::Abort { reason: &in_words(cause) });
        }
    }

    /// Tells the target what it all took, and waits a while until it has hung up: it tells of the guest then. Whether it
    /// hears changes nothing.
    pub(super) fn tell_report(&mut self, report: &Report) {
        self.channel.link().set_patience(LAST_WORDS);
        match serde_json::to_vec(report) {
            Ok(json) if json.len() <= MAX_REPORT => match self.channel.send(&Frame::Report(&json)) {
                Ok(()) => self.channel.linger(LAST_WORDS, || self.clock.now()),
                Err(error) => tracing::warn!(error = in_words(&error), "the target was not told the source's report"),
            },
            Ok(json) => tracing::warn!(bytes = json.len(), "the report is too long to tell the target"),
            Err(error) => tracing::warn!(%error, "the report cannot be encoded"),
        }
    }

    /// The report of a migration whose guest was given away: to a target that runs it, or does so perhaps.
    pub(super) fn report(&mut self, running: Option<Running>) -> Report {
        self.leave();
        let Account { vm, transfer, rounds, phases } = self.account.clone();
        let Course { downtime, total, switched, stalled_in_round } = self.steering.course();
        let live = self.plan.mode == Mode::Live;
        let now = self.clock.now();
        Report {
            role: Role::Source,
            session: self.plan.session,
            vm,
            mode: self.plan.mode,
            transfer,
            streams: match transfer {
                Transfer::Copied => self.streams.count.get(),
                Transfer::Passed => 1,
            },
            ending: if running.is_some() { Ending::HandedOver } else { Ending::ConfirmedLater },
            bytes: self.bytes(),
            total_ms: ms(now - self.started),
            downtime_ms: self.paused.filter(|_| running.is_some()).map(|paused| ms(now - paused)),
            target_part: running.map(Into::into),
            predicted_downtime_ms: downtime.map(ms),
            predicted_total_ms: total.map(ms),
            switched,
            stalled_in_round,
            guest_cost: live.then(|| self.steering.guest_cost()),
            cpu: CpuReport {
                source_ms: Some(ms(self.clock.thread_cpu() - self.cpu_before + self.streams.cpu())),
                target_ms: running.map(|running| ms(running.cpu)),
            },
            verified: self.plan.verify.then_some(true),
            bytes_per_second: Report::throughput(&rounds),
            rounds,
            phases,
        }
    }
}
