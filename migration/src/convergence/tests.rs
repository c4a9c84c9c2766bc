//! Decisions on recorded and on simulated guests.

use super::*;
use crate::counts::PageCounts;
use crate::region::PAGE_SIZE;
use crate::throttling::{MOST_SHARE, next_share};

const MIB: u64 = 1 << 20;

/// Bytes a second of the links here: 1000 MiB, so that a MiB takes a millisecond.
const RATE: f64 = 1000.0 * 1024.0 * 1024.0;

fn goal() -> Goal {
    Goal { max_downtime: Duration::from_millis(100), state_bytes: 0, ..Goal::default() }
}

/// What is known after the first round.
fn stats(remaining: u64) -> Stats<'static> {
    Stats {
        round: 1,
        elapsed: Duration::from_secs(1),
        remaining,
        recent: &[],
        dirtied_per_second: bytes(remaining),
        bytes_per_second: RATE,
        round_trip: Duration::ZERO,
        log_time: Duration::ZERO,
        stalled_rounds: 0,
        cheap_rounds: 0,
        throttle: 0.0,
    }
}

#[test]
fn prediction_counts_bytes_fixed_costs_the_log_and_one_and_a_half_round_trips() {
    let ms = Duration::from_millis;
    let stats = Stats { round_trip: ms(20), log_time: ms(3), ..stats(50 * MIB) };
    let goal = Goal { state_bytes: 2 * MIB, ..goal() };
    assert_eq!(predict(&stats, &goal), ms(50 + 2 + 10 + 3 + 30));
}

#[test]
fn the_total_is_predicted_by_the_decisions_to_come() {
    let ms = Duration::from_millis;
    let foreseen = |dirtied, goal| {
        let stats = Stats { dirtied_per_second: RATE * dirtied, recent: &[400 * MIB], ..stats(400 * MIB) };
        predict_total(&stats, &goal)
    };
    assert_eq!(foreseen(0.0, goal()), ms(1000 + 400 + 10));
    assert_eq!(foreseen(0.75, goal()), foreseen(0.75, Goal { on_stall: OnStall::Throttle, ..goal() }));
    // Rounds of 400, 200 and 100 ms until the goal holds, and four short ones that make 60 ms of downtime 13.
    let rounds = ms(400 + 200 + 100 + 50 + 25) + Duration::from_micros(12_500 + 6250);
    assert_eq!(foreseen(0.5, goal()), ms(1000) + rounds + Duration::from_micros(3125 + 10_000));
    // It pauses in the fourth round, when the stall is seen.
    assert_eq!(foreseen(1.0, goal()), ms(1000 + 3 * 400 + 410));
    let slower = foreseen(1.0, Goal { on_stall: OnStall::Throttle, ..goal() });
    assert!((ms(2700)..ms(5000)).contains(&slower), "{slower:?}");
}

#[test]
fn a_goal_that_holds_switches_and_one_that_does_not_continues() {
    let written = |remaining| Stats { dirtied_per_second: RATE, ..stats(remaining) };
    assert_eq!(decide(&written(90 * MIB), &goal()), Decision::Switch(SwitchReason::GoalMet));
    assert_eq!(decide(&written(91 * MIB), &goal()), Decision::Continue);
}

#[test]
fn a_short_round_that_lowers_the_downtime_by_much_is_sent() {
    let goal = Goal { max_downtime: Duration::from_millis(300), ..goal() };
    let small = |remaining| Stats { elapsed: Duration::from_millis(100), ..stats(remaining) };
    assert_eq!(decide(&small(45 * MIB), &goal), Decision::Continue, "45 ms make 55 ms of downtime 12");
    assert_eq!(decide(&small(MIB), &goal), Decision::Switch(SwitchReason::GoalMet), "11 ms are no better than 10");
    assert_eq!(decide(&small(90 * MIB), &goal), Decision::Switch(SwitchReason::GoalMet), "90 ms are no short round");
    let late = Stats { elapsed: Duration::from_secs(1), ..small(90 * MIB) };
    assert_eq!(decide(&late, &goal), Decision::Continue, "they are after a second");
    let busy = Stats { dirtied_per_second: RATE * 0.6, ..small(45 * MIB) };
    assert_eq!(decide(&busy, &goal), Decision::Switch(SwitchReason::GoalMet), "it would not become half");
    let patient = Stats { cheap_rounds: CHEAP_ROUNDS, ..small(45 * MIB) };
    assert_eq!(decide(&patient, &goal), Decision::Switch(SwitchReason::GoalMet));
    let last = Stats { round: goal.max_rounds, ..small(45 * MIB) };
    assert_eq!(decide(&last, &goal), Decision::Switch(SwitchReason::GoalMet));
}

#[test]
fn nothing_known_of_the_link_is_no_reason_to_pause() {
    let unknown = Stats { bytes_per_second: 0.0, ..stats(1) };
    assert_eq!(predict(&unknown, &goal()), Duration::MAX);
    assert_eq!(decide(&unknown, &goal()), Decision::Continue);
    assert_eq!(decide(&Stats { remaining: 0, ..unknown }, &goal()), Decision::Switch(SwitchReason::GoalMet));
}

#[test]
fn costs_that_no_round_lowers_are_a_stall_at_once() {
    let far = |on_stall| {
        let stats = Stats { round_trip: Duration::from_millis(64), ..stats(MIB) };
        decide(&stats, &Goal { on_stall, ..goal() })
    };
    assert_eq!(far(OnStall::Stop), Decision::Switch(SwitchReason::Stalled));
    assert_eq!(far(OnStall::Throttle), Decision::Switch(SwitchReason::Stalled), "a slower guest does not help");
    assert_eq!(far(OnStall::Cancel), Decision::GiveUp(SwitchReason::Stalled));
    let more = Stats { round_trip: Duration::from_millis(64), ..stats(50 * MIB) };
    assert_eq!(decide(&more, &goal()), Decision::Continue, "rounds still make the downtime less");
}

#[test]
fn the_round_limit_ends_it() {
    let late = Stats { round: 30, ..stats(900 * MIB) };
    for (on_stall, decision) in [
        (OnStall::Stop, Decision::Switch(SwitchReason::RoundLimit)),
        (OnStall::Throttle, Decision::Switch(SwitchReason::RoundLimit)),
        (OnStall::Cancel, Decision::GiveUp(SwitchReason::RoundLimit)),
    ] {
        assert_eq!(decide(&late, &Goal { on_stall, ..goal() }), decision);
    }
}

#[test]
fn a_deadline_ends_rounds_while_there_is_time_to_pause() {
    // 400 ms for a round, 400 ms and 10 ms of downtime after it, 150 ms in reserve.
    let stats = |ms| Stats { elapsed: Duration::from_millis(ms), dirtied_per_second: RATE, ..stats(400 * MIB) };
    let goal = Goal { deadline: Some(Duration::from_secs(3)), ..goal() };
    assert_eq!(decide(&stats(2040), &goal), Decision::Continue);
    assert_eq!(decide(&stats(2041), &goal), Decision::Switch(SwitchReason::Deadline));
    let cancel = Goal { on_stall: OnStall::Cancel, ..goal };
    assert_eq!(decide(&stats(2041), &cancel), Decision::GiveUp(SwitchReason::Deadline));
    let throttle = Goal { on_stall: OnStall::Throttle, ..goal };
    assert_eq!(decide(&stats(2041), &throttle), Decision::Switch(SwitchReason::Deadline));
    let met = Stats { remaining: 10 * MIB, ..stats(2999) };
    assert_eq!(decide(&met, &cancel), Decision::Switch(SwitchReason::GoalMet), "a goal that holds is met");
}

#[test]
fn a_stall_pauses_at_a_good_moment_and_waits_for_it_a_few_rounds() {
    let at = |recent: &'static [u64; 4], stalled_rounds| {
        let recent: Vec<u64> = recent.iter().map(|mib| mib * MIB).collect();
        let stats = Stats { round: 9, recent: &recent, stalled_rounds, ..stats(recent[3]) };
        decide(&Stats { dirtied_per_second: RATE, ..stats }, &goal())
    };
    assert_eq!(at(&[500, 500, 500, 540], 0), Decision::Switch(SwitchReason::Stalled));
    assert_eq!(at(&[500, 500, 500, 560], 0), Decision::Continue);
    assert_eq!(at(&[500, 500, 500, 560], WAIT_ROUNDS), Decision::Switch(SwitchReason::Stalled));
}

/// How a migration of a simulated guest ended.
#[derive(Debug, PartialEq)]
struct End {
    decision: Decision,
    rounds: u32,
    /// MiB that were left.
    left: u64,
    /// Percent that were taken from the guest.
    throttled: u32,
}

/// Migrates a guest of 1 GiB that writes so many MiB in a round of that time, with that much taken from it.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "simulated counts")]
fn simulate(goal: Goal, mut writes: impl FnMut(Duration, f64) -> f64) -> End {
    let (mut trend, mut elapsed, mut pages, mut throttle) = (Trend::new(None), Duration::ZERO, 1 << 18, 0.0);
    for round in 1.. {
        let sent = pages * PAGE_SIZE as u64;
        let time = seconds(bytes(sent) / RATE);
        elapsed += time;
        let kinds = PageCounts { raw: pages, ..PageCounts::default() };
        trend.add(Round { number: round, kinds, bytes: sent, received: sent, time });
        pages = (writes(time, throttle) * bytes(MIB)) as u64 / PAGE_SIZE as u64;
        let standing = Standing {
            elapsed,
            dirty_pages: pages,
            unsent_pages: 0,
            in_flight: 0,
            round_trip: Duration::ZERO,
            log_time: Duration::ZERO,
            throttle,
        };
        let stats = trend.stats(round, standing);
        let verdict = Verdict::of(&stats, &goal);
        let left = stats.remaining / MIB;
        match decide(&stats, &goal) {
            Decision::Continue => trend.note(verdict),
            Decision::Throttle => {
                trend.note(verdict);
                throttle = next_share(throttle, trend.last_ratio());
            }
            decision @ (Decision::Switch(_) | Decision::GiveUp(_)) => {
                return End { decision, rounds: round, left, throttled: (throttle * 100.0) as u32 };
            }
        }
    }
    unreachable!("there is a most number of rounds")
}

/// A guest that writes to all of a working set of `set` MiB at `rate` MiB a second, page after page.
fn writer(set: f64, rate: f64) -> impl FnMut(Duration, f64) -> f64 {
    move |time, throttle| (rate * (1.0 - throttle) * time.as_secs_f64()).min(set)
}

#[test]
fn an_idle_guest_is_paused_after_its_first_round() {
    let end = simulate(goal(), |_, _| 0.5);
    assert_eq!((end.decision, end.rounds), (Decision::Switch(SwitchReason::GoalMet), 1));
}

#[test]
fn a_guest_slower_than_the_link_gets_a_downtime_far_below_the_goal() {
    let goal = Goal { max_downtime: Duration::from_millis(300), ..goal() };
    let end = simulate(goal, writer(512.0, 90.0));
    assert_eq!(end.decision, Decision::Switch(SwitchReason::GoalMet));
    assert!(end.left <= 8 && end.rounds <= 4, "{end:?}");
}

#[test]
fn a_working_set_faster_than_the_link_ends_within_eight_rounds() {
    for wobble in [0.0, 0.03, 0.09] {
        let mut round = 0;
        let end = simulate(goal(), |_, _| {
            round += 1;
            500.0 * (1.0 + wobble * f64::from(round * 7 % 5 - 2) / 2.0)
        });
        assert_eq!(end.decision, Decision::Switch(SwitchReason::Stalled));
        assert!(end.rounds <= 8, "{wobble}: {end:?}");
    }
}

/// What was the least ever is no measure for ever.
#[test]
fn a_working_set_that_dips_once_ends_within_a_few_rounds_more() {
    for dip in 0..8 {
        let mut round = 0;
        let end = simulate(goal(), |_, _| {
            round += 1;
            if round == dip { 200.0 } else { 500.0 }
        });
        assert_eq!(end.decision, Decision::Switch(SwitchReason::Stalled));
        assert!(end.rounds <= 9 && end.left <= 500, "a dip in round {dip}: {end:?}");
    }
}

#[test]
fn a_guest_that_shrinks_by_little_is_seen_to_stall_and_one_that_shrinks_enough_is_not() {
    let shrinking = |by: f64| {
        let mut left = 800.0;
        simulate(goal(), move |_, _| {
            left *= by;
            left
        })
    };
    for by in [1.0, 0.99, 0.97, 0.95] {
        let end = shrinking(by);
        assert_eq!(end.decision, Decision::Switch(SwitchReason::Stalled));
        assert!(end.rounds <= 6, "{by}: {end:?}");
    }
    for by in [0.9, 0.8, 0.5] {
        assert_eq!(shrinking(by).decision, Decision::Switch(SwitchReason::GoalMet), "{by}");
    }
}

#[test]
fn an_oscillating_guest_is_paused_when_little_remains() {
    for (period, low) in [(2, 200.0), (3, 300.0), (4, 150.0)] {
        let mut round = 0;
        let end = simulate(goal(), |_, _| {
            round += 1;
            if round % period == 0 { low } else { 700.0 }
        });
        assert_eq!(end.decision, Decision::Switch(SwitchReason::Stalled));
        assert!(end.left <= 330 && end.rounds <= 12, "{period}: {end:?}");
    }
}

#[test]
fn a_guest_that_dirties_more_and_more_does_not_run_to_the_round_limit() {
    let mut left = 100.0;
    let end = simulate(goal(), |_, _| {
        left *= 1.2;
        left
    });
    assert_eq!(end.decision, Decision::Switch(SwitchReason::Stalled));
    assert!(end.rounds <= 4 + WAIT_ROUNDS, "{end:?}");
}

#[test]
fn a_guest_that_cannot_go_is_let_stay_when_that_is_wished() {
    let cancel = Goal { on_stall: OnStall::Cancel, ..goal() };
    let end = simulate(cancel, writer(500.0, 5000.0));
    assert_eq!((end.decision, end.rounds), (Decision::GiveUp(SwitchReason::Stalled), 4));
}

#[test]
fn a_guest_is_throttled_until_it_converges() {
    let throttle = Goal { on_stall: OnStall::Throttle, ..goal() };
    // It writes 1.5 times, and 8 times, as fast as the link takes it.
    for (rate, least, most) in [(1500.0, 40, 70), (8000.0, 88, 97)] {
        let end = simulate(throttle, writer(500.0, rate));
        assert_eq!(end.decision, Decision::Switch(SwitchReason::GoalMet), "{rate}: {end:?}");
        assert!((least..=most).contains(&end.throttled) && end.rounds < 20, "{rate}: {end:?}");
    }
    // One that writes its working set a thousand times a round cannot be made slow enough.
    let end = simulate(throttle, writer(500.0, 500_000.0));
    assert_eq!(end.decision, Decision::Switch(SwitchReason::Stalled));
    assert_eq!(f64::from(end.throttled), (MOST_SHARE * 100.0).floor());
    // Where it is not needed, nothing is taken.
    assert_eq!(simulate(throttle, writer(500.0, 500.0)).throttled, 0);
}

/// What pages cost as they were sent lately, and not what they are in memory.
#[test]
fn pages_count_as_what_they_are_on_the_link() {
    let mut trend = Trend::new(None);
    let kinds = PageCounts { delta: 900, same: 100, ..PageCounts::default() };
    trend.add(Round { number: 2, kinds, bytes: 100_000, received: 100_000, time: Duration::from_millis(100) });
    let standing = Standing {
        elapsed: Duration::ZERO,
        dirty_pages: 500,
        unsent_pages: 20,
        in_flight: 1000,
        round_trip: Duration::ZERO,
        log_time: Duration::ZERO,
        throttle: 0.0,
    };
    let stats = trend.stats(2, standing);
    assert_eq!((stats.remaining, stats.recent.len()), (53_000, 0), "a round that was cut short is no step of a trend");
    assert!((stats.dirtied_per_second - 500_000.0).abs() < 1.0 && (stats.bytes_per_second - 1e6).abs() < 1.0);
    let mut capped = Trend::new(Some(1000));
    capped.add(Round { number: 1, kinds, bytes: 100_000, received: 100_000, time: Duration::from_millis(100) });
    assert!((capped.stats(1, standing).bytes_per_second - 1000.0).abs() < 1e-9, "the cap holds for what comes, too");
}

#[test]
fn a_tiny_round_does_not_look_like_an_endless_link() {
    let mut trend = Trend::new(None);
    let kinds = PageCounts { raw: 1, ..PageCounts::default() };
    trend.add(Round { number: 1, kinds, bytes: 1000 * MIB, received: 1000 * MIB, time: Duration::from_secs(1) });
    trend.add(Round { number: 2, kinds, bytes: MIB, received: MIB, time: Duration::from_nanos(1) });
    let standing = Standing {
        elapsed: Duration::ZERO,
        dirty_pages: 0,
        unsent_pages: 0,
        in_flight: 0,
        round_trip: Duration::ZERO,
        log_time: Duration::ZERO,
        throttle: 0.0,
    };
    let rate = trend.stats(2, standing).bytes_per_second;
    assert!((1000.0..1003.0).contains(&(rate / bytes(MIB))), "{rate}");
}
