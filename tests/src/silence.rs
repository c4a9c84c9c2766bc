//! How long a guest was silent while it moved: its downtime as somebody sees it who listens to its ticks.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::console::Console;

/// How long the other end may take to say something, and the source's console to be closed.
const PATIENCE: Duration = Duration::from_secs(60);

/// From the end of the last line at the source to the end of the first one at the target, by the time of their arrival
/// here. Up to one tick's period too long, never too short. The source's process must have ended or be about to.
pub fn between(source: &mut Console, target: &mut Console) -> Result<Duration> {
    let mut last: Option<Instant> = None;
    // Reads to the end, which is an error to whoever waits for a line.
    let _ = source.find("the end", PATIENCE, |line| {
        last = Some(line.at);
        None::<()>
    });
    let last = last.context("The guest was silent at the source")?;
    // A line that began at the source ends at the target: a sign of life like any other.
    let first = target.find("a line at the target", PATIENCE, |line| Some(line.at))?;
    Ok(first.saturating_duration_since(last))
}
