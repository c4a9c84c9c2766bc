//! The first serial port, a 16550A: registers by vm-superio, output to a sink, input from any thread.
//!
//! vCPU threads come through the bus, the console's pump through [`SerialInput`]; one lock orders them. Invariants: a
//! sink that blocks or fails costs output, never the guest; input is taken only as far as the guest's FIFO has room, and
//! none while the port stands still, so that what is saved is all there is.

mod console;
mod descriptor;
mod socket;
mod terminal;
#[cfg(test)]
mod tests;

pub use console::{Console, ConsoleError, ConsoleInput, ConsoleLink};
pub use terminal::restore_terminal;

use crate::{BusDevice, Device, Gpa, QuiesceError};
use saved::{Saved, SavedError, SavedState};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use thiserror::Error;
use vm_superio::serial::{Error as UartError, SerialEvents};
use vm_superio::{Serial, SerialState, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Number of ports that a 16550 takes.
pub const PORTS: u64 = 8;

/// The bits that a 16550A has in its interrupt enable register.
const INTERRUPT_ENABLE_BITS: u8 = 0x0f;
/// Interrupt identification: nothing pending, or any of the two that this model raises.
const NOTHING_PENDING: u8 = 1;
const IDENTIFICATION_BITS: u8 = 0b0111;

/// Why a serial port could not be made.
#[derive(Debug, Error)]
pub enum SerialError {
    /// The host gives no event descriptor.
    #[error("Could not create an event descriptor")]
    Event(#[source] io::Error),
    /// No section, or one of another kind.
    #[error(transparent)]
    Section(#[from] SavedError),
    /// A saved register has a value that a 16550 cannot have.
    #[error("The saved {field} of serial port {id} cannot be {value:#x}")]
    BadField {
        /// The port.
        id: String,
        /// The register.
        field: &'static str,
        /// Its value, or length.
        value: u64,
    },
}

/// What a serial port is made of.
pub struct SerialParts {
    /// Unique name in the machine, such as `com1`.
    pub id: String,
    /// The interrupt, to be bound as an edge-triggered irqfd.
    pub irq: EventFd,
    /// Where the guest's output goes, byte by byte.
    pub sink: Box<dyn Write + Send>,
}

impl fmt::Debug for SerialParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialParts").field("id", &self.id).field("irq", &self.irq).finish_non_exhaustive()
    }
}

/// The section of a serial port, version 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialSavedV1 {
    /// Divisor latch, low byte.
    pub divisor_low: u8,
    /// Divisor latch, high byte.
    pub divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register: which interrupts are pending.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Input that the guest has not read.
    pub input: Vec<u8>,
}

impl Saved for SerialSavedV1 {
    const KIND: &'static str = "serial-16550a";
    const VERSION: u16 = 1;
}

#[derive(Debug, Clone)]
struct Irq(Arc<EventFd>);

impl Trigger for Irq {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the pump that the guest has read all its input.
#[derive(Debug, Clone)]
struct Drained(Arc<EventFd>);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // The only refusal is a counter at its end, and then the pump is told already.
        let _ = self.0.write(1);
    }
}

/// The sink, made harmless: what it refuses is dropped, with one warning.
struct Output {
    sink: Box<dyn Write + Send>,
    has_warned: bool,
}

impl Output {
    fn new(sink: Box<dyn Write + Send>) -> Self {
        Self { sink, has_warned: false }
    }
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Output").field("has_warned", &self.has_warned).finish_non_exhaustive()
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Err(error) = self.sink.write_all(bytes).and_then(|()| self.sink.flush())
            && !self.has_warned
        {
            self.has_warned = true;
            tracing::warn!(%error, "The console does not take the guest's output; some of it is dropped");
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Uart = Serial<Irq, Drained, Output>;

#[derive(Debug)]
struct Port {
    uart: Uart,
    stands: bool,
}

impl Port {
    /// Puts another UART in the place of this one; output goes where it went.
    fn replace(&mut self, mut uart: Uart) {
        std::mem::swap(uart.writer_mut(), self.uart.writer_mut());
        self.uart = uart;
    }
}

#[derive(Debug)]
struct Shared {
    id: String,
    irq: Irq,
    drained: Drained,
    port: Mutex<Port>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A serial port.
#[derive(Debug)]
pub struct SerialPort {
    shared: Arc<Shared>,
}

impl SerialPort {
    /// A port in its power-on state.
    ///
    /// # Errors
    /// [`SerialError::Event`] if the host refuses a descriptor.
    pub fn new(parts: SerialParts) -> Result<Self, SerialError> {
        let SerialParts { id, irq, sink } = parts;
        let irq = Irq(Arc::new(irq));
        let drained = Drained(Arc::new(EventFd::new(EFD_NONBLOCK).map_err(SerialError::Event)?));
        let uart = Serial::with_events(irq.clone(), drained.clone(), Output::new(sink));
        let port = Mutex::new(Port { uart, stands: false });
        Ok(Self { shared: Arc::new(Shared { id, irq, drained, port }) })
    }

    /// Takes the section of this port's id out of `state` and takes it over. The console stays connected; the port
    /// stands still until it is resumed.
    ///
    /// # Errors
    /// [`SerialError`] if the section is missing, of another kind, or cannot be one of a 16550; the port is as before.
    pub fn restore(&self, state: &mut SavedState) -> Result<(), SerialError> {
        let Shared { id, irq, drained, port: _ } = self.shared.as_ref();
        let uart = validate(id, state.take::<SerialSavedV1>(id)?)?;
        let nowhere = Output::new(Box::new(io::sink()));
        let fresh = Serial::from_state(&uart, irq.clone(), drained.clone(), nowhere).map_err(|error| match error {
            UartError::FullFifo => SerialError::BadField {
                id: id.clone(),
                field: "length of the input",
                value: uart.in_buffer.len() as u64,
            },
            UartError::Trigger(source) | UartError::IOError(source) => SerialError::Event(source),
        })?;
        let mut port = self.shared.lock();
        port.replace(fresh);
        port.stands = true;
        Ok(())
    }

    /// The other end of the line.
    #[must_use]
    pub fn input(&self) -> SerialInput {
        SerialInput { shared: Arc::clone(&self.shared) }
    }
}

fn validate(id: &str, saved: SerialSavedV1) -> Result<SerialState, SerialError> {
    let SerialSavedV1 {
        divisor_low,
        divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
        input,
    } = saved;
    let bad = |field, value: u8| Err(SerialError::BadField { id: id.to_owned(), field, value: value.into() });
    if interrupt_enable & !INTERRUPT_ENABLE_BITS != 0 {
        return bad("interrupt enable register", interrupt_enable);
    }
    if interrupt_identification & !IDENTIFICATION_BITS != 0 {
        return bad("interrupt identification register", interrupt_identification);
    }
    Ok(SerialState {
        baud_divisor_low: divisor_low,
        baud_divisor_high: divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
        in_buffer: input,
    })
}

/// The input side of a serial port, for a console. Clones share it.
#[derive(Debug, Clone)]
pub struct SerialInput {
    shared: Arc<Shared>,
}

impl SerialInput {
    /// Gives the guest as much of `bytes` as its FIFO has room for; how many were taken. The rest is to be offered again
    /// after [`Self::drained`].
    pub fn offer(&self, bytes: &[u8]) -> usize {
        let mut port = self.shared.lock();
        if port.stands {
            return 0;
        }
        match port.uart.enqueue_raw_bytes(bytes) {
            Ok(taken) => taken,
            Err(UartError::FullFifo) => 0,
            // They are in the FIFO; an interrupt that cannot be raised is one that is up already.
            Err(UartError::Trigger(_) | UartError::IOError(_)) => bytes.len(),
        }
    }

    /// Readable each time there is room again.
    #[must_use]
    pub fn drained(&self) -> &EventFd {
        &self.shared.drained.0
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut port = self.shared.lock();
        for (byte, place) in data.iter_mut().zip(0..) {
            *byte = u8::try_from(offset.saturating_add(place)).map_or(0, |register| port.uart.read(register));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut port = self.shared.lock();
        for (byte, place) in data.iter().zip(0..) {
            if let Ok(register) = u8::try_from(offset.saturating_add(place)) {
                // Output never fails (see Output), and an interrupt that cannot be raised is one that is up already.
                let _ = port.uart.write(register, *byte);
            }
        }
    }
}

impl Device for SerialPort {
    fn id(&self) -> &str {
        &self.shared.id
    }

    fn quiesce(&self, _: Duration) -> Result<(), QuiesceError> {
        self.shared.lock().stands = true;
        Ok(())
    }

    fn resume(&self) {
        let mut port = self.shared.lock();
        port.stands = false;
        if port.uart.state().interrupt_identification & NOTHING_PENDING == 0 {
            // The edge may have been lost in the move, and the guest would wait for it: a console that is stuck.
            let _ = self.shared.irq.trigger();
        }
        // Input was refused meanwhile.
        self.shared.drained.in_buffer_empty();
    }

    fn save(&self, state: &mut SavedState) -> Result<(), SavedError> {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = self.shared.lock().uart.state();
        state.put(
            &self.shared.id,
            &SerialSavedV1 {
                divisor_low: baud_divisor_low,
                divisor_high: baud_divisor_high,
                interrupt_enable,
                interrupt_identification,
                line_control,
                line_status,
                modem_control,
                modem_status,
                scratch,
                input: in_buffer,
            },
        )
    }

    fn reset(&self) {
        let Shared { id: _, irq, drained, port: _ } = self.shared.as_ref();
        let nowhere = Output::new(Box::new(io::sink()));
        self.shared.lock().replace(Serial::with_events(irq.clone(), drained.clone(), nowhere));
    }

    fn release(&self) {}

    fn reacquire(&self) -> io::Result<()> {
        Ok(())
    }

    fn announce(&self) {}

    fn log_dirty(&self, _: bool) -> io::Result<()> {
        Ok(())
    }

    fn harvest_dirty(&self, _: &mut dyn FnMut(Gpa)) {}
}
