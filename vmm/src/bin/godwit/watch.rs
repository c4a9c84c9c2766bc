//! The commands that follow events: `watch`, `stop`, `dirty-rate`, and `migrate` with a progress bar for each round.

use crate::args::{DirtyRate, Migrate, Status, Stop};
use crate::client::ask;
use crate::show;
use anyhow::{Context, bail};
use control::{
    After, Client, EventStream, Happening, JobId, MeasureDirtyRate, MigrationState, MigrationStatus, Progress, Reply,
    Request, RoundInfo, StartMigration,
};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// The size of a guest page, in bytes.
const PAGE: u64 = 4096;

/// Prints events until the Godwit ends.
pub(crate) fn watch(status: &Status) -> anyhow::Result<u8> {
    for event in Client::new(&status.client.api).events(After::Now)? {
        let event = event?;
        if status.json {
            show::json(&event)?;
        } else {
            println!("{:>6}  {}  {}", event.sequence, event.what.name(), serde_json::to_string(&event.what)?);
        }
    }
    Ok(0)
}

/// Presses the power button and waits for the guest's end.
pub(crate) fn stop(stop: &Stop) -> anyhow::Result<u8> {
    let events = Client::new(&stop.client.api).events(After::Now)?;
    ask(&stop.client, &Request::Stop(control::Stop { force_after_s: stop.force_after }))?;
    for event in events {
        match event {
            Ok(event) => {
                if let Happening::GuestEnded { message, .. } = event.what {
                    eprintln!("godwit: {message}");
                    return Ok(0);
                }
            }
            Err(error) => return Err(error).context("The guest was asked to stop, but whether it did is not known"),
        }
    }
    Ok(0)
}

/// Starts a measurement and waits for what it finds.
pub(crate) fn dirty_rate(dirty_rate: &DirtyRate) -> anyhow::Result<u8> {
    let DirtyRate { read: Status { client, json }, period } = dirty_rate;
    let events = Client::new(&client.api).events(After::Now)?;
    let request = Request::MeasureDirtyRate(MeasureDirtyRate { period_ms: *period });
    let Reply::Started(started) = ask(client, &request)? else { bail!("The measurement was not started") };
    for event in events {
        let event = event.context("The measurement was started, but its end is not known")?;
        if let Happening::MeasurementEnded { measurement } = event.what
            && measurement.job == started.job
        {
            let Some(found) = measurement.found else {
                bail!("Nothing was measured: {}", measurement.error.unwrap_or_default())
            };
            if *json {
                return show::json(&found);
            }
            show::dirty_rate(&found);
            return Ok(0);
        }
    }
    bail!("The Godwit ended before it told what it had measured")
}

/// Starts a migration and follows it to its end.
pub(crate) fn migrate(migrate: &Migrate) -> anyhow::Result<u8> {
    let (client, goals) = (&migrate.read.client, &migrate.goals);
    let events = Client::new(&client.api).events(After::Now)?;
    let request = Request::StartMigration(StartMigration {
        mode: migrate.mode.into(),
        max_downtime_ms: goals.max_downtime,
        max_rounds: goals.max_rounds,
        deadline_ms: goals.deadline,
        on_stall: goals.on_stall.into(),
        bandwidth_bytes_per_second: goals.bandwidth,
        timeout_s: migrate.timeout,
        verify: migrate.verify,
        memory: migrate.memory.into(),
        streams: migrate.streams,
        congestion: migrate.congestion.clone(),
        codec: migrate.codec,
        cpu_budget: migrate.cpu_budget,
        delta_cache_bytes: migrate.delta_cache,
        with_disks: migrate.with_disks.clone(),
        ..StartMigration::new(migrate.to.clone())
    });
    let Reply::Started(started) = ask(client, &request)? else { bail!("The migration was not started") };
    let bars = (!migrate.read.json).then(Bars::default);
    let status = follow(events, started.job, bars)?;
    if migrate.read.json {
        show::json(&status)?;
    } else {
        show::ended_migration(&status);
    }
    Ok(u8::from(status.state != MigrationState::Completed))
}

/// Shows the migration's progress; how it ended.
fn follow(events: EventStream, job: JobId, mut bars: Option<Bars>) -> anyhow::Result<MigrationStatus> {
    for event in events {
        let event = event.context("The migration was started, but its end is not known; ask `godwit status`")?;
        match event.what {
            Happening::MigrationProgress { job: of, progress } if of == job => {
                bars.iter_mut().for_each(|bars| bars.progress(&progress));
            }
            Happening::RoundEnded { job: of, round } if of == job => {
                bars.iter_mut().for_each(|bars| bars.round_done(&round));
            }
            Happening::MigrationEnded { migration } if migration.job == job => {
                bars.iter_mut().for_each(Bars::end);
                return Ok(*migration);
            }
            _ => {}
        }
    }
    bail!("The Godwit ended before it told the end of the migration")
}

/// One progress bar a round.
#[derive(Debug, Default)]
struct Bars {
    bar: Option<(u32, ProgressBar)>,
}

impl Bars {
    fn progress(&mut self, progress: &Progress) {
        let Progress { round, remaining_bytes, bytes_per_second, throttled_percent, .. } = progress;
        if *round == 0 {
            return;
        }
        let bar = self.of_round(*round);
        // The round's whole is known at its first word.
        let length = bar.length().unwrap_or(0).max(*remaining_bytes);
        bar.set_length(length);
        bar.set_position(length - remaining_bytes);
        let throttled = throttled_percent.map_or_else(String::new, |percent| format!(", throttled by {percent} %"));
        bar.set_message(format!("{}/s{throttled}", HumanBytes(*bytes_per_second)));
    }

    fn round_done(&mut self, round: &RoundInfo) {
        let bar = self.of_round(round.round);
        bar.set_length(round.pages * PAGE);
        bar.set_position(round.pages * PAGE);
        bar.finish_with_message(format!("{} sent in {}", HumanBytes(round.bytes), round.duration_ms));
    }

    fn of_round(&mut self, round: u32) -> &ProgressBar {
        if self.bar.as_ref().is_none_or(|(of, _)| *of != round) {
            let style = ProgressStyle::with_template("{prefix} [{bar:30}] {bytes}/{total_bytes} {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = ProgressBar::new(0).with_style(style).with_prefix(format!("round {round:>2}"));
            self.bar = Some((round, bar));
        }
        &self.bar.as_ref().expect("made above").1
    }

    fn end(&mut self) {
        if let Some((_, bar)) = self.bar.take()
            && !bar.is_finished()
        {
            bar.abandon();
        }
    }
}
