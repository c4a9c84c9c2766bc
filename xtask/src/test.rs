//! `cargo xtask test`: the unit and integration tests of all packages, then the scenarios, on this host and in the lab.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use godwit_tests::demo;
use godwit_tests::place::Choice;
use godwit_tests::scenario::{self, DISKS};
use godwit_tests::shipping::Plan;
use godwit_tests::tally::Tally;
use guest_images::{DEFAULT_CACHE, Images};
use tempfile::TempDir;

use crate::packages;
use crate::workspace::{binaries, build, cargo, root};

/// Enough for two guests of the scenarios at once, and little enough for a machine of 8 GiB.
const LAB_MEMORY_MIB: u32 = 3072;

/// What to test.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Only tests and scenarios with this in their names; may be given several times.
    #[arg(long)]
    filter: Vec<String>,
}

/// Runs the tests and prints the closing line.
pub(crate) fn test(options: &Options) -> Result<ExitCode> {
    let start = Instant::now();
    packages::ensure(&packages::for_test())?;
    let mut tally = cargo_test(&options.filter)?;
    tally += scenarios(options).unwrap_or_else(|error| {
        println!("FAIL  the scenarios did not run: {error:#}");
        Tally { passed: 0, failed: 1 }
    });
    eprintln!("Total time {:.1} s", start.elapsed().as_secs_f64());
    println!("{tally}");
    Ok(if tally.failed == 0 && tally.passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs `cargo test` and adds up the closing lines of all test binaries.
fn cargo_test(filters: &[String]) -> Result<Tally> {
    eprintln!("Building and running the tests of all packages");
    let mut command = cargo(&["test", "--release", "--workspace", "--no-fail-fast", "--"]);
    command.args(filters).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().context("Cannot start cargo")?;
    let output = child.stdout.take().context("Standard output is a pipe")?;
    let mut tally = Tally::default();
    for line in BufReader::new(output).lines() {
        let line = line?;
        match Tally::from_test_binary(&line) {
            Some(counted) => tally += counted,
            None if is_news(&line) => println!("{line}"),
            None => {}
        }
    }
    let status = child.wait()?;
    if !status.success() && tally.failed == 0 {
        println!("FAIL  cargo test ended with {status}, but no test failed: see above");
        tally.failed = 1;
    }
    Ok(tally)
}

/// Whether a line of a test binary says more than that a test passed.
fn is_news(line: &str) -> bool {
    let passed = line.starts_with("test ") && line.ends_with(" ... ok");
    !(passed || line.is_empty() || line.starts_with("running "))
}

fn scenarios(options: &Options) -> Result<Tally> {
    build(&["--workspace", "--bins"])?;
    let binaries = binaries()?;
    let images = scenario_images(&binaries)?;
    let choice = choose_place(&binaries, &images)?;
    let filters = options.filter.clone();
    Plan { binaries, images, debian: debian_disks, filters, choice, lab_memory_mib: LAB_MEMORY_MIB }.run()
}

/// Where Linux guests run: on this host if it has what they need and a trial boot succeeds, else in the lab.
pub(crate) fn choose_place(binaries: &Path, images: &Path) -> Result<Choice> {
    Choice::make(|| {
        let work = TempDir::with_prefix("godwit-trial-").context("Cannot make a folder for the trial boot")?;
        let (godwit, images) = (binaries.join("godwit"), images.to_owned());
        demo::trial(&scenario::Context { godwit, images, work: work.path().to_owned() })
    })
}

fn link(image: &Path, link: &Path) -> Result<()> {
    if link.is_symlink() {
        fs::remove_file(link)?;
    }
    symlink(image, link).with_context(|| format!("Cannot link {}", link.display()))
}

/// A folder with the images of the scenarios under their plain names, as links into the image cache.
pub(crate) fn scenario_images(binaries: &Path) -> Result<PathBuf> {
    let cache = root().join(DEFAULT_CACHE);
    let images = Images::open(&cache)?;
    let (tiny, micro) = (images.tiny(&binaries.join("verifier"))?, images.micro()?);
    let folder = scenario_folder("images")?;
    let images = [
        ("vmlinux", tiny.kernel.vmlinux()),
        ("vmlinuz", tiny.kernel.bzimage()),
        ("initramfs", tiny.initramfs),
        ("micro.elf", micro),
    ];
    for (name, image) in images {
        link(image.as_ref(), &folder.join(name))?;
    }
    Ok(folder)
}

/// The folder with the disk of the `debian` image and its key under their plain names, as links into the image cache.
pub(crate) fn debian_disks() -> Result<PathBuf> {
    let debian = Images::open(&root().join(DEFAULT_CACHE))?.debian(&binaries()?.join("verifier"))?;
    let folder = scenario_folder(DISKS)?;
    link(&debian.disk, &folder.join("debian.img"))?;
    link(&debian.ssh_key, &folder.join("ssh-key"))?;
    Ok(folder)
}

/// A folder of what scenarios use, in the image cache.
fn scenario_folder(name: &str) -> Result<PathBuf> {
    let folder = root().join(DEFAULT_CACHE).join("scenarios").join(name);
    fs::create_dir_all(&folder).with_context(|| format!("Cannot make {}", folder.display()))?;
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_failures_are_news() {
        for line in ["", "running 3 tests", "test lab::tests::it_boots ... ok"] {
            assert!(!is_news(line), "{line}");
        }
        for line in ["test lab::tests::it_boots ... FAILED", "failures:", "thread 'x' panicked at y:1:2:"] {
            assert!(is_news(line), "{line}");
        }
    }
}
