//! What is at the host's end of the serial line: a terminal, a file, or a Unix socket.
//!
//! A console is made first, for its sink goes into the port; then its input is connected to the port and pumped on a
//! [`Worker`]. Dropping the [`ConsoleLink`] ends the pump and gives the terminal back as it was.

use super::descriptor::PatientWriter;
use super::socket::SocketPump;
use super::terminal::{RawMode, TerminalPump};
use super::{SerialInput, socket};
use crate::worker::{Attachment, Worker, WorkerError};
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why there is no console.
#[derive(Debug, Error)]
pub enum ConsoleError {
    /// The log file cannot be opened.
    #[error("Could not open console file {}; check that its directory exists and may be written", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The path does not fit into a socket address.
    #[error("Console socket path {} is too long; the system takes at most 107 bytes", path.display())]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// Somebody listens there.
    #[error("Console socket {} is in use by another process", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// There is something else at the path.
    #[error("Console socket {} cannot be made: something that is not a socket is there", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Anything else about the socket.
    #[error("Could not listen on console socket {}", path.display())]
    Socket {
        /// The path.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The terminal's descriptors are not usable.
    #[error("Could not use the terminal as the console")]
    Terminal(#[source] io::Error),
    /// The input cannot be pumped.
    #[error(transparent)]
    Worker(#[from] WorkerError),
}

/// The host's end of a serial line, not connected yet.
pub struct Console {
    sink: Box<dyn Write + Send>,
    input: ConsoleInput,
}

/// The input of a console, to be connected to the port that writes to its sink.
pub struct ConsoleInput {
    kind: Kind,
}

enum Kind {
    None,
    Terminal { keyboard: File, quit: Box<dyn FnMut() + Send> },
    Socket(socket::Listener),
}

impl Console {
    /// The terminal of this process, in raw mode while it is connected. `Ctrl-a x` calls `quit`; `Ctrl-a Ctrl-a` is one
    /// `Ctrl-a` for the guest. Standard input and output may also be pipes or files.
    ///
    /// # Errors
    /// [`ConsoleError::Terminal`] if standard input or output is closed.
    pub fn terminal(quit: Box<dyn FnMut() + Send>) -> Result<Self, ConsoleError> {
        let duplicate = |fd: io::Result<std::os::fd::OwnedFd>| fd.map(File::from).map_err(ConsoleError::Terminal);
        let keyboard = duplicate(io::stdin().as_fd().try_clone_to_owned())?;
        let screen = duplicate(io::stdout().as_fd().try_clone_to_owned())?;
        let kind = Kind::Terminal { keyboard, quit };
        Ok(Self { sink: Box::new(PatientWriter::new(screen)), input: ConsoleInput { kind } })
    }

    /// A file that output is appended to; no input.
    ///
    /// # Errors
    /// [`ConsoleError::File`] if it cannot be opened.
    pub fn file(path: &Path) -> Result<Self, ConsoleError> {
        let file = File::options().append(true).create(true).open(path);
        let file = file.map_err(|source| ConsoleError::File { path: path.to_owned(), source })?;
        Ok(Self { sink: Box::new(PatientWriter::new(file)), input: ConsoleInput { kind: Kind::None } })
    }

    /// A Unix socket that one client at a time talks on; the next is served when the first has left. Output while there
    /// is no client is dropped. A socket left by a dead process is taken over.
    ///
    /// # Errors
    /// [`ConsoleError`] if it is in use or impossible.
    pub fn socket(path: &Path) -> Result<Self, ConsoleError> {
        let listener = socket::Listener::bind(path)?;
        Ok(Self { sink: Box::new(listener.sink()), input: ConsoleInput { kind: Kind::Socket(listener) } })
    }

    /// The sink for the port, and the input to connect to it.
    #[must_use]
    pub fn split(self) -> (Box<dyn Write + Send>, ConsoleInput) {
        (self.sink, self.input)
    }
}

impl ConsoleInput {
    /// Pumps input to `port` on `worker`'s thread until the link is dropped.
    ///
    /// # Errors
    /// [`ConsoleError`] if the host refuses to poll.
    pub fn connect(self, port: SerialInput, worker: &Worker) -> Result<ConsoleLink, ConsoleError> {
        Ok(match self.kind {
            Kind::None => ConsoleLink { _pump: None, _raw: None },
            Kind::Terminal { keyboard, quit } => {
                let raw = RawMode::enter(&keyboard).map_err(ConsoleError::Terminal)?;
                let pump = worker.attach(Box::new(TerminalPump::new(keyboard, port, quit)))?;
                ConsoleLink { _pump: Some(pump), _raw: raw }
            }
            Kind::Socket(listener) => {
                let pump = worker.attach(Box::new(SocketPump::new(listener, port)))?;
                ConsoleLink { _pump: Some(pump), _raw: None }
            }
        })
    }
}

/// A connected console. Not to be dropped on the worker's own thread.
#[derive(Debug)]
pub struct ConsoleLink {
    _pump: Option<Attachment>,
    _raw: Option<RawMode>,
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").field("input", &self.input).finish_non_exhaustive()
    }
}

impl fmt::Debug for ConsoleInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.kind {
            Kind::None => "none",
            Kind::Terminal { .. } => "terminal",
            Kind::Socket(_) => "socket",
        };
        f.debug_tuple("ConsoleInput").field(&kind).finish()
    }
}
