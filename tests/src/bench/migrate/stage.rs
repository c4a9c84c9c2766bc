//! Where a turn is taken: the programs, the link that is laid, and the guest.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};
use guest_images::micro::Line;

use super::cell::{Link, Micro};
use super::wire::{End, Wire};
use crate::console::Console;
use crate::scenario::Context;

/// How long a VMM may take until its guest works, and the guest until it has looked at its memory.
pub(super) const BOOT_WITHIN: Duration = Duration::from_secs(60);
/// How long a migration may take: 30 rounds of the largest working set on the slowest link that it is moved over.
pub(super) const MOVE_WITHIN: Duration = Duration::from_secs(300);
/// How long a guest works before it is moved.
pub(super) const WORK: Duration = Duration::from_millis(300);

/// The programs that are compared.
#[derive(Debug, Clone)]
pub struct Programs {
    /// The `godwit` binary.
    pub godwit: PathBuf,
    /// QEMU.
    pub qemu: PathBuf,
    /// iperf3.
    pub iperf: PathBuf,
    /// The micro guest.
    pub kernel: PathBuf,
}

/// What a turn has.
#[derive(Debug)]
pub(super) struct Stage<'a> {
    pub(super) programs: &'a Programs,
    pub(super) link: Link,
    pub(super) wire: Wire,
    pub(super) guest: &'a Micro,
    /// The guest's initrd.
    pub(super) content: Option<PathBuf>,
    /// A folder of the heat's own.
    pub(super) work: PathBuf,
}

impl Stage<'_> {
    /// A `godwit` at an end of the wire; its processes live in a folder of the turn below the heat's.
    pub(super) fn godwit(&self, end: End, turn: usize) -> Result<Context> {
        let work = self.work.join(turn.to_string());
        std::fs::create_dir_all(&work)?;
        let context = Context { godwit: self.programs.godwit.clone(), images: PathBuf::new(), work };
        let name = match end {
            End::Source => "godwit-at-source",
            End::Target => "godwit-at-target",
        };
        context.within(name, &format!("exec {}", self.wire.prefix(end).join(" ")))
    }
}

/// Waits until the guest has begun its work.
pub(super) fn await_work(console: &mut Console) -> Result<()> {
    console.find("the guest's first tick", BOOT_WITHIN, |line| match Line::parse(&line.text) {
        Line::Tick { .. } => Some(Ok(())),
        Line::Refused(why) => Some(Err(anyhow::anyhow!("The guest refuses: {why}"))),
        _ => None,
    })?
}

/// Has the guest look at all its pages where it is now: a move that damages them is not worth a figure.
pub(super) fn verify(console: &mut Console) -> Result<()> {
    console.say("v")?;
    let found = console.find("the guest's verdict", BOOT_WITHIN, |line| match Line::parse(&line.text) {
        Line::Verified { .. } => Some(None),
        // What is wrong with the clock, which some KVMs do not restore, is no matter of the pages.
        Line::Bad(what) if !what.starts_with("clock") => Some(Some(what)),
        _ => None,
    })?;
    match found {
        None => Ok(()),
        Some(what) => bail!("The guest has a damaged page after the move: {what}"),
    }
}

/// A path as an argument.
pub(super) fn text(path: &Path) -> String {
    path.display().to_string()
}
