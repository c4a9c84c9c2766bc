//! Runs end-to-end scenarios where it is executed: on a host, or inside a lab that it was shipped into.
//!
//! Exit status 0 when all passed, 1 when one failed, 2 when it was called wrongly.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use godwit_tests::bench::boot::{self, Contestants};
use godwit_tests::bench::migrate::real_guest;
use godwit_tests::demo;
use godwit_tests::place::Place;
use godwit_tests::scenario::runner::{self, Setup};
use godwit_tests::scenario::{Context, named, select};
use godwit_tests::scenarios::ALL;

#[derive(Debug, Parser)]
#[command(name = "scenarios", about = "Runs end-to-end scenarios here")]
struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Lists the scenarios and what each checks.
    List,
    /// Runs scenarios and prints one line for each.
    Run {
        /// The godwit binary.
        #[arg(long, env = "GODWIT")]
        godwit: PathBuf,
        /// The folder of guest images.
        #[arg(long, env = "GODWIT_IMAGES")]
        images: PathBuf,
        /// Take the names as whole names; each must exist.
        #[arg(long)]
        exact: bool,
        /// Parts of the names of the scenarios to run; all of them without any.
        names: Vec<String>,
    },
    /// Moves a working guest live and back stopped, and shows what that was like.
    Demo {
        /// The godwit binary.
        #[arg(long, env = "GODWIT")]
        godwit: PathBuf,
        /// The folder of guest images.
        #[arg(long, env = "GODWIT_IMAGES")]
        images: PathBuf,
        /// Where this is.
        #[arg(long, default_value = "host")]
        place: Place,
        /// Print one JSON object per migration.
        #[arg(long)]
        json: bool,
    },
    /// Measures how long Godwit and QEMU take to the init of a Linux guest here, and prints JSON.
    BenchLinux {
        /// The godwit binary.
        #[arg(long, env = "GODWIT")]
        godwit: PathBuf,
        /// The folder of guest images.
        #[arg(long, env = "GODWIT_IMAGES")]
        images: PathBuf,
        /// QEMU.
        #[arg(long)]
        qemu: PathBuf,
        /// How often each of them boots.
        #[arg(long)]
        runs: usize,
    },
    /// Has contenders move a Debian under load between two hosts made here, and prints JSON.
    BenchRealGuest {
        /// The godwit binary.
        #[arg(long, env = "GODWIT")]
        godwit: PathBuf,
        /// The folder of guest images, beside that of the disks.
        #[arg(long, env = "GODWIT_IMAGES")]
        images: PathBuf,
        /// The guest, the link and the contenders as JSON.
        #[arg(long)]
        heat: String,
    },
    /// Runs the body of one scenario in this process, without limit or cleaning up.
    #[command(hide = true, name = runner::BODY)]
    Body { name: String, godwit: PathBuf, images: PathBuf, work: PathBuf },
}

fn main() -> ExitCode {
    match act(Arguments::parse().action) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(action: Action) -> Result<bool> {
    match action {
        Action::List => {
            for scenario in ALL {
                println!("{:<40} {}", scenario.name, scenario.about);
            }
            Ok(true)
        }
        Action::Run { godwit, images, exact, names } => {
            let chosen = if exact {
                names.iter().map(|name| named(ALL, name)).collect::<Result<Vec<_>>>()?
            } else {
                select(ALL, &names)
            };
            let binary = std::env::current_exe().context("Cannot find the own binary")?;
            let setup = Setup { binary: &binary, godwit: &godwit, images: &images };
            let tally = runner::run(&chosen, &setup, &mut std::io::stdout().lock())?;
            Ok(tally.failed == 0)
        }
        Action::Demo { godwit, images, place, json } => {
            demo::check_images(&images)?;
            demo::run(&godwit, &images, demo::Telling { place, json })
        }
        Action::BenchLinux { godwit, images, qemu, runs } => {
            let work = tempfile::tempdir().context("Cannot make a folder")?;
            let contestants = Contestants { godwit, qemu, work: work.path().to_owned() };
            for series in boot::linux(&contestants, &images, runs)? {
                println!("{}", serde_json::to_string(&series)?);
            }
            Ok(true)
        }
        Action::BenchRealGuest { godwit, images, heat } => {
            let work = tempfile::tempdir().context("Cannot make a folder")?;
            let heat = serde_json::from_str(&heat).context("That is no heat")?;
            let told = real_guest::run(&Context { godwit, images, work: work.path().to_owned() }, &heat)?;
            println!("{}", serde_json::to_string(&told)?);
            Ok(true)
        }
        Action::Body { name, godwit, images, work } => {
            runner::body(ALL, &name, &Context { godwit, images, work })?;
            Ok(true)
        }
    }
}
