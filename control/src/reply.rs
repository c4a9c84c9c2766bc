//! Everything that a Godwit answers, one variant per kind of answer, and the payloads.
//!
//! Payloads accept unknown fields when they are read, unlike the bodies of requests, so that an older client can talk
//! to a newer Godwit. A field that has no value yet is absent, never `null`.

use crate::dirty_rate::LastDirtyRate;
use crate::migration::{JobId, LastMigration};
use crate::millis::Millis;
use crate::phase::Phase;
use crate::request::Request;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;
use uuid::Uuid;

/// One answer of a Godwit that did what it was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It is done and there is nothing to tell.
    Done,
    /// To [`Request::ShowVm`].
    Vm(VmInfo),
    /// To [`Request::ShowBalloon`].
    Balloon(BalloonInfo),
    /// To [`Request::ListDisks`].
    Disks(DiskList),
    /// To [`Request::ListNics`].
    Nics(NicList),
    /// To [`Request::StartMigration`] and [`Request::MeasureDirtyRate`].
    Started(JobStarted),
    /// To [`Request::ShowMigration`].
    Migration(LastMigration),
    /// To [`Request::ShowDirtyRate`].
    DirtyRate(LastDirtyRate),
    /// To [`Request::Pulse`].
    Pulsed(Pulsed),
}

impl Reply {
    /// The name of the payload's schema in `openapi.json`; `None` where there is no payload.
    #[must_use]
    pub const fn schema(&self) -> Option<&'static str> {
        match self {
            Self::Done => None,
            Self::Vm(_) => Some("VmInfo"),
            Self::Balloon(_) => Some("BalloonInfo"),
            Self::Disks(_) => Some("DiskList"),
            Self::Nics(_) => Some("NicList"),
            Self::Started(_) => Some("JobStarted"),
            Self::Migration(_) => Some("LastMigration"),
            Self::DirtyRate(_) => Some("LastDirtyRate"),
            Self::Pulsed(_) => Some("Pulsed"),
        }
    }

    /// The payload as JSON; empty where there is none.
    pub(crate) fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        match self {
            Self::Done => Ok(Vec::new()),
            Self::Vm(payload) => serde_json::to_vec(payload),
            Self::Balloon(payload) => serde_json::to_vec(payload),
            Self::Disks(payload) => serde_json::to_vec(payload),
            Self::Nics(payload) => serde_json::to_vec(payload),
            Self::Started(payload) => serde_json::to_vec(payload),
            Self::Migration(payload) => serde_json::to_vec(payload),
            Self::DirtyRate(payload) => serde_json::to_vec(payload),
            Self::Pulsed(payload) => serde_json::to_vec(payload),
        }
    }

    /// Reads the payload that answers `request`.
    pub(crate) fn from_json(request: &Request, json: &[u8]) -> Result<Self, serde_json::Error> {
        match request {
            Request::ShowVm => serde_json::from_slice(json).map(Self::Vm),
            Request::ShowBalloon => serde_json::from_slice(json).map(Self::Balloon),
            Request::ListDisks => serde_json::from_slice(json).map(Self::Disks),
            Request::ListNics => serde_json::from_slice(json).map(Self::Nics),
            Request::StartMigration(_) | Request::MeasureDirtyRate(_) => {
                serde_json::from_slice(json).map(Self::Started)
            }
            Request::ShowMigration => serde_json::from_slice(json).map(Self::Migration),
            Request::ShowDirtyRate => serde_json::from_slice(json).map(Self::DirtyRate),
            Request::Pulse(_) => serde_json::from_slice(json).map(Self::Pulsed),
            Request::Pause
            | Request::Resume
            | Request::Stop(_)
            | Request::Kill
            | Request::Reset
            | Request::PowerButton
            | Request::SetBalloon(_)
            | Request::ResizeDisk(_)
            | Request::CancelMigration
            | Request::ResolveMigration(_) => Ok(Self::Done),
        }
    }
}

/// How the pages that the guest writes are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DirtyTrackerKind {
    /// KVM's dirty log: one bit per page.
    Log,
    /// KVM's dirty ring: one ring per vCPU.
    Ring,
}

/// What this VM is and how it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmInfo {
    /// The VM's identity; it moves with the guest.
    pub id: Uuid,
    /// The VM's name.
    pub name: String,
    /// What the VM is doing.
    pub phase: Phase,
    /// How many vCPUs it has.
    pub vcpus: u32,
    /// How much memory it has.
    pub memory_bytes: u64,
    /// The process id of the VMM.
    pub pid: u32,
    /// When this process began to serve the VM, in milliseconds since 1970.
    pub started_at_ms: u64,
    /// How long ago that is.
    pub uptime_ms: Millis,
    /// The ids of its disks.
    pub disks: Vec<String>,
    /// The ids of its network interfaces.
    pub nics: Vec<String>,
    /// How dirty pages are found.
    pub dirty_tracker: DirtyTrackerKind,
    /// The version of the API that is spoken here, [`API_VERSION`](crate::API_VERSION).
    pub api_version: String,
    /// The version of the Godwit that speaks it.
    pub godwit_version: String,
}

/// What the balloon holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonInfo {
    /// How much it should take from the guest.
    pub target_bytes: u64,
    /// How much it holds.
    pub actual_bytes: u64,
    /// The guest's statistics by name, as far as its driver reports them (virtio 1.3, section 5.5.6.4).
    pub statistics: BTreeMap<String, u64>,
}

/// All disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskList {
    /// In the order of the command line.
    pub disks: Vec<DiskInfo>,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// The device's id, such as `blk0`.
    pub id: String,
    /// Where its bytes are, for people to read: a path, or the URI of an export.
    pub place: String,
    /// Its size.
    pub bytes: u64,
    /// How much of it is not here yet, where it comes to this host while it is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub missing_bytes: Option<u64>,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// What the guest did with it.
    pub counters: DiskCounters,
    /// What it was like at the host that the guest came from, if it came from one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<DiskBefore>,
}

/// What a disk was like at the host that the guest came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskBefore {
    /// Where its bytes were.
    pub place: String,
    /// How long a read took there on average; absent if there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_read_ms: Option<Millis>,
    /// How long a write took there on average; absent if there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_write_ms: Option<Millis>,
}

/// What a guest did with a disk since its machine was built here: a move, a reset and a pulse begin anew. Requests that
/// failed are in `errors` alone; discards and writes of zeroes are not counted otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskCounters {
    /// Read requests.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Write requests.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Flush requests.
    pub flushes: u64,
    /// Requests of any kind that failed, or that the disk does not know.
    pub errors: u64,
    /// How long the reads took, added up.
    pub read_time_ms: Millis,
    /// How long the writes took, added up.
    pub write_time_ms: Millis,
}

impl DiskCounters {
    /// How long a read took on average; `None` if there was none.
    #[must_use]
    pub fn mean_read(&self) -> Option<Millis> {
        mean(self.read_time_ms, self.reads)
    }

    /// How long a write took on average; `None` if there was none.
    #[must_use]
    pub fn mean_write(&self) -> Option<Millis> {
        mean(self.write_time_ms, self.writes)
    }
}

fn mean(sum: Millis, count: u64) -> Option<Millis> {
    let micros = u64::try_from(Duration::from(sum).as_micros()).unwrap_or(u64::MAX);
    micros.checked_div(count).map(|mean| Duration::from_micros(mean).into())
}

/// All network interfaces.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicList {
    /// In the order of the command line.
    pub nics: Vec<NicInfo>,
}

/// Who carries a network interface's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NicBackend {
    /// The VMM, by reads and writes of the tap.
    Tap,
    /// The kernel's vhost-net.
    VhostNet,
}

/// One network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicInfo {
    /// The device's id, such as `net0`.
    pub id: String,
    /// The name of the tap on the host.
    pub tap: String,
    /// The guest's hardware address, such as `52:54:00:12:34:56`.
    pub mac: String,
    /// Who carries its packets, as it was chosen when the machine was built.
    pub backend: NicBackend,
    /// What went through it. Absent with vhost-net: the kernel carries the packets then, and does not count them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counters: Option<NicCounters>,
}

/// What went through a network interface since its machine was built here, named from the guest's side. Bytes are those
/// of Ethernet frames; what an offload sends in one piece is one packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicCounters {
    /// Packets to the guest.
    pub received_packets: u64,
    /// Bytes to the guest.
    pub received_bytes: u64,
    /// Packets from the guest.
    pub sent_packets: u64,
    /// Bytes from the guest.
    pub sent_bytes: u64,
    /// Packets that were dropped, both ways.
    pub dropped_packets: u64,
}

/// Long work began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobStarted {
    /// Its name, which the events about it carry.
    pub job: JobId,
}

/// The machine was saved, reset and restored in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pulsed {
    /// How many times.
    pub times: u32,
    /// The size of the saved state, without memory.
    pub state_bytes: u64,
    /// The longest time that the guest stood still for one pulse.
    pub longest_ms: Millis,
}
