//! Migrations that meet no fault: everything arrives, in order, and both ends say the same.

use super::faults::decisive;
use super::link::{FaultAt, Harm, SOURCE};
use super::world::{FakeGuest, FakeHost, MemoryClaims, REGIONS, STATE, World, content};
use super::{Attempt, Diary, Weather, migrate, plan};
use crate::source::{Outcome, SourceError};
use crate::target::{Arrival, Fault};
use crate::wire::{MAX_MACHINE, MAX_STATE};
use crate::{
    Claim, Ending, Mode, Phase, Plan, Progress, RamRegion, Region, Report, Role, RoundReport, SwitchReason, TargetPart,
    total_pages,
};
use std::sync::Arc;
use vm_memory::GuestAddress;

/// A migration that went well.
pub(super) struct Success {
    pub(super) source: Report,
    pub(super) target: Report,
    source_diary: Diary,
    target_diary: Diary,
    pub(super) host: FakeHost,
}

/// Migrates a fresh guest and checks what must hold after every success.
pub(super) fn moves(plan: &Plan, busy: u32, weather: Weather) -> Success {
    let (world, claims) = (World::new(), MemoryClaims::default());
    let guest = FakeGuest { busy, ..FakeGuest::with_plan(&world, plan) };
    let (before, mut host) = (Arc::clone(&guest.memory), FakeHost::expecting(&world, &guest));
    let Attempt { outcome, arrival, source_diary, target_diary, .. } =
        migrate(guest, &mut host, &claims, plan, weather);
    let Outcome::HandedOver(source) = outcome else { panic!("{outcome:?}") };
    let Ok(Arrival::Running(target)) = arrival else { panic!("{arrival:?}") };
    assert!(content(&before) == content(&host.memory), "memory differs");
    assert_eq!(host.state.as_deref(), Some(STATE));
    assert!(world.facts().runs_at_target && !world.facts().runs_at_source);
    assert_eq!(claims.stand.lock().unwrap().get(&plan.session), Some(&Claim::Mine));
    Success { source, target: *target, source_diary, target_diary, host }
}

#[test]
fn a_stopped_guest_moves_in_one_pass() {
    let plan = plan(Mode::Stop);
    let Success { source, target, source_diary, .. } = moves(&plan, 2, Weather::default());
    assert_eq!((source.role, target.role), (Role::Source, Role::Target));
    for report in [&source, &target] {
        assert_eq!((report.session, report.mode), (plan.session, Mode::Stop));
        assert_eq!(report.rounds.len(), 1);
        assert_eq!(report.rounds[0].pages, total_pages(&REGIONS));
        assert_eq!((report.verified, report.ending, report.forced()), (None, Ending::HandedOver, false));
    }
    assert_eq!(source.rounds[0].zero_pages, target.rounds[0].zero_pages);
    assert_eq!(target, Report { role: Role::Target, ..source.clone() }, "both ends tell the same");
    assert!(source.target_part.is_some() && source.downtime_ms.unwrap() <= source.total_ms, "{source:?}");
    let phases: Vec<Phase> = source.phases.iter().map(|phase| phase.phase).collect();
    use Phase::{HandingOver, LastPages, Offering, Pausing, Restoring};
    assert_eq!(phases, [Offering, Pausing, LastPages, Restoring, HandingOver]);
    assert!(source_diary.0.iter().any(|news| matches!(news, Progress::Moved(moved) if moved.pages == moved.of)));
}

#[test]
fn a_live_guest_moves_in_rounds_while_it_writes() {
    let Success { source, target, source_diary, target_diary, .. } = moves(&plan(Mode::Live), 2, Weather::default());
    assert!(source.rounds.len() > 1);
    assert_eq!(target, Report { role: Role::Target, ..source.clone() }, "both ends tell the same");
    assert!(source.rounds[0].dirty_at_end > 0, "the guest wrote while its memory moved");
    assert_eq!(source.rounds.last().unwrap().dirty_at_end, 0);
    assert_eq!((source.switched, source.stalled_in_round), (Some(SwitchReason::GoalMet), None));
    let cost = source.guest_cost.unwrap();
    assert!(cost.most_share == 0.0 && cost.throttled_ms == 0.0, "{cost:?}");
    assert!(source.predicted_total_ms.unwrap() > 0.0);
    assert!(source.predicted_downtime_ms.unwrap() <= 300.0 && source.bytes_per_second > 0.0);
    assert_eq!(rounds(&source_diary), source.rounds);
    let counts = |round: &RoundReport| (round.round, round.pages, round.zero_pages);
    let came: Vec<_> = rounds(&target_diary).iter().map(counts).collect();
    assert_eq!(came, source.rounds.iter().map(counts).collect::<Vec<_>>());
}

/// The rounds that an onlooker was told.
fn rounds(diary: &Diary) -> Vec<RoundReport> {
    let round = |news: &Progress| if let Progress::RoundDone(round) = news { Some(*round) } else { None };
    diary.0.iter().filter_map(round).collect()
}

/// What the target knows without the source's report, which is lost here.
#[test]
fn a_report_that_is_lost_leaves_the_target_with_its_own() {
    let plan = plan(Mode::Stop);
    let faults = vec![FaultAt { sender: SOURCE, stream: 0, frame: decisive(&plan, SOURCE) + 1, harm: Harm::Lose }];
    let Success { source, target, .. } = moves(&plan, 2, Weather { faults, ..Weather::default() });
    assert!(source.downtime_ms.is_some());
    assert_eq!((target.downtime_ms, target.target_part), (None, source.target_part));
    assert_eq!((target.session, target.vm, target.ending), (source.session, source.vm, Ending::HandedOver));
    assert_eq!(target.rounds[0].pages, total_pages(&REGIONS));
    let phases: Vec<Phase> = target.phases.iter().map(|phase| phase.phase).collect();
    assert_eq!(phases, [Phase::Offering, Phase::Rounds, Phase::Restoring, Phase::HandingOver]);
}

/// The figures are the source's word; what the target saw itself is not.
#[test]
fn a_target_does_not_take_from_a_report_what_it_knows_itself() {
    let Success { source, target, .. } = moves(&plan(Mode::Stop), 2, Weather::default());
    let part = Some(TargetPart { restore_ms: 7.0, start_ms: 7.0 });
    let lies = Report { verified: Some(true), mode: Mode::Live, target_part: part, ..source };
    assert_eq!(target.clone().joined(lies), target);
}

#[test]
fn verified_migrations_say_so() {
    for mode in [Mode::Stop, Mode::Live] {
        let plan = Plan { verify: true, ..plan(mode) };
        let Success { source, target, .. } = moves(&plan, 3, Weather::default());
        assert_eq!((source.verified, target.verified), (Some(true), Some(true)));
    }
}

#[test]
fn pages_that_are_zero_from_the_start_are_not_touched() {
    let Success { host, .. } = moves(&plan(Mode::Stop), 0, Weather::default());
    let mut touched = host.touched.lock().unwrap();
    let mut pages = 0;
    while let Some(run) = touched.take_run(1) {
        assert_ne!(run.first.0 % 5, 3, "page {} of region {} is zero", run.first, run.region);
        pages += 1;
    }
    assert_eq!(pages, (0..560).chain(0..70).filter(|page| page % 5 != 3).count());
}

#[test]
fn the_guest_is_led_through_its_steps_in_order() {
    let world = World::new();
    let guest = FakeGuest::new(&world);
    let weather = Weather::default();
    let mut host = FakeHost { fails: Some("restore"), ..FakeHost::new(&world) };
    let attempt = migrate(guest, &mut host, &MemoryClaims::default(), &plan(Mode::Live), weather);
    let Outcome::StillOurs(failed) = attempt.outcome else { panic!("{:?}", attempt.outcome) };
    let mut calls = failed.guest.calls;
    calls.dedup();
    let there = ["start_dirty_log", "harvest_dirty", "record_given_away", "pause", "save", "harvest_dirty", "release"];
    let back = ["reacquire", "resume", "record_kept", "stop_dirty_log"];
    assert_eq!(calls, [there.as_slice(), back.as_slice()].concat());
}

#[test]
fn what_does_not_fit_is_refused_before_anything_happens() {
    let world = World::new();
    let guests = [
        FakeGuest { machine: vec![b' '; MAX_MACHINE + 1], ..FakeGuest::new(&world) },
        FakeGuest { state: vec![0; MAX_STATE + 1], ..FakeGuest::new(&world) },
    ];
    for guest in guests {
        let mut host = FakeHost::new(&world);
        let attempt = migrate(guest, &mut host, &MemoryClaims::default(), &plan(Mode::Stop), Weather::default());
        let Outcome::StillOurs(failed) = attempt.outcome else { panic!("{:?}", attempt.outcome) };
        assert!(matches!(failed.cause, SourceError::TooLarge { .. }), "{:?}", failed.cause);
        assert!(world.facts().runs_at_source && failed.stuck.is_none());
    }
}

#[test]
fn the_largest_description_and_state_fit() {
    let world = World::new();
    let machine = vec![b'x'; MAX_MACHINE];
    let guest = FakeGuest { machine, state: vec![7; MAX_STATE], ..FakeGuest::new(&world) };
    let mut host = FakeHost::new(&world);
    let attempt = migrate(guest, &mut host, &MemoryClaims::default(), &plan(Mode::Stop), Weather::default());
    assert!(matches!(attempt.outcome, Outcome::HandedOver(_)), "{:?}", attempt.outcome);
    assert_eq!(host.state.unwrap(), vec![7; MAX_STATE]);
}

#[test]
fn a_refusal_reaches_the_source_in_the_targets_words() {
    let world = World::new();
    let attempt = migrate(
        FakeGuest::new(&world),
        &mut FakeHost::refusing(&world),
        &MemoryClaims::default(),
        &plan(Mode::Live),
        Weather::default(),
    );
    let Outcome::StillOurs(failed) = attempt.outcome else { panic!("{:?}", attempt.outcome) };
    assert!(matches!(failed.cause, SourceError::Refused { .. }));
    assert_eq!(
        failed.cause.to_string(),
        "The target refused the guest: The guest cannot run here: a guest runs here already"
    );
    assert!(matches!(attempt.arrival, Err(Fault::Refused(_))));
}

#[test]
fn another_memory_layout_is_refused() {
    let world = World::new();
    let regions = vec![REGIONS[0], Region::Ram(RamRegion { start: GuestAddress(1 << 32), pages: 71 }), REGIONS[2]];
    let mut host = FakeHost { regions, ..FakeHost::new(&world) };
    let attempt =
        migrate(FakeGuest::new(&world), &mut host, &MemoryClaims::default(), &plan(Mode::Stop), Weather::default());
    let Outcome::StillOurs(failed) = attempt.outcome else { panic!("{:?}", attempt.outcome) };
    let reason = failed.cause.to_string();
    assert!(reason.contains("70 pages at 0x100000000") && reason.contains("71 pages"), "{reason}");
    assert!(host.abandoned.is_some());
}
