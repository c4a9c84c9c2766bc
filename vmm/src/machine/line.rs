//! The serial line of a guest: the port, its interrupt, and the host's console at the other end.
//!
//! It outlives the machine: when the machine is reset or pulsed, a new one takes the same line, so that a console client
//! stays connected and no byte of output is lost.

use crate::config::{SERIAL_ID, Serial};
use crate::seccomp;
use devices::Worker;
use devices::serial::{
    Console, ConsoleError, ConsoleInput, ConsoleLink, SerialError, SerialInput, SerialParts, SerialPort,
};
use devices::worker::WorkerError;
use std::io::{self, Write};
use std::sync::Arc;
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Why there is no serial line.
#[derive(Debug, Error)]
pub enum LineError {
    /// The console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The port.
    #[error(transparent)]
    Port(#[from] SerialError),
    /// The thread that pumps input.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The host gives no event descriptor.
    #[error("Could not create an event descriptor")]
    Event(#[source] io::Error),
}

/// A serial port whose output goes to a console.
#[derive(Debug)]
pub struct SerialLine {
    port: Arc<SerialPort>,
    irq: EventFd,
}

/// The other direction: a console's input.
#[derive(Debug)]
pub struct LineInput {
    port: SerialInput,
    from: Option<ConsoleInput>,
}

impl SerialLine {
    /// Opens the console that `serial` asks for. `quit` is called by the terminal's escape.
    ///
    /// # Errors
    /// [`LineError`], which says what to do.
    pub fn open(serial: &Serial, quit: Box<dyn FnMut() + Send>) -> Result<(Self, LineInput), LineError> {
        let console = match serial {
            Serial::Off => None,
            Serial::Terminal => Some(Console::terminal(quit)?),
            Serial::File(path) => Some(Console::file(path)?),
            Serial::Socket(path) => Some(Console::socket(path)?),
        };
        let irq = EventFd::new(EFD_NONBLOCK).map_err(LineError::Event)?;
        let id = SERIAL_ID.to_owned();
        let parts = |sink| -> Result<_, LineError> {
            Ok(SerialParts { id, irq: irq.try_clone().map_err(LineError::Event)?, sink })
        };
        let (sink, from) = match console.map(Console::split) {
            None => (Box::new(io::sink()) as Box<dyn Write + Send>, None),
            Some((sink, input)) => (sink, Some(input)),
        };
        let port = SerialPort::new(parts(sink)?)?;
        let input = LineInput { port: port.input(), from };
        Ok((Self { port: Arc::new(port), irq }, input))
    }

    pub(crate) fn port(&self) -> &Arc<SerialPort> {
        &self.port
    }

    pub(crate) fn irq(&self) -> &EventFd {
        &self.irq
    }
}

impl LineInput {
    /// Feeds the port, on a thread of its own, until the link is dropped. A guest need not wait for that.
    ///
    /// # Errors
    /// [`LineError::Console`] or [`LineError::Worker`].
    pub fn connect(self) -> Result<Option<ConsoleLink>, LineError> {
        let Self { port, from } = self;
        let Some(input) = from else { return Ok(None) };
        Ok(Some(input.connect(port, &Worker::spawn("console", seccomp::enter_console)?)?))
    }
}
