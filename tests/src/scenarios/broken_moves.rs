//! Moves that begin and do not come to their end: cancelled, out of time, or with an end that hangs or dies. The guest
//! goes on at the source, the target waits for the next one, and the move that is tried again succeeds.

use std::fs;
use std::num::NonZeroU32;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use control::{MigrationMode, MigrationState, Phase, Request, StartMigration};
use guest_images::micro::Line;
use rustix::process::{Pid, Signal, kill_process};

use crate::console::Console;
use crate::godwit::Godwit;
use crate::scenario::{Context, Needs, Scenario};

/// See its `about`.
pub(super) const BROKEN: Scenario = Scenario {
    name: "broken-moves",
    about: "Moves that are cancelled, run out of time, or lose an end leave the guest at the source and the target waiting",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(120),
    run: broken_moves,
};

const SOON: Duration = Duration::from_secs(20);

/// What ends a move to a target that hangs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    Cancel,
    Timeout,
    TargetDies,
}

fn broken_moves(context: &Context) -> Result<()> {
    let kernel = context.images.join("micro.elf").display().to_string();
    let machine = ["--kernel", &kernel, "--cmdline=ws=384M rate=20000 tick=20 pattern=check", "--memory=512M"];
    let godwit = Godwit::run(context, "source", &machine)?;
    let mut console = godwit.console()?;
    for trouble in [Trouble::Cancel, Trouble::Timeout, Trouble::TargetDies] {
        for mode in [MigrationMode::Live, MigrationMode::Stop] {
            break_a_move(context, &godwit, &mut console, trouble, mode)
                .with_context(|| format!("{trouble:?}, {mode:?}. The source says:\n{}", godwit.words()))?;
        }
    }
    let target = Godwit::receive(context, "target", &[])?;
    let mut arrived = target.console()?;
    godwit.migrate(&target, MigrationMode::Live, SOON)?;
    arrived.say("q")?;
    let last = arrived.find("the guest's last word", SOON, |line| {
        let word = Line::parse(&line.text);
        matches!(word, Line::End { .. } | Line::Bad(_)).then_some(word)
    })?;
    ensure!(matches!(last, Line::End { bad: 0, .. }), "The guest says {last:?}");
    target.finish(SOON)?.expect(0, "The guest powered off")?;
    source_dies(context, &machine)
}

fn break_a_move(
    context: &Context,
    godwit: &Godwit,
    console: &mut Console,
    trouble: Trouble,
    mode: MigrationMode,
) -> Result<()> {
    let target = Godwit::receive(context, &format!("{trouble:?}-{mode:?}"), &[])?;
    let timeout_s = (trouble == Trouble::Timeout).then_some(NonZeroU32::MIN);
    let order = Request::StartMigration(StartMigration { mode, timeout_s, ..StartMigration::new(target.address()) });
    match mode {
        // It hangs before it has answered the offer.
        MigrationMode::Stop => {
            signal(&target, Signal::STOP)?;
            godwit.client().call(&order)?;
        }
        // It hangs while memory comes in: the source waits for room in the socket.
        MigrationMode::Live => {
            godwit.client().call(&order)?;
            target.await_phase(Phase::Incoming)?;
            signal(&target, Signal::STOP)?;
        }
    }
    godwit.await_phase(Phase::Migrating)?;
    let state = match trouble {
        Trouble::Cancel => {
            godwit.client().call(&Request::CancelMigration)?;
            MigrationState::Cancelled
        }
        Trouble::Timeout => MigrationState::Failed,
        Trouble::TargetDies => {
            signal(&target, Signal::KILL)?;
            MigrationState::Failed
        }
    };
    godwit.await_phase(Phase::Running)?;
    let status = godwit.migration()?.context("The source has no account of the migration")?;
    ensure!(status.state == state && status.error.is_some(), "The account is {status:?}");
    console.pending();
    console.expect("tick", SOON)?;
    if trouble == Trouble::TargetDies {
        // Who is killed leaves its sockets behind.
        let folder = target.folder().to_owned();
        target.finish(SOON)?;
        return Ok(fs::remove_dir_all(folder)?);
    }
    signal(&target, Signal::CONT)?;
    dismiss(target)
}

/// Ends a target that waits again. One that hung has yet to read what came meanwhile, and is not to be killed over it.
fn dismiss(target: Godwit) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while let Err(refused) = target.client().call(&Request::Kill) {
        ensure!(Instant::now() < deadline, "The target does not wait again: {refused}");
        sleep(Duration::from_millis(5));
    }
    target.finish(SOON)?.expect(0, "ended by request")
}

/// A target whose source dies in the middle goes back to waiting, and takes another guest.
fn source_dies(context: &Context, machine: &[&str]) -> Result<()> {
    let target = Godwit::receive(context, "patient", &[])?;
    let dies = Godwit::run(context, "dies", machine)?;
    dies.await_phase(Phase::Running)?;
    dies.start_migration(&target, MigrationMode::Live)?;
    target.await_phase(Phase::Incoming)?;
    signal(&target, Signal::STOP)?;
    let folder = dies.folder().to_owned();
    dies.kill()?;
    fs::remove_dir_all(folder)?;
    signal(&target, Signal::CONT)?;
    target.await_phase(Phase::Receiving)?;
    let lives = Godwit::run(context, "lives", machine)?;
    lives.await_phase(Phase::Running)?;
    lives.migrate(&target, MigrationMode::Stop, SOON)?;
    target.client().call(&Request::Kill)?;
    target.finish(SOON)?.expect(0, "ended by request")
}

fn signal(godwit: &Godwit, signal: Signal) -> Result<()> {
    let pid = i32::try_from(godwit.pid()).ok().and_then(Pid::from_raw).context("A process has a number")?;
    kill_process(pid, signal).context("Cannot signal godwit")
}
