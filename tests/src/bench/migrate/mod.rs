//! Migrations of the micro guest on this host's KVM: Godwit beside QEMU, the codecs beside each other, the engine's memory,
//! and hand-overs of the memory itself. And migrations of a Debian under load in the nested lab, by each codec.
//!
//! Called by `xtask` with the list in [`plan`]. Contenders take turns over the same guest, content and link. The whole time
//! and the bytes are what each VMM reports of itself; the downtime is the gap in the guest's ticks, measured the same way
//! for all of them ([`crate::silence`]); processor time and memory are read from `/proc` by `usage`, but in the lab, where
//! to look would take much of a processor: there the time is what Godwit reports. A contender that cannot take its turn
//! says why and has no figures.

pub(in crate::bench) mod by_godwit;
mod by_qemu;
pub mod cell;
pub mod content;
mod distance;
mod guest_shell;
mod idleness;
pub mod load;
pub mod plan;
mod qmp;
pub(in crate::bench) mod random;
pub mod real_guest;
mod stage;
pub mod trip;
mod usage;
mod warmth;
pub(in crate::bench) mod wire;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{Figure, Summary, machine};
use cell::{Contender, Guest, Heat, Link, Micro, Part};
use content::Contents;
pub use stage::Programs;
use stage::Stage;
use trip::Baggage;
use wire::Wire;

/// What one turn showed.
type Figures = BTreeMap<Figure, f64>;

/// The turns of one contender, or why one of them failed.
type Outcome = Result<Vec<Figures>, String>;

/// What is told of a heat.
#[derive(Debug, Serialize, Deserialize)]
pub struct Told {
    /// The machine, in words.
    machine: String,
    /// Of each contender, in their order.
    outcomes: Vec<Outcome>,
}

/// What one contender showed in all its turns at one guest over one link.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// The question.
    pub part: Part,
    /// The link.
    pub link: Link,
    /// The guest, in words.
    pub guest: String,
    /// The contender.
    pub contender: String,
    /// What its program says of its version.
    pub version: String,
    /// The machine, in words.
    pub machine: String,
    /// How many turns the figures are of.
    pub n: usize,
    /// The figures. None of them where a turn failed.
    pub figures: BTreeMap<Figure, Summary>,
    /// Why it has no figures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

impl Cell {
    /// The middle value of a figure.
    pub fn median(&self, figure: Figure) -> Option<f64> {
        self.figures.get(&figure).map(|summary| summary.median)
    }
}

/// Makes the turns.
#[derive(Debug)]
pub struct Bench {
    programs: Programs,
    contents: Contents,
    baggage: Baggage,
    work: PathBuf,
    machine: String,
}

impl Bench {
    /// With contents that are kept in one folder, what goes into labs, and an empty folder for everything else.
    pub fn new(programs: Programs, contents: Contents, baggage: Baggage, work: &Path) -> Self {
        Self { programs, contents, baggage, work: work.to_owned(), machine: machine::describe() }
    }

    /// Has all contenders of a heat take their turns. `index` is the heat's own.
    pub fn run(&self, heat: &Heat, index: usize) -> Vec<Cell> {
        let told = match &heat.guest {
            Guest::Micro(guest) => self.stage(heat, guest, index).map(|stage| {
                let outcomes = take_turns(heat, |contender, turn| take_turn(&stage, contender, turn));
                Told { machine: self.machine.clone(), outcomes }
            }),
            Guest::Debian(_) => trip::make(&self.baggage, heat),
        };
        let Told { machine, outcomes } = told.unwrap_or_else(|error| {
            let outcomes = heat.contenders.iter().map(|_| Err(format!("{error:#}"))).collect();
            Told { machine: self.machine.clone(), outcomes }
        });
        let cells = heat.contenders.iter().zip(outcomes);
        cells.map(|(contender, outcome)| self.cell(heat, contender, &machine, outcome)).collect()
    }

    fn stage<'a>(&'a self, heat: &Heat, guest: &'a Micro, index: usize) -> Result<Stage<'a>> {
        let file = |(content, mib)| self.contents.file(content, mib);
        let content = guest.content.map(file).transpose()?;
        let work = self.work.join(format!("heat-{index}"));
        std::fs::create_dir_all(&work)?;
        let wire = Wire::lay(heat.link)?;
        Ok(Stage { programs: &self.programs, link: heat.link, wire, guest, content, work })
    }

    fn cell(&self, heat: &Heat, contender: &Contender, machine: &str, outcome: Outcome) -> Cell {
        let (turns, why) = match outcome {
            Ok(turns) => (turns, None),
            Err(why) => (Vec::new(), Some(why)),
        };
        let program = match contender {
            Contender::Godwit { .. } => &self.programs.godwit,
            Contender::Qemu(_) => &self.programs.qemu,
            Contender::Iperf => &self.programs.iperf,
        };
        Cell {
            part: heat.part,
            link: heat.link,
            guest: heat.guest.name(),
            contender: contender.name(),
            version: version(program).unwrap_or_else(|error| format!("{error:#}")),
            machine: machine.to_owned(),
            n: turns.len(),
            figures: sum_up(&turns),
            why,
        }
    }
}

/// Has each contender take its turns; after one that failed it takes no more.
fn take_turns(heat: &Heat, mut take: impl FnMut(&Contender, usize) -> Result<Figures>) -> Vec<Outcome> {
    let mut outcomes: Vec<Outcome> = heat.contenders.iter().map(|_| Ok(Vec::new())).collect();
    let mut turn = 0;
    for _ in 0..heat.runs {
        for (contender, outcome) in heat.contenders.iter().zip(&mut outcomes) {
            turn += 1;
            let Ok(turns) = outcome else { continue };
            match take(contender, turn) {
                Ok(figures) => turns.push(figures),
                Err(error) => *outcome = Err(format!("{error:#}")),
            }
        }
    }
    outcomes
}

fn take_turn(stage: &Stage<'_>, contender: &Contender, turn: usize) -> Result<Figures> {
    match contender {
        Contender::Godwit { name: _, options } => by_godwit::migrate(stage, options, turn),
        Contender::Qemu(variant) => by_qemu::migrate(stage, *variant, turn),
        Contender::Iperf => by_godwit::iperf(stage, turn),
    }
}

fn sum_up(turns: &[Figures]) -> BTreeMap<Figure, Summary> {
    let mut values: BTreeMap<Figure, Vec<f64>> = BTreeMap::new();
    for (figure, value) in turns.iter().flatten() {
        values.entry(*figure).or_default().push(*value);
    }
    values.into_iter().filter_map(|(figure, values)| Some((figure, Summary::of(values)?))).collect()
}

/// The first line of what a program answers to `--version`.
fn version(program: &Path) -> Result<String> {
    let output = Command::new(program).arg("--version").output();
    let output = output.with_context(|| format!("Cannot start {}", program.display()))?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned())
}

/// Bytes in a time as 10^6 bytes per second.
fn per_second(bytes: u64, time: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "2^53 bytes are more than any machine moves")]
    let bytes = bytes as f64;
    bytes / 1e6 / time.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::cell::Guest;
    use super::*;

    #[test]
    fn turns_alternate_and_a_failure_ends_ones_own() {
        let contenders = vec![Contender::godwit("a", ""), Contender::Iperf];
        let guest = Guest::Micro(Micro { name: "g".to_owned(), memory_mib: 64, content: None, words: String::new() });
        let heat = Heat { part: Part::Codecs, link: Link::Loopback, guest, contenders, runs: 3 };
        let order = std::cell::RefCell::new(Vec::new());
        let outcomes = take_turns(&heat, |contender, turn| {
            order.borrow_mut().push((contender.name(), turn));
            if turn == 3 {
                bail!("no reason")
            }
            Ok(Figures::from([(Figure::CpuS, f64::from(u32::try_from(turn)?))]))
        });
        let names: Vec<_> = order.borrow().iter().map(|(name, turn)| format!("{name} {turn}")).collect();
        assert_eq!(names, ["godwit a 1", "iperf3 2", "godwit a 3", "iperf3 4", "iperf3 6"]);
        assert_eq!(outcomes[0], Err("no reason".to_owned()));
        let summed = sum_up(outcomes[1].as_ref().unwrap());
        assert_eq!(summed[&Figure::CpuS].values, [2.0, 4.0, 6.0]);
    }

    #[test]
    fn a_cell_is_one_object() {
        let cell = Cell {
            part: Part::AgainstQemu,
            link: Link::Gigabit,
            guest: "g".to_owned(),
            contender: "qemu plain".to_owned(),
            version: "QEMU emulator version 7.2".to_owned(),
            machine: "m".to_owned(),
            n: 1,
            figures: sum_up(&[Figures::from([(Figure::MigrationMs, 2.5)])]),
            why: None,
        };
        let text = serde_json::to_string(&cell).unwrap();
        let figures = "\"figures\":{\"migration-ms\":{\"median\":2.5,\"min\":2.5,\"max\":2.5,\"values\":[2.5]}}}";
        assert!(
            text.starts_with("{\"part\":\"against-qemu\",\"link\":\"1gbit\",") && text.ends_with(figures),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<Cell>(&text).unwrap(), cell);
    }
}
