//! What the API tells about a measurement of how fast the guest dirties its memory, and what is in that memory. The VMM
//! fills these from its own types, which this crate does not know.

use crate::migration::JobId;
use crate::millis::Millis;
use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;
use std::time::Duration;

/// The body that starts a measurement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeasureDirtyRate {
    /// How long the guest's writes are watched, in milliseconds; within [`PERIOD_MS`](Self::PERIOD_MS).
    #[serde(default = "MeasureDirtyRate::default_period_ms")]
    pub period_ms: u32,
}

impl MeasureDirtyRate {
    /// The periods that can be asked for, in milliseconds: each of its tenths should be long against the time to look at
    /// the log, and the guest should not pay for ever.
    pub const PERIOD_MS: RangeInclusive<u32> = 100..=60_000;

    /// The period.
    #[must_use]
    pub fn period(&self) -> Duration {
        Duration::from_millis(self.period_ms.into())
    }

    const fn default_period_ms() -> u32 {
        1000
    }
}

impl Default for MeasureDirtyRate {
    fn default() -> Self {
        Self { period_ms: Self::default_period_ms() }
    }
}

/// How a measurement stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MeasurementState {
    /// Under way.
    Active,
    /// It came to its end.
    Completed,
    /// It was ended before its time. The guest is as it would be without it.
    Failed,
}

/// How one measurement stands or ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeasurementStatus {
    /// Its name.
    pub job: JobId,
    /// How it stands.
    pub state: MeasurementState,
    /// How long it was to take.
    pub period_ms: Millis,
    /// What was found. Known when it has completed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found: Option<DirtyRate>,
    /// Why it failed, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// How fast a guest dirties its memory, and what is in it. Pages have 4 KiB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtyRate {
    /// How long the guest's writes were watched.
    pub duration_ms: Millis,
    /// Pages dirtied per second: each page counts once in a tenth of the period in which it was written.
    pub pages_per_second: u64,
    /// The same in bytes.
    pub bytes_per_second: u64,
    /// The writable working set: different pages that were dirtied after each tenth of the period. The last one is that
    /// of the whole period.
    pub working_set_pages: Vec<u64>,
    /// Pages dirtied per second by each vCPU, without those that devices wrote. Absent with the dirty log, which does not
    /// know it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpu_pages_per_second: Option<Vec<u64>>,
    /// What a sample of the memory holds.
    pub sample: MemorySample,
    /// What the measurement cost.
    pub cost: MeasurementCost,
}

/// Pages taken evenly from all memory that the host backs, and what they hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemorySample {
    /// How many pages.
    pub pages: u64,
    /// Those of them that hold nothing but zeroes.
    pub zero_pages: u64,
    /// Those of the others that hold the same as one before them in the sample. In all of the memory there may be more.
    pub duplicate_pages: u64,
    /// Bytes of the pages that are not zero, compressed by LZ4 in blocks of up to 64 pages.
    pub lz4_bytes: u64,
    /// The same by Zstandard of level 1.
    pub zstd_bytes: u64,
}

impl MemorySample {
    /// Pages that are not zero.
    #[must_use]
    pub fn data_pages(&self) -> u64 {
        self.pages.saturating_sub(self.zero_pages)
    }
}

/// What a measurement took from guest and host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeasurementCost {
    /// Pages that were write-protected again after a write was noticed. The guest leaves its CPU for KVM at the next write
    /// to each of them, and at the first write to any page at all.
    pub protected_pages: u64,
    /// The time that KVM needed to switch the log on and off, and to tell and protect pages. A vCPU that writes to a
    /// protected page meanwhile waits for it.
    pub log_ms: Millis,
    /// The longest of these times without a break.
    pub longest_log_ms: Millis,
    /// CPU time that the VMM spent on all of it, the sample included.
    pub cpu_ms: Millis,
}

/// The answer to "what did the measurement find".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastDirtyRate {
    /// The measurement under way, or the last one. Absent if there never was one in this process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measurement: Option<MeasurementStatus>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_measurement_takes_a_second_unless_asked_otherwise() {
        let parsed: MeasureDirtyRate = serde_json::from_str("{}").unwrap();
        assert_eq!((parsed.period(), parsed), (Duration::from_secs(1), MeasureDirtyRate::default()));
        assert!(serde_json::from_str::<MeasureDirtyRate>(r#"{"period":1}"#).is_err());
    }
}
