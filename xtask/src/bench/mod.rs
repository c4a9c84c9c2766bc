//! `cargo xtask bench`: measures what the project promises, beside QEMU, and prints figures and goals. It fails only
//! where it cannot measure anything at all.

mod boot;
mod disk;
mod journal;
mod migrate;
mod plot;
mod promises;
mod results;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};
use godwit_tests::bench::migrate::content::Contents;
use godwit_tests::table;
use guest_images::DEFAULT_CACHE;
use serde::Serialize;

use crate::workspace::root;

/// Debian's QEMU.
const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// What to measure.
#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Boot times and resident memory beside QEMU, and the downtime of live migrations.
    Boot(boot::Options),
    /// What a disk's requests cost, without a guest.
    Disk(disk::Options),
    /// Migrations beside QEMU, codecs beside each other, the engine's memory, long ways, hand-overs within the host, and a
    /// Debian under load in the lab.
    Migrate(migrate::Options),
}

/// Measures and prints.
pub(crate) fn bench(options: &Options) -> Result<ExitCode> {
    match &options.bench {
        Bench::Boot(options) => boot::bench(options),
        Bench::Disk(options) => disk::bench(options),
        Bench::Migrate(options) => migrate::bench(options),
    }
}

/// What guests are given to hold; kept between runs.
fn contents() -> Result<Contents> {
    Contents::in_folder(&root().join(DEFAULT_CACHE).join("contents"))
}

/// A promise and what was measured.
#[derive(Debug, Serialize)]
struct Row {
    what: &'static str,
    goal: Option<f64>,
    figure: Option<f64>,
    ok: bool,
    /// Why there is no figure, or no goal.
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
}

impl Row {
    /// Holds when there is a figure and it is at most the goal.
    fn at_most(what: &'static str, goal: Option<f64>, figure: Option<f64>) -> Self {
        let ok = goal.zip(figure).is_some_and(|(goal, figure)| figure <= goal);
        Self { what, goal, figure, ok, why: None }
    }

    /// Holds when there is a figure and it is at least the goal.
    fn at_least(what: &'static str, goal: Option<f64>, figure: Option<f64>) -> Self {
        let ok = goal.zip(figure).is_some_and(|(goal, figure)| figure >= goal);
        Self { what, goal, figure, ok, why: None }
    }
}

/// The promises for people.
fn promise_table(rows: &[Row]) -> String {
    let heads = ["holds", "figure", "goal", "what"].map(str::to_owned);
    let number = |number: Option<f64>| number.map_or_else(|| "-".to_owned(), |number| format!("{number:.2}"));
    let lines = rows.iter().map(|Row { what, goal, figure, ok, why }| {
        let holds = if *ok { "yes" } else { "NO" };
        let why = why.as_ref().map(|why| format!(" ({why})")).unwrap_or_default();
        [holds.to_owned(), number(*figure), number(*goal), format!("{what}{why}")]
    });
    table::aligned(&std::iter::once(heads).chain(lines).collect::<Vec<_>>())
}

/// The name that a value has in JSON.
fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        other => format!("{other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_needs_a_goal_and_a_figure() {
        assert!(Row::at_most("x", Some(2.0), Some(2.0)).ok && !Row::at_most("x", Some(2.0), Some(2.1)).ok);
        assert!(Row::at_least("x", Some(2.0), Some(2.0)).ok && !Row::at_least("x", Some(2.0), Some(1.9)).ok);
        for (goal, figure) in [(None, Some(1.0)), (Some(1.0), None), (None, None)] {
            assert!(!Row::at_most("x", goal, figure).ok && !Row::at_least("x", goal, figure).ok);
        }
        let row = Row { why: Some("no KVM".to_owned()), ..Row::at_most("x", Some(1.0), None) };
        assert!(promise_table(&[row]).contains("NO     -       1.00  x (no KVM)"));
    }
}
