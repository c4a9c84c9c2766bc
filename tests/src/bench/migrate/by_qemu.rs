//! One move of the guest from one QEMU to another, by QMP.
//!
//! Both have the command line of the boot bench. The cap on bandwidth is lifted, and the goal for the downtime is that of
//! the others; after as many rounds as they may have, the goal is given up, which is what makes QEMU pause the guest.

use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::cell::Variant;
use super::idleness::let_idle;
use super::plan::{MAX_DOWNTIME_MS, MAX_ROUNDS};
use super::stage::{BOOT_WITHIN, MOVE_WITHIN, Stage, WORK, await_work, text, verify};
use super::usage::{Usage, Watch};
use super::warmth::warm_up;
use super::wire::End;
use super::{Figures, per_second};
use crate::bench::Figure;
use crate::console::Console;
use crate::silence;

/// More than any link here carries, in bytes per second.
const NO_CAP: u64 = 100 << 30;
/// The longest downtime that QEMU can be allowed (migration/options.c, MAX_MIGRATE_DOWNTIME), in milliseconds.
const ANY_DOWNTIME_MS: u32 = 2_000_000;
/// Streams of multifd, as many as there are processors on the smallest machine that this is meant for.
const STREAMS: u32 = 2;
/// XBZRLE's memory of what was sent: the largest working set.
const XBZRLE_CACHE: u64 = 256 << 20;

/// How often a socket is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(5);

type Qmp = super::qmp::Qmp<std::io::BufReader<std::os::unix::net::UnixStream>, std::os::unix::net::UnixStream>;

/// Moves a fresh guest.
pub(super) fn migrate(stage: &Stage<'_>, variant: Variant, turn: usize) -> Result<Figures> {
    let source = Qemu::start(stage, End::Source, turn)?;
    let mut departure = source.console()?;
    await_work(&mut departure)?;
    let_idle(stage.guest, source.child.id())?;
    let target = Qemu::start(stage, End::Target, turn)?;
    let mut arrival = target.console()?;
    let (mut here, mut there) = (source.qmp()?, target.qmp()?);
    for qmp in [&mut here, &mut there] {
        prepare(qmp, variant)?;
    }
    let address = stage.wire.target_address();
    there.call("migrate-incoming", &json!({ "uri": format!("tcp:{address}:0") }))?;
    let port = listening_port(&there.call("query-migrate", &json!({}))?)?;
    sleep(WORK);
    warm_up(stage.guest, stage.link)?;
    let watch = Watch::begin([source.child.id(), target.child.id()])?;
    here.call("migrate", &json!({ "uri": format!("tcp:{address}:{port}") }))?;
    await_completion(&mut here)?;
    let usage = watch.end()?;
    let report = final_report(&mut here)?;
    // It keeps its console otherwise, and the silence has no beginning.
    drop(source);
    let downtime = silence::between(&mut departure, &mut arrival)?;
    verify(&mut arrival)?;
    figures(&report, downtime, usage)
}

/// Chooses the way of moving, the same at both ends.
fn prepare(qmp: &mut Qmp, variant: Variant) -> Result<()> {
    let capability = |name: &str, state: bool| json!({ "capability": name, "state": state });
    let multifd = matches!(variant, Variant::Multifd | Variant::MultifdZstd);
    let xbzrle = variant == Variant::Xbzrle;
    let capabilities = [capability("events", true), capability("multifd", multifd), capability("xbzrle", xbzrle)];
    qmp.call("migrate-set-capabilities", &json!({ "capabilities": capabilities }))?;
    let mut parameters = json!({ "max-bandwidth": NO_CAP, "downtime-limit": MAX_DOWNTIME_MS });
    if multifd {
        parameters["multifd-channels"] = json!(STREAMS);
    }
    if variant == Variant::MultifdZstd {
        parameters["multifd-compression"] = json!("zstd");
        parameters["multifd-zstd-level"] = json!(1);
    }
    if xbzrle {
        parameters["xbzrle-cache-size"] = json!(XBZRLE_CACHE);
    }
    qmp.call("migrate-set-parameters", &parameters).map(drop)
}

/// The port that came of 0.
fn listening_port(report: &Value) -> Result<u16> {
    let port = report["socket-address"][0]["port"].as_str().and_then(|port| port.parse().ok());
    port.with_context(|| format!("QEMU does not tell where it waits: {report}"))
}

/// Waits for the end of the migration, and gives up the goal after so many rounds.
fn await_completion(qmp: &mut Qmp) -> Result<()> {
    loop {
        let event = qmp.event()?;
        match (event.name.as_str(), event.data["status"].as_str()) {
            ("MIGRATION", Some("completed")) => return Ok(()),
            ("MIGRATION", Some(status @ ("failed" | "cancelled"))) => {
                let report = qmp.call("query-migrate", &json!({}))?;
                bail!("QEMU's migration has {status}: {}", report["error-desc"].as_str().unwrap_or("no reason"));
            }
            ("MIGRATION_PASS", _) if event.data["pass"].as_u64() == Some(u64::from(MAX_ROUNDS)) => {
                qmp.call("migrate-set-parameters", &json!({ "downtime-limit": ANY_DOWNTIME_MS }))?;
            }
            _ => {}
        }
    }
}

/// What QEMU reports of a migration that is completed: it says so before it has summed up.
fn final_report(qmp: &mut Qmp) -> Result<Value> {
    let deadline = Instant::now() + BOOT_WITHIN;
    loop {
        let report = qmp.call("query-migrate", &json!({}))?;
        if report["total-time"].as_u64().is_some_and(|total| total > 0) {
            return Ok(report);
        }
        ensure!(Instant::now() < deadline, "QEMU does not tell how long it took: {report}");
        sleep(LOOK_EVERY);
    }
}

fn figures(report: &Value, downtime: Duration, usage: Usage) -> Result<Figures> {
    let number = |value: &Value, name: &str| {
        value[name].as_u64().with_context(|| format!("QEMU does not tell {name}: {report}"))
    };
    let total = Duration::from_millis(number(report, "total-time")?);
    let ram = &report["ram"];
    let second = Duration::from_secs(1);
    Ok(Figures::from([
        (Figure::MigrationMs, total.as_secs_f64() * 1e3),
        (Figure::DowntimeMs, downtime.as_secs_f64() * 1e3),
        (Figure::LinkMb, per_second(number(ram, "transferred")?, second)),
        (Figure::CpuS, usage.cpu_s),
        (Figure::RateMbS, per_second(number(ram, "normal-bytes")?, total)),
        // Not its memory: of that, the guest's is no memory file and cannot be told apart.
    ]))
}

/// A QEMU with the guest, or for it. Killed on drop.
#[derive(Debug)]
struct Qemu {
    child: Child,
    folder: PathBuf,
}

impl Qemu {
    fn start(stage: &Stage<'_>, end: End, turn: usize) -> Result<Self> {
        let folder = stage.work.join(format!("qemu-{turn}-{end:?}"));
        std::fs::create_dir_all(&folder)?;
        let socket = |name: &str| text(&folder.join(name));
        let mut command = stage.wire.command(end, &text(&stage.programs.qemu));
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
        command.args(["-name", "guest,debug-threads=on", "-M", "microvm,x-option-roms=off,rtc=on", "-accel", "kvm"]);
        command.args(["-cpu", "host,-arch-capabilities", "-m", &stage.guest.memory_mib.to_string()]);
        command.args(["-append", &stage.guest.words]).arg("-kernel").arg(&stage.programs.kernel);
        command.args(stage.content.iter().flat_map(|content| ["-initrd".into(), content.clone()]));
        command.args(["-chardev", &format!("socket,id=console,path={},server=on,wait=off", socket("console.sock"))]);
        command.args(["-serial", "chardev:console"]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket("qmp.sock"))]);
        if end == End::Target {
            command.args(["-incoming", "defer"]);
        }
        let errors = std::fs::File::create(folder.join("stderr"))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        let child = command.spawn().context("Cannot start QEMU")?;
        let mut qemu = Self { child, folder };
        qemu.await_socket()?;
        Ok(qemu)
    }

    /// The monitor's socket is made after the console's.
    fn await_socket(&mut self) -> Result<()> {
        let deadline = Instant::now() + BOOT_WITHIN;
        while !self.folder.join("qmp.sock").exists() {
            if let Some(status) = self.child.try_wait()? {
                let words = std::fs::read_to_string(self.folder.join("stderr")).unwrap_or_default();
                bail!("QEMU ended at once ({status}): {}", words.trim());
            }
            ensure!(Instant::now() < deadline, "QEMU has no monitor after {BOOT_WITHIN:?}");
            sleep(LOOK_EVERY);
        }
        Ok(())
    }

    fn console(&self) -> Result<Console> {
        Console::connect(&self.folder.join("console.sock"))
    }

    fn qmp(&self) -> Result<Qmp> {
        Qmp::connect(&self.folder.join("qmp.sock"), MOVE_WITHIN)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself; then there is only something to reap.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemus_report_is_read() {
        let usage = Usage { cpu_s: 0.5, memory_mib: 40.0 };
        let report = json!({"status": "completed", "total-time": 500,
            "ram": {"transferred": 2_000_000, "normal-bytes": 1_000_000, "duplicate": 3}});
        let figures = figures(&report, Duration::from_millis(7), usage).unwrap();
        let wanted = [
            (Figure::MigrationMs, 500.0),
            (Figure::DowntimeMs, 7.0),
            (Figure::LinkMb, 2.0),
            (Figure::CpuS, 0.5),
            (Figure::RateMbS, 2.0),
        ];
        assert_eq!(figures, Figures::from(wanted));
        let cut = super::figures(&json!({"total-time": 1, "ram": {}}), Duration::ZERO, usage);
        assert!(cut.unwrap_err().to_string().contains("transferred"));
    }

    #[test]
    fn the_port_is_found() {
        let report =
            json!({"status": "setup", "socket-address": [{"port": "39423", "host": "127.0.0.1", "type": "inet"}]});
        assert_eq!(listening_port(&report).unwrap(), 39423);
        assert!(listening_port(&json!({})).is_err());
    }
}
