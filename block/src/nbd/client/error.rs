//! Why an export cannot be used.

use super::super::tls::TlsError;
use std::io;
use std::time::Duration;
use thiserror::Error;

/// Why an export cannot be used.
#[derive(Debug, Error)]
pub enum NbdError {
    /// Nobody listens there, or the way is barred.
    #[error("Could not reach the NBD server at {address}")]
    Unreachable {
        /// Where it was looked for.
        address: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// It did not answer in time.
    #[error("The NBD server at {address} did not answer within {within:?}")]
    Silent {
        /// Where it was looked for.
        address: String,
        /// How long it was waited for, at each step.
        within: Duration,
    },
    /// What listens there speaks another language.
    #[error("What listens at {address} is no NBD server with fixed newstyle negotiation: {why}")]
    NotNbd {
        /// Where it listens.
        address: String,
        /// What it said.
        why: String,
    },
    /// It has no such export.
    #[error("The NBD server at {address} has no export {export:?}; it has {}", listed(exports))]
    NoExport {
        /// Where it listens.
        address: String,
        /// The export.
        export: String,
        /// Those that it tells of.
        exports: Vec<String>,
    },
    /// It refuses something that is needed.
    #[error("The NBD server at {address} refuses {what}: {why}")]
    Refused {
        /// Where it listens.
        address: String,
        /// What was asked for.
        what: &'static str,
        /// What it said.
        why: String,
    },
    /// It wants TLS, and the client was not told how.
    #[error("The NBD server at {address} wants TLS; write nbds:// and tls-certificates=/folder")]
    TlsWanted {
        /// Where it listens.
        address: String,
    },
    /// The client's own side of TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The export may only be read.
    #[error("Export {export:?} of {address} is read-only; attach the disk with readonly")]
    ReadOnly {
        /// Where it is.
        address: String,
        /// The export.
        export: String,
    },
    /// Its length is no disk's.
    #[error("Export {export:?} of {address} is {length} bytes long; a disk has a multiple of 512, and not 0")]
    BadSize {
        /// Where it is.
        address: String,
        /// The export.
        export: String,
        /// Its length in bytes.
        length: u64,
    },
    /// It takes only requests that a disk cannot keep to.
    #[error("Export {export:?} of {address} takes requests of {minimum} to {maximum} bytes; a disk needs 512 to 65536")]
    BlockSizes {
        /// Where it is.
        address: String,
        /// The export.
        export: String,
        /// The shortest request in bytes.
        minimum: u32,
        /// The longest request in bytes.
        maximum: u32,
    },
    /// It is not what it was before the connection was lost.
    #[error("Export {export:?} of {address} was {was} bytes long and is {length} now")]
    Changed {
        /// Where it is.
        address: String,
        /// The export.
        export: String,
        /// Its length in bytes when the disk was opened.
        was: u64,
        /// Its length in bytes now.
        length: u64,
    },
    /// It can do less than before the connection was lost.
    #[error("Export {export:?} of {address} lacks what it had (transmission flags {lost:#x}, or longer requests)")]
    Lacks {
        /// Where it is.
        address: String,
        /// The export.
        export: String,
        /// The transmission flags that are missing.
        lost: u16,
    },
    /// It breaks the rules of the protocol.
    #[error("The NBD server at {address} breaks the protocol: {how}")]
    Violation {
        /// Where it listens.
        address: String,
        /// In which way.
        how: String,
    },
    /// The connection broke off, or the host refused something.
    #[error("The connection to the NBD server at {address} failed")]
    Broken {
        /// Where it listens.
        address: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

fn listed(exports: &[String]) -> String {
    match exports {
        [] => "none that it tells of".to_owned(),
        names => names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", "),
    }
}
