//! Moves between two processes of this host that pass the guest's memory itself.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use control::{
    MemoryPolicy, MemoryTransfer, MigrationMode, MigrationState, MigrationStatus, MigrationStep, Request,
    StartMigration,
};
use rustix::process::Signal;

use super::migrate::verify_micro;
use crate::godwit::{Godwit, call};
use crate::scenario::{Context, Needs, Scenario};
use crate::traveller::Traveller;

/// See its `about`.
pub(super) const MICRO: Scenario = Scenario {
    name: "pass-micro",
    about: "The micro guest's memory is passed from process to process 20 times, with two regions, too; nothing of it is sent, no page is wrong",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(120),
    run: micro,
};

/// See its `about`.
pub(super) const BROKEN: Scenario = Scenario {
    name: "pass-broken",
    about: "A target that dies while it has a guest's memory leaves guest and memory to the source; over TCP none is passed",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(60),
    run: broken,
};

/// See its `about`.
pub(super) const LINUX: Scenario = Scenario {
    name: "pass-linux",
    about: "Linux with 2 vCPUs, disk and balloon is passed there and back 5 times; nothing is lost",
    needs: Needs::LinuxGuests,
    timeout: Duration::from_secs(300),
    run: linux,
};

const SOON: Duration = Duration::from_secs(20);

/// The most that goes over the link: the description and the state, of whatever guest.
const STATE_BYTES: u64 = 1 << 20;

fn passing(to: &Godwit, mode: MigrationMode) -> StartMigration {
    StartMigration { mode, memory: MemoryPolicy::Pass, ..StartMigration::new(to.address()) }
}

/// Checks that both memory and its absence from the link are told.
fn was_passed(status: &MigrationStatus) -> Result<()> {
    let passed = status.memory == Some(MemoryTransfer::Passed) && status.rounds.is_empty();
    ensure!(passed && status.progress.bytes_sent < STATE_BYTES, "The memory was not passed: {status:?}");
    let steps: Vec<_> = status.steps.iter().map(|step| step.step).collect();
    use MigrationStep::{HandOver, Negotiating, Pausing, Restoring};
    ensure!(steps == [Negotiating, Pausing, Restoring, HandOver], "{steps:?}");
    Ok(())
}

fn micro(context: &Context) -> Result<()> {
    let kernel = context.images.join("micro.elf").display().to_string();
    for (name, memory, words, moves) in [
        ("small", "--memory=128M", "ws=32M rate=20000 tick=20 pattern=check", 20),
        ("large", "--memory=5G", "ws=16M rate=5000 tick=20", 2),
    ] {
        let mut godwit = Godwit::run(context, name, &["--kernel", &kernel, "--cmdline", words, memory])?;
        let mut console = godwit.console()?;
        for stop in 1..=moves {
            console.expect("tick", SOON)?;
            let tracker = if stop % 2 == 0 { "--dirty=log" } else { "--dirty=ring" };
            let target = Godwit::receive(context, &format!("{name}-{stop}"), &[tracker])?;
            let next = target.console()?;
            let mode = [MigrationMode::Live, MigrationMode::Stop][stop % 2];
            let order = passing(&target, mode);
            let order = match stop % 3 {
                0 => StartMigration { verify: true, ..order },
                1 => StartMigration { memory: MemoryPolicy::Auto, ..order },
                _ => order,
            };
            let status = godwit.migrate_as(order, &target, SOON)?;
            println!("move {stop}: {} bytes, downtime {:?}", status.progress.bytes_sent, status.downtime_ms);
            was_passed(&status)?;
            (godwit, console) = (target, next);
        }
        // Memory that was passed is copied as any other.
        let target = Godwit::receive(context, &format!("{name}-last"), &[])?;
        let next = target.console()?;
        let status = godwit.migrate(&target, MigrationMode::Live, SOON)?;
        ensure!(status.memory == Some(MemoryTransfer::Copied) && !status.rounds.is_empty(), "{status:?}");
        console = next;
        console.expect("tick", SOON)?;
        verify_micro(target, console)?;
    }
    Ok(())
}

fn broken(context: &Context) -> Result<()> {
    let kernel = context.images.join("micro.elf").display().to_string();
    let machine =
        ["--kernel", &kernel, "--cmdline=ws=384M rate=20000 tick=20 pattern=check fill=check", "--memory=512M"];
    let godwit = Godwit::run(context, "source", &machine)?;
    let mut console = godwit.console()?;
    console.expect("tick", SOON)?;
    over_tcp(context, &godwit)?;
    for mode in [MigrationMode::Live, MigrationMode::Stop] {
        let target = Godwit::receive(context, &format!("dies-{mode:?}"), &[])?;
        let folder = target.folder().to_owned();
        // The digests of all memory give time: the guest stands still, and the target has its state.
        let order = StartMigration { verify: true, ..passing(&target, mode) };
        godwit.client().call(&Request::StartMigration(order))?;
        await_step(&godwit, MigrationStep::Restoring)?;
        target.signal(Signal::KILL)?;
        target.finish(SOON)?;
        // Who is killed leaves its sockets behind.
        fs::remove_dir_all(folder)?;
        let status = godwit.await_stay()?;
        ensure!(status.state == MigrationState::Failed && status.error.is_some(), "The account is {status:?}");
        console.pending();
        console.expect("tick", SOON)?;
    }
    let target = Godwit::receive(context, "target", &[])?;
    let arrived = target.console()?;
    was_passed(&godwit.migrate_as(passing(&target, MigrationMode::Live), &target, SOON)?)?;
    verify_micro(target, arrived)
}

fn await_step(godwit: &Godwit, step: MigrationStep) -> Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let status = godwit.migration()?.context("The source has no account of the migration")?;
        if status.progress.step == step {
            return Ok(());
        }
        let waits = status.state == MigrationState::Active && Instant::now() < deadline;
        ensure!(waits, "The migration did not come to {step:?}: {status:?}");
        sleep(Duration::from_millis(1));
    }
}

/// Over TCP memory is not passed: a wish is refused at once, and without one it is copied.
fn over_tcp(context: &Context, godwit: &Godwit) -> Result<()> {
    let api = godwit.folder().join("api.sock").display().to_string();
    let (ended, _) = call(context, &["migrate", "--memory=pass", "--api", &api, "--to=tcp://127.0.0.1:1"])?;
    println!("{}", ended.words.trim_end());
    ended
        .expect(1, "memory is passed over a Unix socket between two processes of one host, not to tcp://127.0.0.1:1")?;
    ensure!(godwit.migration()?.is_none(), "A migration was started");
    Ok(())
}

fn linux(context: &Context) -> Result<()> {
    let disk = context.work.join("disk.img");
    fs::File::create(&disk)?.set_len(32 << 20)?;
    let disk = format!("path={}", disk.display());
    let machine = ["--memory=160M", "--disk", &disk, "--vcpus=2", "--balloon=on,free-page-reporting"];
    let verifier = "--memory 8M --rate 500 --threads 2 --disk /dev/vda --disk-size 8M --tick-ms 50";
    let mut traveller = Traveller::set_out(context, &machine, "", verifier)?;
    for _ in 0..10 {
        let moved = traveller.travel_by(context, |target| passing(target, MigrationMode::Live), &[])?;
        println!("downtime {:?}, as the guest saw it {:?}", moved.status.downtime_ms, moved.guest_downtime);
        was_passed(&moved.status)?;
        traveller.prove()?;
    }
    traveller.arrive()
}
