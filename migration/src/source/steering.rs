//! The source's hand on a live migration: what it measures of the rounds, what it predicts, when it throttles and when it
//! pauses the guest, and the account of all that for the report.

use super::error::SourceError;
use crate::clock::Clock;
use crate::convergence::{
    Decision, Goal, Round, Standing, Stats, SwitchReason, Trend, Verdict, bytes, decide, predict, predict_total,
    reserve,
};
use crate::report::ms;
use crate::throttling::{GuestCost, next_share, shares};
use std::num::NonZeroU64;
use std::time::Duration;

/// What comes after a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    Round,
    /// Another round, with the guest slower.
    SlowerRound,
    Pause,
}

/// What was predicted, and what was decided on it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Course {
    /// The downtime, when the source decided to pause the guest.
    pub(super) downtime: Option<Duration>,
    /// The time from the first frame until the guest runs at the target, after the first round.
    pub(super) total: Option<Duration>,
    /// Why rounds ended.
    pub(super) switched: Option<SwitchReason>,
    /// The round after which it was first seen that more do not help.
    pub(super) stalled_in_round: Option<u32>,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Steering {
    goal: Goal,
    started: Duration,
    trend: Trend,
    course: Course,
    log: LogTimes,
    throttle: Throttle,
}

/// How long the host needed for the dirty log.
#[derive(Debug, Clone, Copy, Default)]
struct LogTimes {
    sum: Duration,
    longest: Duration,
    last: Duration,
}

/// What is taken from the guest.
#[derive(Debug, Default)]
struct Throttle {
    share: f64,
    most_share: f64,
    /// Of each vCPU.
    shares: Vec<f64>,
    /// When it began, and what each vCPU had lost by then.
    began: Option<(Duration, Duration)>,
    /// What all vCPUs lost, and the time that they had.
    taken: Option<[Duration; 2]>,
}

impl Steering {
    pub(super) fn new(goal: Goal, cap: Option<NonZeroU64>, started: Duration) -> Self {
        Self {
            goal,
            started,
            trend: Trend::new(cap.map(NonZeroU64::get)),
            course: Course::default(),
            log: LogTimes::default(),
            throttle: Throttle::default(),
        }
    }

    /// When a round that begins now is to be cut short, so that half of the time until the deadline is left for what it
    /// has not sent, and for what the guest has written since.
    pub(super) fn cut_at(&self, now: Duration) -> Option<Duration> {
        let deadline = self.goal.deadline?;
        let end = self.started + deadline.saturating_sub(reserve(deadline));
        Some(now + end.saturating_sub(now) / 2)
    }

    /// Notes a round.
    pub(super) fn sent(&mut self, round: Round) {
        self.trend.add(round);
    }

    /// Notes how long the host needed to tell dirty pages, or to begin to watch them.
    pub(super) fn logged(&mut self, time: Duration) {
        let LogTimes { sum, longest, last } = &mut self.log;
        (*sum, *longest, *last) = (*sum + time, time.max(*longest), time);
    }

    /// What comes after round `round`, with so many pages written in it, so many that it did not come to, and so many bytes
    /// on their way.
    pub(super) fn next(&mut self, round: u32, now: Duration, left: Left) -> Result<Then, SourceError> {
        let Left { dirty_pages, unsent_pages, in_flight, round_trip } = left;
        let (elapsed, log_time, throttle) = (now - self.started, self.log.last, self.throttle.share);
        let standing = Standing { elapsed, dirty_pages, unsent_pages, in_flight, round_trip, log_time, throttle };
        let stats = self.trend.stats(round, standing);
        tracing::debug!(?stats, "migration course");
        let (decision, verdict, goal) = (decide(&stats, &self.goal), Verdict::of(&stats, &self.goal), &self.goal);
        self.course.downtime = Some(predict(&stats, goal));
        self.course.total.get_or_insert_with(|| predict_total(&stats, goal));
        if verdict == Verdict::Stalls {
            self.course.stalled_in_round.get_or_insert(round);
        }
        let next = match decision {
            Decision::Continue => Then::Round,
            Decision::Throttle => Then::SlowerRound,
            Decision::Switch(reason) => {
                self.course.switched = Some(reason);
                Then::Pause
            }
            Decision::GiveUp(reason) => return Err(unreachable(&stats, goal, reason)),
        };
        self.trend.note(verdict);
        Ok(next)
    }

    /// Slows the guest down by one more step: the share that each vCPU loses from now on. `written` is what each wrote in
    /// the last round, and `taken` what each has lost so far.
    pub(super) fn slow_down(&mut self, written: Option<&[u64]>, taken: &[Duration], now: Duration) -> &[f64] {
        let Throttle { share, most_share, shares: each, began, taken: _ } = &mut self.throttle;
        began.get_or_insert_with(|| (now, taken.iter().sum()));
        *share = next_share(*share, self.trend.last_ratio());
        *most_share = share.max(*most_share);
        each.resize(taken.len(), 0.0);
        *each = shares(*share, written, each);
        each
    }

    /// The share of its time that the guest as a whole loses.
    pub(super) fn throttled_share(&self) -> f64 {
        self.throttle.share
    }

    /// Notes that nothing is taken from the guest any more.
    pub(super) fn unthrottled(&mut self, taken: &[Duration], now: Duration) {
        let Throttle { share, began, taken: lost, .. } = &mut self.throttle;
        if let Some((since, before)) = began.take() {
            let vcpus = u32::try_from(taken.len()).unwrap_or(u32::MAX);
            *lost = Some([taken.iter().sum::<Duration>().saturating_sub(before), (now - since).saturating_mul(vcpus)]);
        }
        *share = 0.0;
    }

    /// What was predicted and decided.
    pub(super) fn course(&self) -> Course {
        self.course
    }

    /// What the rounds took from the guest.
    pub(super) fn guest_cost(&self) -> GuestCost {
        let LogTimes { sum, longest, last: _ } = self.log;
        let [taken, had] = self.throttle.taken.unwrap_or_default();
        GuestCost {
            log_ms: ms(sum),
            longest_log_ms: ms(longest),
            throttled_ms: ms(taken),
            throttled_share: if had.is_zero() { 0.0 } else { taken.div_duration_f64(had).min(1.0) },
            most_share: self.throttle.most_share,
        }
    }
}

/// What is left to send after a round.
#[derive(Debug, Clone, Copy)]
pub(super) struct Left {
    pub(super) dirty_pages: u64,
    pub(super) unsent_pages: u64,
    pub(super) in_flight: u64,
    pub(super) round_trip: Duration,
}

/// How long `work` takes, by `clock`.
pub(super) fn timed<T>(clock: &dyn Clock, work: impl FnOnce() -> T) -> (T, Duration) {
    let begun = clock.now();
    let done = work();
    (done, clock.now() - begun)
}

fn unreachable(stats: &Stats<'_>, goal: &Goal, reason: SwitchReason) -> SourceError {
    let Stats { round, remaining, dirtied_per_second, bytes_per_second, .. } = *stats;
    SourceError::GoalUnreachable {
        goal: goal.max_downtime,
        predicted: predict(stats, goal),
        round,
        reason,
        remaining: bytes(remaining),
        dirtied_per_second,
        bytes_per_second,
    }
}
