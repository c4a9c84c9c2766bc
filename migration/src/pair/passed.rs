//! Migrations that pass the memory itself: nothing of it is sent, the target does not touch it while the guest runs at the
//! source, and whatever goes wrong, the guest goes on in it.

use super::faults::{Fate, storm_at_source, storm_at_target, survive};
use super::link::{FaultAt, Harm, SOURCE, TARGET};
use super::moves::{Success, moves};
use super::world::{FakeGuest, FakeHost, MemoryClaims, World};
use super::{Handles, Weather, migrate, plan};
use crate::source::{MemoryPolicy, Outcome, Plan, SourceError};
use crate::target::Fault;
use crate::wire::Transfer;
use crate::{Mode, Phase, Report, Role};
use std::num::NonZeroU16;

fn passing(mode: Mode) -> Plan {
    Plan { memory: MemoryPolicy::Pass, ..plan(mode) }
}

/// A guest none of whose disks move with it.
fn guest(world: &World) -> FakeGuest {
    FakeGuest::with_plan(world, &passing(Mode::Live))
}

/// Where it may come to.
fn host(world: &World) -> FakeHost {
    FakeHost::expecting(world, &guest(world))
}

fn handles(handles: Handles) -> Weather {
    Weather { handles, ..Weather::default() }
}

#[test]
fn memory_that_is_passed_is_not_sent() {
    for mode in [Mode::Stop, Mode::Live] {
        for memory in [MemoryPolicy::Pass, MemoryPolicy::Auto] {
            let streams = NonZeroU16::new(5).unwrap();
            let Success { source, target, host, .. } =
                moves(&Plan { memory, streams: Some(streams), ..passing(mode) }, 3, Weather::default());
            assert_eq!((source.mode, source.transfer), (mode, Transfer::Passed));
            assert!(host.passed && host.touched.lock().unwrap().dirty_pages() == 0, "its pages are not even read");
            assert!(source.rounds.is_empty() && source.bytes < 4096, "{source:?}");
            assert_eq!((source.switched, source.predicted_downtime_ms), (None, None));
            let phases: Vec<Phase> = source.phases.iter().map(|phase| phase.phase).collect();
            assert_eq!(phases, [Phase::Offering, Phase::Pausing, Phase::Restoring, Phase::HandingOver]);
            assert_eq!(target, Report { role: Role::Target, ..source }, "both ends tell the same");
        }
    }
}

#[test]
fn memory_that_is_passed_can_be_verified() {
    let Success { source, .. } = moves(&Plan { verify: true, ..passing(Mode::Live) }, 3, Weather::default());
    assert_eq!((source.verified, source.transfer), (Some(true), Transfer::Passed));
}

#[test]
fn a_passed_guest_keeps_no_dirty_log() {
    let world = World::new();
    let (mut host, claims) = (FakeHost { fails: Some("restore"), ..host(&world) }, MemoryClaims::default());
    let attempt = migrate(guest(&world), &mut host, &claims, &passing(Mode::Live), Weather::default());
    let Outcome::StillOurs(failed) = attempt.outcome else { panic!("{:?}", attempt.outcome) };
    let mut calls = failed.guest.calls;
    calls.dedup();
    let there = ["record_given_away", "pause", "save", "release"];
    let back = ["reacquire", "resume", "record_kept"];
    assert_eq!(calls, [there.as_slice(), back.as_slice()].concat());
}

#[test]
fn where_memory_cannot_be_passed_it_is_copied() {
    for weather in [Handles::GetLost, Handles::AreNotTaken] {
        let auto = Plan { memory: MemoryPolicy::Auto, streams: Some(NonZeroU16::new(3).unwrap()), ..plan(Mode::Live) };
        let Success { source, target, host, .. } = moves(&auto, 2, handles(weather));
        assert!(!host.passed && source.transfer == Transfer::Copied && !source.rounds.is_empty(), "{source:?}");
        assert_eq!(target, Report { role: Role::Target, ..source }, "both ends tell the same");
    }
}

#[test]
fn memory_that_must_be_passed_is_not_copied() {
    for (weather, words) in [
        (Handles::GetLost, "was passed and did not arrive"),
        (Handles::AreNotTaken, "is passed over a Unix socket between two processes of one host"),
    ] {
        let (world, claims) = (World::new(), MemoryClaims::default());
        let mut host = host(&world);
        let attempt = migrate(guest(&world), &mut host, &claims, &passing(Mode::Live), handles(weather));
        let Outcome::StillOurs(failed) = attempt.outcome else { panic!("{:?}", attempt.outcome) };
        assert!(failed.cause.to_string().contains(words), "{}", failed.cause);
        assert!(failed.guest.calls.is_empty() && world.facts().runs_at_source, "the guest never noticed");
        let Err(fault) = attempt.arrival else { panic!("{:?}", attempt.arrival) };
        assert!(matches!(fault, Fault::SourceGaveUp { reason } if reason.contains(words)));
    }
}

#[test]
fn a_handle_that_cannot_be_had_leaves_the_guest() {
    let world = World::new();
    let guest = FakeGuest { fails: Some("handle"), ..guest(&world) };
    let (mut host, claims) = (host(&world), MemoryClaims::default());
    let attempt = migrate(guest, &mut host, &claims, &passing(Mode::Stop), Weather::default());
    let Outcome::StillOurs(failed) = attempt.outcome else { panic!("{:?}", attempt.outcome) };
    assert!(matches!(failed.cause, SourceError::Guest { step: "pass its memory", .. }), "{}", failed.cause);
    assert!(world.facts().runs_at_source && !host.prepared);
}

#[test]
fn whatever_fails_at_the_target_the_guest_goes_on_in_its_memory() {
    for fails in ["restore", "slice"] {
        let world = World::new();
        let mut host = FakeHost { fails: Some(fails), ..host(&world) };
        let plan = Plan { verify: true, ..passing(Mode::Live) };
        let attempt = migrate(guest(&world), &mut host, &MemoryClaims::default(), &plan, Weather::default());
        let Outcome::StillOurs(failed) = attempt.outcome else { panic!("{fails}: {:?}", attempt.outcome) };
        assert!(world.facts().runs_at_source && failed.stuck.is_none() && host.abandoned.is_some(), "{fails}");
    }
}

#[test]
fn every_harm_to_every_frame_leaves_one_owner() {
    for mode in [Mode::Stop, Mode::Live] {
        storm_at_source(|| passing(mode));
        storm_at_target(|| passing(mode));
    }
}

/// Where copying is as good, a handle that is harmed may cost no more than that.
#[test]
fn every_harm_to_the_handle_leaves_one_owner_by_auto() {
    for harm in Harm::FOUND {
        let faults = vec![FaultAt { sender: SOURCE, stream: 0, frame: 1, harm }];
        let auto = Plan { memory: MemoryPolicy::Auto, ..plan(Mode::Live) };
        let fate = survive(&auto, Weather { faults, ..Weather::default() });
        let copied = matches!(harm, Harm::Garbage | Harm::Flip);
        assert_eq!(fate, if copied { Fate::Moved } else { Fate::Stayed }, "{harm:?}");
    }
}

#[test]
fn two_faults_at_once_leave_one_owner() {
    for (ours, theirs) in (0..6).flat_map(|ours| (0..4).map(move |theirs| (ours, theirs))) {
        for (one, other) in [(Harm::Stall, Harm::Stall), (Harm::CutAfter, Harm::Flip), (Harm::Block, Harm::Lose)] {
            let faults = vec![
                FaultAt { sender: SOURCE, stream: 0, frame: ours, harm: one },
                FaultAt { sender: TARGET, stream: 0, frame: theirs, harm: other },
            ];
            survive(&passing(Mode::Stop), Weather { faults, ..Weather::default() });
        }
    }
}
