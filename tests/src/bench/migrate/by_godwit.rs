//! One move of the guest from one Godwit to another, and the iperf3 stream beside a guest that stays.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use control::{MigrationState, MigrationStatus};
use serde_json::Value;

use super::cell::Link;
use super::idleness::let_idle;
use super::stage::{MOVE_WITHIN, Stage, WORK, await_work, text, verify};
use super::usage::Watch;
use super::warmth::warm_up;
use super::wire::End;
use super::{Figures, per_second};
use crate::bench::Figure;
use crate::console::Console;
use crate::godwit::{Godwit, call};
use crate::scenario::Context;
use crate::silence;

/// How long iperf3 sends.
const STREAM: Duration = Duration::from_secs(2);

/// Size of a page.
const PAGE: u64 = 4096;

/// Moves a fresh guest; `options` are words for `godwit migrate`.
pub(super) fn migrate(stage: &Stage<'_>, options: &[String], turn: usize) -> Result<Figures> {
    let (source, mut departure) = boot(stage, turn)?;
    let there = stage.godwit(End::Target, turn)?;
    let target = match stage.link {
        Link::UnixSocket => Godwit::receive(&there, "target", &[])?,
        _ => Godwit::receive_at(&there, "target", &format!("tcp://{}:0", stage.wire.target_address()), &[])?,
    };
    let mut arrival = target.console()?;
    sleep(WORK);
    warm_up(stage.guest, stage.link)?;
    let watch = Watch::begin([source.pid(), target.pid()])?;
    let here = Context { godwit: stage.programs.godwit.clone(), images: stage.work.clone(), work: stage.work.clone() };
    let status = order(&here, &source, &target, options)?;
    let usage = watch.end()?;
    source.finish(MOVE_WITHIN)?.expect(0, "The guest has moved to")?;
    let downtime = silence::between(&mut departure, &mut arrival)?;
    verify(&mut arrival)?;
    target.end()?;
    let mut figures = account(&status, downtime);
    figures.extend([(Figure::CpuS, usage.cpu_s), (Figure::MemoryMib, usage.memory_mib)]);
    Ok(figures)
}

fn boot(stage: &Stage<'_>, turn: usize) -> Result<(Godwit, Console)> {
    let memory = format!("{}M", stage.guest.memory_mib);
    let kernel = text(&stage.programs.kernel);
    let mut options = vec!["--kernel", &kernel, "--memory", &memory, "--cmdline", &stage.guest.words];
    let content = stage.content.as_deref().map(text);
    options.extend(content.iter().flat_map(|content| ["--initramfs", content]));
    let godwit = Godwit::run(&stage.godwit(End::Source, turn)?, "source", &options)?;
    let mut console = godwit.console()?;
    await_work(&mut console)?;
    let_idle(stage.guest, godwit.pid())?;
    Ok((godwit, console))
}

/// Asks the source by the command line, and waits until it tells the end. The command line talks to the source by its Unix
/// socket, from wherever it is.
pub(in crate::bench) fn order(
    here: &Context,
    source: &Godwit,
    target: &Godwit,
    options: &[String],
) -> Result<MigrationStatus> {
    let (api, to) = (text(&source.folder().join("api.sock")), target.address().to_string());
    let timeout = MOVE_WITHIN.as_secs().to_string();
    let mut words = vec!["migrate", "--json", "--api", &api, "--to", &to, "--timeout", &timeout];
    words.extend(options.iter().map(String::as_str));
    let (ended, told) = call(here, &words)?;
    if !ended.status.success() {
        bail!("{}", complaint(&ended.words).unwrap_or("godwit migrate failed without a word"));
    }
    let status: MigrationStatus = serde_json::from_str(&told).with_context(|| format!("{told:?} is no status"))?;
    ensure!(status.state == MigrationState::Completed, "The guest has not moved: {:?}", status.error);
    Ok(status)
}

/// The first line that says what was wrong.
fn complaint(words: &str) -> Option<&str> {
    words.lines().map(str::trim).find(|line| !line.is_empty())
}

/// What the source tells of a move, and the downtime that the guest saw.
pub(super) fn account(status: &MigrationStatus, downtime: Duration) -> Figures {
    let total = Duration::from(status.total_ms);
    let progress = &status.progress;
    let bytes = progress.pages_sent.saturating_sub(progress.zero_pages) * PAGE;
    Figures::from([
        (Figure::MigrationMs, total.as_secs_f64() * 1e3),
        (Figure::DowntimeMs, downtime.as_secs_f64() * 1e3),
        (Figure::LinkMb, per_second(progress.bytes_sent, Duration::from_secs(1))),
        (Figure::RateMbS, per_second(bytes, total)),
    ])
}

/// The speed of one TCP stream over the link while the guest works in a Godwit at the source.
pub(super) fn iperf(stage: &Stage<'_>, turn: usize) -> Result<Figures> {
    let (guest, _console) = boot(stage, turn)?;
    let address = stage.wire.target_address().to_string();
    let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port().to_string();
    let iperf = text(&stage.programs.iperf);
    let mut server = stage.wire.command(End::Target, &iperf);
    server.args(["--server", "--one-off", "--forceflush", "--bind", &address, "--port", &port]);
    server.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let _server = Server::await_listening(server.spawn().context("Cannot start iperf3")?)?;
    let mut client = stage.wire.command(End::Source, &iperf);
    client.args(["--client", &address, "--port", &port, "--json", "--time", &STREAM.as_secs().to_string()]);
    let output = client.stdin(Stdio::null()).output().context("Cannot start iperf3")?;
    guest.end()?;
    let report: Value = serde_json::from_slice(&output.stdout).context("iperf3 tells no JSON")?;
    Ok(Figures::from([(Figure::RateMbS, received_mb_per_s(&report)?)]))
}

/// Payload that arrived, in units of 10^6 bytes per second.
fn received_mb_per_s(report: &Value) -> Result<f64> {
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.with_context(|| format!("iperf3 has no result: {}", report["error"]))? / 8e6)
}

/// An iperf3 that waits for one client. Killed on drop.
#[derive(Debug)]
struct Server(Child);

impl Server {
    fn await_listening(child: Child) -> Result<Self> {
        let mut server = Self(child);
        let output = server.0.stdout.take().context("Standard output is a pipe")?;
        let mut lines = BufReader::new(output).lines();
        let listens = lines.any(|line| line.is_ok_and(|line| line.contains("Server listening")));
        // Kept open by nobody: what it prints after this does not matter to it, since it ignores SIGPIPE.
        ensure!(listens, "iperf3 does not listen");
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself; then there is only something to reap.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_words_of_a_failure_are_kept() {
        let words = "\nerror: unexpected argument '--codec' found\n\n  tip: to pass it as a value\n";
        assert_eq!(complaint(words), Some("error: unexpected argument '--codec' found"));
        assert_eq!(complaint("\n \n"), None);
    }

    #[test]
    fn iperf3s_report_is_read() {
        let report = serde_json::json!({"end": {"sum_received": {"bits_per_second": 8e9}}});
        assert!((received_mb_per_s(&report).unwrap() - 1000.0).abs() < 1e-9);
        let refusal = received_mb_per_s(&serde_json::json!({"error": "unable to connect"})).unwrap_err();
        assert!(refusal.to_string().contains("unable to connect"));
    }
}
