//! `cargo xtask bench migrate`: moves the micro guest on this host's KVM, by Godwit and by QEMU, and a Debian under load in
//! the nested lab, and compares.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Args;
use godwit_tests::bench::Figure;
use godwit_tests::bench::migrate::cell::{Guest, Heat, Part};
use godwit_tests::bench::migrate::trip::Baggage;
use godwit_tests::bench::migrate::{Bench, Cell, Programs, plan};
use godwit_tests::interruption::clean_up_on_signals;
use godwit_tests::place::kvm_works;
use godwit_tests::table;
use guest_images::{DEFAULT_CACHE, Images};
use tempfile::TempDir;

use super::journal::Journal;
use super::promises::{Cells, rows};
use super::{QEMU, contents, promise_table, results, word};
use crate::packages;
use crate::test::{debian_disks, scenario_images};
use crate::workspace::{binaries, build, root};

const IPERF: &str = "/usr/bin/iperf3";

/// How to measure it.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// Print one JSON object per cell, and the rows of the promises last.
    #[arg(long)]
    json: bool,
    /// Fewer cells and turns, less than ten minutes: what the promises need.
    #[arg(long)]
    quick: bool,
    /// Only the cells of this question; may be given several times. The promises of others are not kept then.
    #[arg(long, value_enum)]
    part: Vec<Part>,
    /// Write migrate.csv, migrate.md, plots, and each turn's figures into this folder, too.
    #[arg(long, value_name = "DIR")]
    results: Option<PathBuf>,
    /// Go on with a run into that folder that was cut off: what it has measured is not measured again.
    #[arg(long, requires = "results")]
    resume: bool,
}

/// Measures and prints.
pub(super) fn bench(options: &Options) -> Result<ExitCode> {
    let cells = measure(options)?;
    let rows = rows(&Cells(&cells));
    if options.json {
        for cell in &cells {
            println!("{}", serde_json::to_string(cell)?);
        }
        println!("{}", serde_json::json!({ "rows": rows }));
    } else {
        print!("{}\n{}", report(&cells), promise_table(&rows));
    }
    if let Some(folder) = &options.results {
        results::write(folder, &cells, &rows)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(options: &Options) -> Result<Vec<Cell>> {
    let mut heats = plan::heats(options.quick);
    heats.retain(|heat| options.part.is_empty() || options.part.contains(&heat.part));
    ensure!(!heats.is_empty(), "The quick list has none of these parts");
    let in_lab = |heat: &Heat| matches!(heat.guest, Guest::Debian(_));
    packages::ensure(&packages::for_migration_bench())?;
    build(&["--package", "vmm", "--bins"])?;
    if heats.iter().any(in_lab) {
        packages::ensure(&packages::for_test())?;
        build(&["--package", "verifier", "--package", "godwit-tests", "--bins"])?;
    }
    if !heats.iter().all(in_lab) {
        kvm_works().context("Not all of it can be measured on this host")?;
    }
    let kernel = Images::open(&root().join(DEFAULT_CACHE))?.micro()?;
    let programs = Programs { godwit: binaries()?.join("godwit"), qemu: QEMU.into(), iperf: IPERF.into(), kernel };
    let work = TempDir::with_prefix("godwit-bench-").context("Cannot make a folder for the bench")?;
    clean_up_on_signals(work.path().to_owned())?;
    let baggage = Baggage { binaries: binaries()?, images: scenario_images, debian: debian_disks };
    let bench = Bench::new(programs, contents()?, baggage, work.path());
    let mut journal = options.results.as_ref().map(|folder| Journal::open(folder, options.resume)).transpose()?;
    let mut cells = Vec::new();
    for (index, heat) in heats.iter().enumerate() {
        eprint!("{} of {}: {}, {}, {}", index + 1, heats.len(), word(&heat.part), heat.link, heat.guest.name());
        let known = journal.as_ref().and_then(|journal| journal.cells_of(heat));
        eprintln!("{}", if known.is_some() { ": measured before" } else { "" });
        if let Some(known) = known {
            cells.extend(known);
            continue;
        }
        let measured = bench.run(heat, index);
        if let Some(journal) = &mut journal {
            journal.add(&measured)?;
        }
        cells.extend(measured);
    }
    Ok(cells)
}

/// Everything that was measured, for people.
fn report(cells: &[Cell]) -> String {
    let machines: BTreeSet<&str> = cells.iter().map(|cell| cell.machine.as_str()).collect();
    let mut text: String = machines.iter().map(|machine| format!("On {machine}\n")).collect();
    let heads =
        ["question", "link", "guest", "contender", "n", "total ms", "downtime ms", "MB sent", "CPU s", "MB/s", "MiB"];
    let lines = cells.iter().map(|cell| {
        let number = |figure| cell.median(figure).map_or_else(|| "-".to_owned(), |value| format!("{value:.1}"));
        [
            word(&cell.part),
            cell.link.to_string(),
            cell.guest.clone(),
            cell.contender.clone(),
            cell.n.to_string(),
            number(Figure::MigrationMs),
            number(Figure::DowntimeMs),
            number(Figure::LinkMb),
            cell.median(Figure::CpuS).map_or_else(|| "-".to_owned(), |value| format!("{value:.2}")),
            number(Figure::RateMbS),
            number(Figure::MemoryMib),
        ]
    });
    text += &table::aligned(&std::iter::once(heads.map(str::to_owned)).chain(lines).collect::<Vec<_>>());
    for cell in cells {
        if let Some(why) = &cell.why {
            text += &format!("Not measured: {}, {}, {}: {why}\n", cell.link, cell.guest, cell.contender);
        }
    }
    let mut versions: Vec<&str> = cells.iter().map(|cell| cell.version.as_str()).collect();
    versions.sort_unstable();
    versions.dedup();
    text + &format!("Of {}\n", versions.join(", "))
}
