//! What a source tells a target of its machine, in the JSON that travels in `Hello`.

use crate::config::MachineConfig;
use crate::state::CpuidEntryV1;
use serde::{Deserialize, Serialize};

/// The machine as it is offered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineOffer {
    /// Its description, with the source's host resources.
    pub machine: MachineConfig,
    /// What CPUID tells its boot vCPU: the target's CPU must have all of it.
    pub cpuid: Vec<CpuidEntryV1>,
    /// Whether the guest is to run at the target, or stays paused.
    pub running: bool,
}
