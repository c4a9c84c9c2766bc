//! What a source tells a target of its machine, in the JSON that travels in `Hello`.

use crate::config::MachineConfig;
use crate::cpuid::GuestCpu;
use serde::{Deserialize, Serialize};

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
}
