//! Guests that have nothing to do.
//!
//! The micro guest knows no interrupts, so that it waits for its next tick by looking at its clock: it takes a whole processor,
//! and on a machine of two that is one of those that a migration works on. An idle guest halts. So the vCPUs of one that
//! writes nothing run at idle priority (`SCHED_IDLE`, sched(7)): they take what nobody else wants.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::cell::Micro;
use super::usage::vcpu_threads;

/// Has the guest in the VMM of this process be idle, if it has nothing to do.
pub(super) fn let_idle(guest: &Micro, pid: u32) -> Result<()> {
    if !guest.is_idle() {
        return Ok(());
    }
    let vcpus = vcpu_threads(pid);
    ensure!(!vcpus.is_empty(), "Process {pid} has no vCPU that could be idle");
    for vcpu in vcpus {
        let status = Command::new("chrt").args(["--idle", "--pid", "0", &vcpu.to_string()]).status();
        let status = status.context("Cannot start chrt")?;
        ensure!(status.success(), "A vCPU cannot be given idle priority ({status})");
    }
    Ok(())
}
