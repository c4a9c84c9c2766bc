//! The benches behind `cargo xtask bench`: what is measured, on the host by `xtask` itself and in the lab by the binary
//! `scenarios`, and how figures are summed up.
//!
//! Nothing here judges: a slow machine is no failure. Goals are put beside the figures by `xtask`.

pub mod boot;
pub mod disk;
pub mod downtime;
pub mod machine;
pub mod migrate;

use serde::{Deserialize, Serialize};

/// What kind of thing a series measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Figure {
    /// From exec to the first byte on the serial port, in milliseconds.
    FirstByteMs,
    /// Resident memory of the process without the guest's, in MiB.
    ResidentMib,
    /// From exec to the line of the guest's init, in milliseconds.
    InitMs,
    /// The longest time without a tick around a live migration, in milliseconds.
    DowntimeMs,
    /// From the start of a migration to its end, in milliseconds.
    MigrationMs,
    /// What went through the link, in 10^6 bytes.
    LinkMb,
    /// Processor time of both ends but that of vCPUs, in seconds.
    CpuS,
    /// Bytes of guest pages that are not zero, or of a stream's payload, in 10^6 bytes per second.
    RateMbS,
    /// The most memory that either end had resident beside the guest's, in MiB.
    MemoryMib,
}

/// The VMM that was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vmm {
    /// This project.
    Godwit,
    /// The peer, as its machine `microvm`.
    Qemu,
}

/// One series of measurements of one thing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// What it is.
    pub figure: Figure,
    /// The guest, in words.
    pub guest: String,
    /// The VMM.
    pub vmm: Vmm,
    /// The machine, in words.
    pub machine: String,
    /// How many runs.
    pub n: usize,
    /// The middle one.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// All of them, in the order of the runs.
    pub values: Vec<f64>,
}

impl Series {
    /// Sums up; `None` without any value.
    pub fn new(figure: Figure, guest: &str, vmm: Vmm, values: Vec<f64>) -> Option<Self> {
        let Summary { median, min, max, values } = Summary::of(values)?;
        let (guest, machine, n) = (guest.to_owned(), machine::describe(), values.len());
        Some(Self { figure, guest, vmm, machine, n, median, min, max, values })
    }
}

/// Values of one figure, summed up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The middle one.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// All of them, in the order of the runs.
    pub values: Vec<f64>,
}

impl Summary {
    /// Sums up, to three decimals; `None` without any value.
    pub fn of(values: Vec<f64>) -> Option<Self> {
        let values: Vec<f64> = values.into_iter().map(|value| (value * 1e3).round() / 1e3).collect();
        let mut sorted = values.clone();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        // Of an even number the lower one of the middle: a value that was measured.
        let median = sorted[(sorted.len() - 1) / 2];
        Some(Self { median, min, max, values })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_is_summed_up() {
        let series = Series::new(Figure::InitMs, "g", Vmm::Qemu, vec![3.0, 1.0, 2.0, 10.0]).unwrap();
        assert_eq!((series.n, series.median, series.min, series.max), (4, 2.0, 1.0, 10.0));
        assert!(Series::new(Figure::InitMs, "g", Vmm::Qemu, Vec::new()).is_none());
        let text = serde_json::to_string(&series).unwrap();
        assert!(text.starts_with("{\"figure\":\"init-ms\",\"guest\":\"g\",\"vmm\":\"qemu\",\"machine\":"), "{text}");
        assert_eq!(serde_json::from_str::<Series>(&text).unwrap(), series);
    }
}
