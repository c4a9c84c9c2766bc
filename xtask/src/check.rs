//! `cargo xtask check`: everything that can be said about the sources without running them.
//!
//! All checks run, whatever the first ones say; a tool that is not on this machine is named, not passed over.

use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::workspace::cargo;

/// One check: its name, cargo's arguments, and the arguments that tell whether its tool is there at all.
struct Check {
    name: &'static str,
    arguments: &'static [&'static str],
    probe: &'static [&'static str],
}

const CHECKS: [Check; 6] = [
    Check { name: "format", arguments: &["fmt", "--all", "--check"], probe: &["fmt", "--version"] },
    Check {
        name: "format of fuzz",
        arguments: &["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"],
        probe: &["fmt", "--version"],
    },
    Check {
        name: "lints",
        arguments: &["clippy", "--release", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"],
        probe: &["clippy", "--version"],
    },
    Check {
        name: "documentation",
        arguments: &["doc", "--release", "--quiet", "--workspace", "--no-deps", "--document-private-items"],
        probe: &["--version"],
    },
    Check {
        name: "dependencies",
        arguments: &["deny", "--log-level", "error", "check", "--hide-inclusion-graph", "bans", "licenses", "sources"],
        probe: &["deny", "--version"],
    },
    // On its own, because it is the one that needs the network.
    Check {
        name: "advisories",
        arguments: &["deny", "--log-level", "error", "check", "advisories"],
        probe: &["deny", "--version"],
    },
];

/// The documentation is for those who work on the tree and shows private items; links to them are right.
const DOCUMENTATION_FLAGS: &str = "-D warnings -A rustdoc::private_intra_doc_links";

enum Verdict {
    Ok,
    Failed,
    Absent,
}

/// Runs all checks and prints a line for each.
pub(crate) fn check() -> Result<ExitCode> {
    let mut verdicts = Vec::new();
    for Check { name, arguments, probe } in CHECKS {
        verdicts.push(run(name, &format!("cargo {}", arguments[0]), &mut cargo(probe), &mut cargo(arguments))?);
    }
    let mut typos = Command::new("typos");
    typos.current_dir(crate::workspace::root());
    verdicts.push(run("spelling", "typos", Command::new("typos").arg("--version"), &mut typos)?);
    let failed = verdicts.iter().any(|verdict| matches!(verdict, Verdict::Failed));
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn run(name: &str, tool: &str, probe: &mut Command, command: &mut Command) -> Result<Verdict> {
    let probed = probe.stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !probed.is_ok_and(|status| status.success()) {
        println!("absent  {name:<14} {tool} is not installed; this check did not run");
        return Ok(Verdict::Absent);
    }
    let start = Instant::now();
    // What the tools have to say are complaints; standard output is for the verdicts.
    command.env("RUSTDOCFLAGS", DOCUMENTATION_FLAGS).stdout(std::io::stderr());
    let status = command.status().with_context(|| format!("Cannot run {tool}"))?;
    let verdict = if status.success() { "ok    " } else { "FAILED" };
    println!("{verdict}  {name:<14} {:6.1} s", start.elapsed().as_secs_f64());
    Ok(if status.success() { Verdict::Ok } else { Verdict::Failed })
}
