//! Migrations over several streams: what arrives, what a fault on one of them does to all, and who else is at the door.

use super::faults::{Fate, survive};
use super::link::{FaultAt, Harm, SOURCE};
use super::moves::{Success, moves};
use super::world::{FakeGuest, FakeHost, MemoryClaims, REGIONS, World};
use super::{Weather, migrate, plan};
use crate::region::total_pages;
use crate::source::{Outcome, Plan, SourceError};
use crate::{Mode, Report, Role};
use std::num::NonZeroU16;

fn over(streams: u16, mode: Mode) -> Plan {
    Plan { streams: NonZeroU16::new(streams), ..plan(mode) }
}

#[test]
fn a_guest_moves_over_several_streams() {
    for (streams, mode) in [(2, Mode::Stop), (2, Mode::Live), (5, Mode::Live), (64, Mode::Stop)] {
        let plan = Plan { verify: true, ..over(streams, mode) };
        let Success { source, target, .. } = moves(&plan, 3, Weather::default());
        assert_eq!(source.rounds[0].pages, total_pages(&REGIONS));
        assert_eq!(target, Report { role: Role::Target, ..source }, "both ends tell the same");
    }
}

/// Which pages go over which stream is chance, and so is how many frames a stream sends: at least `Join` and one more.
#[test]
fn every_harm_to_every_frame_of_a_further_stream_leaves_one_owner() {
    for mode in [Mode::Stop, Mode::Live] {
        for (frame, harm) in (0..4).flat_map(|frame| Harm::FOUND.map(|harm| (frame, harm))) {
            let faults = vec![FaultAt { sender: SOURCE, stream: 1, frame, harm }];
            let fate = survive(&over(3, mode), Weather { faults, ..Weather::default() });
            // What happens after all has come is no loss.
            let certain = frame < 1 + usize::from(mode == Mode::Live) && harm != Harm::CutAfter;
            assert!(
                fate == Fate::Stayed || (fate == Fate::Moved && !certain),
                "{mode:?}: {harm:?} to {frame}: {fate:?}"
            );
        }
    }
}

#[test]
fn a_stream_that_cannot_be_had_ends_the_migration() {
    let world = World::new();
    let mut host = FakeHost::new(&world);
    let weather = Weather { no_more_links: true, ..Weather::default() };
    let attempt = migrate(FakeGuest::new(&world), &mut host, &MemoryClaims::default(), &over(3, Mode::Live), weather);
    let Outcome::StillOurs(failed) = attempt.outcome else { panic!("{:?}", attempt.outcome) };
    assert!(matches!(failed.cause, SourceError::Link(_)), "{}", failed.cause);
    assert!(world.facts().runs_at_source && host.abandoned.is_some());
}

/// Links that say nothing, nonsense, or that they belong to another migration do not keep the streams out.
#[test]
fn strangers_at_the_door_do_not_keep_streams_out() {
    for strangers in [1, 200] {
        moves(&over(3, Mode::Live), 2, Weather { strangers, ..Weather::default() });
    }
}
