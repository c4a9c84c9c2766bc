//! A Debian under load that is moved there and back between two hosts of the nested lab, as often as there are turns.
//!
//! Called in the lab by the binary `scenarios`, for `super::trip`. The hosts are network namespaces, joined at the rate of
//! the heat's link. The guest is booted once: which turn is whose changes what it holds less than a boot does. It has one
//! vCPU, so that an emulated lab of two processors has one for those who move it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use control::{CpuTimes, MigrationStatus};

use super::by_godwit::{account, order};
use super::cell::{Contender, Debian, Guest, Heat};
use super::guest_shell::Shell;
use super::stage::MOVE_WITHIN;
use super::{Figures, Told, take_turns};
use crate::bench::{Figure, machine};
use crate::godwit::Godwit;
use crate::network::{HostName, Hosts, Link};
use crate::scenario::Context;
use crate::traveller::host_tsc_parameter;

/// How long the guest may take from its boot to its shell. In a lab every instruction is emulated.
pub(super) const BOOT_WITHIN: Duration = Duration::from_secs(300);

/// Has all contenders of a heat move its guest. `context` has the images, and `debian.img` among the disks.
pub fn run(context: &Context, heat: &Heat) -> Result<Told> {
    let Guest::Debian(guest) = heat.guest else { bail!("A micro guest is not for the lab") };
    let link = Link { rate: heat.link.rate(), ..Link::default() };
    let hosts = Hosts::join(2, &link)?;
    let mut journey = Journey::set_out(context, guest, hosts.names())?;
    let outcomes = take_turns(heat, |contender, turn| journey.take_turn(contender, turn));
    // Whoever has harmed the guest: its last check is that of all moves.
    let outcomes = match journey.arrive() {
        Ok(()) => outcomes,
        Err(error) => outcomes.into_iter().map(|outcome| outcome.and_then(|_| Err(format!("{error:#}")))).collect(),
    };
    Ok(Told { machine: machine::describe(), outcomes })
}

/// The guest on its way.
#[derive(Debug)]
struct Journey<'a> {
    context: &'a Context,
    guest: Debian,
    /// The host where it is, and the other one.
    ways: [HostName; 2],
    home: Godwit,
    shell: Shell,
    /// What was wrong with it after a move. It is not worth a figure any more then.
    harm: Option<String>,
}

impl<'a> Journey<'a> {
    /// Boots the guest at the first host, and waits until it works.
    fn set_out(context: &'a Context, guest: Debian, hosts: &[HostName]) -> Result<Self> {
        let begun = Instant::now();
        let &[here, there] = hosts else { bail!("A guest moves between two hosts, not {}", hosts.len()) };
        let path = |path: PathBuf| path.display().to_string();
        let (kernel, initramfs) = (path(context.images.join("vmlinux")), path(context.images.join("initramfs")));
        let disk = format!("path={}", path(context.disk("debian.img")));
        let memory = format!("{}M", guest.memory_mib);
        let words = format!("console=ttyS0 quiet panic=1 {} godwit.root=/dev/vda", host_tsc_parameter());
        let machine = ["--kernel", &kernel, "--initramfs", &initramfs, "--cmdline", &words, "--memory", &memory];
        let home = Godwit::run(&on_host(context, here)?, "boot", &[&machine[..], &["--disk", &disk]].concat())?;
        let mut shell = Shell::log_in(home.console()?, BOOT_WITHIN).context("The guest has not booted")?;
        let booted = begun.elapsed();
        shell.ask(&guest.load.begin()).context("The guest's load has not begun")?;
        eprintln!(
            "  It has booted after {:.0} s and works after {:.0} s",
            booted.as_secs_f32(),
            begun.elapsed().as_secs_f32()
        );
        Ok(Self { context, guest, ways: [here, there], home, shell, harm: None })
    }

    fn take_turn(&mut self, contender: &Contender, turn: usize) -> Result<Figures> {
        let options = match contender {
            Contender::Godwit { name: _, options } => options,
            Contender::Qemu(_) | Contender::Iperf => bail!("Only Godwit moves guests in the lab"),
        };
        if let Some(harm) = &self.harm {
            bail!("The guest was not well after an earlier move: {harm}");
        }
        let begun = Instant::now();
        let moved = self.travel(options, turn);
        // Wherever it is: it must be heard there, too.
        if let Err(error) = self.shell.ask(&self.guest.load.healthy()) {
            self.harm = Some(format!("{error:#}"));
            return Err(moved.err().unwrap_or(error).context("The guest is not well after the move"));
        }
        let (status, downtime) = moved?;
        eprintln!("  {}: {} of {:.0} s in all", contender.name(), status.total_ms, begun.elapsed().as_secs_f32());
        let mut figures = account(&status, downtime);
        figures.extend(status.cpu.and_then(cpu_s).map(|seconds| (Figure::CpuS, seconds)));
        Ok(figures)
    }

    /// Moves the guest to the other host: what the source tells, and how long the guest did not tick.
    fn travel(&mut self, options: &[String], turn: usize) -> Result<(MigrationStatus, Duration)> {
        let [here, there] = self.ways;
        let address = format!("tcp://{}:0", there.address());
        let target = Godwit::receive_at(&on_host(self.context, there)?, &format!("turn{turn}"), &address, &[])?;
        let arrival = target.console()?;
        self.shell.tick()?;
        let status = match order(self.context, &self.home, &target, options) {
            Ok(status) => status,
            Err(error) => {
                // The guest has stayed where it is, or else it does not answer.
                return Err(match self.shell.hush() {
                    Ok(()) => error,
                    Err(deaf) => error.context(deaf),
                });
            }
        };
        std::mem::replace(&mut self.home, target).finish(MOVE_WITHIN)?.expect(0, "The guest has moved to")?;
        self.ways = [there, here];
        let downtime = self.shell.move_to(arrival)?;
        Ok((status, downtime))
    }

    /// Ends the load, looks at all of it, and ends the guest.
    fn arrive(mut self) -> Result<()> {
        self.shell.ask(&self.guest.load.end()).context("The guest is not well after all moves")?;
        self.home.end()
    }
}

/// A `godwit` that has a host's network.
fn on_host(context: &Context, host: HostName) -> Result<Context> {
    context.within(&format!("on-{host}"), &format!("exec {}", host.prefix().join(" ")))
}

/// Processor time of both ends.
fn cpu_s(CpuTimes { source_ms, target_ms }: CpuTimes) -> Option<f64> {
    let [source, target] = [source_ms?, target_ms?].map(Duration::from);
    Some((source + target).as_secs_f64())
}
