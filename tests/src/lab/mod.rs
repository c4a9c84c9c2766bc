//! The nested lab: a whole Linux machine in QEMU, with a KVM that runs stock guests, on any Linux host.
//!
//! Who needs Linux guests or networks with delay where the host has neither boots a lab, runs commands in it and drops
//! it. One lab is one QEMU process with Debian's cloud kernel; its init is this package's agent ([`crate::agent`]),
//! which takes commands over a virtio-serial port ([`wire`]). Nothing outlives a lab: dropping it kills and reaps QEMU
//! and removes its files; QEMU dies with the harness; each command, each boot and each lab has a time limit.

mod builder;
mod channel;
mod command;
mod libraries;
mod machine;
pub(crate) mod root;
pub mod wire;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

pub use builder::{AGENT_VARIABLE, LabBuilder};
use channel::Channel;
pub use channel::Event;
pub use command::{COMMAND_TIMEOUT, Input, LabCommand, Output, Running};
pub use libraries::program_with_libraries;
use machine::Machine;
use wire::{Frame, Kind, Ready};

use crate::network::{HostName, Link, setup_script};
use crate::place::Accelerator;

/// Lines of the console that are worth reading when something failed.
pub const CONSOLE_LINES: usize = 100;

/// How long a lab may take to switch itself off.
const POWER_OFF_WAIT: Duration = Duration::from_secs(20);

/// A running lab.
#[derive(Debug)]
pub struct Lab {
    channel: Arc<Channel>,
    machine: Machine,
    ready: Ready,
    accelerator: Accelerator,
    boot_time: Duration,
}

impl Lab {
    /// Describes a lab to boot.
    pub fn builder() -> LabBuilder {
        LabBuilder::new()
    }

    /// A command to run in the lab: program and arguments.
    pub fn command(&self, argv: &[impl AsRef<str>]) -> LabCommand {
        let argv = argv.iter().map(|word| word.as_ref().to_owned()).collect();
        LabCommand::new(self.channel.clone(), argv)
    }

    /// Runs a command to its end, for at most [`COMMAND_TIMEOUT`].
    pub fn run(&self, argv: &[impl AsRef<str>]) -> Result<Output> {
        self.command(argv).run()
    }

    /// Starts a command.
    pub fn spawn(&self, argv: &[impl AsRef<str>]) -> Result<Running> {
        self.command(argv).spawn()
    }

    /// Makes hosts in the lab and joins them by a network. Once per lab.
    pub fn hosts(&self, count: usize, link: &Link) -> Result<Vec<LabHost>> {
        let names = HostName::first(count)?;
        let made = self.run(&["/bin/sh", "-c", &setup_script(&names, link)])?;
        made.checked().context("Cannot join hosts by a network")?;
        Ok(names.into_iter().map(|name| LabHost { name, channel: self.channel.clone() }).collect())
    }

    /// Whether the lab has `/dev/kvm`.
    pub fn has_kvm(&self) -> bool {
        self.ready.kvm
    }

    /// What did not work while it booted, in words.
    pub fn problems(&self) -> &[String] {
        &self.ready.problems
    }

    /// How QEMU runs it.
    pub fn accelerator(&self) -> Accelerator {
        self.accelerator
    }

    /// From the start of QEMU to the moment it accepted commands.
    pub fn boot_time(&self) -> Duration {
        self.boot_time
    }

    /// The last lines of its kernel's console, and of QEMU's own complaints before them.
    pub fn console_tail(&self, lines: usize) -> String {
        self.machine.console_tail(lines)
    }

    /// Switches it off the polite way. Only dropping it is just as thorough; this tells whether it still could.
    pub fn power_off(self) -> Result<()> {
        self.channel.send(&Frame::bare(Kind::PowerOff, 0))?;
        let ended = self.machine.await_end(Instant::now() + POWER_OFF_WAIT);
        ensure!(ended, "The lab did not switch itself off:\n{}", self.console_tail(CONSOLE_LINES));
        Ok(())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("Last lines of the lab's console:\n{}", self.console_tail(CONSOLE_LINES));
        }
    }
}

/// One of the hosts that a lab joined by a network.
#[derive(Debug, Clone)]
pub struct LabHost {
    name: HostName,
    channel: Arc<Channel>,
}

impl LabHost {
    /// Its name and address.
    pub fn name(&self) -> HostName {
        self.name
    }

    /// A command to run on this host.
    pub fn command(&self, argv: &[impl AsRef<str>]) -> LabCommand {
        let words = argv.iter().map(|word| word.as_ref().to_owned());
        LabCommand::new(self.channel.clone(), self.name.prefix().into_iter().chain(words).collect())
    }

    /// Runs a command on this host to its end, for at most [`COMMAND_TIMEOUT`].
    pub fn run(&self, argv: &[impl AsRef<str>]) -> Result<Output> {
        self.command(argv).run()
    }

    /// Starts a command on this host.
    pub fn spawn(&self, argv: &[impl AsRef<str>]) -> Result<Running> {
        self.command(argv).spawn()
    }
}
