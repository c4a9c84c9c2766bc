//! Guests stay off the first processor of an emulated lab.
//!
//! QEMU's software emulator keeps what it knows of nested guests (is this processor in one, are interrupts held back
//! globally) in the flags `hflags2` of each processor. Whenever *any* processor restores its floating-point registers,
//! `cpu_clear_ignne` (target/i386/tcg/sysemu/fpu_helper.c, QEMU 7.2) reads and writes these flags of the *first* one,
//! without a lock. If the first processor enters or leaves a guest at that moment, its change is lost. It was seen to run
//! on in the host with the guest's nested paging, and so to leave the guest twice; KVM then enters the guest with the
//! host's registers. Within some tens of moves a guest ends by a triple fault, or the lab hangs. So an emulated lab has
//! one processor more than it was asked for, and what the harness starts never runs on the first.

use anyhow::{Context, Result, ensure};
use rustix::thread::{sched_getaffinity, sched_setaffinity};

/// Keeps this process, and all that it starts from now on, off the first processor.
pub(super) fn keep_off_first_processor() -> Result<()> {
    let mut processors = sched_getaffinity(None).context("read the processors")?;
    processors.unset(0);
    ensure!(processors.count() > 0, "there is only one");
    sched_setaffinity(None, &processors).context("leave the first one")
}
