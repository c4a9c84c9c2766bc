//! The one entry for people and CI: `cargo xtask demo`, `test`, `check`, `fuzz`, `bench`, `image`, `lab`.
//!
//! Progress goes to standard error, results to standard output. Exit status 0 when all is well, 1 when something failed,
//! 2 when it was called wrongly; `lab` ends with the status of its command.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

mod bench;
mod check;
mod demo;
mod fuzz;
mod image;
mod lab;
mod packages;
mod terminal;
mod test;
mod workspace;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Builds, checks and tries out Godwit")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Boots a Debian guest with a workload, moves it live to a second Godwit and back stopped, and shows how it went.
    Demo(demo::Options),
    /// Measures what the project promises, beside QEMU.
    Bench(bench::Options),
    /// Makes a guest image, for `godwit` by hand.
    Image(image::Options),
    /// Checks the sources without running them: format, lints, documentation, dependencies, spelling.
    Check,
    /// Runs every test, and every scenario where it can run: on this host or in the nested lab.
    Test(test::Options),
    /// Feeds the parsers of what a peer sends with generated input, and fails when one crashes.
    Fuzz(fuzz::Options),
    /// Boots a nested lab with KVM and runs a command or a shell in it.
    Lab(lab::Options),
}

fn main() -> ExitCode {
    show_recipes();
    let done = match Arguments::parse().task {
        Task::Demo(options) => demo::demo(&options),
        Task::Bench(options) => bench::bench(&options),
        Task::Image(options) => image::image(&options),
        Task::Check => check::check(),
        Task::Test(options) => test::test(&options),
        Task::Fuzz(options) => fuzz::fuzz(&options),
        Task::Lab(options) => lab::lab(options),
    };
    done.unwrap_or_else(|error| {
        eprintln!("{error:#}");
        ExitCode::FAILURE
    })
}

/// Shows what the recipes of guest images log: their steps, which may take minutes, and what they had to do without.
fn show_recipes() {
    let lines = tracing_subscriber::fmt().without_time().with_target(false).with_writer(std::io::stderr);
    lines.finish().with(Targets::new().with_target("guest_images", LevelFilter::INFO)).init();
}
