//! `cargo xtask bench boot`: how long guests take to start, what a process weighs, and the downtime of live migrations.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use godwit_tests::bench::boot::{self, Contestants};
use godwit_tests::bench::downtime::{self, Load};
use godwit_tests::bench::migrate::cell::Content;
use godwit_tests::bench::{Figure, Series, Vmm};
use godwit_tests::lab::Lab;
use godwit_tests::place::kvm_works;
use godwit_tests::{demo, scenario, table};
use tempfile::TempDir;

use super::{QEMU, Row, contents, promise_table, word};
use crate::packages;
use crate::test::scenario_images;
use crate::workspace::{binaries, build};

/// QEMU's firmware, at the same paths in the lab.
const FIRMWARE: [&str; 2] = ["/usr/share/qemu", "/usr/share/seabios"];

const LAB_MEMORY_MIB: u32 = 1536;
/// Longest time of one boot in the lab.
const LAB_BOOT: Duration = Duration::from_secs(90);

/// What the 1 GiB guest holds, so that not all of its pages are zero.
const CONTENT_MIB: u64 = 512;

/// How to measure it.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// Print one JSON object per series, and the rows of the promises last.
    #[arg(long)]
    json: bool,
    /// Fewer runs.
    #[arg(long)]
    quick: bool,
}

/// Measures and prints.
pub(super) fn bench(options: &Options) -> Result<ExitCode> {
    let series = measure(options.quick)?;
    let rows = rows(&series);
    if options.json {
        for series in &series {
            println!("{}", serde_json::to_string(series)?);
        }
        println!("{}", serde_json::json!({ "rows": rows }));
    } else {
        print!("{}", report(&series, &rows));
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(quick: bool) -> Result<Vec<Series>> {
    packages::ensure(&packages::for_test())?;
    build(&["--package", "vmm", "--package", "verifier", "--package", "godwit-tests", "--bins"])?;
    let binaries = binaries()?;
    let images = scenario_images(&binaries)?;
    let work = TempDir::with_prefix("godwit-bench-").context("Cannot make a folder for the benches")?;
    let (godwit, kernel) = (binaries.join("godwit"), images.join("micro.elf"));
    let runs = |many, few| if quick { few } else { many };
    let mut series = Vec::new();
    if let Err(error) = kvm_works() {
        eprintln!("Nothing is measured on this host: {error:#}");
    } else {
        eprintln!("Booting the micro guest on this host's KVM");
        let contestants = Contestants { godwit: godwit.clone(), qemu: QEMU.into(), work: work.path().to_owned() };
        series.extend(boot::micro(&contestants, &kernel, runs(31, 7))?);
        eprintln!("Moving the micro guest on this host's KVM");
        let content = contents()?.file(Content::Tar, CONTENT_MIB)?;
        let load = Load { kernel: &kernel, content: &content, content_mib: CONTENT_MIB };
        let context = scenario::Context { godwit, images: images.clone(), work: work.path().to_owned() };
        series.extend(downtime::live(&context, load, runs(9, 3))?);
    }
    eprintln!("Booting a Linux guest in the lab");
    series.extend(linux_in_lab(&binaries, &images, runs(5, 1))?);
    Ok(series)
}

fn linux_in_lab(binaries: &Path, images: &Path, runs: usize) -> Result<Vec<Series>> {
    // One more that does not count, of both VMMs.
    let limit = LAB_BOOT * u32::try_from(2 * (runs + 1)).context("So many runs never end")?;
    let mut builder = Lab::builder().memory_mib(LAB_MEMORY_MIB).lifetime(limit + LAB_BOOT).program(QEMU);
    for program in ["scenarios", "godwit"] {
        builder = builder.file(binaries.join(program), &format!("/lab/{program}"));
    }
    for image in demo::IMAGES {
        builder = builder.file(images.join(image), &format!("/lab/images/{image}"));
    }
    let lab = FIRMWARE.into_iter().fold(builder, |builder, folder| builder.file(folder, folder)).boot()?;
    let number = runs.to_string();
    let argv = [
        "/lab/scenarios",
        "bench-linux",
        "--godwit",
        "/lab/godwit",
        "--images",
        "/lab/images",
        "--qemu",
        QEMU,
        "--runs",
        &number,
    ];
    let output = lab.command(&argv).timeout(limit).run()?.checked()?;
    let accelerator = lab.accelerator();
    lab.power_off()?;
    output
        .text()
        .lines()
        .map(|line| {
            let mut series: Series = serde_json::from_str(line).with_context(|| format!("{line:?} is no series"))?;
            series.machine = format!("nested lab by {accelerator}: {}", series.machine);
            Ok(series)
        })
        .collect()
}

/// The project's promises beside what was measured.
fn rows(series: &[Series]) -> Vec<Row> {
    let find = |figure, vmm| series.iter().find(|series| series.figure == figure && series.vmm == vmm);
    let median = |figure, vmm| find(figure, vmm).map(|series| series.median);
    let row = Row::at_most;
    vec![
        row(
            "micro guest, 128 MiB, host KVM: exec to the first byte, ms, median",
            Some(4.0),
            median(Figure::FirstByteMs, Vmm::Godwit),
        ),
        row(
            "micro guest, 128 MiB, host KVM: resident without guest memory, MiB, median",
            Some(4.5),
            median(Figure::ResidentMib, Vmm::Godwit),
        ),
        row(
            "Linux guest in the lab: exec to init, ms, median; the goal is QEMU's",
            median(Figure::InitMs, Vmm::Qemu),
            median(Figure::InitMs, Vmm::Godwit),
        ),
        row(
            "live migration of a 1 GiB micro guest, host KVM: downtime as the guest saw it, ms, longest",
            Some(50.0),
            find(Figure::DowntimeMs, Vmm::Godwit).map(|series| series.max),
        ),
    ]
}

fn report(series: &[Series], rows: &[Row]) -> String {
    let mut text = String::new();
    let mut machines: Vec<&str> = series.iter().map(|series| series.machine.as_str()).collect();
    machines.dedup();
    for machine in machines {
        text += &format!("On {machine}:\n");
        let heads = ["figure", "VMM", "n", "median", "min", "max", "guest"].map(str::to_owned);
        let lines = series.iter().filter(|series| series.machine == machine).map(|series| {
            let Series { figure, guest, vmm, machine: _, n, median, min, max, values: _ } = series;
            let number = |number: &f64| format!("{number:.2}");
            [word(figure), word(vmm), n.to_string(), number(median), number(min), number(max), guest.clone()]
        });
        text += &table::aligned(&std::iter::once(heads).chain(lines).collect::<Vec<_>>());
        text += "\n";
    }
    text + &promise_table(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_without_figure_is_not_kept() {
        let series = |figure, vmm, value| Series::new(figure, "guest", vmm, vec![value]).unwrap();
        let measured = [
            series(Figure::InitMs, Vmm::Godwit, 2000.0),
            series(Figure::InitMs, Vmm::Qemu, 2100.0),
            series(Figure::FirstByteMs, Vmm::Godwit, 4.1),
        ];
        let rows = rows(&measured);
        assert_eq!(rows.iter().map(|row| row.ok).collect::<Vec<_>>(), [false, false, true, false]);
        let text = report(&measured, &rows);
        assert!(text.contains("first-byte-ms") && text.contains("2100.00"), "{text}");
    }
}
