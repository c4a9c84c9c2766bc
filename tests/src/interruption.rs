//! What happens when somebody interrupts a program that has started VMMs: nothing of it stays.

use std::fs;
use std::path::PathBuf;
use std::thread;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::scenario::leftovers::kill_descendants;

/// How often everything is ended and removed: other threads may still start and write something.
const TRIES: usize = 20;

/// From now on a signal ends everything below this process, removes the folder `work`, and ends the process with 128 and
/// the signal's number.
pub fn clean_up_on_signals(work: PathBuf) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("Cannot watch signals")?;
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        if let Some(signal) = signals.forever().next() {
            for _ in 0..TRIES {
                kill_descendants();
                // It fails where the main thread removes it, too, or makes something new in it.
                if fs::remove_dir_all(&work).is_ok() || !work.exists() {
                    break;
                }
            }
            std::process::exit(128 + signal);
        }
    })?;
    Ok(())
}
