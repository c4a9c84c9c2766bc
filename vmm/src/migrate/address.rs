//! Where migrations come from and go to: dialling a target, and listening as one.

use super::link::{SocketLink, poll};
use super::tcp;
use control::{ControlSocket, PeerAddress, SocketError};
use std::io;
use std::net::{IpAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// How long each address of a target may take to answer at most.
pub const DIAL_WITHIN: Duration = Duration::from_secs(10);

/// How long `accept` sleeps when nobody comes; only its end needs it.
const ACCEPT_WAIT: Duration = Duration::from_secs(3600);

/// Why there is no connection.
#[derive(Debug, Error)]
pub enum AddressUseError {
    /// The target does not answer.
    #[error("No Godwit can be reached at {address}; start `godwit receive {address}` there, and check the network")]
    Unreachable {
        /// The target.
        address: PeerAddress,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// TCP is not to go by this algorithm here.
    #[error("TCP on this host cannot go by {name:?}; it has {}", tcp::congestion_controls())]
    Congestion {
        /// The algorithm that was asked for.
        name: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// There is no TCP.
    #[error("No congestion control can be chosen for {address}: it is no TCP address")]
    NoTcp {
        /// The target.
        address: PeerAddress,
    },
    /// The name has no address.
    #[error("The host name in {address} is not known; check it, or write the host's IP address")]
    UnknownHost {
        /// The target.
        address: PeerAddress,
    },
    /// Nobody can wait here.
    #[error("Cannot wait for migrations at {address}")]
    Listen {
        /// The address.
        address: PeerAddress,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The Unix socket cannot be made.
    #[error(transparent)]
    Socket(#[from] SocketError),
}

/// A connection to a target.
#[derive(Debug)]
pub struct Dialled {
    /// The connection.
    pub link: SocketLink,
    /// Where it goes, without a name that may stand for several hosts: so that one more goes there, too.
    pub exactly: PeerAddress,
    /// This host's end of it, where it goes over a network.
    pub here: Option<IpAddr>,
}

/// Connects to the Godwit that waits at `address`, by TCP with the congestion control of this name, if there is one. Each
/// address of it may take `within` to answer, and no longer than [`DIAL_WITHIN`].
///
/// # Errors
/// [`AddressUseError`], with what to do.
pub fn dial(address: &PeerAddress, congestion: Option<&str>, within: Duration) -> Result<Dialled, AddressUseError> {
    // 0 is refused by the standard library.
    let within = within.clamp(Duration::from_millis(1), DIAL_WITHIN);
    let unreachable = |source| AddressUseError::Unreachable { address: address.clone(), source };
    match address {
        PeerAddress::Unix(_) if congestion.is_some() => Err(AddressUseError::NoTcp { address: address.clone() }),
        PeerAddress::Unix(path) => {
            let link = UnixStream::connect(path).map_err(unreachable)?.into();
            Ok(Dialled { link, exactly: address.clone(), here: None })
        }
        PeerAddress::Tcp { host, port } => {
            let unknown = || AddressUseError::UnknownHost { address: address.clone() };
            let mut last = unknown();
            for candidate in (host.as_str(), *port).to_socket_addrs().map_err(|_| unknown())? {
                match TcpStream::connect_timeout(&candidate, within) {
                    Ok(stream) => {
                        tcp::prepare_source(&stream, congestion).map_err(|source| match congestion {
                            Some(name) => AddressUseError::Congestion { name: name.to_owned(), source },
                            None => unreachable(source),
                        })?;
                        let here = stream.local_addr().map_err(unreachable)?.ip();
                        let link = SocketLink::try_from(stream).map_err(unreachable)?;
                        let exactly = PeerAddress::Tcp { host: candidate.ip().to_string(), port: candidate.port() };
                        return Ok(Dialled { link, exactly, here: Some(here) });
                    }
                    Err(source) => last = unreachable(source),
                }
            }
            Err(last)
        }
    }
}

/// Who came to a [`Listener`].
#[derive(Debug)]
pub enum Accepted {
    /// A link.
    Link(SocketLink),
    /// Nobody, in the time given.
    Nobody,
    /// Nobody will: the listener was ended.
    Ended,
}

/// A place where sources can connect. A Unix socket's file goes when this is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    end: EventFd,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(ControlSocket),
}

impl Listener {
    /// Listens at `address`. Port 0 is any that is free.
    ///
    /// # Errors
    /// [`AddressUseError`], with what to do.
    pub fn bind(address: &PeerAddress) -> Result<Self, AddressUseError> {
        let refused = |source| AddressUseError::Listen { address: address.clone(), source };
        let socket = match address {
            PeerAddress::Unix(path) => Socket::Unix(ControlSocket::bind(path)?),
            PeerAddress::Tcp { host, port } => {
                let listener = TcpListener::bind((host.as_str(), *port)).map_err(refused)?;
                listener.set_nonblocking(true).map_err(refused)?;
                tcp::prepare_target(&listener);
                Socket::Tcp(listener)
            }
        };
        Ok(Self { socket, end: EventFd::new(EFD_NONBLOCK).map_err(refused)? })
    }

    /// Where it listens, with the port that was chosen.
    #[must_use]
    pub fn address(&self) -> PeerAddress {
        match &self.socket {
            Socket::Unix(socket) => PeerAddress::Unix(socket.path().to_owned()),
            Socket::Tcp(listener) => listener.local_addr().map_or_else(
                |_| PeerAddress::Tcp { host: String::new(), port: 0 },
                |address| PeerAddress::Tcp { host: address.ip().to_string(), port: address.port() },
            ),
        }
    }

    /// Waits for a source; `None` once [`end`](Self::end) was called.
    ///
    /// # Errors
    /// The host's refusal.
    pub fn accept(&self) -> io::Result<Option<SocketLink>> {
        loop {
            match self.accept_within(ACCEPT_WAIT)? {
                Accepted::Nobody => {}
                Accepted::Link(link) => return Ok(Some(link)),
                Accepted::Ended => return Ok(None),
            }
        }
    }

    /// Waits for a link for at most `limit`.
    ///
    /// # Errors
    /// The host's refusal.
    pub fn accept_within(&self, limit: Duration) -> io::Result<Accepted> {
        loop {
            let socket = match &self.socket {
                Socket::Tcp(listener) => listener.as_raw_fd(),
                Socket::Unix(socket) => socket.listener().as_raw_fd(),
            };
            let [came, ended] = poll([(socket, libc::POLLIN), (self.end.as_raw_fd(), libc::POLLIN)], limit)?;
            if ended {
                return Ok(Accepted::Ended);
            }
            if !came {
                return Ok(Accepted::Nobody);
            }
            let accepted = match &self.socket {
                Socket::Tcp(listener) => listener.accept().and_then(|(stream, _)| SocketLink::try_from(stream)),
                Socket::Unix(socket) => socket.listener().accept().map(|(stream, _)| SocketLink::from(stream)),
            };
            match accepted {
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {}
                accepted => return accepted.map(Accepted::Link),
            }
        }
    }

    /// Makes `accept` give up, now and ever after.
    pub fn end(&self) {
        // The only refusal is a counter at its end, and then the end is known.
        let _ = self.end.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use migration::{Cutter, Link};

    fn meets(address: &str) {
        let listener = Listener::bind(&address.parse().unwrap()).unwrap();
        let Dialled { link: mut near, exactly, here } = dial(&listener.address(), None, DIAL_WITHIN).unwrap();
        assert_eq!(exactly, listener.address());
        assert_eq!(here.is_some(), address.starts_with("tcp"));
        let mut far = listener.accept().unwrap().unwrap();
        near.send(b"x", &[]).unwrap();
        let mut byte = [0];
        far.receive(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
        let cutter = far.cutter().unwrap();
        let waits = std::thread::spawn(move || far.receive(&mut [0]));
        cutter.cut();
        assert!(waits.join().unwrap().is_err());
        listener.end();
        assert!(listener.accept().unwrap().is_none());
    }

    #[test]
    fn a_congestion_control_is_one_of_this_hosts_and_for_tcp() {
        let listener = Listener::bind(&"tcp://127.0.0.1:0".parse().unwrap()).unwrap();
        dial(&listener.address(), Some("reno"), DIAL_WITHIN).unwrap();
        let error = dial(&listener.address(), Some("nosuch"), DIAL_WITHIN).unwrap_err().to_string();
        assert!(error.contains(r#"cannot go by "nosuch"; it has "#) && error.contains("reno"), "{error}");
        let error = dial(&"unix:/nonexistent".parse().unwrap(), Some("reno"), DIAL_WITHIN).unwrap_err().to_string();
        assert!(error.contains("no TCP address"), "{error}");
    }

    #[test]
    fn both_kinds_of_socket_meet() {
        let dir = tempfile::tempdir().unwrap();
        meets("tcp://127.0.0.1:0");
        meets(&format!("unix:{}/m.sock", dir.path().display()));
        assert!(!dir.path().join("m.sock").exists());
    }

    #[test]
    fn nobody_there_says_what_to_start() {
        for address in ["tcp://127.0.0.1:1", "unix:/nonexistent/m.sock"] {
            let error = dial(&address.parse().unwrap(), None, DIAL_WITHIN).unwrap_err();
            assert!(error.to_string().contains(&format!("godwit receive {address}")), "{error}");
        }
    }

    #[test]
    fn an_address_in_use_is_refused() {
        let listener = Listener::bind(&"tcp://127.0.0.1:0".parse().unwrap()).unwrap();
        assert!(matches!(Listener::bind(&listener.address()), Err(AddressUseError::Listen { .. })));
    }
}
