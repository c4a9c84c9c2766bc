//! Measures how fast a running guest dirties its memory, and what is in that memory.
//!
//! ```text
//! begin --> Watching: the dirty log is on, a harvest each tenth of the period
//!              | the period is over, the log off
//!              v
//!           Sampling: some pages at a time are looked at --> DirtyRate
//! ```
//! The service takes a step whenever one is due, and does other things in between, so each step is short. Sampling comes
//! last, so that the guest is watched while it is disturbed by the log alone. Invariant: the log is on exactly while a
//! [`Measurement`] watches; each way out of that, an error too, switches it off. A migration begins with a log of its own,
//! so the service ends a measurement before one starts.

mod cost;
mod growth;
mod sample;

use crate::layout::PAGE_SIZE;
use crate::machine::{Machine, MachineError};
use crate::memory::{GuestMemory, MemoryError};
use control::{DirtyRate, MeasurementCost, MemorySample};
use cost::Cost;
use growth::{Growth, per_second};
use migration::DirtyLedger;
use sample::Sample;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How many times the log is harvested in a period.
const HARVESTS: u32 = 10;

/// Why a measurement failed.
#[derive(Debug, Error)]
pub enum MeasureError {
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The memory file, or the compressor.
    #[error("A sample of the memory could not be taken")]
    Compress(#[from] std::io::Error),
}

/// A sample of the memory, with nobody's writes watched.
pub(crate) fn sample(memory: &GuestMemory) -> Result<MemorySample, MeasureError> {
    let mut sample = Sample::new()?;
    while sample.step(memory)? {}
    Ok(sample.tally())
}

/// A measurement that is under way.
#[derive(Debug)]
pub struct Measurement(Stage);

#[derive(Debug)]
enum Stage {
    Watching(Box<Watch>),
    Sampling(Box<Sampling>),
}

/// What became of a measurement by a step.
#[derive(Debug)]
pub enum Step {
    /// It goes on.
    Unfinished(Measurement),
    /// It is over.
    Finished(DirtyRate),
}

/// The guest's writes, as far as they were watched.
#[derive(Debug)]
struct Watch {
    period: Duration,
    begun: Instant,
    growth: Growth,
    cost: Cost,
}

/// All that is known of the guest's writes, and the sample so far.
#[derive(Debug)]
struct Sampling {
    watched: Duration,
    growth: Growth,
    cost: Cost,
    sample: Sample,
}

impl Measurement {
    /// Begins to watch the writes of the guest on `machine` for `period`.
    ///
    /// # Errors
    /// [`MeasureError`] if there is no log; it is off then.
    pub fn begin(machine: &Machine, period: Duration) -> Result<Self, MeasureError> {
        let pages = machine.memory().pages_per_region();
        let mut cost = Cost::default();
        let started = cost.of_log(|| {
            machine.start_dirty_log()?;
            // What was written before, as this process keeps a record of its own writes at all times.
            machine.harvest_dirty(&mut DirtyLedger::new(&pages))
        });
        let watch = Watch { period, begun: Instant::now(), growth: Growth::new(&pages), cost };
        match started {
            Ok(()) => Ok(Self(Stage::Watching(Box::new(watch)))),
            Err(error) => {
                switch_off(machine);
                Err(error.into())
            }
        }
    }

    /// When the next step is due.
    #[must_use]
    pub fn due(&self) -> Instant {
        match &self.0 {
            Stage::Watching(watch) => watch.due(),
            Stage::Sampling(_) => Instant::now(),
        }
    }

    /// Takes the step that is due, on the machine on which it began.
    ///
    /// # Errors
    /// [`MeasureError`]; the log is off then.
    pub fn step(self, machine: &Machine) -> Result<Step, MeasureError> {
        match self.0 {
            Stage::Watching(watch) => watch.step(machine).map(|stage| Step::Unfinished(Self(stage))),
            Stage::Sampling(sampling) => sampling.step(machine),
        }
    }

    /// Ends it before its time. The log is off afterwards.
    pub fn abandon(self, machine: &Machine) {
        match self.0 {
            Stage::Watching(_) => switch_off(machine),
            Stage::Sampling(_) => {}
        }
    }
}

impl Watch {
    fn due(&self) -> Instant {
        self.begun + self.period * (self.growth.harvests() + 1) / HARVESTS
    }

    fn step(mut self: Box<Self>, machine: &Machine) -> Result<Stage, MeasureError> {
        let watched = self.begun.elapsed();
        let Self { growth, cost, .. } = &mut *self;
        if let Err(error) = cost.of_log(|| machine.harvest_dirty(growth.harvest())) {
            switch_off(machine);
            return Err(error.into());
        }
        growth.add_harvest(machine.written_by_vcpu().as_deref());
        if growth.harvests() < HARVESTS {
            return Ok(Stage::Watching(self));
        }
        let Self { period: _, begun: _, growth, mut cost } = *self;
        cost.of_log(|| machine.stop_dirty_log())?;
        Ok(Stage::Sampling(Box::new(Sampling { watched, growth, cost, sample: Sample::new()? })))
    }
}

/// Stops the log of a measurement that comes to nothing.
fn switch_off(machine: &Machine) {
    if let Err(error) = machine.stop_dirty_log() {
        // What ended the measurement is the reason to tell; a log that stays on costs only speed.
        tracing::warn!(error = migration::in_words(&error), "the dirty log stays on");
    }
}

impl Sampling {
    fn step(mut self: Box<Self>, machine: &Machine) -> Result<Step, MeasureError> {
        let Self { sample, cost, .. } = &mut *self;
        let more = cost.of_sample(|| sample.step(machine.memory()))?;
        Ok(if more { Step::Unfinished(Measurement(Stage::Sampling(self))) } else { Step::Finished(self.finish()) })
    }

    fn finish(self) -> DirtyRate {
        let Self { watched, growth, cost, sample } = self;
        let pages_per_second = per_second(growth.dirtied(), watched);
        DirtyRate {
            duration_ms: watched.into(),
            pages_per_second,
            bytes_per_second: pages_per_second.saturating_mul(PAGE_SIZE),
            working_set_pages: growth.working_set().to_vec(),
            vcpu_pages_per_second: growth
                .by_vcpu()
                .map(|counts| counts.iter().map(|count| per_second(*count, watched)).collect()),
            sample: sample.tally(),
            cost: MeasurementCost {
                protected_pages: growth.dirtied(),
                log_ms: cost.log.into(),
                longest_log_ms: cost.longest_log.into(),
                cpu_ms: cost.cpu.into(),
            },
        }
    }
}
