//! What a source tells a target of its machine, in the JSON that travels in `Hello`.

use super::mirrored::MirroredDisk;
use crate::config::{ExportUri, MachineConfig};
use crate::cpuid::GuestCpu;
use control::DiskBefore;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The machine as it is offered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineOffer {
    /// Its description, with the source's host resources.
    pub machine: MachineConfig,
    /// What the guest was told of its CPU: the target's must hold all of it.
    pub cpu: GuestCpu,
    /// Whether the guest is to run at the target, or stays paused.
    pub running: bool,
    /// Disks that come before the guest, with its memory, in the order of their regions.
    #[serde(default)]
    pub mirrored: Vec<MirroredDisk>,
    /// Disks that come after the guest.
    #[serde(default)]
    pub coming: Vec<ComingDisk>,
    /// What disks are like at the source, by their ids.
    #[serde(default)]
    pub before: BTreeMap<String, DiskBefore>,
}

/// A disk that comes to the target after the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ComingDisk {
    /// Its name in the machine.
    pub id: String,
    /// Where it can be read, from the hand-over on.
    pub base: ExportUri,
    /// Whether the source lends it, and waits for it to be given up.
    pub lent: bool,
    /// How much space it takes, in bytes, where the source knows: holes take none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub space: Option<u64>,
}
