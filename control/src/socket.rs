//! The Unix socket of the control API, from before its birth to its removal.
//!
//! Whoever can connect can do everything, so the file has mode 0600 from the moment it exists: the mode is set on the
//! socket before `bind`, which gives the file the mode of the socket (less the umask). A file that a dead process left
//! is replaced; checking and replacing happen under a lock of the directory, so that of two processes that start at
//! once exactly one wins. Nothing but a dead socket is ever removed.

use socket2::{Domain, SockAddr, Socket, Type};
use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use thiserror::Error;

/// The longest path of a Unix socket: `sun_path` has 108 bytes, one of them for the terminating NUL (unix(7)).
pub const SOCKET_PATH_MAX: usize = 107;

/// How many clients may wait to be accepted.
const BACKLOG: i32 = 64;

/// How long another process may hold the lock of the directory.
const LOCK_WAIT: Duration = Duration::from_secs(2);

/// Why a control socket cannot be made.
#[derive(Debug, Error)]
pub enum SocketError {
    /// The path is empty or has a NUL byte in it.
    #[error("{path:?} is not a path for a socket")]
    NotAPath {
        /// The path.
        path: PathBuf,
    },
    /// The path is too long for a socket address.
    #[error(
        "Socket path {} has {length} bytes and a Unix socket path has at most {SOCKET_PATH_MAX}; choose a shorter one, \
         for example under /run", path.display()
    )]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length.
        length: usize,
    },
    /// The directory is not there.
    #[error("Directory {} for the socket does not exist; create it first", directory.display())]
    NoDirectory {
        /// The directory.
        directory: PathBuf,
    },
    /// The directory cannot be used.
    #[error("Directory {} for the socket cannot be used", directory.display())]
    Directory {
        /// The directory.
        directory: PathBuf,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// Another process keeps the directory locked.
    #[error("Directory {} is locked by another process; try again", directory.display())]
    Locked {
        /// The directory.
        directory: PathBuf,
    },
    /// Something else lies there.
    #[error("{} exists and is not a socket; remove it, or choose another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Somebody listens there.
    #[error("Socket {} is in use by another process; choose another path", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The host refused.
    #[error("Socket {} cannot be made", path.display())]
    Host {
        /// The path.
        path: PathBuf,
        /// What the host says.
        #[source]
        source: io::Error,
    },
}

/// A socket that clients can connect to; nobody answers them yet. The file is removed on drop.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    file: SocketFile,
}

/// The file of a socket, removed on drop unless another one has taken its place.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// As long as the socket is open, no other file can have its inode number.
    _socket: Socket,
    device: u64,
    inode: u64,
}

impl ControlSocket {
    /// Makes the socket. Clients that connect from now on wait until a [`Server`](crate::Server) serves it.
    ///
    /// # Errors
    /// [`SocketError`], with the path and what to do.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        check_path(path)?;
        let _lock = lock_directory_of(path)?;
        let host = |source| SocketError::Host { path: path.to_owned(), source };
        let address = SockAddr::unix(path).map_err(host)?;
        let socket = private_socket().map_err(host)?;
        let held = socket.try_clone().map_err(host)?;
        if let Err(error) = socket.bind(&address) {
            if error.kind() != ErrorKind::AddrInUse {
                return Err(host(error));
            }
            remove_stale(path, &address)?;
            socket.bind(&address).map_err(host)?;
        }
        let metadata = fs::symlink_metadata(path).map_err(host)?;
        let file = SocketFile { path: path.to_owned(), _socket: held, device: metadata.dev(), inode: metadata.ino() };
        socket.listen(BACKLOG).map_err(host)?;
        Ok(Self { listener: OwnedFd::from(socket).into(), file })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// What accepts clients, without blocking, for those who serve something else than the control API here.
    #[must_use]
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    pub(crate) fn into_parts(self) -> (UnixListener, SocketFile) {
        (self.listener, self.file)
    }
}

impl SocketFile {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = |found: &fs::Metadata| (found.dev(), found.ino()) == (self.device, self.inode);
        if fs::symlink_metadata(&self.path).is_ok_and(|found| ours(&found))
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "the control socket could not be removed");
        }
    }
}

/// Whether a socket can have this path.
pub(crate) fn check_path(path: &Path) -> Result<(), SocketError> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.contains(&0) {
        return Err(SocketError::NotAPath { path: path.to_owned() });
    }
    if bytes.len() > SOCKET_PATH_MAX {
        return Err(SocketError::TooLong { path: path.to_owned(), length: bytes.len() });
    }
    Ok(())
}

/// A socket whose file will be for its owner only.
fn private_socket() -> io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    File::from(OwnedFd::from(socket.try_clone()?)).set_permissions(Permissions::from_mode(0o600))?;
    Ok(socket)
}

/// Holds the directory until the returned file is closed.
fn lock_directory_of(path: &Path) -> Result<File, SocketError> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    let file = File::open(directory).map_err(|source| match source.kind() {
        ErrorKind::NotFound => SocketError::NoDirectory { directory: directory.to_owned() },
        _ => SocketError::Directory { directory: directory.to_owned(), source },
    })?;
    let deadline = Instant::now() + LOCK_WAIT;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(fs::TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(fs::TryLockError::WouldBlock) => {
                return Err(SocketError::Locked { directory: directory.to_owned() });
            }
            Err(fs::TryLockError::Error(source)) => {
                return Err(SocketError::Directory { directory: directory.to_owned(), source });
            }
        }
    }
}

/// Removes the socket at `path` if nobody listens to it.
fn remove_stale(path: &Path, address: &SockAddr) -> Result<(), SocketError> {
    let host = |source| SocketError::Host { path: path.to_owned(), source };
    let metadata = fs::symlink_metadata(path).map_err(host)?;
    if !metadata.file_type().is_socket() {
        return Err(SocketError::NotASocket { path: path.to_owned() });
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(host)?;
    // A listener with a full backlog must not hold us up; it answers "would block" and is alive.
    probe.set_nonblocking(true).map_err(host)?;
    match probe.connect(address) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "replacing a control socket that nobody listens to");
            fs::remove_file(path).map_err(host)
        }
        // Connected, would block, of another type, not permitted: somebody is there.
        Ok(()) | Err(_) => Err(SocketError::InUse { path: path.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    fn bind_error(path: &Path) -> String {
        ControlSocket::bind(path).unwrap_err().to_string()
    }

    #[test]
    fn the_file_is_private_and_goes_with_its_owner() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let socket = ControlSocket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(socket.path(), path);
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let socket = ControlSocket::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        drop(socket);
    }

    #[test]
    fn a_live_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let first = ControlSocket::bind(&path).unwrap();
        assert!(bind_error(&path).ends_with("api.sock is in use by another process; choose another path"));
        // Even when it is too busy to accept anybody.
        let waiting: Vec<_> = (0..BACKLOG).map(|_| UnixStream::connect(&path).unwrap()).collect();
        assert!(bind_error(&path).contains("is in use"));
        drop(waiting);
        assert!(path.exists());
        drop(first);
        let _datagram = UnixDatagram::bind(&path).unwrap();
        assert!(bind_error(&path).contains("is in use"));
    }

    #[test]
    fn other_files_are_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notes.txt");
        fs::write(&path, "precious").unwrap();
        assert!(bind_error(&path).contains("exists and is not a socket"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        let link = directory.path().join("link.sock");
        std::os::unix::fs::symlink(directory.path().join("nowhere"), &link).unwrap();
        assert!(bind_error(&link).contains("exists and is not a socket"));
    }

    #[test]
    fn a_successor_at_the_same_path_is_not_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let (listener, file) = ControlSocket::bind(&path).unwrap().into_parts();
        drop(listener);
        fs::remove_file(&path).unwrap();
        let successor = ControlSocket::bind(&path).unwrap();
        drop(file);
        assert!(path.exists());
        drop(successor);
        assert!(!path.exists());
    }

    #[test]
    fn impossible_paths_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let long = directory.path().join("p".repeat(SOCKET_PATH_MAX));
        let length = long.as_os_str().len();
        let error = bind_error(&long);
        assert!(error.contains(&format!("has {length} bytes")) && error.contains("at most 107; choose a shorter"));
        let missing = directory.path().join("missing/api.sock");
        assert!(bind_error(&missing).ends_with("missing for the socket does not exist; create it first"));
        fs::write(directory.path().join("file"), "").unwrap();
        assert!(bind_error(&directory.path().join("file/api.sock")).ends_with("cannot be made"));
        assert!(bind_error(Path::new("")).contains("is not a path"));
        assert!(bind_error(Path::new("a\0b")).contains("is not a path"));
    }

    #[test]
    fn the_longest_path_works() {
        let directory = tempfile::tempdir().unwrap();
        let room = SOCKET_PATH_MAX - directory.path().as_os_str().len() - 1;
        let path = directory.path().join("p".repeat(room));
        let _socket = ControlSocket::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn of_many_at_once_one_wins() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        drop(UnixListener::bind(&path).unwrap());
        let sockets: Vec<_> = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..8).map(|_| scope.spawn(|| ControlSocket::bind(&path))).collect();
            starts.into_iter().map(|start| start.join().unwrap()).collect()
        });
        assert_eq!(sockets.iter().filter(|socket| socket.is_ok()).count(), 1);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_locked_directory_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let holder = File::open(directory.path()).unwrap();
        holder.lock().unwrap();
        assert!(bind_error(&directory.path().join("api.sock")).ends_with("is locked by another process; try again"));
    }
}
