//! Where an export is, as people write it (the NBD project's doc/uri.md).
//!
//! `nbd://host[:port]/export`, `nbd+unix:///export?socket=/path`, and the same with `nbds` for TLS, which takes a folder of
//! certificates as `tls-certificates=/folder` and the name in the server's certificate as `tls-hostname=name`.

use super::wire::{MAX_NAME, PORT};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use thiserror::Error;

/// What stands as it is in a URI's path or query.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');

/// Why a text does not say where an export is.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum UriError {
    /// Another scheme, or none.
    #[error("{text:?} is no NBD export; write nbd://host/export, nbd+unix:///export?socket=/path, or nbds for TLS")]
    Scheme {
        /// The text.
        text: String,
    },
    /// No host, or none where it belongs.
    #[error("{text:?} names no host; write nbd://host/export")]
    NoHost {
        /// The text.
        text: String,
    },
    /// A port that is none.
    #[error("{port:?} in {text:?} is no port; it is a number from 1 to 65535")]
    Port {
        /// The text.
        text: String,
        /// The port.
        port: String,
    },
    /// No socket.
    #[error("{text:?} names no socket; write nbd+unix:///export?socket=/path")]
    NoSocket {
        /// The text.
        text: String,
    },
    /// TLS with nobody to be believed.
    #[error("{text:?} does not say whose certificates count; add ?tls-certificates=/folder, with ca-cert.pem in it")]
    NoCertificates {
        /// The text.
        text: String,
    },
    /// A parameter that is not known.
    #[error(
        "{text:?} has the parameter {parameter:?}, which is not known; there are socket, tls-certificates and tls-hostname"
    )]
    Parameter {
        /// The text.
        text: String,
        /// The parameter.
        parameter: String,
    },
    /// Percent signs that are no UTF-8 afterwards, or a name beyond the protocol's limit.
    #[error("The export's name in {text:?} is not UTF-8, or longer than 4096 bytes")]
    Name {
        /// The text.
        text: String,
    },
}

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// On a host.
    Tcp {
        /// Its name or address.
        host: String,
        /// The port.
        port: u16,
    },
    /// On a Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// How a connection is kept private.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Privacy {
    /// It is not.
    Plain,
    /// By TLS.
    Tls {
        /// The folder with `ca-cert.pem`, and `client-cert.pem` and `client-key.pem` where the server wants to know who
        /// calls.
        certificates: PathBuf,
        /// The name that the server's certificate must be for, if it is not the host's.
        hostname: Option<String>,
    },
}

/// An export of a server.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NbdUri {
    /// Where the server listens.
    pub address: Address,
    /// The export's name. The empty one is the server's default.
    pub export: String,
    /// How the connection is kept private.
    pub privacy: Privacy,
}

impl FromStr for NbdUri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let owned = || text.to_owned();
        let wrong_scheme = || UriError::Scheme { text: owned() };
        let (scheme, rest) = text.split_once("://").ok_or_else(wrong_scheme)?;
        let (is_private, is_unix) = match scheme {
            "nbd" | "nbd+tcp" => (false, false),
            "nbds" | "nbds+tcp" => (true, false),
            "nbd+unix" => (false, true),
            "nbds+unix" => (true, true),
            _ => return Err(wrong_scheme()),
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let decode = |part: &str| {
            let decoded = percent_decode_str(part).decode_utf8().ok()?;
            (!decoded.contains('\0')).then(|| decoded.into_owned())
        };
        let bad_name = || UriError::Name { text: owned() };
        let export = decode(path).filter(|name| name.len() <= MAX_NAME).ok_or_else(bad_name)?;
        let (mut socket, mut certificates, mut hostname) = (None, None, None);
        for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
            let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            let value = decode(value).ok_or_else(bad_name)?;
            match key {
                "socket" if is_unix => socket = Some(PathBuf::from(value)),
                "tls-certificates" if is_private => certificates = Some(PathBuf::from(value)),
                "tls-hostname" if is_private => hostname = Some(value),
                _ => return Err(UriError::Parameter { text: owned(), parameter: key.to_owned() }),
            }
        }
        let address = if is_unix {
            let socket = socket.filter(|socket| authority.is_empty() && !socket.as_os_str().is_empty());
            Address::Unix(socket.ok_or_else(|| UriError::NoSocket { text: owned() })?)
        } else {
            tcp_address(text, authority)?
        };
        let privacy = if is_private {
            let certificates = certificates.ok_or_else(|| UriError::NoCertificates { text: owned() })?;
            Privacy::Tls { certificates, hostname }
        } else {
            Privacy::Plain
        };
        Ok(Self { address, export, privacy })
    }
}

fn tcp_address(text: &str, authority: &str) -> Result<Address, UriError> {
    let no_host = || UriError::NoHost { text: text.to_owned() };
    // Who is asked for is nothing that the protocol knows; a user before the host is a mistake.
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or_else(no_host)?;
            (host, port.strip_prefix(':').or_else(|| port.is_empty().then_some("")).ok_or_else(no_host)?)
        }
        None => authority.split_once(':').unwrap_or((authority, "")),
    };
    if host.is_empty() || host.contains('@') {
        return Err(no_host());
    }
    let port = match port {
        "" => PORT,
        port => port
            .parse()
            .ok()
            .filter(|&port| port != 0)
            .ok_or_else(|| UriError::Port { text: text.to_owned(), port: port.to_owned() })?,
    };
    Ok(Address::Tcp { host: host.to_owned(), port })
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, export, privacy } = self;
        let plain = |text: &str| utf8_percent_encode(text, PLAIN).to_string();
        let secure = if *privacy == Privacy::Plain { "" } else { "s" };
        let mut parameters = Vec::new();
        match address {
            Address::Tcp { host, port } => {
                let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
                let port = if *port == PORT { String::new() } else { format!(":{port}") };
                write!(f, "nbd{secure}://{host}{port}/{}", plain(export))?;
            }
            Address::Unix(path) => {
                write!(f, "nbd{secure}+unix:///{}", plain(export))?;
                parameters.push(format!("socket={}", plain(&path.to_string_lossy())));
            }
        }
        if let Privacy::Tls { certificates, hostname } = privacy {
            parameters.push(format!("tls-certificates={}", plain(&certificates.to_string_lossy())));
            parameters.extend(hostname.as_ref().map(|name| format!("tls-hostname={}", plain(name))));
        }
        match parameters.is_empty() {
            true => Ok(()),
            false => write!(f, "?{}", parameters.join("&")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<NbdUri, UriError> {
        text.parse()
    }

    fn tcp(host: &str, port: u16, export: &str) -> NbdUri {
        NbdUri { address: Address::Tcp { host: host.into(), port }, export: export.into(), privacy: Privacy::Plain }
    }

    #[test]
    fn what_is_written_is_understood_and_written_again() {
        for (text, uri) in [
            ("nbd://a/data", tcp("a", 10_809, "data")),
            ("nbd://10.0.0.1:1234/", tcp("10.0.0.1", 1234, "")),
            ("nbd://[fe80::1]:5/x/y%20z", tcp("fe80::1", 5, "x/y z")),
        ] {
            assert_eq!(parse(text).as_ref(), Ok(&uri));
            assert_eq!(uri.to_string(), text);
        }
        assert_eq!(parse("nbd://a"), Ok(tcp("a", 10_809, "")));
        assert_eq!(parse("nbd://[::1]/e"), Ok(tcp("::1", 10_809, "e")));
        let unix = parse("nbds+unix:///d?socket=/run/a%26b&tls-certificates=/c&tls-hostname=h").unwrap();
        assert_eq!(unix.address, Address::Unix("/run/a&b".into()));
        let privacy = Privacy::Tls { certificates: "/c".into(), hostname: Some("h".into()) };
        assert_eq!(unix.privacy, privacy);
        assert_eq!(parse(&unix.to_string()), Ok(unix));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |text: &str| parse(text).unwrap_err().to_string();
        for text in ["", "a", "http://a/b", "nbd:/a", "/srv/a.img"] {
            assert!(error(text).contains("write nbd://host/export"), "{text}");
        }
        for text in ["nbd://", "nbd:///x", "nbd://:5/x", "nbd://[::1/x", "nbd://[::1]5/x", "nbd://me@a/x"] {
            assert!(error(text).contains("names no host"), "{text}");
        }
        for text in ["nbd://a:0/x", "nbd://a:65536/x", "nbd://a:b/x"] {
            assert!(error(text).contains("from 1 to 65535"), "{text}");
        }
        for text in ["nbd+unix:///x", "nbd+unix:///x?socket=", "nbd+unix://a/x?socket=/s"] {
            assert!(error(text).contains("names no socket"), "{text}");
        }
        for text in ["nbd://a/x?socket=/s", "nbd://a/x?tls-hostname=b", "nbds://a/x?foo"] {
            assert!(error(text).contains("is not known"), "{text}");
        }
        assert!(error("nbds://a/x").contains("add ?tls-certificates=/folder"));
        assert!(error("nbd://a/%ff").contains("not UTF-8"));
        assert!(error(&format!("nbd://a/{}", "x".repeat(4097))).contains("4096"));
    }
}
