//! Measurements of the dirty rate: the micro guest writes at a known rate, with known content.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use control::{DirtyRate, MeasureDirtyRate, MeasurementState, MeasurementStatus, MigrationMode, Phase, Reply, Request};

use super::api::Curl;
use super::migrate::verify_micro;
use crate::godwit::{Godwit, call};
use crate::scenario::{Context, Needs, Scenario};

/// See its `about`.
pub(super) const KNOWN: Scenario = Scenario {
    name: "dirty-rate-known",
    about: "Dirty rate, working set and content of a guest that writes at a known rate are measured, with each dirty tracker",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(120),
    run: known,
};

/// See its `about`.
pub(super) const ENDED: Scenario = Scenario {
    name: "dirty-rate-ended",
    about: "A measurement is ended by a pause, a reset, a migration and the guest's end, and none of them by it",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(60),
    run: ended,
};

const SOON: Duration = Duration::from_secs(20);
/// Pages that the guest writes each second, one word in each.
const RATE: u64 = 1000;
/// Pages of 16 MiB, which the guest walks through again and again.
const WORKING_SET: u64 = 4096;
/// Its variables and its stack, which it writes all the time.
const OWN_PAGES: u64 = 16;

fn start(context: &Context, name: &str, words: &str, more: &[&str]) -> Result<Godwit> {
    let kernel = context.images.join("micro.elf").display().to_string();
    let words = format!("--cmdline=ws=16M rate={RATE} tick=10 {words}");
    let godwit = Godwit::run(context, name, &[&["--kernel", &kernel, &words, "--memory=64M"], more].concat())?;
    godwit.console()?.expect("tick", SOON)?;
    Ok(godwit)
}

fn known(context: &Context) -> Result<()> {
    for (tracker, content) in [("log", "fill=zero"), ("ring", "fill=random")] {
        println!("--dirty={tracker} {content}");
        let dirty = format!("--dirty={tracker}");
        let godwit = start(context, tracker, content, &[&dirty])?;
        let api = godwit.folder().join("api.sock").display().to_string();
        let (told, json) = call(context, &["dirty-rate", "--json", "--period=2s", "--api", &api])?;
        told.expect(0, "")?;
        print!("{json}");
        let found: DirtyRate = serde_json::from_str(&json)?;
        rate(&found)?;
        ensure!(found.vcpu_pages_per_second.is_some() == (tracker == "ring"), "{found:?}");
        ensure!(found.vcpu_pages_per_second.iter().flatten().sum::<u64>() <= found.pages_per_second, "{found:?}");
        memory(&found, content)?;
        let (told, people) = call(context, &["dirty-rate", "--period=100ms", "--api", &api])?;
        told.expect(0, "")?;
        print!("{people}");
        for part in ["dirtied  ", "working set  ", "  grew  ", "sample  ", " by Zstandard", "cost  "] {
            ensure!(people.contains(part), "{part:?} is missing:\n{people}");
        }
        ensure!(people.contains("by vCPU") == (tracker == "ring"), "{people}");
        let console = godwit.console()?;
        verify_micro(godwit, console)?;
    }
    Ok(())
}

/// On a busy machine the guest writes more slowly, but for a moment never faster.
fn rate(found: &DirtyRate) -> Result<()> {
    let DirtyRate { duration_ms, pages_per_second, bytes_per_second, working_set_pages, cost, .. } = found;
    ensure!(Duration::from(*duration_ms) >= Duration::from_secs(2), "{found:?}");
    // Its own pages count in each tenth, which are five in a second.
    ensure!((RATE / 5..=RATE * 2 + 5 * OWN_PAGES).contains(pages_per_second), "{found:?}");
    ensure!(*bytes_per_second == pages_per_second * 4096, "{found:?}");
    ensure!(working_set_pages.len() == 10 && working_set_pages.is_sorted(), "{found:?}");
    let (first, last) = (working_set_pages[0], working_set_pages[9]);
    ensure!((RATE / 5..=WORKING_SET + OWN_PAGES).contains(&last) && first * 2 < last, "{found:?}");
    ensure!(cost.protected_pages >= last && cost.longest_log_ms <= cost.log_ms, "{found:?}");
    ensure!(Duration::from(cost.cpu_ms) > Duration::ZERO, "{found:?}");
    Ok(())
}

/// The guest's working set is nearly all that the host has backed.
fn memory(found: &DirtyRate, content: &str) -> Result<()> {
    let sample = found.sample;
    let (data, bytes) = (sample.data_pages(), sample.data_pages() * 4096);
    ensure!((3000..=4096).contains(&sample.pages) && data > 0, "{found:?}");
    if content == "fill=random" {
        // Each of its pages is one of 1024, which overlap.
        ensure!(sample.zero_pages < sample.pages / 10 && sample.duplicate_pages > data / 10, "{found:?}");
        ensure!(sample.lz4_bytes > bytes / 50, "{found:?}");
    } else {
        // Two words in a page that was written, and no two pages the same.
        ensure!(sample.zero_pages > sample.pages / 10 && sample.duplicate_pages < data / 10, "{found:?}");
        ensure!(sample.lz4_bytes < bytes / 50 && sample.zstd_bytes < bytes / 50, "{found:?}");
    }
    Ok(())
}

fn ended(context: &Context) -> Result<()> {
    let godwit = start(context, "guest", "", &[])?;
    let mut curl = Curl::at(&godwit);
    ensure!(measurement(&godwit)?.is_none(), "There is a measurement");
    for wrong in ["0", "99", "60001"] {
        let body = format!(r#"{{"period_ms":{wrong}}}"#);
        let refusal = curl.expect("POST", "/v1/dirty-rate", Some(&body), 400)?;
        ensure!(refusal.contains("is not from 100 to 60000"), "{refusal}");
    }
    begin(&godwit)?;
    let busy = curl.expect("POST", "/v1/dirty-rate", None, 503)?;
    ensure!(busy.contains("measurements of the dirty rate"), "{busy}");
    curl.expect("POST", "/v1/vm/pause", None, 204)?;
    has_failed(&godwit, "The guest was paused")?;
    let refusal = curl.expect("POST", "/v1/dirty-rate", None, 409)?;
    ensure!(refusal.contains("writes nothing; resume it first"), "{refusal}");
    curl.expect("POST", "/v1/vm/resume", None, 204)?;
    begin(&godwit)?;
    curl.expect("POST", "/v1/vm/reset", None, 204)?;
    has_failed(&godwit, "The guest was reset")?;
    begin(&godwit)?;
    curl.expect("POST", "/v1/pulse", Some(r#"{"times":1}"#), 200)?;
    has_failed(&godwit, "The machine was pulsed")?;

    // Its command learns of the end too, and the guest is none the worse for it.
    let target = Godwit::receive(context, "target", &[])?;
    let console = target.console()?;
    let api = godwit.folder().join("api.sock").display().to_string();
    std::thread::scope(|scope| -> Result<()> {
        let command = scope.spawn(|| call(context, &["dirty-rate", "--period=60s", "--api", &api]));
        await_active(&godwit)?;
        godwit.migrate(&target, MigrationMode::Live, SOON)?;
        let (told, _) = command.join().ok().context("The command panicked")??;
        told.expect(1, "Nothing was measured: A migration was started")
    })?;
    begin(&target)?;
    verify_micro(target, console)
}

/// Starts a measurement that is longer than the test.
fn begin(godwit: &Godwit) -> Result<()> {
    godwit.client().call(&Request::MeasureDirtyRate(MeasureDirtyRate { period_ms: 60_000 }))?;
    let state = measurement(godwit)?.map(|measurement| measurement.state);
    ensure!(state == Some(MeasurementState::Active), "The measurement is {state:?}");
    Ok(())
}

fn await_active(godwit: &Godwit) -> Result<()> {
    let begun = Instant::now();
    while measurement(godwit)?.is_none_or(|measurement| measurement.state != MeasurementState::Active) {
        ensure!(begun.elapsed() < SOON, "The measurement does not begin");
        sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn has_failed(godwit: &Godwit, why: &str) -> Result<()> {
    let failed = measurement(godwit)?.context("There is no measurement")?;
    let MeasurementStatus { state, found, error, .. } = &failed;
    ensure!(*state == MeasurementState::Failed && found.is_none() && error.as_deref() == Some(why), "{failed:?}");
    ensure!(godwit.vm()?.phase != Phase::Ended, "The guest has ended");
    Ok(())
}

fn measurement(godwit: &Godwit) -> Result<Option<MeasurementStatus>> {
    match godwit.client().call(&Request::ShowDirtyRate)? {
        Reply::DirtyRate(last) => Ok(last.measurement),
        other => bail!("Unexpected reply: {other:?}"),
    }
}
