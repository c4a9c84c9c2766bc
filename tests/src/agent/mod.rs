//! The agent: process 1 of a lab machine, and the server that the harness speaks to.
//!
//! Process 1 brings the machine up ([`boot`]), starts itself again as the server ([`serve`]), and from then on only reaps
//! orphans. When the server ends, for whatever reason, the machine is switched off, so a broken lab never lingers. The
//! binary `lab-agent` is nothing but a call of [`main`].

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use rustix::process::{Pid, WaitOptions};
use rustix::system::{RebootCommand, reboot};

use crate::lab::root::BYSTANDER;

mod anchor;
mod boot;
mod bystander;
mod program;
mod serve;

/// Runs the agent: as init in process 1, as the server when asked by init.
pub fn main() -> ExitCode {
    if std::process::id() == 1 {
        if let Err(error) = init() {
            println!("The lab could not start: {error:#}");
        }
        rustix::fs::sync();
        let error = reboot(RebootCommand::PowerOff);
        println!("The lab could not be switched off: {error:?}");
        return ExitCode::FAILURE;
    }
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() != Some("serve") {
        eprintln!("lab-agent is the init of a lab machine and does nothing elsewhere");
        return ExitCode::from(2);
    }
    match serve::serve(arguments.collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("The lab's agent gave up: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Brings the machine up, starts the server, and reaps until the server has ended.
fn init() -> Result<()> {
    if std::env::var_os(BYSTANDER).is_some() {
        bystander::keep_off_first_processor().context("keep off the first processor")?;
    }
    let mut problems = boot::boot()?;
    let anchor = anchor::Anchor::cast();
    problems.extend(anchor.as_ref().err().map(|error| format!("KVM is not held steady: {error:#}")));
    let server = Command::new("/proc/self/exe").arg("serve").args(problems).spawn()?;
    let server = i32::try_from(server.id()).ok().and_then(Pid::from_raw);
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((ended, _))) if Some(ended) == server => return Ok(()),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
