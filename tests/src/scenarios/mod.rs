//! Every end-to-end scenario, in the order in which they run. A new one is a function in a file here and a line below.

use crate::scenario::Scenario;

mod smoke;

/// All scenarios.
pub const ALL: &[Scenario] = &[smoke::KVM_OPENS, smoke::HOSTS_JOIN];
