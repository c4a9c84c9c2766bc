//! Migrations with each codec: every page arrives, whatever it was made into on the way, over one stream and several.

use super::faults::{Fate, survive};
use super::link::{FaultAt, Harm, SOURCE};
use super::moves::{Success, moves};
use super::{Weather, plan};
use crate::codec::block::{Packing, ZstdLevel};
use crate::codec::{BlockCode, Codecs};
use crate::report::RoundReport;
use crate::source::Plan;
use crate::{Mode, PageCounts, Report, Role, Why};
use std::num::NonZeroU16;

const ZSTD: Packing = Packing::Zstd(ZstdLevel::MIN);

fn all() -> Codecs {
    Codecs { zero: true, rle: true, delta: true, dedup: true, packing: ZSTD }
}

fn with(codecs: Codecs, streams: u16, mode: Mode) -> Plan {
    Plan { codecs: Some(codecs), streams: NonZeroU16::new(streams), verify: true, ..plan(mode) }
}

fn sum(rounds: &[RoundReport]) -> PageCounts {
    let mut sum = PageCounts::default();
    rounds.iter().for_each(|round| sum += round.kinds);
    sum
}

/// The pages of a live migration over one stream, and of some others, which must arrive as well.
fn kinds(codecs: Codecs) -> PageCounts {
    for (streams, mode) in [(3, Mode::Live), (1, Mode::Stop), (3, Mode::Stop)] {
        let Success { source, target, .. } = moves(&with(codecs, streams, mode), 3, Weather::default());
        assert_eq!(target, Report { role: Role::Target, ..source }, "both ends tell the same");
    }
    let Success { source, .. } = moves(&with(codecs, 1, Mode::Live), 3, Weather::default());
    let kinds = sum(&source.rounds);
    assert_eq!(kinds.sent(), source.rounds.iter().map(|round| round.pages).sum::<u64>());
    kinds
}

#[test]
fn without_codecs_only_holes_are_not_sent() {
    let PageCounts { raw, zero, plain: 0, rle: 0, delta: 0, copy: 0, kept: 0, same: 0 } = kinds(Codecs::NONE) else {
        panic!()
    };
    assert!(raw > 600 && zero < 100, "{raw} raw, {zero} zero");
}

#[test]
fn runs_are_sent_short() {
    let PageCounts { raw: 0, rle, plain: 0, .. } = kinds(Codecs { rle: true, ..Codecs::ZERO }) else { panic!() };
    assert!(rle > 400, "{rle}");
}

#[test]
fn what_is_sent_again_is_sent_as_a_change() {
    let PageCounts { raw: 0, delta, plain, .. } = kinds(Codecs { delta: true, ..Codecs::ZERO }) else { panic!() };
    assert!(delta > 0 && plain > 400, "{delta} changed, {plain} whole");
}

#[test]
fn equal_pages_are_sent_once() {
    // Without the codec for zero pages these are equal to each other.
    let PageCounts { raw: 0, copy, plain, .. } = kinds(Codecs { dedup: true, ..Codecs::NONE }) else { panic!() };
    assert!(copy > 90 && plain > 400, "{copy} copies, {plain} whole");
}

#[test]
fn blocks_are_packed() {
    let bytes = |packing| {
        let plan = with(Codecs { packing, ..Codecs::ZERO }, 1, Mode::Stop);
        moves(&plan, 0, Weather::default()).source.bytes
    };
    let stored = bytes(Packing::Stored);
    for packing in [Packing::Lz4, ZSTD, Packing::Zstd(ZstdLevel::MAX)] {
        assert!(bytes(packing) * 10 < stored, "{packing:?}");
    }
    kinds(Codecs { packing: Packing::Lz4, ..Codecs::ZERO });
}

#[test]
fn all_codecs_together() {
    let PageCounts { raw: 0, zero, rle, delta, .. } = kinds(all()) else { panic!() };
    assert!(zero > 0 && rle > 0 && delta > 0, "{zero} {rle} {delta}");
    assert_eq!(BlockCode::ALL.len(), 3, "each packing is in these tests");
}

/// A cache that holds next to nothing, or nothing at all, costs bytes only.
#[test]
fn a_small_cache_is_no_error() {
    for delta_cache in [0, 4096, 100_000] {
        moves(&Plan { delta_cache, ..with(all(), 3, Mode::Live) }, 3, Weather::default());
    }
}

#[test]
fn every_harm_to_encoded_pages_leaves_one_owner() {
    for (stream, harm) in [0, 1].into_iter().flat_map(|stream| Harm::FOUND.map(|harm| (stream, harm))) {
        let faults = vec![FaultAt { sender: SOURCE, stream, frame: 1, harm }];
        let fate = survive(&with(all(), 2, Mode::Live), Weather { faults, ..Weather::default() });
        assert!(fate == Fate::Stayed || harm == Harm::CutAfter, "{harm:?} on stream {stream}: {fate:?}");
    }
}

/// The link of these tests takes 1 GB/s, and encoding takes no time there: every codec pays.
#[test]
fn codecs_chosen_by_measurement_bring_every_page() {
    for (streams, mode) in [(1, Mode::Live), (3, Mode::Live), (1, Mode::Stop), (3, Mode::Stop)] {
        let plan = Plan { codecs: None, ..with(Codecs::NONE, streams, mode) };
        let Success { source, target, .. } = moves(&plan, 3, Weather::default());
        assert_eq!(target, Report { role: Role::Target, ..source.clone() }, "both ends tell the same");
        let chosen: Vec<_> = source.rounds.iter().filter_map(|round| round.chosen).collect();
        assert_eq!(chosen.len(), source.rounds.len());
        assert!(chosen.iter().all(|chosen| chosen.why != Why::Asked), "{chosen:?}");
    }
}
