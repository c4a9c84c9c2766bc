//! What the API tells about a migration. The VMM fills these from the reports of the migration engine, which this crate
//! does not know.

use crate::address::PeerAddress;
use crate::identity::{NoRandomness, random_uuid};
use crate::millis::Millis;
use crate::transfer::{Codecs, MemoryTransfer};
use serde::{Deserialize, Serialize};
use std::fmt;
use uuid::Uuid;

/// The name of a piece of long work, such as a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(pub Uuid);

impl JobId {
    /// A name nobody else has.
    ///
    /// # Errors
    /// [`NoRandomness`] if the host gives no random bytes.
    pub fn random() -> Result<Self, NoRandomness> {
        random_uuid().map(Self)
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
    /// Pausing the guest, and capturing the state of its vCPUs and devices.
    Pausing,
    /// The guest stands still: the last pages.
    LastPages,
    /// Sending that state, and having it restored.
    Restoring,
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
    /// How much of its time is taken from the guest, so that it dirties its memory more slowly. Absent while nothing is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttled_percent: Option<u8>,
    /// The downtime as it was predicted when the source decided to pause the guest.
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
    /// Its pages by the way they went.
    pub kinds: RoundKinds,
    /// Pages that were dirty again at its end. Only the source knows it before the migration is over.
    pub dirty_pages: u64,
    /// The codecs that most of its pages went by, and why. Only the source knows it before the migration is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub codec: Option<RoundCodecs>,
}

/// What most pages of a round went by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundCodecs {
    /// The codecs.
    pub codecs: Codecs,
    /// Why these.
    pub why: CodecReason,
    /// How fast the link took bytes, where the codecs were chosen by measurements.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_bytes_per_second: Option<u64>,
}

/// Why pages went by certain codecs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CodecReason {
    /// They were asked for.
    Asked,
    /// Nothing was measured yet.
    Unmeasured,
    /// Only to see what they gain.
    Trial,
    /// The link takes pages faster than they can be packed.
    FastLink,
    /// The link is slower than packing.
    SlowLink,
    /// The link is slow, and pages are short without packing.
    ShortPages,
    /// The link is slow, but pages do not pack.
    NothingGained,
    /// More would take more processor time than it may.
    Budget,
}

impl fmt::Display for CodecReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Asked => "as asked",
            Self::Unmeasured => "nothing was measured yet",
            Self::Trial => "a trial",
            Self::FastLink => "the link takes pages faster than they pack",
            Self::SlowLink => "the link is slower than packing",
            Self::ShortPages => "the link is slow, and pages are short without packing",
            Self::NothingGained => "the link is slow, but pages do not pack",
            Self::Budget => "more would be over the CPU budget",
        })
    }
}

/// The pages of a round, by the way they went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundKinds {
    /// As they are.
    pub raw: u64,
    /// Zero: no content was sent.
    pub zero: u64,
    /// Whole, in a block, which may be packed.
    pub plain: u64,
    /// As runs of equal words.
    pub rle: u64,
    /// As changes to what was sent before.
    pub delta: u64,
    /// As references to other pages.
    pub copy: u64,
    /// Of a disk, as digests, which the target compares with an old copy that it has.
    pub kept: u64,
    /// Not at all: the target has them already as they are. Only the source knows of these before the migration is over.
    pub same: u64,
}

/// How long one step took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepInfo {
    /// The step.
    pub step: MigrationStep,
    /// How long it took.
    pub duration_ms: Millis,
}

/// Why a live migration stopped to send rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SwitchReason {
    /// The downtime was predicted to hold.
    GoalMet,
    /// No more rounds were allowed.
    RoundLimit,
    /// More rounds would not have brought the goal nearer.
    Stalled,
    /// No time was left until the deadline.
    Deadline,
}

/// What the rounds of a live migration took from the guest while it ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestCost {
    /// How long the host needed to tell dirty pages and to watch them again, in all. A vCPU that writes to a page meanwhile
    /// may have to wait.
    pub log_ms: Millis,
    /// The longest of these times without a break.
    pub longest_log_ms: Millis,
    /// How long vCPUs were kept from running, summed over all of them.
    pub throttled_ms: Millis,
    /// The same in percent of the time that all vCPUs had since they were first throttled.
    pub throttled_percent: u8,
    /// The most that was taken at a time from the guest as a whole, in percent.
    pub most_percent: u8,
}

/// Processor time of the threads that moved the guest, user and system; nothing of the guest's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuTimes {
    /// At the source, up to the hand-over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_ms: Option<Millis>,
    /// At the target, up to the hand-over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_ms: Option<Millis>,
}

/// What the target spent of the downtime, by its own clock. The rest is the source's, and the link's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetPart {
    /// From the source's last word about the paused guest until all was compared and restored, and disks were locked.
    pub restore_ms: Millis,
    /// From `Go` until it was durably recorded whose the guest is, and the guest ran.
    pub start_ms: Millis,
}

/// How one migration stands or ended. Once it has completed, both ends tell the same figures, in which times are by the
/// source's clock unless they say otherwise. If the connection broke right after the hand-over, the target tells what it
/// saw itself, which is no downtime.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationStatus {
    /// Its name, the same at both ends.
    pub job: JobId,
    /// Which end this is.
    pub role: MigrationRole,
    /// The other end as it was given: where to connect to, or where was listened.
    pub peer: PeerAddress,
    /// Live or stopped.
    pub mode: MigrationMode,
    /// Whether memory was copied or passed. Known at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryTransfer>,
    /// Over how many connections its memory went. Known at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub streams: Option<u16>,
    /// How it stands.
    pub state: MigrationState,
    /// How far it is.
    pub progress: Progress,
    /// The finished rounds, in order. The last one is sent while the guest stands still. None if memory is passed.
    pub rounds: Vec<RoundInfo>,
    /// The finished steps, in order. Known at the end.
    pub steps: Vec<StepInfo>,
    /// How long it took so far, by this host's clock; of a completed one, from the source's first word until it heard
    /// that the guest runs.
    pub total_ms: Millis,
    /// How long nobody ran the guest: from the order to pause it until the source heard that it runs at the target, so
    /// that the way of that word is in it too. Known at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<Millis>,
    /// What the target did in that time. Known at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_part: Option<TargetPart>,
    /// The total as it was predicted after the first round; only of a live migration. Known at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_total_ms: Option<Millis>,
    /// Why no more rounds were sent; only of a live migration. Known at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub switched: Option<SwitchReason>,
    /// The round after which it was first seen that more do not bring the downtime goal nearer, if any. Known at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stalled_in_round: Option<u32>,
    /// What the rounds took from the guest; only of a live migration. Known at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_cost: Option<GuestCost>,
    /// What it took of both hosts' processors. Known at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuTimes>,
    /// True if both ends compared a digest of all memory before the hand-over. A comparison that fails ends the
    /// migration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<bool>,
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
