//! A Unix socket as a console: one client at a time, the others wait in the listener's queue.
//!
//! The pump, on its worker, accepts and reads; the sink, on vCPU threads, writes. They share the client behind a lock.
//! Invariant: only the pump drops a client, after it has stopped polling it.

use super::SerialInput;
use super::console::ConsoleError;
use super::descriptor::PatientWriter;
use crate::worker::{Polls, Task, WorkerError};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

type Client = Arc<Mutex<Option<PatientWriter<UnixStream>>>>;

/// A bound socket. Its path is removed when it is dropped.
#[derive(Debug)]
pub(super) struct Listener {
    listener: UnixListener,
    path: PathBuf,
    client: Client,
}

impl Listener {
    pub(super) fn bind(path: &Path) -> Result<Self, ConsoleError> {
        let refused = |source: io::Error| match source.kind() {
            io::ErrorKind::InvalidInput => ConsoleError::PathTooLong { path: path.to_owned() },
            _ => ConsoleError::Socket { path: path.to_owned(), source },
        };
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_stale(path)?;
                UnixListener::bind(path)
            }
            outcome => outcome,
        }
        .map_err(refused)?;
        listener.set_nonblocking(true).map_err(refused)?;
        Ok(Self { listener, path: path.to_owned(), client: Client::default() })
    }

    pub(super) fn sink(&self) -> Sink {
        Sink { client: Arc::clone(&self.client) }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "The console socket was gone already");
        }
    }
}

/// Removes a socket that nobody listens on any more.
fn remove_stale(path: &Path) -> Result<(), ConsoleError> {
    let socket = |source| ConsoleError::Socket { path: path.to_owned(), source };
    if !std::fs::symlink_metadata(path).map_err(socket)?.file_type().is_socket() {
        return Err(ConsoleError::NotASocket { path: path.to_owned() });
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path).map_err(socket),
        Err(error) => Err(socket(error)),
        Ok(_) => Err(ConsoleError::InUse { path: path.to_owned() }),
    }
}

/// Writes to the client, if there is one.
#[derive(Debug)]
pub(super) struct Sink {
    client: Client,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.client.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            None => Ok(bytes.len()),
            // A client that has left is the pump's affair, and its bytes are lost as without one.
            Some(client) => match client.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(bytes.len()),
                outcome => outcome,
            },
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const LISTENER: u32 = 0;
const CLIENT: u32 = 1;
const DRAINED: u32 = 2;
/// Bytes read at once: as many as the port's FIFO takes.
const READ: usize = 64;

/// Why the reading of a client stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// Until there is more input, or room for it.
    Waits,
    /// It left.
    Left,
}

#[derive(Debug)]
pub(super) struct SocketPump {
    listener: Listener,
    reader: Option<UnixStream>,
    port: SerialInput,
    /// What the guest's FIFO had no room for.
    pending: Vec<u8>,
}

impl SocketPump {
    pub(super) fn new(listener: Listener, port: SerialInput) -> Self {
        Self { listener, reader: None, port, pending: Vec::new() }
    }

    fn pump(&mut self, polls: &mut Polls<'_, '_>) {
        loop {
            if self.reader.is_none() && !self.accept(polls) {
                return;
            }
            if self.read() == Stop::Waits {
                return;
            }
            self.leave(polls);
        }
    }

    fn accept(&mut self, polls: &mut Polls<'_, '_>) -> bool {
        let welcome = |stream: UnixStream| {
            stream.set_nonblocking(true)?;
            Ok((stream.try_clone()?, stream))
        };
        let (reader, writer) = match self.listener.listener.accept().and_then(|(stream, _)| welcome(stream)) {
            Ok(client) => client,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            Err(error) => {
                tracing::warn!(%error, "A console client could not be accepted");
                return false;
            }
        };
        if let Err(error) = polls.add(reader.as_raw_fd(), CLIENT) {
            tracing::warn!(%error, "A console client could not be polled");
            return false;
        }
        self.reader = Some(reader);
        self.set_writer(Some(PatientWriter::new(writer)));
        true
    }

    fn read(&mut self) -> Stop {
        let Some(reader) = &mut self.reader else { return Stop::Waits };
        loop {
            let taken = self.port.offer(&self.pending);
            self.pending.drain(..taken);
            if !self.pending.is_empty() {
                return Stop::Waits;
            }
            let mut typed = [0; READ];
            match reader.read(&mut typed) {
                Ok(0) => return Stop::Left,
                Ok(length) => self.pending.extend(&typed[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Stop::Waits,
                Err(_) => return Stop::Left,
            }
        }
    }

    fn leave(&mut self, polls: &mut Polls<'_, '_>) {
        if let Some(reader) = self.reader.take()
            && let Err(error) = polls.remove(reader.as_raw_fd(), CLIENT)
        {
            tracing::debug!(%error, "The console client was not polled");
        }
        self.set_writer(None);
    }

    fn set_writer(&self, writer: Option<PatientWriter<UnixStream>>) {
        *self.listener.client.lock().unwrap_or_else(PoisonError::into_inner) = writer;
    }
}

impl Task for SocketPump {
    fn begin(&mut self, polls: &mut Polls<'_, '_>) -> Result<(), WorkerError> {
        polls.add(self.listener.listener.as_raw_fd(), LISTENER)?;
        polls.add(self.port.drained().as_raw_fd(), DRAINED)
    }

    fn ready(&mut self, token: u32, polls: &mut Polls<'_, '_>) {
        if token == DRAINED {
            // Empty if an earlier look has read it.
            let _ = self.port.drained().read();
        }
        self.pump(polls);
    }
}
