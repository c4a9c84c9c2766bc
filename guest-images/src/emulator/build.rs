//! Debian's own QEMU, built from its source with one change.
//!
//! Called by the recipe. QEMU delivers an interrupt that a nested guest was given by VMRUN twice now and then, and that
//! guest is lost (`inject-once.patch` has the story). Everything comes from one suite of Debian: the source, and the Meson
//! that it asks for, which may be newer than the one that this machine could install. The emulator has the devices of
//! `lab.mak` and hardly a feature, so that it is built in two or three minutes on two processors. Firmware is not built.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use thiserror::Error;

use super::PROGRAM;
use crate::apt::{DPKG_DEV, Sources};
use crate::cache::{Cache, Key};
use crate::command;
use crate::mirror::Mirror;

const GCC: &str = "gcc";
const NINJA: &str = "ninja-build";
const PYTHON: &str = "python3-venv";
/// Debian packages that building takes. GLib's brings pkg-config and zlib's.
pub(super) const PACKAGES: &[&str] = &[DPKG_DEV, GCC, "libc6-dev", "libglib2.0-dev", NINJA, PYTHON];

const PATCH: &str = include_str!("inject-once.patch");
const DEVICES: &str = include_str!("lab.mak");
/// Where the build looks for the list of devices that `--with-devices-x86_64=lab` names.
const DEVICES_PLACE: &str = "configs/devices/x86_64-softmmu/lab.mak";
/// Where Debian's packages have Python modules.
const MODULES: &str = "usr/lib/python3/dist-packages";
/// Whatever is not named is left out, also where this machine has the library for it. Optimization stays at Debian's -O2.
const OPTIONS: &[&str] = &[
    // Debian's Python, for which the modules are, whatever else is in the path.
    "--python=/usr/bin/python3",
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--without-default-devices",
    "--with-devices-x86_64=lab",
    "--enable-tcg",
    "--disable-fdt",
    "--disable-download",
    "--disable-install-blobs",
    "--disable-debug-info",
    "--enable-trace-backends=nop",
    "--with-pkgversion=one interrupt, one delivery",
];
const REVISION: &str = "1";

/// The source of QEMU is not what the patch was made for.
///
/// It has been mended elsewhere, or has changed: either way somebody must look at the patch, so there is no falling back.
#[derive(Debug, Error)]
#[error("guest-images/src/emulator/inject-once.patch does not fit the source of QEMU any more")]
pub(super) struct Unfit(#[source] anyhow::Error);

/// The emulator's program, built from the source in a suite of Debian when it is not in the cache.
pub(super) fn program(cache: &Cache, suite: &str) -> Result<PathBuf> {
    let key = OPTIONS.iter().fold(Key::new().with(REVISION).with(PATCH).with(DEVICES), Key::with);
    let entry = cache.get("emulator", &format!("{suite}-patched"), key, |into| {
        let sources = Sources::fetch(&Mirror::of_this_machine()?.with_source(suite)?)?;
        let folder = tempfile::tempdir_in(into)?;
        let [source, tools, build] = ["source", "tools", "build"].map(|name| folder.path().join(name));
        sources.unpack(&sources.candidate("meson")?, &tools)?;
        sources.unpack_source("qemu", &source)?;
        patch(&source)?;
        fs::write(source.join(DEVICES_PLACE), DEVICES)
            .context("The source of QEMU has no place for a list of devices")?;
        fs::create_dir(&build)?;
        tracing::info!("building QEMU, which takes minutes");
        let modules = tools.join(MODULES);
        let inside = |program: &Path| {
            let mut command = Command::new(program);
            command.current_dir(&build).env("PYTHONPATH", &modules);
            command
        };
        command::run(inside(&source.join("configure")).args(OPTIONS), GCC)?;
        command::run(inside(Path::new("ninja")).arg(PROGRAM), NINJA)?;
        Ok(fs::rename(build.join(PROGRAM), into.join(PROGRAM))?)
    })?;
    Ok(entry.join(PROGRAM))
}

/// Changes the source, or says that it cannot be done as it was meant.
fn patch(source: &Path) -> Result<()> {
    let file = tempfile::NamedTempFile::new().context("Cannot make a temporary file")?;
    fs::write(file.path(), PATCH)?;
    let mut command = Command::new("patch");
    // No guessing: the lines around the change must be those that it was made for.
    command.args(["--strip=1", "--fuzz=0", "--forward", "--batch", "--directory"]).arg(source);
    command.arg("--input").arg(file.path());
    command::run(&mut command, "patch").map_err(Unfit)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATCHED: &str = "target/i386/tcg/system/svm_helper.c";
    const CURE: &str = "            cs->exception_index = -1;\n";

    /// What the patch finds, with `lines` of something else before it.
    fn source(lines: usize) -> tempfile::TempDir {
        let hunk = PATCH.lines().skip_while(|line| !line.starts_with("@@")).skip(1);
        let found: String = hunk.filter_map(|line| line.strip_prefix(' ')).map(|line| format!("{line}\n")).collect();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(PATCHED);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "/* a line */\n".repeat(lines) + &found).unwrap();
        folder
    }

    #[test]
    fn the_vector_is_forgotten_after_the_injection() {
        let source = source(400);
        patch(source.path()).unwrap();
        let patched = fs::read_to_string(source.path().join(PATCHED)).unwrap();
        let (_, rest) = patched.split_once("do_interrupt_x86_hardirq(env, vector, 1);\n").unwrap();
        assert!(rest.starts_with(CURE), "{patched}");
        assert_eq!(patched.matches(CURE).count(), 1);
    }

    #[test]
    fn a_source_that_has_changed_is_refused() {
        let changed = source(3);
        let path = changed.path().join(PATCHED);
        fs::write(&path, fs::read_to_string(&path).unwrap().replace("env, vector, 1", "env, vector, 0")).unwrap();
        let mended = source(3);
        patch(mended.path()).unwrap();
        let moved = tempfile::tempdir().unwrap();
        for source in [&changed, &mended, &moved] {
            let error = patch(source.path()).context("Cannot build").unwrap_err();
            assert!(error.is::<Unfit>(), "{error:#}");
        }
    }
}
