//! Where the workspace and its binaries are, and how cargo is called in it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The root of the workspace.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a folder of the workspace")
}

/// The folder of the built binaries, of which this program is one.
pub(crate) fn binaries() -> Result<PathBuf> {
    let own = std::env::current_exe().context("Cannot find the running program")?;
    Ok(own.parent().context("A program lies in a folder")?.to_path_buf())
}

/// The cargo that started this program, to run in the root of the workspace.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(root());
    command
}

/// Builds what the arguments of `cargo build --release` name.
pub(crate) fn build(what: &[&str]) -> Result<()> {
    eprintln!("Building {}", what.join(" "));
    let status = cargo(&["build", "--release", "--quiet"]).args(what).status().context("Cannot start cargo")?;
    ensure!(status.success(), "cargo build {} failed ({status})", what.join(" "));
    Ok(())
}
