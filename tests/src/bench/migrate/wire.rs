//! The two ends of a link on this host: network namespaces joined by a veth pair that HTB shapes at both ends, or by a
//! [`Distance`].
//!
//! The namespaces have no names. Each lives as long as a process that waits in it for the end of a pipe of ours, and the
//! VMMs that run in it are killed when their parent dies: whatever ends the bench, the kernel takes all of it away.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::cell::{Far, Link};
use super::distance::Distance;
use crate::network::Rate;

/// Both ends are there under the same name.
const DEVICE: &str = "eth0";

/// What the shaper may let through at once: four milliseconds of the link, since on a busy machine its timer is often that
/// late and would lose what it could not send; and two of the largest packets in any case.
const BURSTS_PER_SECOND: u64 = 250;
const LEAST_BURST: u64 = 128 << 10;

/// Which VMM runs there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::bench) enum End {
    /// The one that gives the guest away.
    Source,
    /// The one that takes it.
    Target,
}

/// Where the VMMs of a pair run, and how the target is reached.
#[derive(Debug)]
pub(in crate::bench) struct Wire {
    /// Source and target; without them both are on this host.
    ends: Option<[Namespace; 2]>,
    /// What is between them, where that is no veth pair.
    _distance: Option<Distance>,
}

impl Wire {
    /// Both ends on this host as it is, or apart if the link has a rate; needs root, `ip` and `tc`, and a kernel with veth
    /// and HTB, or with taps.
    pub(in crate::bench) fn lay(link: Link) -> Result<Self> {
        let Some(rate) = link.rate() else { return Ok(Self { ends: None, _distance: None }) };
        let apart = || -> Result<_> {
            let ends = [Namespace::make()?, Namespace::make()?];
            if let Some(far) = link.far() {
                let [a, b] = ends.each_ref().map(Namespace::file);
                let distance = Distance::lay([a?, b?], DEVICE, rate, far)?;
                for (end, which) in ends.iter().zip([End::Source, End::Target]) {
                    run(end.command("sh").args(["-c", &far_script(address(which), far)]))?;
                }
                return Ok((ends, Some(distance)));
            }
            let [a, b] = ends.each_ref().map(|end| end.process.id().to_string());
            run(Command::new("ip")
                .args(["link", "add", DEVICE, "netns", &a, "type", "veth"])
                .args(["peer", "name", DEVICE, "netns", &b]))?;
            for (end, which) in ends.iter().zip([End::Source, End::Target]) {
                run(end.command("sh").args(["-c", &setup_script(address(which), rate)]))?;
            }
            Ok((ends, None))
        };
        let (ends, distance) = apart().context("Cannot join two network namespaces")?;
        Ok(Self { ends: Some(ends), _distance: distance })
    }

    /// The target's address.
    pub(in crate::bench) fn target_address(&self) -> Ipv4Addr {
        if self.ends.is_some() { address(End::Target) } else { Ipv4Addr::LOCALHOST }
    }

    /// The source's address.
    pub(in crate::bench) fn source_address(&self) -> Ipv4Addr {
        if self.ends.is_some() { address(End::Source) } else { Ipv4Addr::LOCALHOST }
    }

    /// The network namespace of an end.
    pub(in crate::bench) fn namespace(&self, end: End) -> Result<File> {
        match (&self.ends, end) {
            (Some([source, _]), End::Source) => source.file(),
            (Some([_, target]), End::Target) => target.file(),
            (None, _) => File::open("/proc/self/ns/net").context("Cannot open this network namespace"),
        }
    }

    /// What to put before a command so that it runs at an end and dies with its parent. Its process is the one that is
    /// started.
    pub(in crate::bench) fn prefix(&self, end: End) -> Vec<String> {
        let mut words = ["setpriv", "--pdeathsig", "KILL"].map(str::to_owned).to_vec();
        if let Some([source, target]) = &self.ends {
            let there = match end {
                End::Source => source,
                End::Target => target,
            };
            words.extend(["nsenter".to_owned(), there.option()]);
        }
        words
    }

    /// A command at an end.
    pub(in crate::bench) fn command(&self, end: End, program: &str) -> Command {
        let prefix = self.prefix(end);
        let mut command = Command::new(&prefix[0]);
        command.args(&prefix[1..]).arg(program);
        command
    }
}

fn address(end: End) -> Ipv4Addr {
    // For tests of network devices (RFC 2544, RFC 6890): nothing else on this host has these.
    match end {
        End::Source => Ipv4Addr::new(198, 18, 0, 1),
        End::Target => Ipv4Addr::new(198, 18, 0, 2),
    }
}

fn setup_script(address: Ipv4Addr, rate: Rate) -> String {
    let burst = (rate.bits() / 8 / BURSTS_PER_SECOND).max(LEAST_BURST);
    let rate = rate.bits();
    format!(
        "set -e\nip address add {address}/24 dev {DEVICE}\nip link set {DEVICE} up\n\
         tc qdisc add dev {DEVICE} root handle 1: htb default 1\n\
         tc class add dev {DEVICE} parent 1: classid 1:1 htb rate {rate}bit burst {burst} cburst {burst} quantum 60000\n"
    )
}

fn far_script(address: Ipv4Addr, far: Far) -> String {
    // Carrying frames takes the processors' time from the contenders. Where frames are lost, their size matters more.
    let bytes = if far.loss > 0.0 { 1500 } else { 9000 };
    format!("set -e\nip address add {address}/24 dev {DEVICE}\nip link set {DEVICE} mtu {bytes}\n")
}

/// A network namespace without a name.
#[derive(Debug)]
struct Namespace {
    /// Waits in it for the end of its standard input, of which the other end is ours.
    process: Child,
}

impl Namespace {
    fn make() -> Result<Self> {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", "ip link set lo up && echo up && exec cat"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut namespace = Self { process: command.spawn().context("Cannot start unshare")? };
        let output = namespace.process.stdout.take().context("Standard output is a pipe")?;
        let mut word = String::new();
        BufReader::new(output).read_line(&mut word)?;
        if word.trim() != "up" {
            let errors = namespace.process.stderr.take().context("Standard error is a pipe")?;
            let complaint = std::io::read_to_string(errors)?;
            ensure!(false, "No network namespace can be made: {}", complaint.trim());
        }
        Ok(namespace)
    }

    fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.process.id())
    }

    fn option(&self) -> String {
        format!("--net={}", self.path())
    }

    fn file(&self) -> Result<File> {
        File::open(self.path()).context("Cannot open a network namespace")
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(self.option()).arg(program);
        command
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        // It ends at that.
        let _ = self.process.wait();
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("Cannot start {command:?}"))?;
    ensure!(output.status.success(), "{command:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_rate_both_ends_are_here() {
        let wire = Wire::lay(Link::Loopback).unwrap();
        assert_eq!(wire.target_address(), Ipv4Addr::LOCALHOST);
        assert_eq!(wire.prefix(End::Source), ["setpriv", "--pdeathsig", "KILL"]);
        assert!(wire.command(End::Target, "true").status().unwrap().success());
    }

    #[test]
    fn the_burst_grows_with_the_rate() {
        let fast = setup_script(Ipv4Addr::LOCALHOST, Rate::from_megabits(10_000));
        assert!(fast.contains("rate 10000000000bit burst 5000000 cburst 5000000"), "{fast}");
        let slow = setup_script(Ipv4Addr::LOCALHOST, Rate::from_megabits(100));
        assert!(slow.contains("rate 100000000bit burst 131072 "), "{slow}");
    }
}
