//! The list of what is measured: all of it, or so much that every promise has its figure within minutes.

use super::cell::{Contender, Content, Debian, Guest, Heat, Link, Micro, Part, Variant};
use super::load::Load;

/// The goal for the downtime of all contenders, in milliseconds.
pub(super) const MAX_DOWNTIME_MS: u32 = 20;
/// After so many rounds all contenders pause the guest even if that goal is not met.
pub(super) const MAX_ROUNDS: u32 = 30;

/// The cache of the engine whose memory is measured.
pub const ENGINE_CACHE_MIB: u32 = 64;

/// The codecs of the matrix: the column's name, and words for `godwit migrate`. The cache holds the whole content.
const CODECS: [(&str, &str); 8] = [
    ("none", "--codec none"),
    ("zero", "--codec zero"),
    ("rle", "--codec rle"),
    ("delta", "--codec delta --delta-cache 512M"),
    ("dedup", "--codec dedup"),
    ("lz4", "--codec lz4"),
    ("zstd", "--codec zstd"),
    ("auto", "--codec auto --delta-cache 512M"),
];

/// Size of the matrix' guests: what a link of 1 Gbit/s carries in about a second, and about four.
const MATRIX_MIB: [u64; 2] = [128, 512];
/// Of partial updates it is a promise's own.
const PARTIAL_MIB: u64 = 256;

/// The working set, in MiB, and the pages that the guest writes to it per second, 0 for as many as it can.
const MAIN: (u64, u64) = (64, 0);
const WORKING_SETS: [(u64, u64); 6] = [(0, 0), (64, 1000), (64, 10_000), MAIN, (256, 1000), (256, 10_000)];
/// On the slowest link only what it can carry away.
const SLOW_WORKING_SETS: [(u64, u64); 2] = [(0, 0), (64, 1000)];

/// Everything, or what the promises need.
pub fn heats(quick: bool) -> Vec<Heat> {
    let promised = [against_qemu(quick), codecs(quick), distance(quick), vec![engine_memory(quick)], hand_over(quick)];
    let beside = if quick { Vec::new() } else { real_guests() };
    [promised.concat(), beside].concat()
}

fn godwit(name: &str, options: &str) -> Contender {
    Contender::godwit(name, &format!("--max-downtime {MAX_DOWNTIME_MS} --max-rounds {MAX_ROUNDS} {options}"))
}

fn against_qemu(quick: bool) -> Vec<Heat> {
    let contenders: Vec<Contender> =
        [Contender::Iperf, godwit("default", "")].into_iter().chain(Variant::ALL.map(Contender::Qemu)).collect();
    let heat = |link, (mib, rate): (u64, u64), runs| {
        let writes = match (mib, rate) {
            (0, _) => "idle".to_owned(),
            (_, 0) => "unlimited".to_owned(),
            (_, rate) => format!("{rate} pages/s"),
        };
        let guest = Micro {
            name: format!("1 GiB, 512 MiB of tar, working set {mib} MiB, {writes}"),
            memory_mib: 1024,
            content: Some((Content::Tar, 512)),
            words: format!("ws={mib}M rate={rate} tick=1"),
        };
        Heat { part: Part::AgainstQemu, link, guest: Guest::Micro(guest), contenders: contenders.clone(), runs }
    };
    if quick {
        return vec![heat(Link::Loopback, MAIN, 3)];
    }
    let fast = [Link::Loopback, Link::TenGigabit, Link::Gigabit].into_iter();
    let fast = fast.flat_map(|link| WORKING_SETS.map(|working_set| heat(link, working_set, 5)));
    fast.chain(SLOW_WORKING_SETS.map(|working_set| heat(Link::HundredMegabit, working_set, 5))).collect()
}

/// A guest of the matrix: what it is called and how it works on which content.
fn matrix_guests(mib: u64) -> Vec<Micro> {
    let guest = |name: &str, content, mib: u64, words: &str| Micro {
        name: format!("{name}, {mib} MiB"),
        memory_mib: mib + 64,
        content: Some((content, mib)),
        words: format!("{words} tick=1"),
    };
    vec![
        guest("idle", Content::Tar, mib, "ws=0"),
        guest("zero-filled", Content::Zero, mib, "over ws=64M rate=1000 pattern=zero"),
        guest("coloured", Content::Colour, mib, "over ws=64M rate=1000 pattern=colour"),
        guest("random write", Content::Random, mib, "over ws=64M rate=1000 pattern=shift"),
        partial_update(),
        guest("twin pages", Content::Twin, mib, "ws=0"),
    ]
}

/// It writes not far below what 1 Gbit/s carries as whole pages, so that they take many rounds, but not more rounds than
/// there may be. Ticks at each millisecond would take too much of the guest's time for that.
fn partial_update() -> Micro {
    Micro {
        name: format!("partial update, {PARTIAL_MIB} MiB"),
        memory_mib: PARTIAL_MIB + 64,
        content: Some((Content::Random, PARTIAL_MIB)),
        words: format!("over ws={PARTIAL_MIB}M rate=22500 pattern=patch tick=10"),
    }
}

fn codecs(quick: bool) -> Vec<Heat> {
    let contender = |&(name, options): &(&str, &str)| godwit(name, options);
    let all: Vec<Contender> = CODECS.iter().map(contender).collect();
    let named = |wanted: &[&str]| -> Vec<Contender> {
        CODECS.iter().filter(|(name, _)| wanted.contains(name)).map(contender).collect()
    };
    let heat =
        |link, guest, contenders, runs| Heat { part: Part::Codecs, link, guest: Guest::Micro(guest), contenders, runs };
    if !quick {
        // What a codec gains within the host it gains at 10 Gbit/s.
        let links = [(Link::Gigabit, all.clone()), (Link::TenGigabit, all), (Link::Loopback, named(&["none", "auto"]))];
        let by_link = |(link, contenders): (Link, Vec<Contender>)| {
            matrix_guests(MATRIX_MIB[1]).into_iter().map(move |guest| heat(link, guest, contenders.clone(), 5))
        };
        return links.into_iter().flat_map(by_link).collect();
    }
    let starts_with = |name: &'static str| move |guest: &Micro| guest.name.starts_with(name);
    let others = |guest: &Micro| !starts_with("partial")(guest);
    let guests: Vec<Micro> = matrix_guests(MATRIX_MIB[0]).into_iter().filter(others).collect();
    let by_all = guests.iter().filter(|guest| !starts_with("twin")(guest));
    let mut heats: Vec<Heat> = by_all.map(|guest| heat(Link::Gigabit, guest.clone(), all.clone(), 3)).collect();
    // The more of them there are, the less it matters that a move takes some time in any case.
    let large = matrix_guests(MATRIX_MIB[1]).into_iter().filter(starts_with("twin"));
    heats.extend(large.map(|guest| heat(Link::Gigabit, guest, named(&["none", "dedup", "auto"]), 3)));
    // Without a memory of what was sent it takes long.
    heats.push(heat(Link::Gigabit, partial_update(), named(&["none", "delta", "auto"]), 1));
    heats.extend(guests.into_iter().map(|guest| heat(Link::TenGigabit, guest, named(&["none", "auto"]), 3)));
    heats
}

/// Nothing but a little is written in so much memory; what the engine keeps per page would show.
fn engine_memory(quick: bool) -> Heat {
    let guest = Micro {
        name: "16 GiB, sparse".to_owned(),
        memory_mib: 16 << 10,
        content: Some((Content::Tar, 128)),
        words: "ws=64M rate=10000 tick=1".to_owned(),
    };
    let contenders = vec![godwit("default", &format!("--delta-cache {ENGINE_CACHE_MIB}M"))];
    Heat {
        part: Part::EngineMemory,
        link: Link::Loopback,
        guest: Guest::Micro(guest),
        contenders,
        runs: if quick { 1 } else { 3 },
    }
}

/// So many MiB that the round trips at begin and end do not count for much; and what takes one stream that loses frames as
/// long.
const LARGE: u64 = 2048;
const SMALL: u64 = 24;

/// Nothing that a codec makes shorter: what counts is how much of the link is used.
fn distance(quick: bool) -> Vec<Heat> {
    let heat = |link, mib: u64, contenders, runs| {
        let guest = Micro {
            name: format!("random, {mib} MiB"),
            memory_mib: mib + 64,
            content: Some((Content::Random, mib)),
            words: "ws=0 tick=1".to_owned(),
        };
        Heat { part: Part::Distance, link, guest: Guest::Micro(guest), contenders, runs }
    };
    let alone = || vec![godwit("default", "")];
    // By the way most hosts react to a loss.
    let lossy = vec![godwit("default", "--congestion cubic"), godwit("one stream", "--congestion cubic --streams 1")];
    if quick {
        return vec![heat(Link::Gigabit64Ms, LARGE, alone(), 1), heat(Link::Gigabit64MsLossy, SMALL, lossy, 1)];
    }
    let others = [Contender::Iperf, Contender::Qemu(Variant::Plain), Contender::Qemu(Variant::Multifd)];
    let all = [alone(), others.to_vec()].concat();
    let near = [Link::Gigabit, Link::Gigabit4Ms, Link::Gigabit16Ms, Link::Gigabit64Ms];
    let mut heats: Vec<Heat> = near.map(|link| heat(link, LARGE, all.clone(), 3)).into();
    heats.push(heat(Link::Gigabit64MsLossy, SMALL, lossy, 5));
    heats
}

fn hand_over(quick: bool) -> Vec<Heat> {
    let heat = |memory_mib: u64| {
        // Of both the same share is backed.
        let guest = Micro {
            name: format!("{memory_mib} MiB"),
            memory_mib,
            content: Some((Content::Tar, memory_mib / 8)),
            words: "ws=64M rate=1000 tick=1".to_owned(),
        };
        let contenders = vec![godwit("memory passed", "--memory pass")];
        Heat {
            part: Part::HandOver,
            link: Link::UnixSocket,
            guest: Guest::Micro(guest),
            contenders,
            runs: if quick { 3 } else { 9 },
        }
    };
    vec![heat(4096), heat(512)]
}

/// Memory of a real guest: Debian with its daemons and each of the loads fits, with little room to keep files in.
const REAL_MIB: u64 = 192;

/// Emulated processors pack 15 to 30 MB/s, with all else that they do. So they outrun this link as real ones do 1 Gbit/s; at
/// 200 Mbit/s packing takes as long as it saves. What a guest that works dirties does not go over it in 20 ms: the goal is a
/// downtime that such a guest can have.
fn real_guests() -> Vec<Heat> {
    let contender = |(name, options)| Contender::godwit(name, &format!("--max-downtime 300 {options}"));
    let contenders = CODECS.map(contender).to_vec();
    let heat = |load| Heat {
        part: Part::RealGuests,
        link: Link::HundredMegabit,
        guest: Guest::Debian(Debian { load, memory_mib: REAL_MIB }),
        contenders: contenders.clone(),
        runs: 3,
    };
    Load::ALL.map(heat).to_vec()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_cell_is_there_once_and_fits() {
        for quick in [true, false] {
            let heats = heats(quick);
            let mut cells = BTreeSet::new();
            for heat in &heats {
                for contender in &heat.contenders {
                    let cell = (heat.part, heat.link, heat.guest.name(), contender.name());
                    assert!(cells.insert(cell.clone()), "{cell:?}");
                }
                let fits = match &heat.guest {
                    Guest::Micro(guest) => guest.content.map_or(0, |(_, mib)| mib) + 64 <= guest.memory_mib,
                    Guest::Debian(guest) => guest.memory_mib >= 128,
                };
                assert!(fits && heat.runs > 0, "{heat:?}");
            }
        }
    }

    #[test]
    fn the_quick_list_asks_all_questions_but_of_real_guests() {
        let parts = |quick| heats(quick).iter().map(|heat| heat.part).collect::<BTreeSet<_>>();
        let mut promised = parts(false);
        assert!(promised.remove(&Part::RealGuests));
        assert_eq!(parts(true), promised);
    }

    #[test]
    fn real_guests_are_moved_by_all_codecs_in_the_lab() {
        let all = heats(false);
        let real: Vec<&Heat> = all.iter().filter(|heat| heat.part == Part::RealGuests).collect();
        assert_eq!(real.len(), Load::ALL.len());
        for heat in real {
            assert!(matches!(heat.guest, Guest::Debian(_)) && heat.link.rate().is_some(), "{heat:?}");
            let names: Vec<String> = heat.contenders.iter().map(Contender::name).collect();
            assert_eq!(names, CODECS.map(|(name, _)| format!("godwit {name}")));
            // It is told to the lab as JSON.
            let text = serde_json::to_string(heat).unwrap();
            assert_eq!(&serde_json::from_str::<Heat>(&text).unwrap(), heat);
        }
    }
}
