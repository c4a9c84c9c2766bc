//! Every end-to-end scenario, in the order in which they run. A new one is a function in a file here and a line below.

use crate::scenario::Scenario;

mod migrate;
mod smoke;

/// All scenarios.
pub const ALL: &[Scenario] = &[
    smoke::KVM_OPENS,
    smoke::HOSTS_JOIN,
    migrate::MICRO,
    migrate::MICRO_TWO_REGIONS,
    migrate::LINUX,
    migrate::LINUX_SMP,
    migrate::PULSE,
];
