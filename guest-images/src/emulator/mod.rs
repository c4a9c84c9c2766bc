//! The `emulator` recipe: a QEMU whose software emulation bears a nested lab.
//!
//! Two faults of QEMU lose nested guests. Every version that Debian has may deliver an interrupt twice, so QEMU is built
//! from Debian's source with that cured (`build.rs`): from the release's own where that is 8.1 or newer, else from the
//! next one's. Versions before 8.1, as Debian 12 has one, can also keep the translation of code that another processor has
//! changed since ("accel/tcg: Always lock pages before translation", QEMU 8.1). So where nothing can be built and the
//! installed QEMU is older, a newer one is taken from the release's backports and unpacked beside the system. The libraries
//! that it needs are those of the installed one; so is the firmware of the one that is built.

mod build;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::apt::Sources;
use crate::cache::{Cache, Key};
use crate::command;
use crate::mirror::{Mirror, codename};

/// Debian packages that must be installed: QEMU with its libraries, and the key of the archive.
pub const PACKAGES: &[&str] = &["qemu-system-x86", "debian-archive-keyring"];
/// Debian packages that building takes besides, where a lab must be emulated.
pub const BUILD_PACKAGES: &[&str] = build::PACKAGES;
const PROGRAM: &str = "qemu-system-x86_64";
/// The first version whose translations can be relied on.
const SOUND: (u32, u32) = (8, 1);
/// The release of Debian whose QEMU is built where the installed one is older.
const NEWER_RELEASE: &str = "trixie";
/// The emulator of backports, and the firmware that its machines need.
const UNPACKED: &[&str] = &["qemu-system-x86", "qemu-system-data", "seabios"];
/// Where those have the firmware, below their root or, installed, the system's.
const FIRMWARE: &[&str] = &["usr/share/qemu", "usr/share/seabios"];
const REVISION: &str = "1";

/// A QEMU for x86-64.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Emulator {
    program: PathBuf,
    firmware: Vec<PathBuf>,
}

impl Emulator {
    /// The one that is installed.
    pub fn installed() -> Self {
        Self { program: PathBuf::from(PROGRAM), firmware: Vec::new() }
    }

    pub(crate) fn find(cache: &Cache) -> Result<Self> {
        let told = command::run(Command::new(PROGRAM).arg("--version"), PACKAGES[0])?;
        let version = version(&told).with_context(|| format!("`{PROGRAM} --version` tells no version: {told}"))?;
        let error = match Self::built(cache, version) {
            Err(error) if !error.is::<build::Unfit>() => error,
            built => return built,
        };
        tracing::warn!("QEMU cannot be built, so an emulated guest may be lost now and then: {error:#}");
        if version >= SOUND {
            return Ok(Self::installed());
        }
        Self::backported(cache).or_else(|error| {
            tracing::warn!(
                "QEMU {}.{} is installed, whose emulation of several processors is not sound, and no newer one can be had: \
                 {error:#}",
                version.0,
                version.1
            );
            Ok(Self::installed())
        })
    }

    fn built(cache: &Cache, installed: (u32, u32)) -> Result<Self> {
        let release = if installed >= SOUND { codename()? } else { NEWER_RELEASE.to_owned() };
        let program = build::program(cache, &release)?;
        Ok(Self { program, firmware: FIRMWARE.iter().map(|folder| Path::new("/").join(folder)).collect() })
    }

    fn backported(cache: &Cache) -> Result<Self> {
        let codename = codename()?;
        let entry = cache.get("emulator", &codename, Key::new().with(REVISION), |into| {
            let sources = Sources::fetch(&Mirror::of_this_machine()?.backports()?)?;
            UNPACKED.iter().try_for_each(|package| sources.unpack(&sources.candidate(package)?, into))
        })?;
        let firmware = FIRMWARE.iter().map(|folder| entry.join(folder)).collect();
        Ok(Self { program: entry.join("usr/bin").join(PROGRAM), firmware })
    }

    /// What to start.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Options that must come first: where its firmware is.
    pub fn options(&self) -> impl Iterator<Item = &Path> {
        self.firmware.iter().flat_map(|folder| [Path::new("-L"), folder])
    }
}

fn version(told: &str) -> Option<(u32, u32)> {
    let number = told.strip_prefix("QEMU emulator version ")?.split_whitespace().next()?;
    let mut parts = number.split('.').map(str::parse);
    Some((parts.next()?.ok()?, parts.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        let told = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003-2022 x\n";
        assert_eq!(version(told), Some((7, 2)));
        assert!(version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)") > Some(SOUND));
        assert!(version("QEMU emulator version 8.0.4") < Some(SOUND));
        assert_eq!(version("QEMU emulator version git"), None);
        assert_eq!(version("bash 5"), None);
    }
}
