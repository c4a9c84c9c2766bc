//! `run` and `receive`: the commands in whose process a guest lives.

use crate::UsageError;
use crate::args::{Host, Receive, Run};
use anyhow::Context;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vmm::seccomp::{self, ThreadKind};
use vmm::service::{Ended, Quitter, Service, Settings};

/// Boots a guest and stays until it ends or has moved away.
pub(crate) fn run(run: &Run) -> anyhow::Result<u8> {
    let uuid = run.uuid.map_or_else(control::random_uuid, Ok)?;
    let config = run.machine(uuid).map_err(UsageError)?;
    let service = Service::boot(config, settings(&run.host), quit_on_signals)?;
    Ok(say(&service.run()?))
}

/// Waits for a guest and stays until it ends or has moved away.
pub(crate) fn receive(receive: &Receive) -> anyhow::Result<u8> {
    let resources = receive.resources().map_err(UsageError)?;
    let settings = settings(&receive.host);
    let service = Service::receive(&receive.listen, resources, receive.once, settings, quit_on_signals)?;
    if let Some(address) = service.listens_at() {
        eprintln!("godwit: waiting for a guest at {address}");
    }
    Ok(say(&service.run()?))
}

fn settings(host: &Host) -> Settings {
    let Host { api, state_dir, test_requests, host_name: _, seccomp } = host;
    Settings {
        api: api.clone(),
        state_dir: state_dir.clone(),
        test_requests: *test_requests,
        seccomp: (*seccomp).into(),
    }
}

/// Ends the guest in good order when the process is asked to end.
fn quit_on_signals(quitter: Quitter) {
    let watch = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("Cannot watch signals").and_then(|mut signals| {
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                seccomp::enter(ThreadKind::Signals);
                if signals.forever().next().is_some() {
                    quitter.quit("ended by a signal");
                }
            })
            .context("Cannot start the thread that watches signals")
    });
    if let Err(error) = watch {
        tracing::warn!("{error:#}; a signal will end this process at once");
    }
}

/// Tells how it ended; the exit status.
fn say(ended: &Ended) -> u8 {
    match ended {
        Ended::Guest(end) => {
            eprintln!("godwit: {end}");
            end.exit_status()
        }
        Ended::MovedAway(to) => {
            eprintln!("godwit: The guest has moved to {to}");
            0
        }
        Ended::Quit(why) => {
            eprintln!("godwit: The guest was {why}");
            0
        }
        Ended::Lost(why) => {
            eprintln!("godwit: {why}");
            1
        }
    }
}
