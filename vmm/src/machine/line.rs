//! The serial line of a guest: the port, its interrupt, and the host's console at the other end.
//!
//! It outlives the machine: when the machine is reset or pulsed, a new one takes the same line, so that a console client
//! stays connected and no byte of output is lost.

use crate::config::{SERIAL_ID, Serial};
use crate::seccomp;
use devices::Worker;
use devices::serial::{Console, ConsoleError, ConsoleLink, SerialError, SerialParts, SerialPort};
use devices::worker::WorkerError;
use std::io;
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

/// A serial port with a console.
#[derive(Debug)]
pub struct SerialLine {
    // Dropped first: the pump feeds the port.
    _link: Option<ConsoleLink>,
    port: Arc<SerialPort>,
    irq: EventFd,
}

impl SerialLine {
    /// Opens the console that `serial` asks for. `quit` is called by the terminal's escape.
    ///
    /// # Errors
    /// [`LineError`], which says what to do.
    pub fn open(serial: &Serial, quit: Box<dyn FnMut() + Send>) -> Result<Self, LineError> {
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
        let (port, link) = match console {
            None => (SerialPort::new(parts(Box::new(io::sink()))?)?, None),
            Some(console) => {
                let (sink, input) = console.split();
                let port = SerialPort::new(parts(sink)?)?;
                let link = input.connect(port.input(), &Worker::spawn("console", seccomp::enter_console)?)?;
                (port, Some(link))
            }
        };
        Ok(Self { _link: link, port: Arc::new(port), irq })
    }

    pub(crate) fn port(&self) -> &Arc<SerialPort> {
        &self.port
    }

    pub(crate) fn irq(&self) -> &EventFd {
        &self.irq
    }
}
