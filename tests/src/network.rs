//! Hosts on one wire: network namespaces joined by a switch, with a chosen delay, rate and loss between any two.
//!
//! Used by a lab ([`crate::lab::Lab::hosts`]) and by scenarios that run inside one ([`Hosts::join`]). Every host has a
//! veth pair whose other end is a port of one bridge, so frames are switched by address, as on a LAN: announcements of a
//! guest that moved have the effect that they have there. Each host delays what it sends by half a round trip; hence
//! two hosts see the whole of it, each way has the rate, and each way has the loss.

use std::fmt;
use std::net::Ipv4Addr;
use std::process::Command;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// Most hosts on one wire.
pub const MAX_HOSTS: usize = 9;

/// Packets that wait at a sender's shaper: enough for a second at 200 Mbit/s.
const LIMIT: u32 = 20_000;

const BRIDGE: &str = "wire";

/// What lies between two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Link {
    /// Time of a round trip.
    pub rtt: Duration,
    /// Speed in each direction; unlimited without one.
    pub rate: Option<Rate>,
    /// Share of packets lost in each direction.
    pub loss: Loss,
}

/// A speed on the wire in bits per second, written like `1gbit`, `100mbit`, `64kbit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate(u64);

impl Rate {
    /// So many million bits per second.
    pub const fn from_megabits(megabits: u32) -> Self {
        Self(megabits as u64 * 1_000_000)
    }

    /// Bits per second.
    pub const fn bits(self) -> u64 {
        self.0
    }
}

impl FromStr for Rate {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let units = [("gbit", 1_000_000_000), ("mbit", 1_000_000), ("kbit", 1_000), ("bit", 1)];
        let split = units.iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, *factor)));
        let parsed = split.and_then(|(number, factor)| number.parse::<u64>().ok()?.checked_mul(factor));
        match parsed {
            Some(bits) if bits > 0 => Ok(Self(bits)),
            _ => bail!("{text:?} is not a rate; write a whole number and a unit, like 1gbit, 100mbit or 64kbit"),
        }
    }
}

/// A share of lost packets, written like `0.1%`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Loss(f64);

impl FromStr for Loss {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.strip_suffix('%').and_then(|number| number.parse().ok()) {
            Some(percent) if (0.0..=100.0).contains(&percent) => Ok(Self(percent)),
            _ => bail!("{text:?} is not a loss; write a percentage from 0% to 100%, like 0.1%"),
        }
    }
}

impl Link {
    /// The words of tc's netem; none for a link that is nothing but a wire.
    fn netem(&self) -> Option<String> {
        if *self == Self::default() {
            return None;
        }
        let rate = self.rate.map(|rate| format!(" rate {}bit", rate.0)).unwrap_or_default();
        let loss = if self.loss.0 > 0.0 { format!(" loss {}%", self.loss.0) } else { String::new() };
        Some(format!("netem delay {}us limit {LIMIT}{rate}{loss}", self.rtt.as_micros() / 2))
    }
}

/// One host: its name is its network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostName(usize);

impl HostName {
    /// The first hosts of a wire: `a`, `b`, and so on.
    pub(crate) fn first(count: usize) -> Result<Vec<Self>> {
        ensure!((1..=MAX_HOSTS).contains(&count), "{count} hosts asked for; one wire joins 1 to {MAX_HOSTS}");
        Ok((0..count).map(Self).collect())
    }

    /// Its address, on the `/24` that all hosts share.
    pub fn address(self) -> Ipv4Addr {
        let last = u8::try_from(self.0 + 1).expect("HostName::first allows few hosts");
        Ipv4Addr::new(10, 77, 0, last)
    }

    /// What to put before a command so that it runs on this host. The path is whole because busybox's shell would
    /// otherwise take its own `ip`.
    pub fn prefix(self) -> Vec<String> {
        ["/usr/sbin/ip", "netns", "exec", &self.to_string()].map(str::to_owned).into()
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = u8::try_from(self.0).map_or('?', |number| char::from(b'a' + number));
        write!(f, "{letter}")
    }
}

/// The shell script that makes the hosts and joins them.
pub(crate) fn setup_script(hosts: &[HostName], link: &Link) -> String {
    let mut script = format!("set -e; ip=/usr/sbin/ip\n$ip link add {BRIDGE} type bridge\n$ip link set {BRIDGE} up\n");
    for host in hosts {
        script += &format!(
            "$ip netns add {host}\n\
             $ip link add {BRIDGE}-{host} type veth peer name eth0 netns {host}\n\
             $ip link set {BRIDGE}-{host} master {BRIDGE} up\n\
             $ip -n {host} link set lo up\n\
             $ip -n {host} address add {}/24 dev eth0\n",
            host.address()
        );
        if link.loss.0 > 0.0 {
            // Otherwise netem would count, and lose, a burst of up to 64 KiB as one packet.
            script += &format!("$ip -n {host} link set eth0 gso_max_segs 1\n");
        }
        script += &format!("$ip -n {host} link set eth0 up\n");
        if let Some(netem) = link.netem() {
            script += &format!("/usr/sbin/tc -n {host} qdisc add dev eth0 root {netem}\n");
        }
    }
    script
}

/// The shell script that removes what [`setup_script`] made.
fn removal_script(hosts: &[HostName]) -> String {
    let mut script = "ip=/usr/sbin/ip; status=0\n".to_owned();
    for host in hosts {
        // The veth pair would go with its namespace, but only some time later.
        script += &format!("$ip link delete {BRIDGE}-{host} || status=1\n$ip netns delete {host} || status=1\n");
    }
    script + &format!("$ip link delete {BRIDGE} || status=1\nexit $status\n")
}

/// Hosts made on the machine that this runs on; needs root, `ip`, `tc`, and a kernel with veth and netem, such as a
/// lab's. Dropping it removes them.
#[derive(Debug)]
pub struct Hosts {
    names: Vec<HostName>,
}

impl Hosts {
    /// Makes `count` hosts and joins them.
    pub fn join(count: usize, link: &Link) -> Result<Self> {
        let hosts = Self { names: HostName::first(count)? };
        // Where it fails half way, the drop of `hosts` removes the first half.
        run_script(&setup_script(&hosts.names, link)).context("Cannot join hosts by a network")?;
        Ok(hosts)
    }

    /// The hosts in order.
    pub fn names(&self) -> &[HostName] {
        &self.names
    }

    /// A command that will run on a host.
    pub fn command(&self, host: HostName, program: &str) -> Command {
        let prefix = host.prefix();
        let mut command = Command::new(&prefix[0]);
        command.args(&prefix[1..]).arg(program);
        command
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        if let Err(error) = run_script(&removal_script(&self.names)) {
            eprintln!("The hosts of the network were not all removed: {error:#}");
        }
    }
}

/// The fastest round trip in the report of busybox's ping, `round-trip min/avg/max = 16.123/16.456/17.789 ms`: the link's
/// own time, to which the others add what the machines were busy with.
pub fn fastest_ping(report: &str) -> Option<Duration> {
    let (_, times) = report.rsplit_once("round-trip min/avg/max = ")?;
    let milliseconds: f64 = times.split('/').next()?.parse().ok()?;
    Duration::try_from_secs_f64(milliseconds / 1000.0).ok()
}

fn run_script(script: &str) -> Result<()> {
    let output = Command::new("/bin/sh").args(["-c", script]).output().context("Cannot run /bin/sh")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_and_losses_are_read_or_refused_by_name() {
        assert_eq!("1gbit".parse::<Rate>().unwrap(), Rate(1_000_000_000));
        assert_eq!("64kbit".parse::<Rate>().unwrap(), Rate(64_000));
        assert_eq!("0.1%".parse::<Loss>().unwrap(), Loss(0.1));
        for text in ["", "gbit", "0mbit", "1.5gbit", "99999999999gbit", "-1mbit", "10"] {
            assert!(text.parse::<Rate>().unwrap_err().to_string().contains(&format!("{text:?}")), "{text}");
        }
        for text in ["", "%", "0.1", "101%", "-1%", "NaN%"] {
            assert!(text.parse::<Loss>().unwrap_err().to_string().contains(&format!("{text:?}")), "{text}");
        }
    }

    #[test]
    fn each_way_has_half_of_the_delay() {
        let link = Link { rtt: Duration::from_millis(16), rate: Some(Rate(1_000_000_000)), loss: Loss(0.1) };
        assert_eq!(link.netem().unwrap(), "netem delay 8000us limit 20000 rate 1000000000bit loss 0.1%");
        assert_eq!(Link::default().netem(), None);
        let delay_only = Link { rtt: Duration::from_millis(1), ..Link::default() };
        assert_eq!(delay_only.netem().unwrap(), "netem delay 500us limit 20000");
    }

    #[test]
    fn the_fastest_round_trip_is_read() {
        let report = "2 packets received\nround-trip min/avg/max = 16.500/17.000/18.250 ms\n";
        assert_eq!(fastest_ping(report), Some(Duration::from_micros(16_500)));
        assert_eq!(fastest_ping("0 packets received, 100% packet loss\n"), None);
    }

    #[test]
    fn the_number_of_hosts_has_bounds() {
        assert!(HostName::first(0).is_err());
        assert!(HostName::first(MAX_HOSTS + 1).unwrap_err().to_string().starts_with("10 hosts"));
        let names: Vec<String> = HostName::first(3).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(names, ["a", "b", "c"]);
        assert_eq!(HostName::first(2).unwrap()[1].address(), Ipv4Addr::new(10, 77, 0, 2));
    }
}
