//! Migrations with goals that are out of reach: what is paused, given up, throttled, or cut short, and who runs the guest
//! then; and a cap that holds over all streams.

use super::faults::{Fate, survive};
use super::link::{FaultAt, Harm, SOURCE};
use super::moves::{Success, moves};
use super::world::{FakeGuest, FakeHost, MemoryClaims, World, content};
use super::{Attempt, Weather, migrate, plan};
use crate::convergence::OnStall;
use crate::report::Report;
use crate::source::{Failed, Outcome, Plan, SourceError};
use crate::target::Fault;
use crate::{Goal, Mode, Progress, SwitchReason};
use std::num::{NonZeroU16, NonZeroU64};
use std::sync::Arc;
use std::time::Duration;

const MIB: u64 = 1 << 20;

fn with(on_stall: OnStall, max_downtime: Duration) -> Plan {
    let goal = Goal { on_stall, max_downtime, max_rounds: 40, ..Goal::default() };
    Plan { goal, ..plan(Mode::Live) }
}

/// A guest that writes more than a link of 1 MiB a second takes: a goal of 150 ms is out of its reach.
fn fast_writer(on_stall: OnStall) -> Plan {
    Plan { bandwidth: NonZeroU64::new(MIB), ..with(on_stall, Duration::from_millis(150)) }
}

const BUSY: u32 = 4;

#[test]
fn round_trips_over_the_goal_are_no_reason_for_many_rounds() {
    let far = || Weather { round_trip: Some(Duration::from_secs(1)), ..Weather::default() };
    let Success { source, .. } = moves(&with(OnStall::Stop, Duration::from_millis(300)), 2, far());
    assert_eq!((source.switched, source.forced()), (Some(SwitchReason::Stalled), true));
    assert!(source.rounds.len() <= 5, "{} rounds", source.rounds.len());
    assert!(source.predicted_downtime_ms.unwrap() >= 1500.0, "one and a half round trips are in the prediction");
    let attempt = try_to(&with(OnStall::Cancel, Duration::from_millis(300)), 2, far());
    let failed = given_up(attempt);
    assert!(matches!(failed.cause, SourceError::GoalUnreachable { reason: SwitchReason::Stalled, .. }));
}

#[test]
fn a_guest_does_not_stand_still_while_the_target_catches_up() {
    // The link takes all at once; the target needs 5 s for the first round.
    let slow = || Weather { page_time: Duration::from_millis(10), ..Weather::default() };
    let Success { source, .. } = moves(&with(OnStall::Cancel, Duration::from_millis(150)), 0, slow());
    assert!(source.rounds[0].pages - source.rounds[0].zero_pages > 400, "{:?}", source.rounds);
    assert!(source.total_ms > 4000.0, "{source:?}");
    assert!(source.downtime_ms.is_some_and(|downtime| downtime < 150.0), "{source:?}");
    // It is cancelled while it waits.
    let attempt =
        try_to(&Plan { timeout: Some(Duration::from_secs(2)), ..with(OnStall::Stop, Duration::MAX) }, 2, slow());
    let Outcome::StillOurs(failed) = attempt.0.outcome else { panic!("{:?}", attempt.0.outcome) };
    assert!(matches!(failed.cause, SourceError::OutOfTime { .. }), "{}", failed.cause);
    assert!(!failed.guest.calls.contains(&"pause") && attempt.1.facts().runs_at_source);
    // A deadline does not wait for the target.
    let hurried = with(OnStall::Stop, Duration::from_millis(150));
    let hurried = Plan { goal: Goal { deadline: Some(Duration::from_secs(2)), ..hurried.goal }, ..hurried };
    let Success { source, .. } = moves(&hurried, 0, slow());
    assert!(source.rounds.len() < 5 && source.downtime_ms.is_some_and(|downtime| downtime > 1000.0), "{source:?}");
}

#[test]
fn a_far_target_that_keeps_up_is_waited_for_once() {
    // It needs less than a round trip for a round, and the guest writes more than a few pages in each.
    let page_time = Duration::from_micros(100);
    let far = Weather { round_trip: Some(Duration::from_millis(100)), page_time, ..Weather::default() };
    let Success { source, .. } = moves(&with(OnStall::Cancel, Duration::from_secs(1)), 8, far);
    let written = |round: &crate::RoundReport| round.pages - round.zero_pages;
    assert!(source.rounds.iter().map(written).min() > Some(256), "{:?}", source.rounds);
    assert!(source.rounds.len() <= 4, "{:?}", source.rounds);
}

/// One attempt to migrate a fresh guest.
fn try_to(plan: &Plan, busy: u32, weather: Weather) -> (Attempt, World) {
    let world = World::new();
    let guest = FakeGuest { busy, ..FakeGuest::new(&world) };
    (migrate(guest, &mut FakeHost::new(&world), &MemoryClaims::default(), plan, weather), world)
}

/// What is left of an attempt that was given up: the guest, which never noticed.
fn given_up((attempt, world): (Attempt, World)) -> Failed<FakeGuest> {
    let Outcome::StillOurs(failed) = attempt.outcome else { panic!("{:?}", attempt.outcome) };
    assert!(!failed.guest.calls.contains(&"pause"), "the guest never noticed");
    assert!(world.facts().runs_at_source && !world.facts().logging && failed.stuck.is_none());
    let Err(Fault::SourceGaveUp { reason }) = attempt.arrival else { panic!("{:?}", attempt.arrival) };
    assert!(reason.contains("cannot be reached"), "{reason}");
    failed
}

#[test]
fn a_stall_is_paused_or_given_up_with_its_figures() {
    let Success { source, .. } = moves(&fast_writer(OnStall::Stop), BUSY, Weather::default());
    assert_eq!(source.switched, Some(SwitchReason::Stalled), "{source:?}");
    assert!(source.stalled_in_round.unwrap() <= 6 && source.rounds.len() <= 10, "{source:?}");
    let failed = given_up(try_to(&fast_writer(OnStall::Cancel), BUSY, Weather::default()));
    let words = failed.cause.to_string();
    let parts =
        ["The downtime goal of 150 ms cannot be reached", "ms are predicted after", "MiB to send", "takes 1.0 MiB/s"];
    assert!(parts.iter().all(|part| words.contains(part)), "{words}");
}

#[test]
fn a_throttled_guest_meets_its_goal_and_is_fast_again() {
    let (attempt, world) = try_to(&fast_writer(OnStall::Throttle), BUSY, Weather::default());
    let Outcome::HandedOver(report) = attempt.outcome else { panic!("{:?}", attempt.outcome) };
    assert_eq!(report.switched, Some(SwitchReason::GoalMet), "{report:?}");
    assert!(report.downtime_ms.unwrap() <= 200.0 && world.facts().runs_at_target, "{report:?}");
    let cost = report.guest_cost.unwrap();
    assert!(cost.most_share >= 0.2 && cost.throttled_ms > 0.0 && cost.throttled_share > 0.0, "{cost:?}");
    let told = attempt.source_diary.0.iter().filter_map(|news| match news {
        Progress::Throttled(share) => Some(*share),
        _ => None,
    });
    let told: Vec<f64> = told.collect();
    let (last, steps) = told.split_last().unwrap();
    assert!(*last == 0.0 && steps.is_sorted() && steps[0] > 0.0, "{told:?}");
}

/// Whatever fails while the guest is throttled, it runs at full speed afterwards.
#[test]
fn a_guest_that_stays_is_not_throttled() {
    let (attempt, _) = try_to(&fast_writer(OnStall::Throttle), BUSY, Weather::default());
    let throttled_at = attempt.frames[SOURCE] / 2;
    for step in ["pause", "save", "unthrottle", "throttle", "release", "record_given_away", "harvest_dirty"] {
        let world = World::new();
        let guest = FakeGuest { busy: BUSY, fails: Some(step), ..FakeGuest::new(&world) };
        let (mut host, claims) = (FakeHost::new(&world), MemoryClaims::default());
        let attempt = migrate(guest, &mut host, &claims, &fast_writer(OnStall::Throttle), Weather::default());
        let Outcome::StillOurs(failed) = attempt.outcome else { panic!("{step}: {:?}", attempt.outcome) };
        assert!(world.facts().runs_at_source, "{step}");
        let share = failed.guest.slowness.lock().unwrap().share;
        if step == "unthrottle" {
            assert!(failed.stuck.is_some_and(|stuck| stuck.to_string().contains("get all of its time again")));
        } else {
            assert!(share == 0.0 && failed.stuck.is_none(), "{step}: {share}");
        }
    }
    let faults = vec![FaultAt { sender: SOURCE, stream: 0, frame: throttled_at, harm: Harm::Cut }];
    for weather in
        [Weather { faults, ..Weather::default() }, Weather { cancel_at: Some(throttled_at), ..Weather::default() }]
    {
        let (attempt, world) = try_to(&fast_writer(OnStall::Throttle), BUSY, weather);
        let Outcome::StillOurs(failed) = attempt.outcome else { panic!("{:?}", attempt.outcome) };
        assert!(failed.guest.calls.contains(&"throttle"), "{:?}", failed.guest.calls);
        assert!(failed.guest.slowness.lock().unwrap().share == 0.0 && world.facts().runs_at_source);
    }
}

fn hurried(deadline: Duration, on_stall: OnStall, streams: u16) -> Plan {
    let plan = fast_writer(on_stall);
    let goal = Goal { deadline: Some(deadline), max_downtime: Duration::from_millis(20), ..plan.goal };
    Plan { goal, streams: Some(NonZeroU16::new(streams).unwrap()), ..plan }
}

/// The memory takes two seconds by itself, and the guest writes all the time.
#[test]
fn a_deadline_is_kept() {
    for (deadline, streams) in [(3000, 1), (4000, 1), (4000, 3), (5000, 1), (5000, 3), (8000, 1)] {
        let deadline = Duration::from_millis(deadline);
        for on_stall in [OnStall::Stop, OnStall::Throttle] {
            let Success { source, .. } = moves(&hurried(deadline, on_stall, streams), 2, Weather::default());
            let Report { total_ms, switched, .. } = source;
            assert!(
                total_ms <= deadline.as_secs_f64() * 1000.0,
                "{deadline:?} over {streams}: {total_ms} ms, {switched:?}"
            );
        }
    }
}

#[test]
fn a_round_that_is_cut_short_loses_nothing() {
    let deadline = Duration::from_millis(2500);
    let Success { source, .. } = moves(&hurried(deadline, OnStall::Stop, 3), 1, Weather::default());
    assert!(source.rounds[0].pages < 600, "the first round was not cut: {:?}", source.rounds[0]);
    let cancel = hurried(deadline, OnStall::Cancel, 3);
    let failed = given_up(try_to(&cancel, BUSY, Weather::default()));
    assert!(failed.cause.to_string().contains("no time is left for more"), "{}", failed.cause);
}

#[test]
fn every_harm_to_a_hurried_migration_leaves_one_owner() {
    for (frame, harm) in
        [1, 9, 30].into_iter().flat_map(|frame| [Harm::Cut, Harm::Stall, Harm::Lose].map(|harm| (frame, harm)))
    {
        let faults = vec![FaultAt { sender: SOURCE, stream: 0, frame, harm }];
        let plan = hurried(Duration::from_secs(3), OnStall::Throttle, 2);
        let fate = survive(&plan, Weather { faults, ..Weather::default() });
        assert!(matches!(fate, Fate::Stayed | Fate::Moved), "{harm:?} to {frame}: {fate:?}");
    }
}

#[test]
fn a_cap_holds_over_any_second_and_all_streams() {
    for (cap, streams) in [(MIB, 1), (MIB, 4), (3 * MIB, 16)] {
        let cap = NonZeroU64::new(cap).unwrap();
        let streams = NonZeroU16::new(streams).unwrap();
        let plan = Plan { bandwidth: Some(cap), streams: Some(streams), ..plan(Mode::Live) };
        let world = World::new();
        let guest = FakeGuest::new(&world);
        let (memory, mut host) = (Arc::clone(&guest.memory), FakeHost::new(&world));
        let attempt = migrate(guest, &mut host, &MemoryClaims::default(), &plan, Weather::default());
        let Outcome::HandedOver(report) = attempt.outcome else { panic!("{:?}", attempt.outcome) };
        assert!(content(&memory) == content(&host.memory), "memory differs");
        let second = Duration::from_secs(1);
        let in_second = |from: Duration| {
            let sent = attempt.traffic.iter().filter(|(at, _)| (from..from + second).contains(at));
            sent.map(|(_, bytes)| *bytes as f64).sum::<f64>()
        };
        let busiest = attempt.traffic.iter().map(|(at, _)| in_second(*at)).fold(0.0, f64::max);
        assert!(busiest <= cap.get() as f64 * 1.05, "{busiest} bytes in a second, of {cap} over {streams}");
        let average = report.bytes as f64 / (report.total_ms / 1000.0);
        assert!(average >= cap.get() as f64 * 0.9, "{average} bytes a second, of {cap} over {streams}");
    }
}
