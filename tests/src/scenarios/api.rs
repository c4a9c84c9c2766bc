//! The control API by curl, and the commands that are its clients: each route, and what it does to the guest.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use control::Phase;
use serde_json::Value;

use crate::console::{Console, Line};
use crate::godwit::{Godwit, call};
use crate::scenario::{Context, Needs, Scenario};

/// See its `about`.
pub(super) const ROUTES: Scenario = Scenario {
    name: "api-routes",
    about: "Each route of the control API does what it says, by curl; no route is left out",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(60),
    run: routes,
};

/// See its `about`.
pub(super) const COMMANDS: Scenario = Scenario {
    name: "api-commands",
    about: "The commands that ask a running Godwit answer for people and as JSON; help and completions are complete",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(60),
    run: commands,
};

const SOON: Duration = Duration::from_secs(10);
/// Several ticks of the guest.
const A_WHILE: Duration = Duration::from_millis(150);

/// Curl at the control socket of one Godwit.
#[derive(Debug)]
pub(super) struct Curl<'a> {
    godwit: &'a Godwit,
    called: BTreeSet<(String, String)>,
}

impl<'a> Curl<'a> {
    pub(super) fn at(godwit: &'a Godwit) -> Self {
        Self { godwit, called: BTreeSet::new() }
    }

    fn command(&mut self, method: &str, path: &str) -> Command {
        println!("{method} {path}");
        self.called.insert((method.to_owned(), path.to_owned()));
        let mut command = Command::new("curl");
        command.args(["--silent", "--show-error", "--no-buffer", "--max-time", "20", "--request", method]);
        command.arg("--unix-socket").arg(self.godwit.folder().join("api.sock")).arg(format!("http://localhost{path}"));
        command.stdin(Stdio::null());
        command
    }

    /// Asks, and gives the status and the body.
    pub(super) fn ask(&mut self, method: &str, path: &str, body: Option<&str>) -> Result<(u16, String)> {
        let mut command = self.command(method, path);
        command.args(["--write-out", "\n%{http_code}"]);
        command.args(body.iter().flat_map(|body| ["--data", *body]));
        let output = command.output().context("Cannot start curl")?;
        let answer = String::from_utf8_lossy(&output.stdout).into_owned();
        let (body, status) = answer.rsplit_once('\n').with_context(|| format!("curl failed: {output:?}"))?;
        Ok((status.parse()?, body.to_owned()))
    }

    /// Asks, and wants a status.
    pub(super) fn expect(&mut self, method: &str, path: &str, body: Option<&str>, status: u16) -> Result<String> {
        let (found, answer) = self.ask(method, path, body)?;
        ensure!(found == status, "{method} {path} answered {found} and not {status}: {answer}");
        Ok(answer)
    }

    /// Asks for JSON.
    fn json(&mut self, path: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.expect("GET", path, None, 200)?)?)
    }

    fn order(&mut self, path: &str) -> Result<()> {
        self.expect("POST", path, None, 204).map(drop)
    }
}

fn start(context: &Context, name: &str, more: &[&str]) -> Result<Godwit> {
    let kernel = context.images.join("micro.elf").display().to_string();
    let machine = ["--kernel", &kernel, "--cmdline=ws=16M rate=1000 tick=10", "--memory=64M"];
    let godwit = Godwit::run(context, name, &[&machine, more].concat())?;
    // The socket is there before the guest runs.
    godwit.await_phase(Phase::Running)?;
    Ok(godwit)
}

fn routes(context: &Context) -> Result<()> {
    let disk = context.work.join("disk");
    File::create(&disk)?.set_len(1 << 20)?;
    let disk = format!("path={},id=data", disk.display());
    let godwit = start(context, "guest", &["--balloon=on", "--disk", &disk, "--name=tern"])?;
    let mut console = godwit.console()?;
    console.expect("tick", SOON)?;
    let mut curl = Curl::at(&godwit);
    let (events, watch) = watch_events(context, &mut curl)?;

    let vm = curl.json("/v1/vm")?;
    ensure!(vm["name"] == "tern" && vm["phase"] == "running" && vm["memory_bytes"] == 64 << 20, "{vm}");
    pause_and_resume(&mut curl, &mut console)?;
    devices(&mut curl)?;
    no_migration(&mut curl)?;
    dirty_rate(&mut curl)?;
    let text = curl.expect("GET", "/metrics", None, 200)?;
    metrics(&text)?;
    ensure!(text.contains("\ngodwit_disk_written_bytes_total{disk=\"data\"} 0\n"), "{text}");
    curl.order("/v1/vm/power-button")?;
    reset(&mut curl, &mut console)?;
    pulse(&mut curl, &mut console)?;
    let described = curl.json("/v1/openapi.json")?;
    curl.expect("POST", "/v1/vm/stop", Some(r#"{"force_after_s":1}"#), 204)?;
    let called = curl.called;
    godwit.finish(SOON)?.expect(0, "did not power off in time")?;
    killed(context)?;
    saw_phases(events, &fs::read_to_string(watch)?)?;
    nothing_left_out(&described, &called)
}

/// Starts to write the events to a file.
fn watch_events(context: &Context, curl: &mut Curl<'_>) -> Result<(Child, PathBuf)> {
    let (events, talk) = (context.work.join("events"), context.work.join("talk"));
    let mut command = curl.command("GET", "/v1/events");
    command.arg("--verbose").stdout(File::create(&events)?).stderr(File::create(&talk)?);
    let child = command.spawn().context("Cannot start curl")?;
    // The watching has begun when the head of the answer is there.
    let begun = Instant::now();
    while !fs::read_to_string(&talk)?.contains("200 OK") {
        ensure!(begun.elapsed() < SOON, "The events do not begin");
        sleep(Duration::from_millis(5));
    }
    Ok((child, events))
}

fn pause_and_resume(curl: &mut Curl<'_>, console: &mut Console) -> Result<()> {
    curl.order("/v1/vm/pause")?;
    ensure!(curl.json("/v1/vm")?["phase"] == "paused", "The VM is not paused");
    // What the guest had printed before may still be on its way.
    sleep(A_WHILE);
    console.pending();
    sleep(A_WHILE);
    let ticks = console.pending();
    ensure!(ticks.is_empty(), "A paused guest goes on: {ticks:?}");
    curl.order("/v1/vm/resume")?;
    console.expect("tick", SOON).map(drop)
}

fn devices(curl: &mut Curl<'_>) -> Result<()> {
    let balloon = curl.json("/v1/balloon")?;
    ensure!(balloon["target_bytes"] == 0, "{balloon}");
    curl.expect("PUT", "/v1/balloon", Some(r#"{"target_bytes":1048576}"#), 204)?;
    let balloon = curl.json("/v1/balloon")?;
    ensure!(balloon["target_bytes"] == 1 << 20, "{balloon}");
    let disks = curl.json("/v1/disks")?;
    ensure!(disks["disks"][0]["id"] == "data" && disks["disks"][0]["bytes"] == 1 << 20, "{disks}");
    ensure!(disks["disks"][0]["counters"]["reads"] == 0 && disks["disks"][0]["counters"]["errors"] == 0, "{disks}");
    curl.expect("POST", "/v1/disks/resize", Some(r#"{"id":"data","bytes":2097152}"#), 204)?;
    let disks = curl.json("/v1/disks")?;
    ensure!(disks["disks"][0]["bytes"] == 2 << 20, "{disks}");
    let shorter = curl.expect("POST", "/v1/disks/resize", Some(r#"{"id":"data","bytes":512}"#), 400)?;
    ensure!(shorter.contains("a disk can grow, but not shrink"), "{shorter}");
    let unknown = curl.expect("POST", "/v1/disks/resize", Some(r#"{"id":"date","bytes":512}"#), 404)?;
    ensure!(unknown.contains("date"), "{unknown}");
    let nics = curl.json("/v1/nics")?;
    ensure!(nics["nics"] == Value::Array(Vec::new()), "{nics}");
    Ok(())
}

fn no_migration(curl: &mut Curl<'_>) -> Result<()> {
    ensure!(curl.json("/v1/migration")?["migration"].is_null(), "There is a migration");
    for (method, path, body) in
        [("DELETE", "/v1/migration", None), ("POST", "/v1/migration/resolve", Some(r#"{"owner":"source"}"#))]
    {
        let refusal = curl.expect(method, path, body, 409)?;
        ensure!(refusal.contains(r#""phase":"running""#), "{refusal}");
    }
    let nobody = r#"{"to":"unix:/nonexistent/in.sock","mode":"stop"}"#;
    curl.expect("POST", "/v1/migration", Some(nobody), 202)?;
    for _ in 0..500 {
        let last = curl.json("/v1/migration")?;
        if last["migration"]["state"] == "failed" {
            let error = last["migration"]["error"].as_str().unwrap_or_default();
            ensure!(error.contains("No Godwit can be reached at unix:/nonexistent/in.sock"), "{error}");
            ensure!(last["migration"]["total_ms"].as_f64() > Some(0.0), "It took no time to fail: {last}");
            return Ok(());
        }
        sleep(Duration::from_millis(5));
    }
    anyhow::bail!("A migration to nobody does not fail")
}

fn dirty_rate(curl: &mut Curl<'_>) -> Result<()> {
    ensure!(curl.json("/v1/dirty-rate")?["measurement"].is_null(), "There is a measurement");
    curl.expect("POST", "/v1/dirty-rate", Some(r#"{"period_ms":100}"#), 202)?;
    for _ in 0..2000 {
        let last = curl.json("/v1/dirty-rate")?;
        if last["measurement"]["state"] != "active" {
            let found = &last["measurement"]["found"];
            ensure!(found["pages_per_second"].as_u64() > Some(0), "{last}");
            return Ok(());
        }
        sleep(Duration::from_millis(5));
    }
    anyhow::bail!("The measurement does not end")
}

/// Each line of the text format is a comment or a name, perhaps labels, and a number.
fn metrics(text: &str) -> Result<()> {
    let mut samples = 0;
    for line in text.lines().filter(|line| !line.starts_with("# ")) {
        let (name, value) = line.rsplit_once(' ').with_context(|| format!("{line:?} is no sample"))?;
        ensure!(name.starts_with("godwit_") && value.parse::<f64>().is_ok(), "{line:?} is no sample");
        samples += 1;
    }
    ensure!(samples > 3, "There are hardly any metrics: {text}");
    Ok(())
}

fn reset(curl: &mut Curl<'_>, console: &mut Console) -> Result<()> {
    curl.order("/v1/vm/reset")?;
    // The guest may have been in the middle of a line when it was reset.
    let first = |line: &Line| line.text.ends_with("micro").then_some(());
    console.find("the guest's first line after a reset", SOON, first)?;
    console.expect("tick 0 ", SOON).map(drop)
}

fn pulse(curl: &mut Curl<'_>, console: &mut Console) -> Result<()> {
    let pulsed: Value = serde_json::from_str(&curl.expect("POST", "/v1/pulse", Some(r#"{"times":3}"#), 200)?)?;
    ensure!(pulsed["times"] == 3, "{pulsed}");
    console.pending();
    console.expect("tick", SOON).map(drop)
}

fn killed(context: &Context) -> Result<()> {
    let godwit = start(context, "killed", &[])?;
    Curl::at(&godwit).order("/v1/vm/kill")?;
    godwit.finish(SOON)?.expect(0, "The guest was ended by request")
}

fn saw_phases(mut events: Child, seen: &str) -> Result<()> {
    ensure!(events.wait()?.success(), "curl did not see the end of the events");
    for part in [
        r#""to":"paused""#,
        r#""to":"running""#,
        r#""to":"migrating""#,
        "migration_ended",
        "measurement_ended",
        "guest_ended",
    ] {
        ensure!(seen.contains(part), "The events do not have {part}:\n{seen}");
    }
    Ok(())
}

/// Compares what was called with what the server describes.
fn nothing_left_out(described: &Value, called: &BTreeSet<(String, String)>) -> Result<()> {
    let paths = described["paths"].as_object().context("The description has no paths")?;
    for (path, methods) in paths {
        for method in methods.as_object().into_iter().flat_map(|methods| methods.keys()) {
            let route = (method.to_uppercase(), path.clone());
            // Ended processes of their own.
            ensure!(called.contains(&route) || path == "/v1/vm/kill", "{} {path} was not called", route.0);
        }
    }
    Ok(())
}

fn commands(context: &Context) -> Result<()> {
    let disk = context.work.join("disk");
    File::create(&disk)?.set_len(1 << 20)?;
    let disk_option = format!("path={},cache=none,queues=2,bps=1M,iops=100", disk.display());
    let godwit = start(context, "guest", &["--disk", &disk_option])?;
    let api = godwit.folder().join("api.sock").display().to_string();
    let ask = |arguments: &[&str]| {
        println!("godwit {}", arguments.join(" "));
        let (ended, text) = call(context, &[arguments, &["--api", &api]].concat())?;
        ended.expect(0, "").map(|()| text)
    };
    let status: Value = serde_json::from_str(&ask(&["status", "--json"])?)?;
    ensure!(status["vm"]["phase"] == "running" && status["migration"].is_null(), "{status}");
    ensure!(ask(&["status"])?.contains("is running"), "status for people does not tell the phase");
    ask(&["pause"])?;
    ensure!(ask(&["status"])?.contains("is paused"), "status for people does not tell the phase");
    ask(&["resume"])?;
    for list in ["disks", "nics"] {
        let json: Value = serde_json::from_str(&ask(&[list, "--json"])?)?;
        ensure!(json[list].is_array(), "{json}");
    }
    ask(&["resize-disk", "--id=blk0", "--size=3M"])?;
    ensure!(fs::metadata(&disk)?.len() == 3 << 20, "The disk has not grown");
    ensure!(ask(&["disks"])?.contains("3.00 MiB"), "The disk has not grown for people");
    metrics(&ask(&["metrics"])?)?;
    let (refused, _) = call(context, &["balloon", "--api", &api])?;
    refused.expect(1, "This VM has no balloon; start it with --balloon on")?;
    ask(&["power-button"])?;
    ask(&["reset"])?;
    ask(&["kill"])?;
    godwit.finish(SOON)?.expect(0, "The guest was ended by request")?;
    let (refused, _) = call(context, &["status", "--api", &api])?;
    refused.expect(1, "there is no such socket")?;
    help_and_completions(context)
}

fn help_and_completions(context: &Context) -> Result<()> {
    let (ended, help) = call(context, &["--help"])?;
    ended.expect(0, "")?;
    for command in [
        "run",
        "receive",
        "migrate",
        "cancel",
        "resolve",
        "status",
        "watch",
        "pause",
        "resume",
        "stop",
        "kill",
        "dirty-rate",
    ] {
        ensure!(help.contains(&format!("\n  {command} ")), "The help does not list {command}: {help}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let (ended, script) = call(context, &["completions", shell])?;
        ended.expect(0, "")?;
        ensure!(
            script.contains("godwit") && script.contains("receive") && script.contains("dirty-rate"),
            "The completions for {shell} are incomplete"
        );
    }
    Ok(())
}
