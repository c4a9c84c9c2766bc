//! What the API tells about a migration. The VMM fills these from the reports of the migration engine, which this crate
//! does not know.

use crate::address::PeerAddress;
use crate::millis::Millis;
use serde::{Deserialize, Serialize};
use std::fmt;
use uuid::Uuid;

/// The name of a piece of long work, such as a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(pub Uuid);

impl JobId {
    /// A name nobody else has.
    #[must_use]
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whether the guest runs while its memory moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationMode {
    /// The guest runs, changed pages are sent again in rounds, and only the last round stops it.
    Live,
    /// The guest is stopped first, then everything is sent once.
    Stop,
}

/// Which end of the migration this Godwit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationRole {
    /// The guest was here.
    Source,
    /// The guest comes here.
    Target,
}

/// How a migration stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationState {
    /// Under way.
    Active,
    /// The guest runs at the target.
    Completed,
    /// It failed; the guest is still the source's.
    Failed,
    /// It was cancelled; the guest is still the source's.
    Cancelled,
    /// The answer to the hand-over was lost. Nobody runs the guest until it is settled.
    InDoubt,
}

/// What a migration is doing, in the order in which it does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationStep {
    /// Reaching the other end.
    Connecting,
    /// Comparing versions, CPU, memory and disks.
    Negotiating,
    /// Sending rounds while the guest runs.
    Precopy,
    /// The guest stands still: last pages and the state of vCPUs and devices.
    Stopped,
    /// Ready, go, running.
    HandOver,
    /// The guest has its new owner, or its old one for good.
    Ended,
}

/// The part of a migration's status that changes while it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What it is doing.
    pub step: MigrationStep,
    /// The round under way, from 1; 0 before the first.
    pub round: u32,
    /// Pages sent in all rounds, zero pages included.
    pub pages_sent: u64,
    /// Those of them that were zero and travelled as a mark only.
    pub zero_pages: u64,
    /// Bytes that went through the link.
    pub bytes_sent: u64,
    /// Bytes of guest memory that are known to be still to send.
    pub remaining_bytes: u64,
    /// How fast the link takes bytes, lately.
    pub bytes_per_second: u64,
    /// The downtime if the guest were stopped now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_downtime_ms: Option<Millis>,
}

/// One finished round.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundInfo {
    /// From 1.
    pub round: u32,
    /// Pages sent in it, zero pages included.
    pub pages: u64,
    /// Those of them that were zero.
    pub zero_pages: u64,
    /// Bytes that went through the link.
    pub bytes: u64,
    /// How long it took.
    pub duration_ms: Millis,
    /// Pages that were dirty again at its end.
    pub dirty_pages: u64,
}

/// How one migration stands or ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationStatus {
    /// Its name.
    pub job: JobId,
    /// Which end this is.
    pub role: MigrationRole,
    /// The other end as it was given: where to connect to, or where was listened.
    pub peer: PeerAddress,
    /// Live or stopped.
    pub mode: MigrationMode,
    /// How it stands.
    pub state: MigrationState,
    /// How far it is.
    pub progress: Progress,
    /// The finished rounds, in order.
    pub rounds: Vec<RoundInfo>,
    /// How long nobody ran the guest, as this host measured it. Known once the guest runs again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<Millis>,
    /// How long it took so far.
    pub total_ms: Millis,
    /// Why it failed, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The answer to "how does the migration stand".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastMigration {
    /// The current migration, or the last one. Absent if there never was one in this process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationStatus>,
}
