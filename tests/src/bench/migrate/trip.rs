//! Takes a heat with a real guest into a nested lab, where `super::real_guest` moves it, and brings back what was seen.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Told;
use super::cell::Heat;
use super::real_guest::BOOT_WITHIN;
use crate::demo::IMAGES;
use crate::lab::wire::End;
use crate::lab::{CONSOLE_LINES, Event, Lab, Running};

/// Two guests, and copies of all that the first one has sent.
const LAB_MEMORY_MIB: u32 = 3072;

/// How long a turn may take on average: the move, and what is looked at before and after it.
const TURN_WITHIN: Duration = Duration::from_secs(60);

/// Paths in the lab.
const LAB_SCENARIOS: &str = "/lab/scenarios";
const LAB_GODWIT: &str = "/lab/godwit";
const LAB_IMAGES: &str = "/lab/images";
const LAB_DISK: &str = "/lab/disks/debian.img";

/// What is brought along.
#[derive(Debug, Clone)]
pub struct Baggage {
    /// The folder with the binaries `scenarios`, `godwit` and `lab-agent`.
    pub binaries: PathBuf,
    /// Makes the images for guests with the binaries, or finds them: a folder with `vmlinux` and `initramfs`.
    pub images: fn(&Path) -> Result<PathBuf>,
    /// Makes the `debian` image, or finds it: a folder with `debian.img`.
    pub debian: fn() -> Result<PathBuf>,
}

/// Boots a lab for the heat.
pub(super) fn make(baggage: &Baggage, heat: &Heat) -> Result<Told> {
    let Baggage { binaries, images, debian } = baggage;
    let (images, debian) = (images(binaries)?, debian()?);
    let turns = heat.runs * heat.contenders.len();
    let limit = BOOT_WITHIN * 2 + TURN_WITHIN * u32::try_from(turns).context("So many turns never end")?;
    let mut builder = Lab::builder()
        .memory_mib(LAB_MEMORY_MIB)
        .lifetime(limit + BOOT_WITHIN)
        .file(binaries.join("scenarios"), LAB_SCENARIOS)
        .file(binaries.join("godwit"), LAB_GODWIT)
        .disk(debian.join("debian.img"), LAB_DISK);
    for image in IMAGES {
        builder = builder.file(images.join(image), &format!("{LAB_IMAGES}/{image}"));
    }
    let lab = builder.boot()?;
    let heat = serde_json::to_string(heat)?;
    let argv =
        [LAB_SCENARIOS, "bench-real-guest", "--godwit", LAB_GODWIT, "--images", LAB_IMAGES, "--heat", heat.as_str()];
    let told = follow(lab.command(&argv).timeout(limit).spawn()?);
    let mut told =
        told.with_context(|| format!("Last lines of the lab's console:\n{}", lab.console_tail(CONSOLE_LINES)))?;
    told.machine = format!("nested lab by {}: {}", lab.accelerator(), told.machine);
    lab.power_off()?;
    Ok(told)
}

/// Passes on what is said of each turn, and waits for the outcomes.
fn follow(mut running: Running) -> Result<Told> {
    running.input().end()?;
    let (mut outcomes, mut complaints) = (Vec::new(), Vec::new());
    loop {
        match running.event(Duration::from_secs(1))? {
            Some(Event::Stdout(bytes)) => outcomes.extend(bytes),
            Some(Event::Stderr(bytes)) => {
                std::io::stderr().write_all(&bytes)?;
                complaints.extend(bytes);
            }
            Some(Event::Ended(End::Exited(0))) => break,
            Some(Event::Ended(end)) => bail!("{end:?} in the lab: {}", String::from_utf8_lossy(&complaints)),
            None => {}
        }
    }
    serde_json::from_slice(&outcomes).context("The lab tells no outcomes")
}
