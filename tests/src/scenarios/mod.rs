//! Every end-to-end scenario, in the order in which they run. A new one is a function in a file here and a line below.

use crate::scenario::Scenario;

mod api;
mod bad_input;
mod bad_targets;
mod between_hosts;
mod boot;
mod broken_moves;
mod debian;
mod debian_comes;
mod dirty_rate;
mod disk_lost;
pub(crate) mod disks;
mod ends;
mod goals;
mod handmade;
mod migrate;
pub mod nbd;
mod passed;
mod readme;
mod smoke;

/// All scenarios.
pub const ALL: &[Scenario] = &[
    smoke::KVM_OPENS,
    smoke::HOSTS_JOIN,
    ends::ENDS,
    ends::SOFTWARE_KVM,
    ends::HOSTILE_GUEST,
    bad_input::MACHINES,
    bad_input::HOSTS,
    bad_input::REQUESTS,
    bad_targets::TARGETS,
    bad_targets::SOURCES,
    api::ROUTES,
    api::COMMANDS,
    nbd::REFUSED,
    nbd::SERVER,
    nbd::CLIENT,
    nbd::KILLED,
    disks::PLACES,
    disks::COMES,
    disks::STAYS,
    disks::BEFORE,
    disk_lost::LENDER,
    disk_lost::RESET,
    dirty_rate::KNOWN,
    dirty_rate::ENDED,
    readme::API,
    readme::DIRTY_RATE,
    readme::UPGRADE,
    readme::GOALS,
    readme::MOVES,
    readme::DISKS,
    readme::DISK_BEFORE,
    readme::DISK_AFTER,
    boot::LINUX,
    migrate::MICRO,
    migrate::MICRO_TWO_REGIONS,
    passed::MICRO,
    passed::BROKEN,
    goals::THROTTLED,
    goals::OUT_OF_REACH,
    goals::CONTRADICTORY,
    broken_moves::BROKEN,
    broken_moves::TAKEN_DISK,
    between_hosts::APART,
    migrate::LINUX,
    migrate::LINUX_SMP,
    passed::LINUX,
    migrate::PULSE,
    nbd::LINUX,
    disks::AFTER,
    disks::MIRRORED,
    debian::DEBIAN,
    debian_comes::COMES,
];
