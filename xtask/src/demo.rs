//! `cargo xtask demo`: a working Debian guest moves live to a second Godwit and back stopped, where stock guests run.
//!
//! Prepares everything, decides between this host and the nested lab, and has the binary `scenarios` do the rest there
//! (`godwit_tests::demo`). With `--json`, standard output is what that prints: one object per migration.

use std::io::{Write, stderr, stdout};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use godwit_tests::demo;
use godwit_tests::lab::wire::End;
use godwit_tests::lab::{CONSOLE_LINES, Event, Lab};
use godwit_tests::place::Place;

use crate::packages;
use crate::terminal::RawTerminal;
use crate::test::{choose_place, scenario_images};
use crate::workspace::{binaries, build};

/// Enough for the guest twice: while it moves, both ends hold its memory.
const LAB_MEMORY_MIB: u32 = 1536;

/// When the demonstration is killed at the latest.
const TIMEOUT: Duration = Duration::from_secs(600);

/// How to show it.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Print one JSON object per migration instead of progress bars and a table.
    #[arg(long)]
    json: bool,
}

/// Shows a live and a stopped migration; fails where the guest was not found well after either.
pub(crate) fn demo(options: &Options) -> Result<ExitCode> {
    packages::ensure(&packages::for_test())?;
    build(&["--package", "vmm", "--package", "verifier", "--package", "godwit-tests", "--bins"])?;
    let binaries = binaries()?;
    eprintln!("Preparing the guest image");
    let images = scenario_images(&binaries)?;
    let choice = choose_place(&binaries, &images)?;
    eprintln!("{choice}");
    let well = match choice.place {
        Place::Host => on_host(&binaries, &images, options.json)?,
        Place::Lab => in_lab(&binaries, &images, options.json)?,
    };
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn arguments(godwit: &str, images: &str, place: &str, json: bool) -> Vec<String> {
    let mut words = vec!["demo", "--godwit", godwit, "--images", images, "--place", place];
    if json {
        words.push("--json");
    }
    words.into_iter().map(str::to_owned).collect()
}

fn on_host(binaries: &Path, images: &Path, json: bool) -> Result<bool> {
    let text = |path: &Path| path.to_str().map(str::to_owned).with_context(|| format!("{path:?} is not UTF-8"));
    let mut command = Command::new("setpriv");
    // If this process is killed, the demonstration ends itself and all it started.
    command.args(["--pdeathsig", "TERM"]).arg(binaries.join("scenarios"));
    command.args(arguments(&text(&binaries.join("godwit"))?, &text(images)?, "host", json));
    Ok(command.status().context("Cannot start setpriv")?.success())
}

fn in_lab(binaries: &Path, images: &Path, json: bool) -> Result<bool> {
    let mut builder = Lab::builder().memory_mib(LAB_MEMORY_MIB).lifetime(TIMEOUT + TIMEOUT / 10);
    for program in ["scenarios", "godwit"] {
        builder = builder.file(binaries.join(program), &format!("/lab/{program}"));
    }
    for image in demo::IMAGES {
        builder = builder.file(images.join(image), &format!("/lab/images/{image}"));
    }
    let lab = builder.boot()?;
    eprintln!("The lab runs by {}; it was up after {:.1} s", lab.accelerator(), lab.boot_time().as_secs_f32());
    lab.problems().iter().for_each(|problem| eprintln!("The lab says: {problem}"));
    let well = follow(&lab, json)
        .with_context(|| format!("Last lines of the lab's console:\n{}", lab.console_tail(CONSOLE_LINES)))?;
    lab.power_off()?;
    Ok(well)
}

fn follow(lab: &Lab, json: bool) -> Result<bool> {
    let argv = [vec!["/lab/scenarios".to_owned()], arguments("/lab/godwit", "/lab/images", "lab", json)].concat();
    let mut command = lab.command(&argv).timeout(TIMEOUT);
    if !json && RawTerminal::is_there() {
        // Bars want a terminal.
        command = command.terminal(RawTerminal::size()?).env("TERM", "linux");
    }
    let mut running = command.spawn()?;
    loop {
        match running.event(Duration::from_secs(1))? {
            Some(Event::Stdout(bytes)) => pass_on(stdout().lock(), &bytes)?,
            Some(Event::Stderr(bytes)) => pass_on(stderr().lock(), &bytes)?,
            Some(Event::Ended(End::Exited(status))) => return Ok(status == 0),
            Some(Event::Ended(end)) => bail!("The demonstration in the lab ended like this: {end:?}"),
            None => {}
        }
    }
}

fn pass_on(mut stream: impl Write, bytes: &[u8]) -> Result<()> {
    stream.write_all(bytes)?;
    Ok(stream.flush()?)
}
