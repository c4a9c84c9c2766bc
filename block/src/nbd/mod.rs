//! The Network Block Device protocol, both ends of it.
//!
//! By the protocol's page, <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>, and its page on URIs beside
//! that: fixed newstyle negotiation, TLS, structured replies, block status of `base:allocation`, extended headers.
//!
//! ```text
//! client:  uri -> negotiation -> NbdBackend -> NbdChannel (one connection, reconnects)
//! server:  listener -> one thread a client: negotiation -> requests -> a Channel of the export's back end
//! ```
//!
//! Whatever the other end sends is checked before it is believed; every length has a limit.

pub mod client;
mod inbox;
mod outbox;
pub mod server;
#[cfg(test)]
mod testing;
pub mod tls;
mod transport;
pub mod uri;
mod wire;

pub use client::{NbdBackend, NbdError, NbdOptions};
pub use server::{Export, Listener, NbdServer, ServerOptions};
pub use uri::{NbdUri, UriError};

use std::io;
use std::time::Duration;

/// Whether the server of `uri` takes connections: makes one, and lets go of it.
///
/// # Errors
/// Why not.
pub fn reach(uri: &NbdUri, within: Duration) -> io::Result<()> {
    transport::Transport::connect(&uri.address, within).map(drop)
}
