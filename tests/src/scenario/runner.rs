//! Runs scenarios one after the other, each in a process of its own with a time limit, and tells how each went.
//!
//! Called by the binary `scenarios`, which is also what it starts again for each scenario. That way a scenario that
//! hangs or crashes can be ended with all it started, and the next one begins on a clean machine.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use tempfile::TempDir;

use super::leftovers::{Census, clear, kill_descendants, temporary_folder};
use super::{Context, Scenario};
use crate::tally::Tally;

/// How many of the last lines that a failed scenario wrote to each of its streams are shown.
const SHOWN_LINES: usize = 60;

/// The argument that makes the binary run the body of one scenario.
pub const BODY: &str = "body";

/// What all scenarios of a run share.
#[derive(Debug)]
pub struct Setup<'a> {
    /// The binary to start for each scenario, as `BINARY body NAME GODWIT IMAGES WORK`.
    pub binary: &'a Path,
    /// The `godwit` binary.
    pub godwit: &'a Path,
    /// The folder of guest images.
    pub images: &'a Path,
}

/// Runs the scenarios and prints a line for each and the closing line to `out`.
pub fn run(scenarios: &[&Scenario], setup: &Setup<'_>, out: &mut impl Write) -> Result<Tally> {
    adopt_orphans()?;
    let mut tally = Tally::default();
    for scenario in scenarios {
        let start = Instant::now();
        let result = run_one(scenario, setup);
        let seconds = start.elapsed().as_secs_f64();
        tally.count(result.is_ok());
        match result {
            Ok(()) => writeln!(out, "ok    {:<40} {seconds:6.1} s", scenario.name)?,
            Err(error) => {
                writeln!(out, "FAIL  {:<40} {seconds:6.1} s", scenario.name)?;
                format!("{error:#}").lines().try_for_each(|line| writeln!(out, "      {line}"))?;
            }
        }
        out.flush()?;
    }
    writeln!(out, "{tally}")?;
    out.flush()?;
    Ok(tally)
}

/// Makes every process that loses its parent below this one a child of this one, so that none escapes.
fn adopt_orphans() -> Result<()> {
    let own = rustix::process::getpid();
    rustix::process::set_child_subreaper(Some(own)).context("Cannot adopt orphaned processes")
}

fn run_one(scenario: &Scenario, setup: &Setup<'_>) -> Result<()> {
    let work = TempDir::with_prefix("godwit-scenario-").context("Cannot make a folder for the scenario")?;
    fs::create_dir(temporary_folder(work.path()))?;
    let before = Census::take();
    let (errors, output) = (work.path().join("errors.log"), work.path().join("output.log"));
    let mut child = start(scenario, setup, work.path(), [&errors, &output])?;
    let status = await_end(&mut child, scenario.timeout)?;
    let left = clear(&before, work.path());
    let verdict = match status {
        None => Some(format!("It was killed because its {} s were over", scenario.timeout.as_secs_f32())),
        Some(status) if !status.success() => Some(format!("It failed ({status})")),
        Some(_) if !left.is_empty() => Some("It left something behind".to_owned()),
        Some(_) => None,
    };
    let Some(mut verdict) = verdict else { return Ok(()) };
    for thing in left {
        verdict += &format!("\nleft behind: {thing}");
    }
    bail!("{verdict}\n{}\nBefore that:\n{}", tail(&errors), tail(&output))
}

fn start(scenario: &Scenario, setup: &Setup<'_>, work: &Path, logs: [&Path; 2]) -> Result<Child> {
    let [errors, output] = logs.map(File::create);
    let mut command = Command::new(setup.binary);
    command.arg(BODY).arg(scenario.name).args([setup.godwit, setup.images, work]);
    command.env("TMPDIR", temporary_folder(work)).stdin(Stdio::null());
    command.stdout(output.context("Cannot make the scenario's log")?);
    command.stderr(errors.context("Cannot make the scenario's log")?);
    command.spawn().with_context(|| format!("Cannot start {}", setup.binary.display()))
}

/// The status of the scenario's process, or `None` when its time was up and it was killed with all it started.
fn await_end(child: &mut Child, timeout: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            kill_descendants();
            return Ok(None);
        }
        sleep(Duration::from_millis(10));
    }
}

/// The body of one scenario, in its own process.
pub fn body(list: &[Scenario], name: &str, context: &Context) -> Result<()> {
    ensure!(context.work.is_dir(), "The work folder {} is not there", context.work.display());
    (super::named(list, name)?.run)(context)
}

fn tail(log: &Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n")
}
