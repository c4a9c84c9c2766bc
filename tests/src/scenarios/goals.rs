//! Goals of a migration: a guest that dirties its memory faster than the cap lets it go is throttled, let stay, or stopped
//! in time; goals that contradict each other are refused.

use std::num::{NonZeroU32, NonZeroU64};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use control::{MemoryPolicy, MigrationState, MigrationStatus, OnStall, Phase, RoundInfo, StartMigration, SwitchReason};

use super::migrate::verify_micro;
use crate::godwit::{Ended, Godwit, call};
use crate::scenario::{Context, Needs, Scenario};

/// See its `about`.
pub(super) const THROTTLED: Scenario = Scenario {
    name: "goals-throttled",
    about: "A guest that dirties four times what the cap lets go is throttled until it meets its downtime",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(180),
    run: throttled,
};

/// See its `about`.
pub(super) const OUT_OF_REACH: Scenario = Scenario {
    name: "goals-out-of-reach",
    about: "A guest whose downtime goal is out of reach stays where that is wished, and is stopped as a deadline nears",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(120),
    run: out_of_reach,
};

/// See its `about`.
pub(super) const CONTRADICTORY: Scenario = Scenario {
    name: "goals-contradictory",
    about: "Caps of nothing and goals that contradict each other are refused with the arithmetic before anything is sent",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(60),
    run: contradictory,
};

const SOON: Duration = Duration::from_secs(20);
/// Ticks after which a guest is at its pace.
const WARM_TICKS: usize = 75;
/// Longer than any of these moves takes, on a busy host too.
const MOVED_WITHIN: Duration = Duration::from_secs(90);
/// What a round at the cap may have to spare: the cap holds within 5 %.
const CAP_SLACK: f64 = 1.05;
const WORKING_SET_PAGES: u64 = 4096;

/// A quarter of what the guest writes.
const CAP: NonZeroU64 = NonZeroU64::new(20 << 20).expect("20 MiB are not 0");
const FAST: &str = "rate=20000";

/// A guest that writes to 16 MiB.
fn start(context: &Context, name: &str, words: &str, more: &[&str]) -> Result<Godwit> {
    let kernel = context.images.join("micro.elf").display().to_string();
    let words = format!("--cmdline=ws=16M tick=20 pattern=check {words}");
    let machine = ["--kernel", &kernel, &words, "--memory=64M"];
    let godwit = Godwit::run(context, name, &[&machine, more].concat())?;
    // A tick every 20 ms: by then it has been through its working set, also on a machine that does other things.
    let mut console = godwit.console()?;
    (0..WARM_TICKS).try_for_each(|_| console.expect("tick", SOON).map(drop))?;
    Ok(godwit)
}

fn order(to: &Godwit, on_stall: OnStall) -> Result<StartMigration> {
    let max_downtime_ms = NonZeroU32::new(300).context("300 is not 0")?;
    let bandwidth_bytes_per_second = Some(CAP);
    let memory = MemoryPolicy::Copy;
    let usual = StartMigration::new(to.address());
    // What the guest writes packs so well that it would not be too fast.
    let codec = "zero".parse()?;
    Ok(StartMigration { memory, codec, max_downtime_ms, on_stall, bandwidth_bytes_per_second, ..usual })
}

fn tell(status: &MigrationStatus) {
    let MigrationStatus { total_ms, downtime_ms, predicted_total_ms, switched, guest_cost, rounds, .. } = status;
    let predicted = status.progress.predicted_downtime_ms;
    println!("{switched:?} after {} rounds, {total_ms}, predicted {predicted_total_ms:?}", rounds.len());
    println!("  downtime {downtime_ms:?}, predicted {predicted:?}; {guest_cost:?}");
    for RoundInfo { round, bytes, duration_ms, dirty_pages, .. } in rounds {
        println!("  round {round}: {bytes} bytes in {duration_ms}, {dirty_pages} pages dirty at its end");
    }
}

/// No round was faster than the cap.
fn kept_to_the_cap(status: &MigrationStatus) -> Result<()> {
    for RoundInfo { round, bytes, duration_ms, .. } in &status.rounds {
        // A burst of a twentieth of a second may be in any of them.
        let seconds = Duration::from(*duration_ms).as_secs_f64() + 0.05;
        ensure!(*bytes as f64 <= CAP.get() as f64 * seconds * CAP_SLACK, "Round {round} sent {bytes} in {duration_ms}");
    }
    Ok(())
}

fn throttled(context: &Context) -> Result<()> {
    let source = start(context, "source", FAST, &["--vcpus=2"])?;
    let target = Godwit::receive(context, "target", &[])?;
    let arrived = target.console()?;
    let status = source.migrate_as(order(&target, OnStall::Throttle)?, &target, MOVED_WITHIN)?;
    tell(&status);
    kept_to_the_cap(&status)?;
    ensure!(status.switched == Some(SwitchReason::GoalMet), "The goal is not met: {status:?}");
    let cost = status.guest_cost.context("The guest's cost is not told")?;
    ensure!(cost.most_percent >= 20 && cost.throttled_percent > 0, "It was not throttled: {cost:?}");
    ensure!(cost.throttled_percent <= cost.most_percent, "More was taken than was to be: {cost:?}");
    let last = status.rounds.iter().rev().nth(1).context("There are rounds")?;
    ensure!(last.dirty_pages < WORKING_SET_PAGES / 2, "It is as fast as before: {status:?}");
    verify_micro(target, arrived)
}

fn out_of_reach(context: &Context) -> Result<()> {
    let source = start(context, "source", FAST, &[])?;
    let target = Godwit::receive(context, "target", &[])?;
    source.client().call(&control::Request::StartMigration(order(&target, OnStall::Cancel)?))?;
    let failed = ended(&source)?;
    let words = failed.error.clone().unwrap_or_default();
    println!("{words}");
    ensure!(failed.state == MigrationState::Failed && source.vm()?.phase == Phase::Running, "{failed:?}");
    let parts = [
        "downtime goal of 300 ms cannot be reached",
        "more do not bring it nearer",
        "the link takes",
        "throttled or stopped",
    ];
    ensure!(parts.iter().all(|part| words.contains(part)), "{words}");
    source.console()?.expect("tick", SOON)?;
    target.await_phase(Phase::Receiving)?;

    let arrived = target.console()?;
    // Throttling would take longer.
    let deadline_ms = NonZeroU32::new(3000);
    let hurried = StartMigration { deadline_ms, ..order(&target, OnStall::Throttle)? };
    let status = source.migrate_as(hurried, &target, MOVED_WITHIN)?;
    tell(&status);
    kept_to_the_cap(&status)?;
    ensure!(status.switched == Some(SwitchReason::Deadline), "{status:?}");
    verify_micro(target, arrived)
}

/// Waits for the end of the migration of a guest that stays.
fn ended(source: &Godwit) -> Result<MigrationStatus> {
    for event in source.client().events(control::After::Sequence(0))? {
        if let control::Happening::MigrationEnded { migration } = event?.what {
            return Ok(*migration);
        }
    }
    anyhow::bail!("The migration has no end")
}

fn contradictory(context: &Context) -> Result<()> {
    let source = start(context, "source", "rate=1000 fill=check", &[])?;
    let api = format!("--api={}", source.folder().join("api.sock").display());
    // Nobody listens at this port, which is for services of old.
    let to = "--to=tcp://127.0.0.1:1".to_owned();
    let refused = |options: &[&str], status: i32, parts: &[&str]| -> Result<()> {
        let (ended, _): (Ended, _) = call(context, &[&["migrate", &api, &to], options].concat())?;
        println!("{options:?}: {}", ended.words.trim_end());
        parts.iter().try_for_each(|part| ended.expect(status, part))
    };
    refused(&["--bandwidth=0"], 2, &["\"0\" lets nothing go; leave the option out for no limit"])?;
    refused(&["--bandwidth=fast"], 2, &["fast", "write for example"])?;
    refused(&["--deadline=0s"], 2, &["0s"])?;
    refused(&["--deadline=soon"], 2, &["soon", "write for example 1s or 250ms"])?;
    refused(&["--on-stall=wait"], 2, &["wait", "cancel, throttle, stop"])?;
    let parts = ["A timeout of 5 s gives the migration up before its deadline of 6 s"];
    refused(&["--timeout=5", "--deadline=6s"], 1, &parts)?;
    let short = ["--deadline=2s", "--bandwidth=2M"];
    let parts =
        ["A deadline of 2 s at a bandwidth of 2.0 MiB/s carries 4.0 MiB at most", "without codecs all of it must go"];
    refused(&[&short[..], &["--codec=none"]].concat(), 1, &parts)?;
    let parts = ["carries 4.0 MiB at most", "must go at the least, by a sample"];
    refused(&[&short[..], &["--codec=zero"]].concat(), 1, &parts)?;
    ensure!(source.migration()?.is_none() && source.vm()?.phase == Phase::Running, "Something was begun");
    // Two words in each page: what codecs make of them fits.
    refused(&[&short[..], &["--codec=rle"]].concat(), 1, &["127.0.0.1:1"])?;
    source.end()
}
