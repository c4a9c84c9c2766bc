//! `cargo xtask fuzz`: feeds the fuzz targets of `fuzz/` with libFuzzer's inputs for a while, and fails when one crashes.
//!
//! It needs no nightly compiler. What cargo-fuzz adds to libFuzzer's own instrumentation is AddressSanitizer, which is
//! nightly's; nothing that is fuzzed here has unsafe code of its own. Corpora stay in `target/fuzz`, so that the next run
//! goes on where this one ended.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};

use crate::packages;
use crate::workspace::{cargo, root};

/// The host's, because sanitizers and the flags below must not reach build scripts.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// LLVM's coverage for libFuzzer: counters of edges, their addresses, and the operands of comparisons.
const INSTRUMENTATION: &str = "-Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares \
    --cfg fuzzing";

/// The longest input: a few pages and what is around them.
const MAX_INPUT: usize = 20_000;

/// One input may take this long, in seconds; it takes microseconds.
const SLOW: u32 = 10;

/// The most memory of a target, in MiB: twice what packing a block at the dearest level takes.
const MEMORY_MIB: u32 = 512;

/// What to fuzz.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// One target only.
    #[arg(long)]
    target: Option<Target>,
    /// How long to feed each target.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
}

/// The targets, by the names of their programs.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Target {
    /// Headers and bodies of frames.
    Frame,
    /// Run-length coded pages.
    Rle,
    /// Deltas of pages.
    Delta,
    /// Packed blocks.
    Block,
    /// Records and a block, applied to memory.
    Decode,
}

impl Target {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// Builds and feeds the targets, one after the other, and prints a line for each.
pub(crate) fn fuzz(options: &Options) -> Result<ExitCode> {
    packages::ensure(&["g++"])?;
    let folder = root().join("target/fuzz");
    let programs = build(&folder)?;
    let all = Target::value_variants();
    let mut failed = false;
    for target in options.target.as_ref().map_or(all, std::slice::from_ref) {
        failed |= !feed(&target.name(), options.seconds, &folder, &programs)?;
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Builds all targets; the folder where they are.
fn build(folder: &Path) -> Result<PathBuf> {
    eprintln!("Building the fuzz targets");
    let mut command = cargo(&["build", "--release", "--quiet", "--manifest-path", "fuzz/Cargo.toml"]);
    command.args(["--target", TRIPLE, "--target-dir"]).arg(folder);
    // Instead of the flags of the workspace: libFuzzer is linked like any program of the host.
    command.env("CARGO_ENCODED_RUSTFLAGS", INSTRUMENTATION.split(' ').collect::<Vec<_>>().join("\x1f"));
    let status = command.status().context("Cannot start cargo")?;
    ensure!(status.success(), "The fuzz targets do not build ({status})");
    Ok(folder.join(TRIPLE).join("release"))
}

/// Feeds one target; whether it went well.
fn feed(name: &str, seconds: u32, folder: &Path, programs: &Path) -> Result<bool> {
    let corpus = folder.join("corpus").join(name);
    fs::create_dir_all(&corpus).with_context(|| format!("Cannot make the folder {}", corpus.display()))?;
    let log = folder.join(format!("{name}.log"));
    let output = File::create(&log).with_context(|| format!("Cannot write {}", log.display()))?;
    let mut command = Command::new(programs.join(name));
    command.arg(&corpus).arg(format!("-artifact_prefix={}/crash-of-{name}-", folder.display()));
    command.arg(format!("-max_total_time={seconds}")).arg(format!("-max_len={MAX_INPUT}"));
    // Long inputs from the start: a page is 4096 bytes, and libFuzzer would take a day to come to them.
    command.arg("-len_control=0");
    command.arg(format!("-timeout={SLOW}")).arg(format!("-rss_limit_mb={MEMORY_MIB}")).arg("-print_final_stats=1");
    eprintln!("Feeding {name} for {seconds} s");
    let status = command.stderr(output).status().with_context(|| format!("Cannot run the target {name}"))?;
    let said = fs::read(&log).with_context(|| format!("Cannot read {}", log.display()))?;
    let inputs = inputs(&String::from_utf8_lossy(&said));
    if status.success() {
        println!("ok      {name:<8} {inputs:>12} inputs");
    } else {
        println!("FAILED  {name:<8} {inputs:>12} inputs, {status}; {} tells which one", log.display());
    }
    Ok(status.success())
}

/// How many inputs there were, by libFuzzer's statistics.
fn inputs(log: &str) -> u64 {
    let line = log.lines().rev().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    line.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_counted_by_libfuzzer() {
        let log = "Done 7 runs in 1 second(s)\nstat::number_of_executed_units: 7\nstat::average_exec_per_sec:     3\n";
        assert_eq!((inputs(log), inputs("killed")), (7, 0));
    }

    /// A target that nobody runs guards nothing.
    #[test]
    fn every_target_is_known() {
        let files = fs::read_dir(root().join("fuzz/fuzz_targets")).unwrap();
        let mut files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
        files.sort();
        let mut names: Vec<_> = Target::value_variants().iter().map(|target| target.name()).collect();
        names.sort();
        assert_eq!(files.iter().map(|file| file.file_stem().unwrap().to_str().unwrap()).collect::<Vec<_>>(), names);
    }
}
