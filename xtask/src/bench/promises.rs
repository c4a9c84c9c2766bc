//! What the project promises of migrations, beside what was measured: arithmetic on cells, one function a promise.

use std::collections::BTreeSet;

use godwit_tests::bench::Figure;
use godwit_tests::bench::migrate::Cell;
use godwit_tests::bench::migrate::cell::{Link, Part, Variant};
use godwit_tests::bench::migrate::plan::ENGINE_CACHE_MIB;

use super::Row;

/// What each guest is called at least; the plan adds sizes.
const MAIN: &str = "1 GiB, 512 MiB of tar, working set 64 MiB, unlimited";
const GODWIT: &str = "godwit default";
const NONE: &str = "godwit none";
const AUTO: &str = "godwit auto";

/// A figure, or why there is none.
type Known = Result<f64, String>;

/// What was measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cells<'a>(pub(super) &'a [Cell]);

impl<'a> Cells<'a> {
    fn of(self, part: Part) -> impl Iterator<Item = &'a Cell> {
        self.0.iter().filter(move |cell| cell.part == part)
    }

    fn find(self, part: Part, link: Link, guest: &str, contender: &str) -> Result<&'a Cell, String> {
        let found = self
            .of(part)
            .find(|cell| cell.link == link && cell.guest.starts_with(guest) && cell.contender == contender);
        found.ok_or_else(|| format!("{contender} has not moved \"{guest}\" over {link}"))
    }

    fn total(self, link: Link, guest: &str, contender: &str) -> Known {
        median(self.find(Part::Codecs, link, guest, contender)?, Figure::MigrationMs)
    }

    /// How many times as long `slow` takes as `fast`, at 1 Gbit/s.
    fn gain(self, guest: &str, slow: &str, fast: &str) -> Known {
        Ok(self.total(Link::Gigabit, guest, slow)? / self.total(Link::Gigabit, guest, fast)?)
    }

    /// The guests of the matrix that were moved over a link.
    fn guests(self, link: Link) -> BTreeSet<&'a str> {
        self.of(Part::Codecs).filter(|cell| cell.link == link).map(|cell| cell.guest.as_str()).collect()
    }
}

fn median(cell: &Cell, figure: Figure) -> Known {
    cell.median(figure).ok_or_else(|| {
        let why = cell.why.as_deref().unwrap_or("it does not tell");
        format!("{}, {}, {}: {why}", cell.contender, cell.guest, cell.link)
    })
}

/// A row whose goal and figure may both be unknown.
fn row(
    make: fn(&'static str, Option<f64>, Option<f64>) -> Row,
    what: &'static str,
    goal: &Known,
    figure: &Known,
) -> Row {
    let why = [figure, goal].into_iter().find_map(|known| known.as_ref().err().cloned());
    Row { why, ..make(what, goal.as_ref().ok().copied(), figure.as_ref().ok().copied()) }
}

/// All promises, in the order in which they were given.
pub(super) fn rows(cells: &Cells<'_>) -> Vec<Row> {
    let (most, least) = (Row::at_most, Row::at_least);
    let main =
        |figure| cells.find(Part::AgainstQemu, Link::Loopback, MAIN, GODWIT).and_then(|cell| median(cell, figure));
    let half = |figure| best_of_qemu(*cells, figure).map(|best| best * 0.5);
    let downtime_goal = half(Figure::DowntimeMs).map(|half| half.min(20.0));
    let (downtime, noise) = hand_over(*cells);
    vec![
        row(
            most,
            "loopback, 64 MiB working set: total time, ms; the goal is 0.5 x QEMU's best",
            &half(Figure::MigrationMs),
            &main(Figure::MigrationMs),
        ),
        row(
            least,
            "in the same runs: non-zero bytes per second as a share of what an iperf3 stream reaches",
            &Ok(0.6),
            &share_of_iperf(*cells),
        ),
        row(
            most,
            "in the same runs: downtime as the guest saw it, ms; the goal is 0.5 x QEMU's best, and 20",
            &downtime_goal,
            &main(Figure::DowntimeMs),
        ),
        row(
            most,
            "1 Gbit/s: total time of auto as a multiple of the best single codec's, in the worst cell",
            &Ok(1.05),
            &worst(cells.guests(Link::Gigabit).into_iter().map(|guest| auto_against_best(*cells, guest))),
        ),
        row(
            most,
            "total time of auto as a multiple of none's, in the worst cell of all links",
            &Ok(1.02),
            &auto_against_none(*cells),
        ),
        row(
            most,
            "zero-filled guest, 1 Gbit/s: total time of auto as a share of none's",
            &Ok(0.12),
            &cells.gain("zero-filled", AUTO, NONE),
        ),
        row(
            least,
            "twin pages, 1 Gbit/s: total time of none as a multiple of dedup's",
            &Ok(14.0),
            &cells.gain("twin pages", NONE, "godwit dedup"),
        ),
        row(
            least,
            "partial update, 1 Gbit/s: total time of none as a multiple of delta's",
            &Ok(3.7),
            &cells.gain("partial update", NONE, "godwit delta"),
        ),
        row(
            least,
            "zeros and runs, 1 Gbit/s: total time of none as a multiple of RLE's, the smaller one",
            &Ok(4.0),
            &least_of([cells.gain("zero-filled", NONE, "godwit rle"), cells.gain("coloured", NONE, "godwit rle")]),
        ),
        row(
            most,
            "incompressible pages, 1 Gbit/s: total time of RLE as a multiple of none's",
            &Ok(1.02),
            &cells.gain("random write", "godwit rle", NONE),
        ),
        row(
            least,
            "1 Gbit/s, round trips up to 64 ms: bytes per second as a share of the link's, over the worst way",
            &Ok(0.9),
            &share_of_gigabit(*cells),
        ),
        row(
            least,
            "1 Gbit/s, 64 ms, 0.1 % of the frames lost, CUBIC: total time of one stream as a multiple of the default's",
            &Ok(2.0),
            &gain_of_streams(*cells),
        ),
        row(
            most,
            "16 GiB sparse guest: resident memory of the larger end beside the guest's, MiB; the goal is 64 and the cache",
            &Ok(64.0 + f64::from(ENGINE_CACHE_MIB)),
            &cells
                .find(Part::EngineMemory, Link::Loopback, "16 GiB", GODWIT)
                .and_then(|cell| median(cell, Figure::MemoryMib)),
        ),
        row(most, "memory passed, 4 GiB guest: downtime as the guest saw it, ms", &Ok(15.0), &downtime),
        row(
            most,
            "memory passed: difference of the downtimes at 4 GiB and 512 MiB, ms; the goal is the runs' own spread",
            &noise.as_ref().map(|noise| noise.spread).map_err(Clone::clone),
            &noise.as_ref().map(|noise| noise.difference).map_err(Clone::clone),
        ),
    ]
}

/// The smallest median of QEMU's ways of moving the main guest; all of them must have one.
fn best_of_qemu(cells: Cells<'_>, figure: Figure) -> Known {
    let of = |variant: Variant| {
        cells.find(Part::AgainstQemu, Link::Loopback, MAIN, variant.name()).and_then(|cell| median(cell, figure))
    };
    least_of(Variant::ALL.map(of))
}

fn share_of_iperf(cells: Cells<'_>) -> Known {
    let rate = |contender| {
        cells.find(Part::AgainstQemu, Link::Loopback, MAIN, contender).and_then(|cell| median(cell, Figure::RateMbS))
    };
    Ok(rate(GODWIT)? / rate("iperf3")?)
}

/// The least share of the links without loss that the default uses.
fn share_of_gigabit(cells: Cells<'_>) -> Known {
    const MB_PER_S: f64 = 125.0;
    let here = |cell: &&Cell| cell.link != Link::Gigabit64MsLossy && cell.contender == GODWIT;
    let share = |cell| Ok(median(cell, Figure::LinkMb)? * 1e3 / median(cell, Figure::MigrationMs)? / MB_PER_S);
    least_of(cells.of(Part::Distance).filter(here).map(share))
}

fn gain_of_streams(cells: Cells<'_>) -> Known {
    let total = |contender| {
        median(cells.find(Part::Distance, Link::Gigabit64MsLossy, "random", contender)?, Figure::MigrationMs)
    };
    Ok(total("godwit one stream")? / total(GODWIT)?)
}

fn auto_against_best(cells: Cells<'_>, guest: &str) -> Known {
    let auto = cells.total(Link::Gigabit, guest, AUTO)?;
    let here = |cell: &&Cell| cell.link == Link::Gigabit && cell.guest == guest && cell.contender != AUTO;
    let singles: Vec<Known> =
        cells.of(Part::Codecs).filter(here).map(|cell| median(cell, Figure::MigrationMs)).collect();
    Ok(auto / least_of(singles)?)
}

fn auto_against_none(cells: Cells<'_>) -> Known {
    let moved: BTreeSet<(Link, &str)> = cells.of(Part::Codecs).map(|cell| (cell.link, cell.guest.as_str())).collect();
    worst(moved.into_iter().map(|(link, guest)| Ok(cells.total(link, guest, AUTO)? / cells.total(link, guest, NONE)?)))
}

fn least_of(values: impl IntoIterator<Item = Known>) -> Known {
    values.into_iter().reduce(|a, b| Ok(a?.min(b?))).unwrap_or_else(|| Err("there is nothing to compare".to_owned()))
}

fn worst(values: impl IntoIterator<Item = Known>) -> Known {
    values.into_iter().reduce(|a, b| Ok(a?.max(b?))).unwrap_or_else(|| Err("nothing was moved".to_owned()))
}

/// How the downtimes of two sizes differ.
#[derive(Debug)]
struct Noise {
    difference: f64,
    /// From the shortest to the longest of the runs at one size, the larger of both.
    spread: f64,
}

/// The downtime at 4 GiB, and its difference from that at 512 MiB.
fn hand_over(cells: Cells<'_>) -> (Known, Result<Noise, String>) {
    let find = |guest| cells.find(Part::HandOver, Link::UnixSocket, guest, "godwit memory passed");
    let downtime = |guest| find(guest).and_then(|cell| median(cell, Figure::DowntimeMs));
    let spread = |guest| -> Known {
        let summary = find(guest)?.figures.get(&Figure::DowntimeMs);
        summary.map(|summary| summary.max - summary.min).ok_or_else(|| "there is no downtime".to_owned())
    };
    let (large, small) = ("4096 MiB", "512 MiB");
    let noise = || -> Result<Noise, String> {
        let difference = (downtime(large)? - downtime(small)?).abs();
        Ok(Noise { difference, spread: spread(large)?.max(spread(small)?) })
    };
    (downtime(large), noise())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use godwit_tests::bench::Summary;
    use godwit_tests::bench::migrate::plan;

    use super::*;

    fn cell(part: Part, link: Link, guest: &str, contender: &str, values: &[(Figure, &[f64])]) -> Cell {
        let figures: BTreeMap<Figure, Summary> =
            values.iter().map(|(figure, values)| (*figure, Summary::of(values.to_vec()).unwrap())).collect();
        let why = figures.is_empty().then(|| "no reason".to_owned());
        let [guest, contender, version, machine] = [guest, contender, "v", "m"].map(str::to_owned);
        Cell { part, link, guest, contender, version, machine, n: 1, figures, why }
    }

    fn total(link: Link, guest: &str, contender: &str, ms: f64) -> Cell {
        cell(Part::Codecs, link, guest, contender, &[(Figure::MigrationMs, &[ms])])
    }

    fn row_of(cells: &[Cell], part_of_name: &str) -> Row {
        rows(&Cells(cells)).into_iter().find(|row| row.what.contains(part_of_name)).unwrap()
    }

    #[test]
    fn nothing_measured_is_nothing_kept() {
        let rows = rows(&Cells(&[]));
        assert!(rows.iter().all(|row| !row.ok && row.figure.is_none() && row.why.is_some()));
    }

    #[test]
    fn the_plan_has_a_cell_for_every_promise() {
        for quick in [true, false] {
            let figures: [(Figure, &[f64]); 5] = [
                (Figure::LinkMb, &[1.0]),
                (Figure::MigrationMs, &[1.0]),
                (Figure::DowntimeMs, &[1.0]),
                (Figure::RateMbS, &[1.0]),
                (Figure::MemoryMib, &[1.0]),
            ];
            let heats = plan::heats(quick);
            let all = heats.iter().flat_map(|heat| heat.contenders.iter().map(move |contender| (heat, contender)));
            let cells: Vec<Cell> = all
                .map(|(heat, contender)| cell(heat.part, heat.link, &heat.guest.name(), &contender.name(), &figures))
                .collect();
            for row in rows(&Cells(&cells)) {
                assert_eq!(row.why, None, "{}", row.what);
                assert!(row.goal.is_some() && row.figure.is_some(), "{}", row.what);
            }
        }
    }

    #[test]
    fn qemus_best_is_the_best_of_each_figure() {
        let main = |contender, total, downtime| {
            let figures: [(Figure, &[f64]); 2] = [(Figure::MigrationMs, &[total]), (Figure::DowntimeMs, &[downtime])];
            cell(Part::AgainstQemu, Link::Loopback, MAIN, contender, &figures)
        };
        let mut cells = vec![
            main(GODWIT, 300.0, 9.0),
            main("qemu plain", 1900.0, 60.0),
            main("qemu multifd", 600.0, 500.0),
            main("qemu multifd+zstd", 2000.0, 20.0),
            main("qemu xbzrle", 700.0, 600.0),
        ];
        let (total, downtime) = (row_of(&cells, "total time, ms"), row_of(&cells, "0.5 x QEMU's best, and 20"));
        assert_eq!((total.goal, total.figure, total.ok), (Some(300.0), Some(300.0), true));
        assert_eq!((downtime.goal, downtime.ok), (Some(10.0), true));
        // A contender that did not run could have been the best one.
        cells[2] = cell(Part::AgainstQemu, Link::Loopback, MAIN, "qemu multifd", &[]);
        let total = row_of(&cells, "total time, ms");
        assert!(!total.ok && total.why.unwrap().contains("qemu multifd") && total.figure == Some(300.0));
    }

    #[test]
    fn auto_is_judged_by_its_worst_cell() {
        let cells = [
            total(Link::Gigabit, "idle, 1 MiB", NONE, 1000.0),
            total(Link::Gigabit, "idle, 1 MiB", "godwit zstd", 500.0),
            total(Link::Gigabit, "idle, 1 MiB", AUTO, 520.0),
            total(Link::Gigabit, "random write, 1 MiB", NONE, 1000.0),
            total(Link::Gigabit, "random write, 1 MiB", AUTO, 1010.0),
            total(Link::TenGigabit, "random write, 1 MiB", NONE, 100.0),
            total(Link::TenGigabit, "random write, 1 MiB", AUTO, 103.0),
        ];
        let best = row_of(&cells, "best single codec");
        assert!(best.ok && (best.figure.unwrap() - 1.04).abs() < 1e-9);
        let none = row_of(&cells, "multiple of none's, in the worst cell");
        assert!(!none.ok && (none.figure.unwrap() - 1.03).abs() < 1e-9);
    }

    #[test]
    fn gains_are_ratios_the_right_way_round() {
        let link = Link::Gigabit;
        let cells = [
            total(link, "twin pages, 1 MiB", NONE, 1500.0),
            total(link, "twin pages, 1 MiB", "godwit dedup", 100.0),
            total(link, "zero-filled, 1 MiB", NONE, 1000.0),
            total(link, "zero-filled, 1 MiB", AUTO, 100.0),
            total(link, "zero-filled, 1 MiB", "godwit rle", 100.0),
            total(link, "coloured, 1 MiB", NONE, 1000.0),
            total(link, "coloured, 1 MiB", "godwit rle", 300.0),
        ];
        assert_eq!(row_of(&cells, "dedup's").figure, Some(15.0));
        assert_eq!(row_of(&cells, "share of none's").figure, Some(0.1));
        let runs = row_of(&cells, "RLE's, the smaller");
        assert!(!runs.ok && (runs.figure.unwrap() - 3.333).abs() < 1e-3);
    }

    #[test]
    fn the_hand_overs_spread_is_the_noise() {
        let passed = |guest, values| {
            cell(Part::HandOver, Link::UnixSocket, guest, "godwit memory passed", &[(Figure::DowntimeMs, values)])
        };
        let cells = [passed("4096 MiB", &[10.0, 11.0, 14.0]), passed("512 MiB", &[8.0, 9.0, 10.0])];
        let row = row_of(&cells, "difference of the downtimes");
        assert_eq!((row.goal, row.figure, row.ok), (Some(4.0), Some(2.0), true));
    }
}
