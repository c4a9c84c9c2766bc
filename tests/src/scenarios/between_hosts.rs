//! Moves over a network with delay, a limited rate and loss, between hosts that have nothing else in common.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use control::{MigrationMode, Phase, Request, StartMigration};

use super::migrate::verify_micro;
use crate::godwit::Godwit;
use crate::network::{HostName, Hosts, Link};
use crate::scenario::{Context, Needs, Scenario};

/// See its `about`.
pub(super) const APART: Scenario = Scenario {
    name: "migrate-between-hosts",
    about: "A guest is moved there and back over 16 ms, 1 Gbit/s and 0.1 % loss, and stays when the wire is cut; no page is wrong",
    needs: Needs::Lab,
    timeout: Duration::from_secs(180),
    run: apart,
};

const SOON: Duration = Duration::from_secs(60);

fn apart(context: &Context) -> Result<()> {
    let link = Link { rtt: Duration::from_millis(16), rate: Some("1gbit".parse()?), loss: "0.1%".parse()? };
    let hosts = Hosts::join(2, &link)?;
    let &[a, b] = hosts.names() else { bail!("Two hosts were asked for") };
    let (on_a, on_b) = (on_host(context, a)?, on_host(context, b)?);
    let kernel = context.images.join("micro.elf").display().to_string();
    let machine = ["--kernel", &kernel, "--cmdline=ws=3M rate=100 tick=20 pattern=check", "--memory=64M"];
    let mut godwit = Godwit::run(&on_a, "stop0", &machine)?;
    godwit.console()?.expect("tick", SOON)?;
    let ways = [(MigrationMode::Live, b), (MigrationMode::Stop, a), (MigrationMode::Stop, b), (MigrationMode::Live, a)];
    for (stop, (mode, host)) in (1..).zip(ways) {
        let there = if host == a { &on_a } else { &on_b };
        let target = Godwit::receive_at(there, &format!("stop{stop}"), &format!("tcp://{}:0", host.address()), &[])?;
        if stop == 1 {
            stays_when_the_wire_is_cut(&hosts, b, &godwit, &target)?;
        }
        let status = godwit.migrate(&target, mode, SOON)?;
        println!(
            "{mode:?} to {host}: {} rounds in {}, downtime {:?}",
            status.rounds.len(),
            status.total_ms,
            status.downtime_ms
        );
        godwit = target;
    }
    let console = godwit.console()?;
    verify_micro(godwit, console)
}

/// A `godwit` that has a host's network.
fn on_host(context: &Context, host: HostName) -> Result<Context> {
    context.within(&format!("on-{host}"), &format!("exec {}", host.prefix().join(" ")))
}

/// The target falls silent in the middle. The source gives up when its time is over, and the target goes back to waiting.
fn stays_when_the_wire_is_cut(hosts: &Hosts, there: HostName, source: &Godwit, target: &Godwit) -> Result<()> {
    let timeout_s = std::num::NonZeroU32::new(3);
    let order = StartMigration { timeout_s, ..StartMigration::new(target.address()) };
    source.client().call(&Request::StartMigration(order))?;
    target.await_phase(Phase::Incoming)?;
    let wire = |state: &str| -> Result<()> {
        let status = hosts.command(there, "/usr/sbin/ip").args(["link", "set", "eth0", state]).status()?;
        ensure!(status.success(), "The wire of host {there} cannot be set {state}");
        Ok(())
    };
    wire("down")?;
    let why = source.await_stay()?.error.unwrap_or_default();
    ensure!(why.contains("time limit of 3 s"), "The account of a cut wire is {why:?}");
    source.console()?.expect("tick", SOON)?;
    wire("up")?;
    target.await_phase(Phase::Receiving)
}
