//! The in-guest verifier: works a guest while its VMM moves it, and proves afterwards that nothing was lost.
//!
//! The binary of this crate runs inside a guest, as root, on its serial console; the library is there for the other
//! side: [`report::Line`] reads what it prints, and [`net::Client`] keeps a TCP connection busy from the host.
//!
//! Each mode is one [`worker::Work`] in a thread of its own: [`memory`] rewrites and verifies a working set, [`clock`]
//! looks for steps back and gaps, [`disk`] checks that acknowledged writes are there, [`net`] that no byte of a
//! connection is lost or doubled, and [`kernel_log`] that the kernel complained about nothing. Memory use is bounded by
//! the options, however long it runs.

pub mod clock;
pub mod disk;
pub mod fault;
pub mod kernel_log;
pub mod memory;
pub mod net;
pub mod options;
pub mod pattern;
pub mod report;
pub mod session;
pub mod worker;
