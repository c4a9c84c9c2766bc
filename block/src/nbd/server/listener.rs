//! Where a server waits for clients.

use super::super::uri::Address;
use socket2::{Domain, SockAddr, Socket, Type};
use std::io;
use std::net::{TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// How many clients may wait to be taken in.
const BACKLOG: i32 = 16;

/// Why a server cannot listen somewhere.
#[derive(Debug, Error)]
pub enum ListenError {
    /// Someone listens there already.
    #[error("Something listens at {address} already")]
    InUse {
        /// Where.
        address: String,
    },
    /// There is a file that is no socket.
    #[error("{} is there already and is no socket; remove it, or choose another path", path.display())]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// Anything else.
    #[error("Could not listen at {address}")]
    Host {
        /// Where.
        address: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// A place where clients come to. A Unix socket goes with it.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: Address,
}

impl Listener {
    /// Listens at `address`. The port 0 is any that is free; see [`address`](Self::address).
    ///
    /// # Errors
    /// [`ListenError`] with what is in the way.
    pub fn bind(address: &Address) -> Result<Self, ListenError> {
        let host = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => ListenError::InUse { address: address.to_string() },
            _ => ListenError::Host { address: address.to_string(), source },
        };
        match address {
            Address::Tcp { host: name, port } => {
                let mut resolved = (name.as_str(), *port).to_socket_addrs().map_err(host)?;
                let nowhere = || host(io::Error::new(io::ErrorKind::NotFound, "The name has no address"));
                let first = resolved.next().ok_or_else(nowhere)?;
                let socket = Socket::from(TcpListener::bind(first).map_err(host)?);
                socket.set_nonblocking(true).map_err(host)?;
                let port = socket.local_addr().map_err(host)?.as_socket().map_or(*port, |local| local.port());
                Ok(Self { socket, address: Address::Tcp { host: name.clone(), port } })
            }
            Address::Unix(path) => {
                make_way(path)?;
                let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(host)?;
                socket.bind(&SockAddr::unix(path).map_err(host)?).map_err(host)?;
                let listener = Self { socket, address: address.clone() };
                listener.socket.listen(BACKLOG).map_err(host)?;
                listener.socket.set_nonblocking(true).map_err(host)?;
                Ok(listener)
            }
        }
    }

    /// Where it listens: by the name that was given, and at a port that is one.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    pub(super) fn accept(&self) -> io::Result<Socket> {
        self.socket.accept().map(|(socket, _)| socket)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Address::Unix(path) = &self.address
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::debug!(%error, path = %path.display(), "A socket's file is gone already");
        }
    }
}

/// Removes the file of a socket on which nobody listens any more.
fn make_way(path: &Path) -> Result<(), ListenError> {
    let Ok(found) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !found.file_type().is_socket() {
        return Err(ListenError::NotASocket { path: path.to_owned() });
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(ListenError::InUse { address: path.display().to_string() });
    }
    let removed = std::fs::remove_file(path);
    removed.map_err(|source| ListenError::Host { address: path.display().to_string(), source })
}
