//! `cargo xtask bench disk`: what disks cost, how they come after a guest, and what they promise.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use godwit_tests::bench::Summary;
use godwit_tests::bench::disk::relocation::{self, Programs, Relocation};
use godwit_tests::bench::disk::requests::{self, Cell, Reader};
use godwit_tests::bench::machine;
use godwit_tests::bench::migrate::cell::{Content, Link};
use godwit_tests::interruption::clean_up_on_signals;
use godwit_tests::place::kvm_works;
use godwit_tests::table;
use guest_images::{DEFAULT_CACHE, Images};
use tempfile::TempDir;

use super::{Row, contents, promise_table, word};
use crate::packages;
use crate::workspace::{binaries, build, root};

/// How to measure.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// Print one JSON object per cell, and the rows of the promises last
    #[arg(long)]
    json: bool,
    /// Fewer turns
    #[arg(long)]
    quick: bool,
    /// Only the cells of this question; may be given several times. The promises of others are not kept then
    #[arg(long, value_enum)]
    part: Vec<Part>,
}

/// The question that is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// What does a request cost?
    Requests,
    /// How does a disk go along with its guest?
    Relocation,
}

/// Turns of each kind, alternating.
const TURNS: usize = 5;
const QUICK_TURNS: usize = 3;
/// What the memory of a guest that moves is full of, in MiB.
const CONTENT_MIB: u64 = 256;
/// The way of the relocation, and the milliseconds in which it carries a cluster of 64 KiB.
const WAY: Link = Link::Gigabit16Ms;
const ROUND_TRIP_MS: f64 = 16.0;
const TRANSFER_MS: f64 = 0.53;
/// What it carries, in 10^6 bytes a second.
const LINK_MB_S: f64 = 125.0;

/// All that was measured.
#[derive(Debug, Default)]
struct Measured {
    requests: Vec<Cell>,
    relocation: Option<Relocation>,
}

pub(super) fn bench(options: &Options) -> Result<ExitCode> {
    let measured = measure(options)?;
    let rows = rows(&measured);
    if options.json {
        for cell in &measured.requests {
            println!("{}", serde_json::to_string(cell)?);
        }
        if let Some(cell) = &measured.relocation {
            println!("{}", serde_json::to_string(cell)?);
        }
        println!("{}", serde_json::json!({ "rows": rows }));
    } else {
        println!("{}\n", machine::describe());
        if !measured.requests.is_empty() {
            println!("{}", request_table(&measured.requests));
        }
        measured.relocation.iter().for_each(|relocation| println!("{}", relocation_table(relocation)));
        print!("{}", promise_table(&rows));
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(options: &Options) -> Result<Measured> {
    let is_chosen = |part| options.part.is_empty() || options.part.contains(&part);
    let turns = if options.quick { QUICK_TURNS } else { TURNS };
    let work = TempDir::with_prefix("godwit-bench-").context("Cannot make a folder for the bench")?;
    clean_up_on_signals(work.path().to_owned())?;
    let mut measured = Measured::default();
    if is_chosen(Part::Requests) {
        eprintln!("requests");
        measured.requests = requests::measure(work.path(), turns)?;
    }
    if is_chosen(Part::Relocation) {
        eprintln!("relocation, {WAY}");
        packages::ensure(&packages::for_migration_bench())?;
        build(&["--package", "vmm", "--bins"])?;
        kvm_works().context("Relocation cannot be measured on this host")?;
        let programs = Programs {
            godwit: binaries()?.join("godwit"),
            kernel: Images::open(&root().join(DEFAULT_CACHE))?.micro()?,
            content: contents()?.file(Content::Random, CONTENT_MIB)?,
        };
        measured.relocation = Some(relocation::measure(&programs, WAY, work.path(), turns)?);
    }
    Ok(measured)
}

fn request_table(cells: &[Cell]) -> String {
    let heads = ["reader", "in flight", "reads/s", "us of CPU each", "reads/s of a core"].map(str::to_owned);
    let number = |number: Option<f64>, decimals| number.map_or_else(|| "-".to_owned(), |it| format!("{it:.decimals$}"));
    let lines = cells.iter().map(|cell| {
        [
            word(&cell.reader),
            cell.depth.to_string(),
            number(Some(cell.reads_per_second.median), 0),
            number(cell.cpu_us.as_ref().map(|cpu| cpu.median), 2),
            number(cell.reads_per_core(), 0),
        ]
    });
    table::aligned(&std::iter::once(heads).chain(lines).collect::<Vec<_>>())
}

fn relocation_table(relocation: &Relocation) -> String {
    let Relocation { link, memory_ms, memory_downtime_ms, before_ms, before_downtime_ms, before_mb_s, .. } = relocation;
    let Relocation { with_disk_ms, rest_ms, rest_mb_s, read_ms, .. } = relocation;
    let title = format!("relocation, {link}");
    let heads = [&title, "median", "least", "most"].map(str::to_owned);
    let line = |what: &str, summary: &Summary| {
        let Summary { median, min, max, values: _ } = summary;
        [what.to_owned(), format!("{median:.1}"), format!("{min:.1}"), format!("{max:.1}")]
    };
    let lines = [
        line("memory alone, ms", memory_ms),
        line("downtime then, ms", memory_downtime_ms),
        line("with the disk before the guest, ms", before_ms),
        line("downtime then, ms", before_downtime_ms),
        line("bytes that went then, MB/s", before_mb_s),
        line("with the disk after it, until the guest runs, ms", with_disk_ms),
        line("from then until all of it is there, ms", rest_ms),
        line("data that came then, MB/s", rest_mb_s),
        line("a read of what is not there, ms", read_ms),
    ];
    table::aligned(&std::iter::once(heads).chain(lines).collect::<Vec<_>>())
}

fn rows(measured: &Measured) -> Vec<Row> {
    let Measured { requests, relocation } = measured;
    let best = requests.iter().filter(|cell| cell.reader == Reader::Uring).filter_map(Cell::reads_per_core);
    let relocation = relocation.as_ref();
    let ratio = relocation.map(|relocation| relocation.with_disk_ms.median / relocation.memory_ms.median);
    vec![
        Row::at_least(
            "device model on the host: 4 KiB reads per second of a core, from page cache",
            Some(500_000.0),
            best.reduce(f64::max),
        ),
        Row::at_least(
            "1 Gbit/s, 16 ms: bytes per second with the disk before the guest, as a share of the link's",
            Some(0.85),
            relocation.map(|relocation| relocation.before_mb_s.median / LINK_MB_S),
        ),
        Row::at_most(
            "1 Gbit/s, 16 ms: until the guest runs, with its disk after it, against memory alone",
            Some(2.0),
            ratio,
        ),
        Row::at_most(
            "1 Gbit/s, 16 ms: the longest read of a cluster that is not there, ms (1.5 round trips and the transfer)",
            Some(1.5 * ROUND_TRIP_MS + TRANSFER_MS),
            relocation.map(|relocation| relocation.read_ms.max),
        ),
    ]
}
