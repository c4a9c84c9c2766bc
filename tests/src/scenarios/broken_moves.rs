//! Moves that begin and do not come to their end: cancelled, out of time, with an end that hangs or dies, or with a disk
//! that somebody takes meanwhile. The guest goes on at the source, the target waits for the next one, and the move that is
//! tried again succeeds.

use std::fs::{self, File};
use std::num::NonZeroU32;
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use control::{MigrationMode, MigrationState, Phase, Request, StartMigration};
use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::process::Signal;

use super::migrate::verify_micro;
use crate::console::Console;
use crate::godwit::{Godwit, copying};
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

/// See its `about`.
pub(super) const TAKEN_DISK: Scenario = Scenario {
    name: "taken-disk",
    about: "A disk that somebody takes during a move stops it; the guest does not go on before its disk is free again",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(60),
    run: taken_disk,
};

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
    let arrived = target.console()?;
    godwit.migrate(&target, MigrationMode::Live, SOON)?;
    verify_micro(target, arrived)?;
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
    let order = Request::StartMigration(StartMigration { timeout_s, ..copying(&target, mode) });
    match mode {
        // It hangs before it has answered the offer.
        MigrationMode::Stop => {
            target.signal(Signal::STOP)?;
            godwit.client().call(&order)?;
        }
        // It hangs while memory comes in: the source waits for room in the socket.
        MigrationMode::Live => {
            godwit.client().call(&order)?;
            target.await_phase(Phase::Incoming)?;
            target.signal(Signal::STOP)?;
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
            target.signal(Signal::KILL)?;
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
    target.signal(Signal::CONT)?;
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

/// Somebody waits for the disk's lock and gets it when the source gives it up, before the target can.
fn taken_disk(context: &Context) -> Result<()> {
    let path = context.work.join("disk");
    File::create(&path)?.set_len(1 << 20)?;
    let disk = format!("path={}", path.display());
    let kernel = context.images.join("micro.elf").display().to_string();
    let machine = ["--kernel", &kernel, "--cmdline=ws=16M rate=1000 tick=20", "--memory=64M", "--disk", &disk];
    let godwit = Godwit::run(context, "source", &machine)?;
    let mut console = godwit.console()?;
    console.expect("tick", SOON)?;
    let target = Godwit::receive(context, "target", &[])?;
    let thief = File::options().write(true).open(&path)?;
    let waits = thread::spawn(move || fcntl_lock(&thief, FlockOperation::LockExclusive).map(|()| thief));
    godwit.start_migration(&target, MigrationMode::Stop)?;
    let thief = waits.join().ok().context("Who waits for the lock panicked")??;
    godwit.await_phase(Phase::Paused)?;
    let status = godwit.migration()?.context("The source has no account of the migration")?;
    let why = status.error.unwrap_or_default();
    println!("{why}");
    let in_use = format!("{} is locked by another writer", path.display());
    ensure!(status.state == MigrationState::Failed && why.contains("The guest is still here, but"), "{why:?}");
    ensure!(why.contains(&in_use), "The disk is not named: {why:?}");
    let refused = godwit.client().call(&Request::Resume).err().context("It was resumed without its disk")?;
    ensure!(refused.to_string().contains(&in_use), "The refusal does not name the disk: {refused}");
    console.pending();
    drop(thief);
    godwit.client().call(&Request::Resume)?;
    console.expect("tick", SOON)?;
    let mut arrived = target.console()?;
    godwit.migrate(&target, MigrationMode::Live, SOON)?;
    arrived.expect("tick", SOON)?;
    target.end()
}

/// A target whose source dies in the middle goes back to waiting, and takes another guest.
fn source_dies(context: &Context, machine: &[&str]) -> Result<()> {
    let target = Godwit::receive(context, "patient", &[])?;
    let dies = Godwit::run(context, "dies", machine)?;
    dies.await_phase(Phase::Running)?;
    dies.start_migration(&target, MigrationMode::Live)?;
    target.await_phase(Phase::Incoming)?;
    target.signal(Signal::STOP)?;
    let folder = dies.folder().to_owned();
    dies.kill()?;
    fs::remove_dir_all(folder)?;
    target.signal(Signal::CONT)?;
    target.await_phase(Phase::Receiving)?;
    let lives = Godwit::run(context, "lives", machine)?;
    lives.await_phase(Phase::Running)?;
    lives.migrate(&target, MigrationMode::Stop, SOON)?;
    target.end()
}
