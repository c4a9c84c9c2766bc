//! A guest that works while it is moved from one Godwit to the next, and tells from inside whether anything was lost.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use control::{MigrationMode, MigrationStatus, Request, StartMigration};
use verifier::clock::ClockReport;
use verifier::report::{Line as Word, Report};

use crate::console::Console;
use crate::godwit::{Godwit, copying};
use crate::scenario::Context;

/// How long a guest in an emulated lab may take to boot.
const BOOT_WITHIN: Duration = Duration::from_secs(90);

/// How long one move may take.
const MOVE_WITHIN: Duration = Duration::from_secs(60);

/// How long the verifier may take to look at everything.
const REPORT_WITHIN: Duration = Duration::from_secs(120);

/// How long an emulated vCPU may not run though nobody moves the guest.
const STALL: Duration = Duration::from_secs(5);

/// What one move was like.
#[derive(Debug)]
pub struct Move {
    /// The target's account.
    pub status: MigrationStatus,
    /// From the last tick that was heard at the source to the first at the target.
    pub guest_downtime: Duration,
}

/// A guest of the `tiny` image that runs the verifier.
#[derive(Debug)]
pub struct Traveller {
    godwit: Godwit,
    console: Console,
    stop: u32,
    longest_downtime: Duration,
}

impl Traveller {
    /// Boots the guest with options of its own for `godwit run`, for its kernel and for the verifier, and waits until it
    /// works.
    pub fn set_out(context: &Context, options: &[&str], parameters: &str, verifier: &str) -> Result<Self> {
        let kernel = context.images.join("vmlinux").display().to_string();
        let initramfs = context.images.join("initramfs").display().to_string();
        let tsc = host_tsc_parameter();
        let words = format!("console=ttyS0 quiet panic=1 {tsc} {parameters} godwit.run=\"verifier {verifier}\"");
        let machine = ["--kernel", &kernel, "--initramfs", &initramfs, "--cmdline", &words];
        let godwit = Godwit::run(context, "stop0", &[&machine, options].concat())?;
        let mut console = godwit.console()?;
        console.find("the verifier's first word", BOOT_WITHIN, |line| {
            matches!(Word::parse(&line.text), Some(Word::Ready { .. } | Word::Tick { .. })).then_some(())
        })?;
        Ok(Self { godwit, console, stop: 0, longest_downtime: Duration::ZERO })
    }

    /// The process that it is in now.
    pub fn godwit(&self) -> &Godwit {
        &self.godwit
    }

    /// What is known of it, for the error of somebody who has lost touch with it.
    pub fn account(&mut self) -> String {
        let heard = self.console.pending().len();
        let (vm, words, console) = (self.godwit.vm(), self.godwit.words(), self.console.tail());
        format!("{vm:?}\nGodwit says:\n{words}The guest's console, of which {heard} lines were new:\n{console}")
    }

    /// Moves it, with its memory copied, to a new Godwit that is started with `options`.
    pub fn travel(&mut self, context: &Context, mode: MigrationMode, options: &[&str]) -> Result<Move> {
        self.travel_by(context, |target| copying(target, mode), options)
    }

    /// Moves it by any order to a new Godwit that is started with `options`.
    pub fn travel_by(
        &mut self,
        context: &Context,
        order: impl FnOnce(&Godwit) -> StartMigration,
        options: &[&str],
    ) -> Result<Move> {
        self.stop += 1;
        let target = Godwit::receive(context, &format!("stop{}", self.stop), options)?;
        let mut console = target.console()?;
        self.godwit.client().call(&Request::StartMigration(order(&target)))?;
        let first = await_tick(&mut console, MOVE_WITHIN).with_context(|| {
            format!("The source says:\n{}The target says:\n{}", self.godwit.words(), target.words())
        })?;
        let last = self.console.pending().iter().rfind(|line| is_tick(&line.text)).map(|line| line.at);
        self.console = console;
        let source = std::mem::replace(&mut self.godwit, target);
        source.finish(MOVE_WITHIN)?.expect(0, "The guest has moved to")?;
        let status = self.godwit.arrival()?;
        let guest_downtime = last.map_or(Duration::ZERO, |last| first.saturating_duration_since(last));
        self.longest_downtime = self.longest_downtime.max(guest_downtime);
        Ok(Move { status, guest_downtime })
    }

    /// Asks the verifier; an answer that a kernel message fell into is asked for again.
    pub fn report(&mut self) -> Result<Report> {
        for _ in 0..3 {
            self.console.say("report")?;
            let answer =
                self.console.find("the verifier's report", REPORT_WITHIN, |line| match Word::parse(&line.text) {
                    Some(Word::Report(report)) => Some(Some(*report)),
                    None if line.text.contains("\"type\":\"report\"") => Some(None),
                    _ => None,
                })?;
            if let Some(report) = answer {
                return Ok(report);
            }
        }
        anyhow::bail!("The verifier's report cannot be read")
    }

    /// Checks that nothing was lost so far.
    pub fn prove(&mut self) -> Result<Report> {
        let examined = self.examine();
        examined.with_context(|| self.account())
    }

    fn examine(&mut self) -> Result<Report> {
        let report = self.report()?;
        ensure!(report.ok, "The guest is not well: {}", serde_json::to_string(&report)?);
        self.check_clock(&report.clock)?;
        Ok(report)
    }

    /// A clock that leaps over a move shows a gap longer than anybody outside saw, and one that is set a gain.
    fn check_clock(&self, clock: &ClockReport) -> Result<()> {
        let most = (self.longest_downtime + STALL).as_secs_f64() * 1e3;
        let leaps = [clock.max_gap_ms, clock.boottime_gain_ms, clock.realtime_gain_ms];
        let sound = leaps.iter().all(|leap| leap.abs() <= most);
        ensure!(sound, "A clock of the guest leapt by more than {most} ms: {clock:?}");
        Ok(())
    }

    /// Ends the guest.
    pub fn arrive(self) -> Result<()> {
        self.godwit.end()
    }
}

/// Tells the guest's kernel what its host's kernel knows of the TSC. Where that has found it unsteady, as in an emulated
/// lab, KVM brings a guest's TSC forward as it sees fit, and the guest would find that out after a move.
pub fn host_tsc_parameter() -> &'static str {
    let sources = std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/available_clocksource");
    if sources.is_ok_and(|sources| sources.split_whitespace().any(|source| source == "tsc")) {
        ""
    } else {
        "tsc=unstable"
    }
}

fn is_tick(text: &str) -> bool {
    matches!(Word::parse(text), Some(Word::Tick { .. }))
}

fn await_tick(console: &mut Console, within: Duration) -> Result<Instant> {
    console.find("a tick", within, |line| is_tick(&line.text).then_some(line.at))
}
