//! Live migrations of the micro guest from one Godwit to another on this host, and how long the guest's ticks paused.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use control::MigrationMode;
use guest_images::micro::Line;

use super::{Figure, Series, Vmm};
use crate::godwit::Godwit;
use crate::scenario::Context;
use crate::silence;

/// How long one step may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long the guest ticks before and after a migration.
const TICKING: Duration = Duration::from_millis(300);

/// What is moved.
#[derive(Debug, Clone, Copy)]
pub struct Load<'a> {
    /// The micro guest.
    pub kernel: &'a Path,
    /// What its memory holds beside the working set.
    pub content: &'a Path,
    /// Size of the content, for people.
    pub content_mib: u64,
}

/// Moves a fresh guest so many times: the downtime that its ticks show, and the whole time.
pub fn live(context: &Context, load: Load<'_>, runs: usize) -> Result<Vec<Series>> {
    let (mut downtimes, mut totals) = (Vec::new(), Vec::new());
    for run in 0..runs {
        let (downtime, total) = move_once(context, load, run)?;
        downtimes.push(downtime.as_secs_f64() * 1e3);
        totals.push(total.as_secs_f64() * 1e3);
    }
    let guest = format!("micro, 1 GiB with {} MiB of content, 64 MiB working set", load.content_mib);
    let series = [(Figure::DowntimeMs, downtimes), (Figure::MigrationMs, totals)];
    Ok(series.into_iter().filter_map(|(figure, values)| Series::new(figure, &guest, Vmm::Godwit, values)).collect())
}

fn move_once(context: &Context, load: Load<'_>, run: usize) -> Result<(Duration, Duration)> {
    let [kernel, content] = [load.kernel, load.content].map(|path| path.display().to_string());
    let words = "ws=64M tick=1";
    let options = ["--kernel", &kernel, "--initramfs", &content, "--memory", "1G", "--cmdline", words];
    let source = Godwit::run(context, &format!("source-{run}"), &options)?;
    let mut departure = source.console()?;
    departure.find("the guest's first tick", PATIENCE, |line| tick(&line.text))?;
    let target = Godwit::receive(context, &format!("target-{run}"), &[])?;
    let mut arrival = target.console()?;
    std::thread::sleep(TICKING);
    let account = source.migrate(&target, MigrationMode::Live, PATIENCE)?;
    let downtime = silence::between(&mut departure, &mut arrival)?;
    target.end()?;
    Ok((downtime, account.total_ms.into()))
}

fn tick(line: &str) -> Option<()> {
    matches!(Line::parse(line), Line::Tick { .. }).then_some(())
}
