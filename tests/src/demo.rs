//! The demonstration: a Debian kernel with a workload moves live to a second Godwit, and back stopped.
//!
//! Run by the binary `scenarios` where stock guests run, which is this host or a lab; `xtask demo` decides and starts
//! it. What it does is what a user does by hand: `godwit run`, `godwit receive`, `godwit migrate`. A migration counts
//! as verified when the verifier in the guest reports afterwards that memory, disk, clock and kernel log are in order.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use control::{After, EventStream, Happening, MigrationMode};
use serde::Serialize;
use tempfile::TempDir;
use verifier::report::{Line, Report};

use crate::console::Console;
use crate::godwit::Godwit;
use crate::interruption::clean_up_on_signals;
use crate::place::Place;
use crate::scenario::Context;
use crate::silence;
use crate::traveller::host_tsc_parameter;

/// Names of the images in the folder of images.
const KERNEL: &str = "vmlinux";
const INITRAMFS: &str = "initramfs";
/// All that the demonstration takes from there.
pub const IMAGES: [&str; 2] = [KERNEL, INITRAMFS];

const MEMORY: &str = "256M";
const DISK_BYTES: u64 = 32 << 20;

/// How long the guest may take to boot and to begin its work. In a lab every instruction is emulated.
const BOOT_WITHIN: Duration = Duration::from_secs(120);
/// How long a migration may take.
const MOVE_WITHIN: Duration = Duration::from_secs(120);
/// How long the verifier may take to look at everything.
const REPORT_WITHIN: Duration = Duration::from_secs(60);
/// How long the guest works between boot, migrations and end, so that there is something to lose.
const WORK: Duration = Duration::from_secs(2);

/// How often a report is asked for: a kernel message may land in the middle of one.
const ASKED: usize = 3;

/// Whom to tell, and how.
#[derive(Debug, Clone, Copy)]
pub struct Telling {
    /// Where this runs.
    pub place: Place,
    /// One JSON object per migration on standard output instead of bars and a table.
    pub json: bool,
}

/// One migration as `--json` prints it.
#[derive(Debug, Clone, Serialize)]
pub struct Moved {
    mode: MigrationMode,
    verified: bool,
    rounds: usize,
    bytes: u64,
    total_ms: f64,
    downtime_ms: f64,
    guest_downtime_ms: f64,
    #[serde(rename = "where")]
    place: Place,
}

/// Runs the demonstration; whether everything was verified. Nothing is left behind, also when a signal ends it.
pub fn run(godwit: &Path, images: &Path, telling: Telling) -> Result<bool> {
    let folder = TempDir::with_prefix("godwit-demo-").context("Cannot make a folder for the demonstration")?;
    let work = folder.path().to_owned();
    clean_up_on_signals(work.clone())?;
    let context = Context { godwit: godwit.to_owned(), images: images.to_owned(), work };
    let mut stage = Stage::open(&context, telling)?;
    let moved = [stage.migrate("second", MigrationMode::Live)?, stage.migrate("first-again", MigrationMode::Stop)?];
    stage.close()?;
    if !telling.json {
        print!("\n{}", table(&moved));
    }
    Ok(moved.iter().all(|moved| moved.verified))
}

/// Boots the guest once and powers it off: whether stock guests run here.
pub fn trial(context: &Context) -> Result<()> {
    let arguments =
        guest_arguments(&context.images, "console=ttyS0 quiet panic=1 godwit.run=true godwit.poweroff", None);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    Godwit::run(context, "trial", &arguments)?.finish(BOOT_WITHIN)?.expect(0, "powered off")
}

fn guest_arguments(images: &Path, command_line: &str, disk: Option<&Path>) -> Vec<String> {
    let image = |name: &str| images.join(name).display().to_string();
    let mut arguments = ["--name", "demo", "--memory", MEMORY, "--cmdline", command_line].map(str::to_owned).to_vec();
    arguments.extend(["--kernel".to_owned(), image(KERNEL), "--initramfs".to_owned(), image(INITRAMFS)]);
    arguments.extend(disk.into_iter().flat_map(|disk| ["--disk".to_owned(), format!("path={}", disk.display())]));
    arguments
}

/// The guest's kernel command line: what it works on while it moves.
fn workload(place: Place) -> String {
    // A tick is the measure of the downtime that the guest sees; an emulated machine is too slow for many.
    let tick = match place {
        Place::Host => 2,
        Place::Lab => 10,
    };
    let tsc = host_tsc_parameter();
    format!(
        "console=ttyS0 quiet panic=1 {tsc} godwit.poweroff godwit.run=\"until [ -e /dev/vda ]; do usleep 20000; done; \
         exec verifier --memory 16M --rate 2000 --disk /dev/vda --disk-size 16M --clock-ms 2 --tick-ms {tick}\""
    )
}

/// The guest, where it lives now, and its console there.
#[derive(Debug)]
struct Stage<'a> {
    context: &'a Context,
    telling: Telling,
    home: Option<(Godwit, Console)>,
}

impl<'a> Stage<'a> {
    /// Boots the guest and waits until it works.
    fn open(context: &'a Context, telling: Telling) -> Result<Self> {
        let disk = context.work.join("disk.img");
        File::create(&disk).and_then(|file| file.set_len(DISK_BYTES)).context("Cannot make the guest's disk")?;
        say(&format!("Booting a Debian kernel with {MEMORY} of memory and a disk of {} MiB", DISK_BYTES >> 20));
        let begun = Instant::now();
        let arguments = guest_arguments(&context.images, &workload(telling.place), Some(&disk));
        let godwit = Godwit::run(context, "first", &arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
        let mut console = godwit.console()?;
        console.find("the verifier's first line", BOOT_WITHIN, |line| {
            matches!(Line::parse(&line.text), Some(Line::Ready { .. })).then_some(())
        })?;
        say(&format!("It works after {:.1} s: writes memory and disk, watches its clock", seconds(begun)));
        Ok(Self { context, telling, home: Some((godwit, console)) })
    }

    /// Moves the guest to a new Godwit and has it verified there.
    fn migrate(&mut self, name: &str, mode: MigrationMode) -> Result<Moved> {
        thread::sleep(WORK);
        let (source, mut console) = self.home.take().context("The guest is somewhere")?;
        let target = Godwit::receive(self.context, name, &[])?;
        let mut arrival = target.console()?;
        say(match mode {
            MigrationMode::Live => "Moving it live to a second Godwit",
            MigrationMode::Stop => "Moving it back, stopped",
        });
        let account = Account::keep(&source)?;
        call_migrate(self.context, &source, &target, mode, self.telling)?;
        let account = account.join().map_err(|_| anyhow!("The thread that keeps account has panicked"))??;
        source.finish(MOVE_WITHIN)?.expect(0, "The guest has moved to")?;
        let guest_downtime = silence::between(&mut console, &mut arrival)?;
        let report = ask_for_report(&mut arrival)?;
        if !report.ok {
            say(&format!("The verifier complains: {}", serde_json::to_string(&report)?));
        }
        self.home = Some((target, arrival));
        let moved = Moved {
            mode,
            verified: report.ok,
            rounds: account.rounds,
            bytes: account.bytes,
            total_ms: milliseconds(account.total),
            downtime_ms: milliseconds(account.downtime),
            guest_downtime_ms: milliseconds(guest_downtime),
            place: self.telling.place,
        };
        if self.telling.json {
            let mut out = std::io::stdout().lock();
            writeln!(out, "{}", serde_json::to_string(&moved)?)?;
            out.flush()?;
        }
        Ok(moved)
    }

    /// Ends the work; the guest powers itself off then.
    fn close(&mut self) -> Result<()> {
        let (godwit, mut console) = self.home.take().context("The guest is somewhere")?;
        console.say("quit")?;
        godwit.finish(REPORT_WITHIN)?.expect(0, "powered off")?;
        say("The guest has powered off");
        Ok(())
    }
}

/// Tells people. Standard output is for results.
fn say(what: &str) {
    eprintln!("{what}");
}

/// What the source tells of a migration: it sees both its beginning and its end.
#[derive(Debug)]
struct Account {
    rounds: usize,
    bytes: u64,
    total: Duration,
    downtime: Duration,
}

impl Account {
    /// Listens to the events of the source until a migration has ended.
    fn keep(source: &Godwit) -> Result<JoinHandle<Result<Self>>> {
        let events = source.client().events(After::Now)?;
        Ok(thread::Builder::new().name("account".to_owned()).spawn(move || Self::of(events))?)
    }

    fn of(events: EventStream) -> Result<Self> {
        for event in events {
            if let Happening::MigrationEnded { migration } = event?.what {
                let downtime = migration.downtime_ms;
                let downtime = downtime.with_context(|| format!("The guest has not moved: {:?}", migration.error))?;
                return Ok(Self {
                    rounds: migration.rounds.len(),
                    bytes: migration.progress.bytes_sent,
                    total: migration.total_ms.into(),
                    downtime: downtime.into(),
                });
            }
        }
        bail!("The source ended before it told the end of the migration")
    }
}

/// Calls `godwit migrate`, whose bars are the person's to see.
fn call_migrate(
    context: &Context,
    source: &Godwit,
    target: &Godwit,
    mode: MigrationMode,
    telling: Telling,
) -> Result<()> {
    let word = match mode {
        MigrationMode::Live => "live",
        MigrationMode::Stop => "stop",
    };
    let mut command = Command::new(&context.godwit);
    // Both ends are on one host, and this is to show what a move between two is like.
    command.args(["migrate", "--memory", "copy", "--mode", word, "--to", &target.address().to_string()]);
    command.arg("--timeout").arg(MOVE_WITHIN.as_secs().to_string());
    command.arg("--api").arg(source.folder().join("api.sock")).stdin(Stdio::null());
    if telling.json {
        command.arg("--json").stdout(Stdio::null());
    }
    let status = command.status().context("Cannot start godwit migrate")?;
    if !status.success() {
        let (source, target) = (source.words(), target.words());
        bail!("godwit migrate failed ({status}). The source said:\n{source}The target said:\n{target}");
    }
    Ok(())
}

fn ask_for_report(console: &mut Console) -> Result<Report> {
    for _ in 0..ASKED {
        console.say("report")?;
        let answer = console.find("the verifier's report", REPORT_WITHIN, |line| match Line::parse(&line.text) {
            Some(Line::Report(report)) => Some(Some(*report)),
            None if line.text.contains("\"report\"") => Some(None),
            _ => None,
        })?;
        if let Some(report) = answer {
            return Ok(report);
        }
    }
    bail!("{ASKED} reports of the verifier cannot be read");
}

fn table(moved: &[Moved]) -> String {
    let heads = ["mode", "rounds", "bytes", "total time", "downtime", "as the guest saw it", "verified"];
    let rows = moved.iter().map(|moved| {
        let Moved { mode, verified, rounds, bytes, total_ms, downtime_ms, guest_downtime_ms, place: _ } = moved;
        [
            match mode {
                MigrationMode::Live => "live",
                MigrationMode::Stop => "stop",
            }
            .to_owned(),
            rounds.to_string(),
            format!("{} KiB", bytes.div_ceil(1024)),
            format!("{total_ms:.1} ms"),
            format!("{downtime_ms:.1} ms"),
            format!("{guest_downtime_ms:.1} ms"),
            if *verified { "yes" } else { "NO" }.to_owned(),
        ]
    });
    let rows: Vec<_> = std::iter::once(heads.map(str::to_owned)).chain(rows).collect();
    crate::table::aligned(&rows)
}

fn milliseconds(duration: Duration) -> f64 {
    // Three decimals: microseconds are all that is measured.
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

fn seconds(since: Instant) -> f32 {
    since.elapsed().as_secs_f32()
}

/// Refuses a folder without the images, by name.
pub fn check_images(images: &Path) -> Result<()> {
    for name in IMAGES {
        ensure!(images.join(name).is_file(), "There is no {name} in {}", images.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_migration_is_one_object_with_the_promised_names() {
        let moved = Moved {
            mode: MigrationMode::Live,
            verified: true,
            rounds: 3,
            bytes: 4096,
            total_ms: 1.5,
            downtime_ms: 0.25,
            guest_downtime_ms: 2.0,
            place: Place::Lab,
        };
        let text = serde_json::to_string(&moved).unwrap();
        assert_eq!(
            text,
            "{\"mode\":\"live\",\"verified\":true,\"rounds\":3,\"bytes\":4096,\"total_ms\":1.5,\"downtime_ms\":0.25,\
             \"guest_downtime_ms\":2.0,\"where\":\"lab\"}"
        );
        let table = table(&[moved]);
        assert!(table.contains("live") && table.contains("4 KiB") && table.contains("yes"), "{table}");
    }

    #[test]
    fn missing_images_are_named() {
        let folder = tempfile::tempdir().unwrap();
        assert!(check_images(folder.path()).unwrap_err().to_string().contains(KERNEL));
    }
}
