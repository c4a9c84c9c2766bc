//! When to stop sending rounds and pause the guest: a pure function of what was measured.
//!
//! The source asks [`decide`] after each round. Predicted downtime is the time for what is still to be sent (dirty pages
//! and bytes in flight), the fixed costs of pausing, saving and restoring, and the 1.5 round trips that a safe hand-over
//! needs. A guest that dirties pages as fast as the link takes them never gets there: that is a *stall*, and the
//! source then waits for a good moment and does what [`Goal::unreachable`] says.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Rounds without a new least amount of work before the migration counts as stalled.
const STALL_ROUNDS: u32 = 5;

/// What a round must improve on, to count as better than the best before.
const IMPROVEMENT: f64 = 0.95;

/// A stalled migration pauses at a moment when no more than this much of its least amount of work is left.
const GOOD_MOMENT: f64 = 1.1;

/// What the user wants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Goal {
    /// How long the guest may stand still.
    pub max_downtime: Duration,
    /// The most rounds with the guest running.
    pub max_rounds: u32,
    /// Pausing, saving, restoring and recording, as far as it does not depend on memory.
    pub fixed_cost: Duration,
    /// What to do if the goal cannot be reached.
    pub unreachable: Unreachable,
}

impl Default for Goal {
    fn default() -> Self {
        Self {
            max_downtime: Duration::from_millis(300),
            max_rounds: 30,
            fixed_cost: Duration::from_millis(10),
            unreachable: Unreachable::Switch,
        }
    }
}

/// What to do with a guest that dirties memory faster than the goal allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unreachable {
    /// Pause it anyway, for longer than the goal.
    Switch,
    /// Let it stay.
    GiveUp,
}

/// What was measured up to the end of a round.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stats {
    /// Rounds done.
    pub round: u32,
    /// Bytes that would have to be sent with the guest paused, in flight or dirty.
    pub remaining: u64,
    /// How fast the link takes bytes, a second; 0 if it is not known.
    pub bytes_per_second: f64,
    /// The link's round trip.
    pub round_trip: Duration,
    /// The least `remaining` of the rounds before this one.
    pub least: u64,
    /// Rounds since `least` was new.
    pub since_least: u32,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Send another round.
    Continue,
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
}

/// How long the guest would stand still if it were paused now.
#[must_use]
pub fn predict(stats: &Stats, goal: &Goal) -> Duration {
    let moving =
        if stats.remaining == 0 { Duration::ZERO } else { seconds(bytes(stats.remaining) / stats.bytes_per_second) };
    moving.saturating_add(goal.fixed_cost).saturating_add(stats.round_trip.saturating_mul(3) / 2)
}

/// Whether to go on, pause, or give up.
#[must_use]
pub fn decide(stats: &Stats, goal: &Goal) -> Decision {
    let reason = if predict(stats, goal) <= goal.max_downtime {
        return Decision::Switch(SwitchReason::GoalMet);
    } else if stats.round >= goal.max_rounds {
        SwitchReason::RoundLimit
    } else if stats.since_least >= STALL_ROUNDS && bytes(stats.remaining) <= bytes(stats.least) * GOOD_MOMENT {
        SwitchReason::Stalled
    } else {
        return Decision::Continue;
    };
    match goal.unreachable {
        Unreachable::Switch => Decision::Switch(reason),
        Unreachable::GiveUp => Decision::GiveUp(reason),
    }
}

/// The measurements of a migration as rounds go by, kept by the source.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Trend {
    sent: f64,
    time: f64,
    least: u64,
    since_least: u32,
}

impl Trend {
    pub(crate) fn new() -> Self {
        Self { sent: 0.0, time: 0.0, least: u64::MAX, since_least: 0 }
    }

    /// Adds a round that moved `moved` bytes in `time`. Older rounds count half each time, so that the rate follows the
    /// link, but a short round does not decide alone.
    pub(crate) fn sent(&mut self, moved: u64, time: Duration) {
        self.sent = self.sent / 2.0 + bytes(moved);
        self.time = self.time / 2.0 + time.as_secs_f64();
    }

    /// The state of things with `remaining` bytes to send.
    pub(crate) fn stats(&self, round: u32, remaining: u64, round_trip: Duration) -> Stats {
        let bytes_per_second = if self.time > 0.0 { self.sent / self.time } else { 0.0 };
        Stats { round, remaining, bytes_per_second, round_trip, least: self.least, since_least: self.since_least }
    }

    /// Remembers `remaining` for the next rounds.
    pub(crate) fn note(&mut self, remaining: u64) {
        if bytes(remaining) < bytes(self.least) * IMPROVEMENT {
            (self.least, self.since_least) = (remaining, 0);
        } else {
            self.since_least += 1;
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "53 bits of bytes are precise enough for a prediction")]
fn bytes(count: u64) -> f64 {
    count as f64
}

/// A duration, the longest one where the number is too large or none at all.
fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn goal() -> Goal {
        Goal { max_downtime: Duration::from_millis(100), max_rounds: 10, ..Goal::default() }
    }

    fn stats(remaining: u64) -> Stats {
        Stats {
            round: 1,
            remaining,
            bytes_per_second: 1000.0 * bytes(MIB),
            round_trip: Duration::ZERO,
            least: u64::MAX,
            since_least: 0,
        }
    }

    #[test]
    fn prediction_counts_bytes_fixed_costs_and_one_and_a_half_round_trips() {
        let stats = Stats { round_trip: Duration::from_millis(20), ..stats(50 * MIB) };
        assert_eq!(predict(&stats, &goal()), Duration::from_millis(50 + 10 + 30));
    }

    #[test]
    fn a_goal_that_holds_switches_and_one_that_does_not_continues() {
        assert_eq!(decide(&stats(90 * MIB), &goal()), Decision::Switch(SwitchReason::GoalMet));
        assert_eq!(decide(&stats(91 * MIB), &goal()), Decision::Continue);
        let far = Stats { round_trip: Duration::from_millis(64), ..stats(0) };
        assert_eq!(decide(&far, &goal()), Decision::Continue, "1.5 round trips alone are over the goal");
    }

    #[test]
    fn nothing_known_of_the_link_is_no_reason_to_pause() {
        let unknown = Stats { bytes_per_second: 0.0, ..stats(1) };
        assert_eq!(predict(&unknown, &goal()), Duration::MAX);
        assert_eq!(decide(&unknown, &goal()), Decision::Continue);
        assert_eq!(decide(&Stats { remaining: 0, ..unknown }, &goal()), Decision::Switch(SwitchReason::GoalMet));
    }

    #[test]
    fn the_round_limit_forces_or_gives_up() {
        let late = Stats { round: 10, ..stats(900 * MIB) };
        assert_eq!(decide(&late, &goal()), Decision::Switch(SwitchReason::RoundLimit));
        let stay = Goal { unreachable: Unreachable::GiveUp, ..goal() };
        assert_eq!(decide(&late, &stay), Decision::GiveUp(SwitchReason::RoundLimit));
    }

    #[test]
    fn a_stall_acts_only_at_a_good_moment() {
        let stalled = Stats { least: 500 * MIB, since_least: STALL_ROUNDS, ..stats(540 * MIB) };
        assert_eq!(decide(&stalled, &goal()), Decision::Switch(SwitchReason::Stalled));
        assert_eq!(decide(&Stats { remaining: 560 * MIB, ..stalled }, &goal()), Decision::Continue);
        assert_eq!(decide(&Stats { since_least: STALL_ROUNDS - 1, ..stalled }, &goal()), Decision::Continue);
    }

    #[test]
    fn a_trend_finds_the_rate_and_the_stall() {
        let mut trend = Trend::new();
        trend.sent(1000 * MIB, Duration::from_secs(1));
        trend.sent(MIB, Duration::from_nanos(1));
        let rate = trend.stats(2, 0, Duration::ZERO).bytes_per_second;
        assert!((1000.0..1003.0).contains(&(rate / bytes(MIB))), "a tiny round must not look like an endless link");
        for remaining in [100, 50, 49, 48, 60] {
            trend.note(remaining);
        }
        let stats = trend.stats(5, 50, Duration::ZERO);
        assert_eq!((stats.least, stats.since_least), (50, 3), "a gain of less than a twentieth is none");
    }

    /// A guest that dirties half of what is sent converges; one that dirties as much as is sent does not.
    #[test]
    fn guests_of_a_steady_rate() {
        let simulate = |dirtied_per_sent: f64| {
            let (mut trend, mut remaining, mut round) = (Trend::new(), 1 << 30, 0);
            loop {
                round += 1;
                let time = Duration::from_secs_f64(bytes(remaining) / 1e9);
                trend.sent(remaining, time);
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a simulated byte count")]
                let dirtied = (bytes(remaining) * dirtied_per_sent) as u64;
                remaining = dirtied;
                let stats = trend.stats(round, remaining, Duration::ZERO);
                match decide(&stats, &Goal { max_rounds: 100, ..goal() }) {
                    Decision::Continue => trend.note(remaining),
                    Decision::Switch(reason) => return (reason, round),
                    Decision::GiveUp(_) => unreachable!(),
                }
            }
        };
        assert_eq!(simulate(0.5), (SwitchReason::GoalMet, 4));
        assert_eq!(simulate(1.0), (SwitchReason::Stalled, 7));
    }
}
