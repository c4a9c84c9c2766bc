//! Checks that a scenario finds what every other one relies on: KVM, the binary, and hosts on a network.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::network::{Hosts, Link, fastest_ping};
use crate::place::kvm_works;
use crate::scenario::{Context, Needs, Scenario};

/// See its `about`.
pub(super) const KVM_OPENS: Scenario = Scenario {
    name: "kvm-opens",
    about: "/dev/kvm opens, speaks version 12 and makes a virtual machine; the godwit binary is there",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(10),
    run: kvm_opens,
};

/// See its `about`.
pub(super) const HOSTS_JOIN: Scenario = Scenario {
    name: "hosts-join",
    about: "Two hosts in a lab reach each other with the delay that was asked for, and can be removed without a trace",
    needs: Needs::Lab,
    timeout: Duration::from_secs(60),
    run: hosts_join,
};

fn kvm_opens(context: &Context) -> Result<()> {
    ensure!(context.godwit.is_file(), "There is no godwit at {}", context.godwit.display());
    kvm_works()
}

fn hosts_join(_: &Context) -> Result<()> {
    let link = Link { rtt: Duration::from_millis(40), ..Link::default() };
    let hosts = Hosts::join(2, &link)?;
    let &[a, b] = hosts.names() else { bail!("Two hosts were asked for") };
    let output = hosts.command(a, "ping").args(["-q", "-c", "5", &b.address().to_string()]).output()?;
    let report = String::from_utf8_lossy(&output.stdout);
    let fastest = fastest_ping(&report).with_context(|| format!("Host a does not reach host b: {report}"))?;
    // No upper limit: the machine below may be busy with anything.
    ensure!(fastest >= link.rtt, "A round trip of {:?} took {fastest:?}", link.rtt);
    Ok(())
}
