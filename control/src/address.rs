//! Where the other end of a migration is: `tcp://host:port` or `unix:/path`.
//!
//! The command line, the API and the VMM share this type, so that each of them refuses the same mistakes with the same
//! sentence. A value of [`PeerAddress`] was parsed; `Display` gives the text back that parses to the same value.

use crate::socket::SOCKET_PATH_MAX;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use thiserror::Error;

/// The longest host name DNS can carry, RFC 1035 section 2.3.4.
const HOST_MAX: usize = 253;

/// Where to listen for a migration, or where to send one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum PeerAddress {
    /// `tcp://host:port`.
    Tcp {
        /// A name, an IPv4 address, or an IPv6 address without its brackets.
        host: String,
        /// The port. 0 means "any free port" to the end that listens.
        port: u16,
    },
    /// `unix:/path`, an absolute path.
    Unix(PathBuf),
}

/// Why a text is not a [`PeerAddress`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AddressError {
    /// Neither `tcp://` nor `unix:`.
    #[error("Address {address:?} has no known scheme; write tcp://HOST:PORT or unix:/PATH")]
    Scheme {
        /// The text as given.
        address: String,
    },
    /// No port, or not a port.
    #[error("Address {address:?} has no valid port; write tcp://HOST:PORT with a port from 0 to 65535")]
    Port {
        /// The text as given.
        address: String,
    },
    /// The host is empty, too long, or holds characters no host has.
    #[error("Address {address:?} has no valid host; write a name, an IPv4 address, or an IPv6 address in brackets")]
    Host {
        /// The text as given.
        address: String,
    },
    /// The path is relative. The two ends have different working directories.
    #[error("Address {address:?} has no absolute path; write unix:/PATH")]
    RelativePath {
        /// The text as given.
        address: String,
    },
    /// The path does not fit in a socket address.
    #[error("Address {address:?} has a path of {length} bytes; a Unix socket path has at most {SOCKET_PATH_MAX}")]
    LongPath {
        /// The text as given.
        address: String,
        /// The length of its path.
        length: usize,
    },
    /// The path holds a NUL byte.
    #[error("Address {address:?} has a NUL byte in its path")]
    NulInPath {
        /// The text as given.
        address: String,
    },
}

impl FromStr for PeerAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Some(rest) = text.strip_prefix("tcp://") {
            parse_tcp(text, rest)
        } else if let Some(rest) = text.strip_prefix("unix:") {
            parse_unix(text, rest)
        } else {
            Err(AddressError::Scheme { address: text.to_owned() })
        }
    }
}

fn parse_tcp(address: &str, rest: &str) -> Result<PeerAddress, AddressError> {
    let bad_host = || AddressError::Host { address: address.to_owned() };
    let bad_port = || AddressError::Port { address: address.to_owned() };
    let (host, port) = if let Some(bracketed) = rest.strip_prefix('[') {
        let (host, port) = bracketed.split_once(']').ok_or_else(bad_host)?;
        host.parse::<Ipv6Addr>().map_err(|_| bad_host())?;
        (host, port.strip_prefix(':').ok_or_else(bad_port)?)
    } else {
        let (host, port) = rest.rsplit_once(':').ok_or_else(bad_port)?;
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
        if host.is_empty() || host.len() > HOST_MAX || !host.bytes().all(valid) {
            return Err(bad_host());
        }
        (host, port)
    };
    // `u16::from_str` alone would take "+80" too.
    if !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(bad_port());
    }
    let port = port.parse().map_err(|_| bad_port())?;
    Ok(PeerAddress::Tcp { host: host.to_owned(), port })
}

fn parse_unix(address: &str, rest: &str) -> Result<PeerAddress, AddressError> {
    let path = match rest.strip_prefix("//") {
        Some(after_authority) if after_authority.starts_with('/') => after_authority,
        Some(_) | None => rest,
    };
    if !Path::new(path).is_absolute() {
        return Err(AddressError::RelativePath { address: address.to_owned() });
    }
    if path.len() > SOCKET_PATH_MAX {
        return Err(AddressError::LongPath { address: address.to_owned(), length: path.len() });
    }
    if path.contains('\0') {
        return Err(AddressError::NulInPath { address: address.to_owned() });
    }
    Ok(PeerAddress::Unix(PathBuf::from(path)))
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl TryFrom<String> for PeerAddress {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<PeerAddress> for String {
    fn from(address: PeerAddress) -> Self {
        address.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tcp(host: &str, port: u16) -> PeerAddress {
        PeerAddress::Tcp { host: host.to_owned(), port }
    }

    #[test]
    fn good_addresses_parse_and_print() {
        for (text, address) in [
            ("tcp://host.example:4444", tcp("host.example", 4444)),
            ("tcp://10.0.0.1:1", tcp("10.0.0.1", 1)),
            ("tcp://0.0.0.0:0", tcp("0.0.0.0", 0)),
            ("tcp://[fe80::1]:65535", tcp("fe80::1", 65535)),
            ("unix:/run/godwit/in.sock", PeerAddress::Unix(PathBuf::from("/run/godwit/in.sock"))),
        ] {
            assert_eq!(text.parse(), Ok(address.clone()), "{text}");
            assert_eq!(address.to_string(), text);
            assert_eq!(serde_json::to_value(&address).unwrap(), serde_json::Value::from(text));
        }
        let three_slashes: PeerAddress = "unix:///run/in.sock".parse().unwrap();
        assert_eq!(three_slashes, PeerAddress::Unix(PathBuf::from("/run/in.sock")));
    }

    #[test]
    fn bad_addresses_name_the_value_and_the_remedy() {
        let long = format!("unix:/{}", "p".repeat(SOCKET_PATH_MAX));
        for (text, part) in [
            ("", "no known scheme; write tcp://HOST:PORT or unix:/PATH"),
            ("host:4444", "no known scheme"),
            ("http://host:80", "no known scheme"),
            ("tcp://host", "no valid port"),
            ("tcp://host:", "no valid port"),
            ("tcp://host:+80", "no valid port"),
            ("tcp://host:65536", "no valid port"),
            ("tcp://[::1]", "no valid port"),
            ("tcp://[::1]4444", "no valid port"),
            ("tcp://:4444", "no valid host"),
            ("tcp://::1:4444", "IPv6 address in brackets"),
            ("tcp://[::1:4444", "no valid host"),
            ("tcp://[host]:4444", "no valid host"),
            ("tcp://a b:4444", "no valid host"),
            ("tcp://user@host:4444", "no valid host"),
            ("tcp://host:44/44:44", "no valid host"),
            ("unix:", "no absolute path"),
            ("unix:in.sock", "no absolute path"),
            ("unix:/a\0b", "NUL byte"),
            (&long, "108 bytes; a Unix socket path has at most 107"),
        ] {
            let error = text.parse::<PeerAddress>().unwrap_err().to_string();
            assert!(error.contains(part), "{text:?}: {error}");
        }
        let long_host = format!("tcp://{}:1", "h".repeat(HOST_MAX + 1));
        assert!(matches!(long_host.parse::<PeerAddress>(), Err(AddressError::Host { .. })));
    }

    proptest! {
        #[test]
        fn what_parses_prints_what_parses(text in "(tcp://|unix:|)[a-z0-9:/.\\[\\]]{0,24}") {
            if let Ok(address) = text.parse::<PeerAddress>() {
                prop_assert_eq!(address.to_string().parse::<PeerAddress>(), Ok(address));
            }
        }
    }
}
