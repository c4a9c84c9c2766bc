//! `godwit`: the command line. Reads options, hands the work to `vmm` or to a running Godwit's control socket, and turns
//! what comes back into a sentence and an exit status.
//!
//! Exit statuses: 0 done, 1 an error, 2 wrong usage, and for `run` and `receive` those of [`vmm::vcpu::GuestEnd`].

#[expect(rustdoc::broken_intra_doc_links, reason = "help texts have what may be left out in brackets")]
mod args;
mod client;
mod disk;
mod guest;
mod show;
mod values;
mod watch;

use args::{Command, CommandLine};
use clap::{CommandFactory, Parser};
use std::process::ExitCode;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use vmm::service::ServiceError;

/// Exit status for wrong usage, the same as clap's.
const USAGE: u8 = 2;

/// A mistake in what the user wrote, as opposed to a thing that failed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct UsageError(String);

fn main() -> ExitCode {
    let CommandLine { log, command } = CommandLine::parse();
    if let Err(error) = start_log(&log) {
        return fail(&error);
    }
    match dispatch(command) {
        Ok(status) => ExitCode::from(status),
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("godwit: {error:#}");
    ExitCode::from(if is_usage(error) { USAGE } else { 1 })
}

/// Whether what the user wrote is at fault: an option, or the machine that the options describe.
fn is_usage(error: &anyhow::Error) -> bool {
    error.is::<UsageError>() || matches!(error.downcast_ref(), Some(ServiceError::Config(_)))
}

fn start_log(filter: &str) -> anyhow::Result<()> {
    let filter: Targets =
        filter.parse().map_err(|error| UsageError(format!("--log {filter:?} is not a filter: {error}")))?;
    // The filter alone decides.
    let lines = tracing_subscriber::fmt().with_max_level(LevelFilter::TRACE).with_writer(std::io::stderr);
    lines.finish().with(filter).init();
    Ok(())
}

fn dispatch(command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Run(run) => guest::run(&run),
        Command::Receive(receive) => guest::receive(&receive),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut CommandLine::command(), "godwit", &mut std::io::stdout());
            Ok(0)
        }
        Command::Migrate(migrate) => watch::migrate(&migrate),
        Command::Watch(watch) => watch::watch(&watch),
        Command::Stop(stop) => watch::stop(&stop),
        Command::Cancel(client) => client::cancel(&client),
        Command::Resolve(resolve) => client::resolve(&resolve),
        Command::Status(status) => client::status(&status),
        Command::Pause(client) => client::pause(&client),
        Command::Resume(client) => client::resume(&client),
        Command::Kill(client) => client::kill(&client),
        Command::Reset(client) => client::reset(&client),
        Command::PowerButton(client) => client::power_button(&client),
        Command::Balloon(balloon) => client::balloon(&balloon),
        Command::Disks(status) => client::disks(&status),
        Command::ResizeDisk(resize) => client::resize_disk(&resize),
        Command::Disk(command) => disk::run(&command),
        Command::Nics(status) => client::nics(&status),
        Command::DirtyRate(dirty_rate) => watch::dirty_rate(&dirty_rate),
        Command::Metrics(client) => client::metrics(&client),
        Command::Pulse(pulse) => client::pulse(&pulse),
    }
}
