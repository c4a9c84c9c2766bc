//! Everything that looks at Godwit from outside: the nested lab, the choice between host and lab, and the end-to-end
//! scenarios with the frame that runs them.
//!
//! Used by `xtask` (the entry for people and CI), by the binaries `lab-agent` (init of a lab machine) and `scenarios`
//! (runs scenarios where it is executed), and by this package's own tests. Scenarios speak to Godwit through its public
//! interfaces only: the `godwit` binary and the control API.

pub mod agent;
pub mod bench;
pub mod bridge;
pub mod console;
pub mod demo;
pub mod godwit;
pub mod interruption;
pub mod lab;
pub mod network;
pub mod place;
pub mod scenario;
pub mod scenarios;
pub mod shipping;
pub mod silence;
pub mod table;
pub mod tally;
pub mod traveller;
