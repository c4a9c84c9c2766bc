//! Migrations to a host that has an old copy of the disk: what has not changed since is not sent again.

use super::faults::{Fate, survive_at};
use super::link::{FaultAt, Harm, SOURCE, TARGET};
use super::world::{FakeGuest, FakeHost, MemoryClaims, REGIONS, World, content};
use super::{Weather, migrate, plan};
use crate::codec::kept::GROUP_PAGES;
use crate::region::{PAGE_SIZE, PageIndex};
use crate::source::{Outcome, Plan};
use crate::{Mode, Report, total_pages};
use std::num::NonZeroU16;
use std::sync::Arc;

/// The host has the guest's disk but for these pages.
fn host_with_old_copy(world: &World, guest: &FakeGuest, changed: &[u64]) -> FakeHost {
    let host = FakeHost { is_blank: false, ..FakeHost::new(world) };
    let memory = usize::try_from(total_pages(&REGIONS[..2])).unwrap() * PAGE_SIZE;
    let disk = content(&guest.memory).split_off(memory);
    host.fill_disk(PageIndex(0), &disk);
    for &page in changed {
        host.fill_disk(PageIndex(page), &[0xee; PAGE_SIZE]);
    }
    host
}

fn moved(plan: &Plan, busy: u32, changed: &[u64]) -> Report {
    let (world, claims) = (World::new(), MemoryClaims::default());
    let guest = FakeGuest { busy, ..FakeGuest::new(&world) };
    let mut host = host_with_old_copy(&world, &guest, changed);
    let memory = Arc::clone(&guest.memory);
    let attempt = migrate(guest, &mut host, &claims, plan, Weather::default());
    let Outcome::HandedOver(report) = attempt.outcome else { panic!("{:?}", attempt.outcome) };
    assert!(content(&memory) == content(&host.memory), "memory or the disk differs");
    report
}

#[test]
fn only_what_has_changed_is_sent() {
    for mode in [Mode::Stop, Mode::Live] {
        // The disk ends with a hole, which is looked for at the beginning of each 64 pages.
        let same = moved(&plan(mode), 0, &[]);
        let [first, ..] = &same.rounds[..] else { panic!("{same:?}") };
        assert_eq!(first.kinds.kept, 64, "{mode:?}");
        let disk_pages = |report: &Report| report.rounds[1..].iter().map(|round| round.pages).sum::<u64>();
        assert_eq!(disk_pages(&same), 0, "{mode:?}: {:?}", same.rounds);

        let changed = moved(&plan(mode), 0, &[0, 20, 21, 89]);
        // Two groups at most; the last page is in the hole, and is cleared.
        let sent = disk_pages(&changed);
        assert!((3..=2 * u64::from(GROUP_PAGES)).contains(&sent), "{mode:?}: {:?}", changed.rounds);
    }
}

#[test]
fn an_old_copy_is_brought_up_to_date_while_the_guest_writes() {
    for (mode, streams) in [(Mode::Live, 1), (Mode::Live, 3), (Mode::Stop, 2)] {
        let plan = Plan { streams: NonZeroU16::new(streams), verify: true, ..plan(mode) };
        for busy in [1, 5] {
            let report = moved(&plan, busy, &(0..45).step_by(7).collect::<Vec<_>>());
            assert_eq!(report.verified, Some(true));
        }
    }
}

#[test]
fn every_harm_to_every_frame_leaves_one_owner() {
    let plan = plan(Mode::Live);
    let mut stayed = 0;
    for sender in [SOURCE, TARGET] {
        for frame in 0..12 {
            for harm in [Harm::Cut, Harm::Stall] {
                let weather =
                    Weather { faults: vec![FaultAt { sender, stream: 0, frame, harm }], ..Weather::default() };
                let fate = survive_at(&plan, weather, |world, guest| host_with_old_copy(world, guest, &[0, 20, 44]));
                stayed += u32::from(fate == Fate::Stayed);
            }
        }
    }
    assert!(stayed > 0);
}
