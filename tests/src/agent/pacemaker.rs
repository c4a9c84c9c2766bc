//! Interrupts that come by themselves to every processor, so that one that the emulator loses is made good.
//!
//! QEMU's software emulator keeps "an interrupt is waiting" as a bit beside others in one word. Its emulation of #VMEXIT
//! clears another of these bits without the lock that the thread of the timers holds when it sets this one
//! (`do_vmexit` in target/i386/tcg/sysemu/svm_helper.c of QEMU 7.2), so once in some ten thousand times the bit is gone
//! while the local APIC still has the interrupt. The next interrupt sets it again; but a processor that waits for its
//! one-shot timer gets no next one, and sleeps for ever. An emulated lab therefore has a disk that answers at a slow,
//! steady rate, with a queue and an interrupt for each processor, and two threads per processor that keep reading it.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::thread;

use anyhow::{Context, Result};
use rustix::fs::OFlags;
use rustix::thread::{CpuSet, sched_setaffinity};

/// Threads per processor: while one's answer is lost, the other's is on its way.
const READERS: usize = 2;

/// What is read, and the alignment that direct reads need: one sector.
const SECTOR: usize = 512;

/// Starts the readers; the disk's answers go to the processor that asked.
pub(super) fn start(disk: &Path) -> Result<()> {
    for processor in 0..thread::available_parallelism()?.get() {
        for _ in 0..READERS {
            let disk = direct(disk)?;
            thread::Builder::new().name(format!("pace{processor}")).spawn(move || {
                if let Err(error) = keep_reading(&disk, processor) {
                    println!("Processor {processor} has no pacemaker any more: {error:#}");
                }
            })?;
        }
    }
    Ok(())
}

/// Opened so that every read goes to the disk itself.
fn direct(disk: &Path) -> Result<File> {
    let direct = i32::try_from(OFlags::DIRECT.bits())?;
    File::options().read(true).custom_flags(direct).open(disk).with_context(|| format!("open {}", disk.display()))
}

fn keep_reading(disk: &File, processor: usize) -> Result<()> {
    let mut own = CpuSet::new();
    own.set(processor);
    sched_setaffinity(None, &own).context("stay on it")?;
    let mut memory = vec![0; 2 * SECTOR];
    let from = memory.as_ptr().align_offset(SECTOR);
    let sector = memory.get_mut(from..from + SECTOR).context("align the memory")?;
    loop {
        disk.read_exact_at(sector, 0).context("read the disk")?;
    }
}
