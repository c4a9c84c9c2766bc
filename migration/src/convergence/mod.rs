//! When to stop sending rounds and pause the guest: pure functions of what was measured.
//!
//! The source asks [`decide`] after each round:
//!
//! ```text
//! the downtime is predicted to hold ──► pause; but first another round, where a short one lowers the downtime much
//! no time or no rounds are left, or more of them do not bring the goal nearer (a stall)
//!     ──► what Goal::on_stall says: give up, slow the guest down, or pause it nevertheless, at a good moment
//! else ──► another round
//! ```
//! Predicted downtime is the time for what is still to be sent (dirty pages and bytes in flight, and the state), the fixed
//! costs of pausing, saving and restoring, the last look at the dirty log, and the 1.5 round trips that a safe hand-over
//! needs. The comparison of all memory that [`Plan::verify`](crate::Plan::verify) asks for is not in it.
//!
//! A stall is judged by the last rounds only: from the least of some to the least of the last two, by how much did a round
//! shrink what remains, and how many more would the goal take at that pace? A guest that writes its working set faster
//! than the link takes it never gets there; one that shrinks by a little each round does not within the rounds left.

mod trend;

pub(crate) use trend::{Round, Standing, Trend, Verdict};

use crate::throttling::{MOST_SHARE, next_share};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How many of the last rounds tell whether the migration stalls: two, and those before them, which are two at least.
const WINDOW: usize = 8;

/// How many of them show what is little for this guest.
const MOMENT_WINDOW: usize = 4;

/// A stalled migration pauses at a moment when no more than this much of the least of the last rounds remains.
const GOOD_MOMENT: f64 = 1.1;

/// For how many rounds a stalled migration waits for such a moment.
const WAIT_ROUNDS: u32 = 4;

/// A guest that is throttled should reach the goal in so many rounds, or it is throttled more.
const THROTTLED_ROUNDS: u32 = 5;

/// What is sent in this time is not worth another round, whatever the goal.
const NOTHING_MUCH: Duration = Duration::from_millis(5);

/// A round of at most this, or of one part in [`CHEAP_SHARE`] of the time that the migration took so far, may lower a
/// downtime that holds already.
const CHEAP: Duration = Duration::from_millis(50);
const CHEAP_SHARE: u32 = 10;

/// How many such rounds there are at most.
const CHEAP_ROUNDS: u32 = 4;

/// How many rounds a prediction of the total looks ahead.
const FORESEEN_ROUNDS: usize = 100;

/// The part of a deadline that is kept in reserve, within these limits.
const RESERVE_SHARE: u32 = 20;
const RESERVE: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];

/// What the user wants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Goal {
    /// How long the guest may stand still.
    pub max_downtime: Duration,
    /// The most rounds with the guest running.
    pub max_rounds: u32,
    /// When the guest should run at the target, counted from the start; `None` for whenever it is ready.
    pub deadline: Option<Duration>,
    /// What to do if that cannot be had.
    pub on_stall: OnStall,
    /// Pausing, saving, restoring and recording, as far as it does not depend on memory.
    pub fixed_cost: Duration,
    /// What is sent with the guest paused besides pages: the state of vCPUs and devices, in bytes.
    pub state_bytes: u64,
}

impl Default for Goal {
    fn default() -> Self {
        Self {
            max_downtime: Duration::from_millis(300),
            max_rounds: 30,
            deadline: None,
            on_stall: OnStall::Stop,
            fixed_cost: Duration::from_millis(10),
            state_bytes: 32 << 10,
        }
    }
}

/// What to do with a guest that dirties memory faster than the goal allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnStall {
    /// Let it stay.
    Cancel,
    /// Slow it down until the goal holds; where not even that helps, or no time is left, pause it.
    Throttle,
    /// Pause it anyway, for longer than the goal.
    Stop,
}

/// What was measured up to the end of a round.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stats<'a> {
    /// Rounds done.
    pub round: u32,
    /// Since the start of the migration.
    pub elapsed: Duration,
    /// Bytes that would have to be sent with the guest paused, in flight or dirty.
    pub remaining: u64,
    /// What remained after each of the last rounds, this one included, oldest first.
    pub recent: &'a [u64],
    /// How many bytes to send the guest made by its writes in each second of the last round.
    pub dirtied_per_second: f64,
    /// How fast bytes go, a second; 0 if it is not known.
    pub bytes_per_second: f64,
    /// The link's round trip.
    pub round_trip: Duration,
    /// How long the last look at the dirty log took.
    pub log_time: Duration,
    /// Rounds in a row up to the one before this for which [`stalls`] was true.
    pub stalled_rounds: u32,
    /// Rounds that were sent although the goal held.
    pub cheap_rounds: u32,
    /// The share of its time that is taken from the guest, 0 to [`MOST_SHARE`].
    pub throttle: f64,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Send another round.
    Continue,
    /// Slow the guest down, more than before, and send another round.
    Throttle,
    /// Pause the guest and send the rest.
    Switch(SwitchReason),
    /// End the migration; the guest stays.
    GiveUp(SwitchReason),
}

/// Why rounds ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SwitchReason {
    /// The downtime goal is predicted to hold.
    GoalMet,
    /// The most rounds were sent.
    RoundLimit,
    /// More rounds do not bring the goal nearer.
    Stalled,
    /// No time for another round is left.
    Deadline,
}

impl Stats<'_> {
    /// How long `count` bytes take.
    fn time_for(&self, count: f64) -> Duration {
        if count > 0.0 { seconds(count / self.bytes_per_second) } else { Duration::ZERO }
    }

    /// How long the next round would take.
    fn next_round(&self) -> Duration {
        self.time_for(bytes(self.remaining))
    }

    /// What would remain after it, by the pace of the guest's writes and by how the last two rounds went.
    fn after_next_round(&self) -> f64 {
        let written = self.dirtied_per_second * self.next_round().as_secs_f64();
        let going = match self.recent {
            [.., before, now] => bytes(self.remaining) * ratio(*now, *before),
            _ => 0.0,
        };
        written.max(going)
    }

    /// By how much a round shrinks what remains, lately; `None` if it is too early to tell. A throttled guest is judged by
    /// its last round alone: those before had another guest.
    fn pace(&self) -> Option<f64> {
        match *self.recent {
            [.., before, now] if self.throttle > 0.0 => Some(ratio(now, before)),
            [ref before @ .., a, b] if before.len() >= 2 => {
                let least = before.iter().copied().min()?;
                Some(ratio(a.min(b), least).sqrt())
            }
            _ => None,
        }
    }
}

/// What the downtime is when `left` bytes of pages remain.
fn downtime(left: f64, stats: &Stats<'_>, goal: &Goal) -> Duration {
    let moving = if left > 0.0 { left + bytes(goal.state_bytes) } else { 0.0 };
    stats.time_for(moving).saturating_add(unavoidable(stats, goal))
}

/// What of the downtime does not depend on bytes.
fn unavoidable(stats: &Stats<'_>, goal: &Goal) -> Duration {
    let trips = stats.round_trip.saturating_mul(3) / 2;
    goal.fixed_cost.saturating_add(stats.log_time).saturating_add(trips)
}

/// How long the guest would stand still if it were paused now.
#[must_use]
pub fn predict(stats: &Stats<'_>, goal: &Goal) -> Duration {
    downtime(bytes(stats.remaining), stats, goal)
}

/// How long the whole migration would take from its start, if the guest goes on to write as it did in the last round: what
/// [`decide`] would decide then, round by round.
#[must_use]
pub fn predict_total(stats: &Stats<'_>, goal: &Goal) -> Duration {
    let (mut recent, full) = (stats.recent.to_vec(), 1.0 - stats.throttle);
    let mut at = Stats { recent: &[], ..*stats };
    for _ in 0..FORESEEN_ROUNDS {
        let now = Stats { recent: &recent, ..at };
        let (decision, verdict) = (decide(&now, goal), Verdict::of(&now, goal));
        match decision {
            Decision::Continue => {}
            Decision::Throttle => at.throttle = next_share(at.throttle, trend::last_ratio(&recent)),
            Decision::Switch(_) | Decision::GiveUp(_) => break,
        }
        let written = stats.dirtied_per_second * (1.0 - at.throttle) / full;
        at.elapsed = at.elapsed.saturating_add(at.next_round());
        at.remaining = whole(written * at.next_round().as_secs_f64());
        at.round += 1;
        trend::push(&mut recent, at.remaining);
        (at.stalled_rounds, at.cheap_rounds) = verdict.counted(at.stalled_rounds, at.cheap_rounds);
    }
    at.elapsed.saturating_add(predict(&at, goal))
}

/// Whether more rounds do not bring the goal nearer, or not within those that are left.
#[must_use]
pub fn stalls(stats: &Stats<'_>, goal: &Goal) -> bool {
    if predict(stats, goal) <= goal.max_downtime {
        return false;
    }
    let moving = goal.max_downtime.saturating_sub(unavoidable(stats, goal)).max(NOTHING_MUCH);
    let enough = moving.as_secs_f64() * stats.bytes_per_second - bytes(goal.state_bytes);
    let enough = enough.max(NOTHING_MUCH.as_secs_f64() * stats.bytes_per_second);
    if stats.bytes_per_second > 0.0 && bytes(stats.remaining) <= enough {
        // What is over the goal are the costs that no round changes.
        return true;
    }
    let left = goal.max_rounds.saturating_sub(stats.round);
    let rounds = if stats.throttle > 0.0 { left.min(THROTTLED_ROUNDS) } else { left };
    let Some(pace) = stats.pace() else { return false };
    // Written so that what is no number is a stall.
    let shrinks = pace < 1.0 && (enough / bytes(stats.remaining)).ln() / pace.ln() <= f64::from(rounds);
    !shrinks
}

/// What of the time until a deadline is not planned for.
pub(crate) fn reserve(deadline: Duration) -> Duration {
    let [least, most] = RESERVE;
    (deadline / RESERVE_SHARE).clamp(least, most)
}

/// Whether another round would leave too little time until the deadline.
fn deadline_is_near(stats: &Stats<'_>, goal: &Goal) -> bool {
    goal.deadline.is_some_and(|deadline| {
        let after = downtime(stats.after_next_round(), stats, goal);
        let needed = stats.next_round().saturating_add(after).saturating_add(reserve(deadline));
        stats.elapsed.saturating_add(needed) > deadline
    })
}

/// Whether a short round would lower a downtime that holds already by much.
fn is_worth_a_round(stats: &Stats<'_>, goal: &Goal) -> bool {
    let round = stats.next_round();
    let lower = downtime(stats.after_next_round(), stats, goal);
    let predicted = predict(stats, goal);
    stats.cheap_rounds < CHEAP_ROUNDS
        && stats.round < goal.max_rounds
        && round <= CHEAP.max(stats.elapsed / CHEAP_SHARE)
        && stats.after_next_round() * 2.0 <= bytes(stats.remaining)
        && predicted.saturating_sub(lower) * 8 >= predicted
        && !deadline_is_near(stats, goal)
}

/// Whether little remains, as far as such a guest goes, or was waited for in vain.
fn is_good_moment(stats: &Stats<'_>) -> bool {
    let least = stats.recent.iter().rev().take(MOMENT_WINDOW).copied().min().unwrap_or(u64::MAX);
    stats.stalled_rounds >= WAIT_ROUNDS || bytes(stats.remaining) <= bytes(least) * GOOD_MOMENT
}

/// Whether to go on, and how.
#[must_use]
pub fn decide(stats: &Stats<'_>, goal: &Goal) -> Decision {
    if predict(stats, goal) <= goal.max_downtime {
        let go_on = is_worth_a_round(stats, goal);
        return if go_on { Decision::Continue } else { Decision::Switch(SwitchReason::GoalMet) };
    }
    let reason = if stats.round >= goal.max_rounds {
        SwitchReason::RoundLimit
    } else if deadline_is_near(stats, goal) {
        SwitchReason::Deadline
    } else if stalls(stats, goal) {
        SwitchReason::Stalled
    } else {
        return Decision::Continue;
    };
    match (goal.on_stall, reason) {
        (OnStall::Cancel, _) => Decision::GiveUp(reason),
        (OnStall::Throttle, SwitchReason::Stalled) if may_help(stats, goal) => Decision::Throttle,
        (OnStall::Throttle | OnStall::Stop, SwitchReason::Stalled) if !is_good_moment(stats) => Decision::Continue,
        (OnStall::Throttle | OnStall::Stop, _) => Decision::Switch(reason),
    }
}

/// Whether a slower guest would stand still for less time.
fn may_help(stats: &Stats<'_>, goal: &Goal) -> bool {
    stats.throttle < MOST_SHARE && unavoidable(stats, goal) < goal.max_downtime
}

/// A quotient of bytes; 1 where there is nothing to divide by.
fn ratio(of: u64, by: u64) -> f64 {
    if by == 0 { 1.0 } else { bytes(of) / bytes(by) }
}

#[expect(clippy::cast_precision_loss, reason = "53 bits of bytes are precise enough for a prediction")]
pub(crate) fn bytes(count: u64) -> f64 {
    count as f64
}

/// A number of bytes that is one: the next higher integer.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "what is no number of bytes becomes the nearest"
)]
fn whole(bytes: f64) -> u64 {
    bytes.ceil() as u64
}

/// A duration, the longest one where the number is too large or none at all.
fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests;
