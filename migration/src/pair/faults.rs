//! Migrations that meet a fault, at every frame of both ends: the guest has one owner afterwards, or is in doubt and has
//! one after a question. What is forbidden on the way, the world asserts.

use super::link::{FaultAt, Harm, SOURCE, TARGET};
use super::world::{FakeGuest, FakeHost, MemoryClaims, World, content};
use super::{Weather, ask, migrate, plan};
use crate::clock::HostClock;
use crate::source::{Failed, Outcome, Owner, SourceError};
use crate::target::{Arrival, Fault};
use crate::{Claim, Ending, Mode, Plan};
use std::sync::Arc;
use std::time::Duration;

/// What became of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Moved,
    Stayed,
    /// In doubt, and found to have moved.
    FoundThere,
    /// In doubt, and found to have stayed.
    FoundHere,
}

/// One migration with the given weather. Checks that the guest has one owner, asks if there is doubt, and if the guest
/// stayed, migrates it again in good weather.
pub(super) fn survive(plan: &Plan, weather: Weather) -> Fate {
    survive_at(plan, weather, FakeHost::expecting)
}

/// The same at the host that `host` makes.
pub(super) fn survive_at(plan: &Plan, weather: Weather, host: impl Fn(&World, &FakeGuest) -> FakeHost) -> Fate {
    let what = format!("{:?} {weather:?}", plan.mode);
    let (world, claims) = (World::new(), MemoryClaims::default());
    let guest = FakeGuest::with_plan(&world, plan);
    let (memory, mut host) = (Arc::clone(&guest.memory), host(&world, &guest));
    let attempt = migrate(guest, &mut host, &claims, plan, weather);
    let (outcome, doubted) = match attempt.outcome {
        Outcome::InDoubt(doubt) => {
            assert!(!world.facts().runs_at_source, "a guest in doubt runs: {what}");
            assert_eq!(doubt.session(), plan.session);
            (ask(doubt, &world, &claims), true)
        }
        sure => (sure, false),
    };
    match outcome {
        Outcome::HandedOver(report) => {
            assert!(world.facts().runs_at_target && !world.facts().runs_at_source, "{what}");
            assert!(matches!(attempt.arrival, Ok(Arrival::Running(_))), "{what}: {:?}", attempt.arrival);
            assert!(content(&memory) == content(&host.memory), "memory differs: {what}");
            let ending = if doubted { Ending::ConfirmedLater } else { Ending::HandedOver };
            assert_eq!((report.ending, report.downtime_ms.is_some()), (ending, !doubted), "{what}");
            if doubted { Fate::FoundThere } else { Fate::Moved }
        }
        Outcome::StillOurs(failed) => {
            stayed(&failed, &world, &what);
            assert!(attempt.arrival.is_err(), "{what}: {:?}", attempt.arrival);
            assert_eq!(host.abandoned.is_some(), host.prepared, "{what}");
            if host.prepared {
                assert_eq!(claims.stand.lock().unwrap().get(&plan.session), Some(&Claim::NotMine), "{what}");
            }
            again(failed.guest, &world, &claims, &what);
            if doubted { Fate::FoundHere } else { Fate::Stayed }
        }
        Outcome::InDoubt(doubt) => panic!("still in doubt: {what}: {:?}", doubt.cause()),
    }
}

fn stayed(failed: &Failed<FakeGuest>, world: &World, what: &str) {
    let facts = world.facts();
    assert!(failed.stuck.is_none(), "{what}: {:?}", failed.stuck);
    assert!(facts.runs_at_source && !facts.runs_at_target && !facts.logging && !facts.given_away, "{what}: {facts:?}");
}

/// A guest that has stayed moves the next time.
fn again(guest: FakeGuest, world: &World, claims: &MemoryClaims, what: &str) {
    let (memory, mut host) = (Arc::clone(&guest.memory), FakeHost::expecting(world, &guest));
    let guest = FakeGuest { fails: None, ..guest };
    let attempt = migrate(guest, &mut host, claims, &plan(Mode::Live), Weather::default());
    assert!(matches!(attempt.outcome, Outcome::HandedOver(_)), "the next attempt of {what}: {:?}", attempt.outcome);
    assert!(content(&memory) == content(&host.memory), "memory differs in the next attempt of {what}");
}

/// How many frames each end sends if nothing goes wrong.
fn frames(plan: &Plan) -> [usize; 2] {
    let world = World::new();
    let weather = Weather::default();
    let guest = FakeGuest::with_plan(&world, plan);
    let mut host = FakeHost::expecting(&world, &guest);
    let attempt = migrate(guest, &mut host, &MemoryClaims::default(), plan, weather);
    assert!(matches!(attempt.outcome, Outcome::HandedOver(_)));
    attempt.frames
}

/// The frame of one end that decides whose the guest is: `Go`, which only the report follows, or `Running`.
pub(super) fn decisive(plan: &Plan, sender: usize) -> usize {
    let after = if sender == SOURCE { 1 } else { 0 };
    frames(plan)[sender] - 1 - after
}

/// Every harm at every frame of one end; returns the fates by frame.
fn storm(plan: impl Fn() -> Plan, sender: usize) -> Vec<Vec<Fate>> {
    let frames = frames(&plan())[sender];
    assert!(frames >= 3);
    let strike = |frame, harm| {
        let weather = Weather { faults: vec![FaultAt { sender, stream: 0, frame, harm }], ..Weather::default() };
        survive(&plan(), weather)
    };
    (0..frames).map(|frame| Harm::FOUND.iter().map(|&harm| strike(frame, harm)).collect()).collect()
}

/// Checks that harm to all frames before the decisive one lets the guest stay, and harm to one after it changes nothing;
/// returns the fates of the decisive one by harm.
fn at_decisive_frame(plan: impl Fn() -> Plan, sender: usize) -> Vec<(Harm, Fate)> {
    let mut fates = storm(&plan, sender);
    let decisive = decisive(&plan(), sender);
    assert!(fates.split_off(decisive + 1).concat().iter().all(|fate| *fate == Fate::Moved));
    let decided = fates.pop().unwrap();
    for (frame, fates) in fates.iter().enumerate() {
        for (harm, fate) in Harm::FOUND.iter().zip(fates) {
            // Between its first answer and the next the target only says how far it is.
            let installed = (1..decisive - 1).contains(&frame) && matches!(harm, Harm::Lose | Harm::Double);
            // Swapped with a sign of life.
            let harmless = *fate == Fate::Moved && sender == TARGET && (*harm == Harm::Swap || installed);
            // The target's protest at a second Seal and the source's Go may pass each other.
            let late = (*harm, *fate) == (Harm::Double, Fate::FoundHere) && frame + 1 == decisive;
            assert!(
                *fate == Fate::Stayed || harmless || late,
                "{:?}: {harm:?} to frame {frame} of {sender}: {fate:?}",
                plan()
            );
        }
    }
    Harm::FOUND.into_iter().zip(decided).collect()
}

/// Harms every frame of the source.
pub(super) fn storm_at_source(plan: impl Fn() -> Plan) {
    let expected = Harm::FOUND.map(|harm| match harm {
        Harm::CutAfter => Fate::FoundThere,
        // The second Go is passed over; a held back one comes after a sign of life.
        Harm::Double | Harm::Swap => Fate::Moved,
        _ => Fate::FoundHere,
    });
    assert_eq!(at_decisive_frame(plan, SOURCE), Harm::FOUND.into_iter().zip(expected).collect::<Vec<_>>(), "Go");
}

/// Harms every frame of the target.
pub(super) fn storm_at_target(plan: impl Fn() -> Plan) {
    let expected = Harm::FOUND.map(|harm| match harm {
        Harm::CutAfter | Harm::Double => Fate::Moved,
        _ => Fate::FoundThere,
    });
    assert_eq!(at_decisive_frame(plan, TARGET), Harm::FOUND.into_iter().zip(expected).collect::<Vec<_>>(), "Running");
}

#[test]
fn every_harm_to_every_frame_of_the_source_leaves_one_owner() {
    for mode in [Mode::Stop, Mode::Live] {
        storm_at_source(|| plan(mode));
    }
}

#[test]
fn every_harm_to_every_frame_of_the_target_leaves_one_owner() {
    for mode in [Mode::Stop, Mode::Live] {
        storm_at_target(|| plan(mode));
    }
}

#[test]
fn two_faults_at_once_leave_one_owner() {
    let plan = plan(Mode::Stop);
    let [ours, theirs] = frames(&plan);
    for (ours, theirs) in (0..ours).flat_map(|ours| (0..theirs).map(move |theirs| (ours, theirs))) {
        for (one, other) in [(Harm::Stall, Harm::Stall), (Harm::CutAfter, Harm::Flip), (Harm::Block, Harm::Lose)] {
            let faults = vec![
                FaultAt { sender: SOURCE, stream: 0, frame: ours, harm: one },
                FaultAt { sender: TARGET, stream: 0, frame: theirs, harm: other },
            ];
            survive(&plan, Weather { faults, ..Weather::default() });
        }
    }
}

#[test]
fn cancelling_at_every_frame_leaves_the_guest_or_comes_too_late() {
    for mode in [Mode::Stop, Mode::Live] {
        let decisive = decisive(&plan(mode), SOURCE);
        for frame in 0..frames(&plan(mode))[SOURCE] {
            let fate = survive(&plan(mode), Weather { cancel_at: Some(frame), ..Weather::default() });
            let expected = if frame < decisive { Fate::Stayed } else { Fate::Moved };
            assert_eq!(fate, expected, "cancelled while frame {frame} was sent");
        }
    }
}

#[test]
fn a_cancelled_migration_says_so_on_both_ends() {
    let world = World::new();
    let mut host = FakeHost::new(&world);
    let weather = Weather { cancel_at: Some(1), ..Weather::default() };
    let attempt = migrate(FakeGuest::new(&world), &mut host, &MemoryClaims::default(), &plan(Mode::Live), weather);
    let Outcome::StillOurs(failed) = attempt.outcome else { panic!("{:?}", attempt.outcome) };
    assert!(matches!(failed.cause, SourceError::Cancelled));
    assert_eq!(attempt.frames[SOURCE], 3, "cancelled in the middle of a round, it sends nothing but Abort");
    assert_eq!(host.abandoned.as_deref(), Some("The source gave up: The migration was cancelled"));
}

#[test]
fn a_flipped_bit_of_a_page_is_found_by_verification() {
    for mode in [Mode::Stop, Mode::Live] {
        let faults = vec![FaultAt { sender: SOURCE, stream: 0, frame: 1, harm: Harm::FlipPage }];
        // Nothing the guest writes: what the flip changed is not sent again.
        let world = World::new();
        let guest = FakeGuest { busy: 0, ..FakeGuest::new(&world) };
        let plan = Plan { verify: true, ..plan(mode) };
        let weather = Weather { faults, ..Weather::default() };
        let attempt = migrate(guest, &mut FakeHost::new(&world), &MemoryClaims::default(), &plan, weather);
        assert!(matches!(attempt.arrival, Err(Fault::MemoryDiffers { .. })), "{:?}", attempt.arrival);
        let Outcome::StillOurs(failed) = attempt.outcome else { panic!("{:?}", attempt.outcome) };
        assert!(failed.cause.to_string().contains("Memory region 0 does not have the content"), "{}", failed.cause);
        stayed(&failed, &world, "a flipped bit");
    }
}

#[test]
fn the_time_limit_ends_it() {
    // The target does not answer, or takes no more bytes.
    for (frame, harm) in [(0, Harm::Stall), (1, Harm::Block)] {
        let faults = vec![FaultAt { sender: SOURCE, stream: 0, frame, harm }];
        let plan = Plan { timeout: Some(Duration::from_secs(3)), ..plan(Mode::Live) };
        let world = World::new();
        let (mut host, weather) = (FakeHost::new(&world), Weather { faults, ..Weather::default() });
        let attempt = migrate(FakeGuest::new(&world), &mut host, &MemoryClaims::default(), &plan, weather);
        let Outcome::StillOurs(failed) = attempt.outcome else { panic!("{harm:?}: {:?}", attempt.outcome) };
        assert_eq!(failed.cause.to_string(), "The migration was not done within its time limit of 3 s", "{harm:?}");
    }
}

#[test]
fn whatever_fails_at_the_source_before_go_the_guest_stays_and_runs() {
    let steps = [
        "describe",
        "slice",
        "read",
        "start_dirty_log",
        "harvest_dirty",
        "record_given_away",
        "pause",
        "save",
        "release",
    ];
    for step in steps {
        let (world, claims) = (World::new(), MemoryClaims::default());
        let guest = FakeGuest { fails: Some(step), ..FakeGuest::new(&world) };
        let mut host = FakeHost::new(&world);
        let attempt = migrate(guest, &mut host, &claims, &plan(Mode::Live), Weather::default());
        let Outcome::StillOurs(failed) = attempt.outcome else { panic!("{step}: {:?}", attempt.outcome) };
        assert!(matches!(failed.cause, SourceError::Guest { .. }), "{step}: {:?}", failed.cause);
        stayed(&failed, &world, step);
        if step != "describe" {
            let reason = host.abandoned.unwrap();
            assert!(reason.contains(&format!("{step} was made to fail")), "{reason}");
        }
        again(failed.guest, &world, &claims, step);
    }
}

#[test]
fn whatever_fails_at_the_target_before_go_the_guest_stays_and_runs() {
    for step in ["slice", "write", "settle", "restore"] {
        let (world, claims) = (World::new(), MemoryClaims::default());
        let mut host = FakeHost { fails: Some(step), ..FakeHost::new(&world) };
        let attempt = migrate(FakeGuest::new(&world), &mut host, &claims, &plan(Mode::Live), Weather::default());
        let Outcome::StillOurs(failed) = attempt.outcome else { panic!("{step}: {:?}", attempt.outcome) };
        assert!(failed.cause.to_string().contains(&format!("{step} was made to fail")), "{}", failed.cause);
        stayed(&failed, &world, step);
        again(failed.guest, &world, &claims, step);
    }
}

/// A guest whose way back fails must not run, unless only its record is wrong or its dirty log left on.
#[test]
fn a_way_back_that_fails_leaves_the_guest_paused() {
    for (step, runs) in [("reacquire", false), ("resume", false), ("record_kept", true), ("stop_dirty_log", true)] {
        let world = World::new();
        let guest = FakeGuest { fails: Some(step), ..FakeGuest::new(&world) };
        let mut host = FakeHost { fails: Some("restore"), ..FakeHost::new(&world) };
        let claims = MemoryClaims::default();
        let attempt = migrate(guest, &mut host, &claims, &plan(Mode::Live), Weather::default());
        let Outcome::StillOurs(failed) = attempt.outcome else { panic!("{step}: {:?}", attempt.outcome) };
        assert!(matches!(failed.stuck, Some(SourceError::Guest { .. })), "{step}: {:?}", failed.stuck);
        assert_eq!(world.facts().runs_at_source, runs, "{step}");
    }
}

#[test]
fn a_guest_that_was_taken_over_and_does_not_run_is_not_resumed_at_the_source() {
    let (world, claims) = (World::new(), MemoryClaims::default());
    let mut host = FakeHost { fails: Some("run"), ..FakeHost::new(&world) };
    let attempt = migrate(FakeGuest::new(&world), &mut host, &claims, &plan(Mode::Live), Weather::default());
    assert!(matches!(attempt.arrival, Err(Fault::NotRunning(_))), "{:?}", attempt.arrival);
    assert!(host.abandoned.is_none(), "the guest is the host's");
    let Outcome::InDoubt(doubt) = attempt.outcome else { panic!("{:?}", attempt.outcome) };
    assert!(doubt.cause().to_string().contains("taken over, but does not run"), "{}", doubt.cause());
    assert!(matches!(ask(doubt, &world, &claims), Outcome::HandedOver(_)));
    assert!(!world.facts().runs_at_source);
}

/// Where the record fails in the middle, the claim that stands decides, whichever it is.
#[test]
fn an_uncertain_claim_is_made_certain() {
    for (stands_anyway, expected) in [(true, Claim::Mine), (false, Claim::NotMine)] {
        let (world, claims) = (World::new(), MemoryClaims::default());
        *claims.fails.lock().unwrap() = (1, stands_anyway);
        let plan = plan(Mode::Stop);
        let attempt = migrate(FakeGuest::new(&world), &mut FakeHost::new(&world), &claims, &plan, Weather::default());
        assert_eq!(claims.stand.lock().unwrap()[&plan.session], expected);
        let outcome = match attempt.outcome {
            Outcome::InDoubt(doubt) => ask(doubt, &world, &claims),
            sure => sure,
        };
        assert_eq!(matches!(outcome, Outcome::HandedOver(_)), stands_anyway, "{outcome:?}");
        let facts = world.facts();
        assert_eq!((facts.runs_at_target, facts.runs_at_source), (stands_anyway, !stands_anyway));
    }
}

/// A doubt, by a cut before the decisive frame of the sender.
fn doubt(sender: usize) -> (World, MemoryClaims, crate::InDoubt<FakeGuest>) {
    let (world, claims, plan) = (World::new(), MemoryClaims::default(), plan(Mode::Live));
    let frame = decisive(&plan, sender);
    let faults = vec![FaultAt { sender, stream: 0, frame, harm: Harm::Cut }];
    let weather = Weather { faults, ..Weather::default() };
    let attempt = migrate(FakeGuest::new(&world), &mut FakeHost::new(&world), &claims, &plan, weather);
    let Outcome::InDoubt(doubt) = attempt.outcome else { panic!("{:?}", attempt.outcome) };
    (world, claims, doubt)
}

#[test]
fn the_operator_can_settle_a_doubt_either_way() {
    let (world, _, there) = doubt(TARGET);
    let Outcome::HandedOver(report) = there.settle(Owner::Target, &HostClock::new()) else { panic!() };
    assert_eq!(report.ending, Ending::Settled);
    assert!(world.facts().runs_at_target && !world.facts().runs_at_source);

    let (world, _, here) = doubt(SOURCE);
    let Outcome::StillOurs(failed) = here.settle(Owner::Source, &HostClock::new()) else { panic!() };
    assert!(matches!(failed.cause, SourceError::Settled));
    stayed(&failed, &world, "settled");
}

#[test]
fn another_record_does_not_answer_for_the_target() {
    let (world, claims, there) = doubt(TARGET);
    let stranger = MemoryClaims { identity: uuid::Uuid::from_u128(5), ..MemoryClaims::default() };
    let Outcome::InDoubt(still) = ask(there, &world, &stranger) else { panic!() };
    assert!(matches!(still.cause(), SourceError::Refused { .. }), "{:?}", still.cause());
    assert!(!world.facts().runs_at_source && stranger.stand.lock().unwrap().is_empty());
    assert!(matches!(ask(still, &world, &claims), Outcome::HandedOver(_)));
}
