//! Power: the ACPI fixed registers with the power button, and the ports by which a guest resets itself or reports a panic.
//!
//! The machine is told of a [`PowerEvent`] on the vCPU thread whose access caused it, and ends or resets the guest from
//! another. The registers are those of ACPI 6.5, 4.8: fixed hardware, without the events that the FADT does not announce.

use crate::virtio::read_bytes;
use crate::{BusDevice, Device, Gpa, QuiesceError};
use saved::{Saved, SavedError, SavedState};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

/// What a guest does with its power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerEvent {
    /// It entered S5.
    PowerOff,
    /// It asked for a reset.
    Reset,
    /// Its kernel panicked.
    Panicked,
}

/// Who is told.
#[derive(Clone)]
struct Listener(Arc<dyn Fn(PowerEvent) + Send + Sync>);

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Listener")
    }
}

/// Number of ports of [`PowerManagement`]: the event block (4), then the control block (2).
pub const PM_PORTS: u64 = 6;
/// `SLP_TYP` that means S5, as the DSDT's `\_S5` object has to say.
pub const SLEEP_TYPE_S5: u8 = 5;

/// Power button: bit 8 of PM1 status and PM1 enable (ACPI 6.5, tables 4.12 and 4.13).
const POWER_BUTTON: u16 = 1 << 8;
/// Writable bits of PM1 enable: global lock and power button; the rest needs hardware that is not there.
const ENABLE_BITS: u16 = POWER_BUTTON | 1 << 5;
/// PM1 control (ACPI 6.5, table 4.14): `SCI_EN`, set for good, as the FADT names no SMI command.
const SCI_ENABLED: u16 = 1;
const SLEEP_TYPE_SHIFT: u32 = 10;
const SLEEP_TYPE: u16 = 0b111 << SLEEP_TYPE_SHIFT;
const SLEEP_ENABLE: u16 = 1 << 13;

/// Offsets of the registers' first bytes.
const STATUS: usize = 0;
const ENABLE: usize = 2;
const CONTROL: usize = 4;

/// Why the power registers could not be restored.
#[derive(Debug, Error)]
pub enum PowerError {
    /// No section, or one of another kind.
    #[error(transparent)]
    Section(#[from] SavedError),
    /// A saved register has bits that it cannot have.
    #[error("The saved {field} register of device {id} cannot be {value:#x}")]
    BadField {
        /// The device.
        id: String,
        /// The register.
        field: &'static str,
        /// Its value.
        value: u16,
    },
}

/// What the power registers are made of.
pub struct PowerParts {
    /// Unique name in the machine, such as `power`.
    pub id: String,
    /// The SCI, to be bound as an edge-triggered irqfd.
    pub sci: EventFd,
    /// Told of [`PowerEvent::PowerOff`].
    pub listener: Arc<dyn Fn(PowerEvent) + Send + Sync>,
}

impl fmt::Debug for PowerParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PowerParts").field("id", &self.id).field("sci", &self.sci).finish_non_exhaustive()
    }
}

/// The section of the power registers, version 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerSavedV1 {
    /// PM1 status.
    pub status: u16,
    /// PM1 enable.
    pub enable: u16,
    /// PM1 control.
    pub control: u16,
}

impl Saved for PowerSavedV1 {
    const KIND: &'static str = "acpi-pm1";
    const VERSION: u16 = 1;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Registers {
    status: u16,
    enable: u16,
    control: u16,
}

impl Registers {
    const POWER_ON: Self = Self { status: 0, enable: 0, control: SCI_ENABLED };

    fn bytes(self) -> [u8; 6] {
        let ([a, b], [c, d], [e, f]) =
            (self.status.to_le_bytes(), self.enable.to_le_bytes(), self.control.to_le_bytes());
        [a, b, c, d, e, f]
    }

    fn raises_sci(self) -> bool {
        self.status & self.enable != 0
    }
}

/// The PM1 event and control registers.
#[derive(Debug)]
pub struct PowerManagement {
    id: String,
    sci: EventFd,
    listener: Listener,
    registers: Mutex<Registers>,
}

impl PowerManagement {
    /// The registers as after power-on.
    #[must_use]
    pub fn new(parts: PowerParts) -> Self {
        Self::with(parts, Registers::POWER_ON)
    }

    /// Takes the section of `parts.id` out of `state`.
    ///
    /// # Errors
    /// [`PowerError`] if the section is missing, of another kind, or has impossible bits.
    pub fn restore(state: &mut SavedState, parts: PowerParts) -> Result<Self, PowerError> {
        let PowerSavedV1 { status, enable, control } = state.take(&parts.id)?;
        let known = [
            ("status", status, POWER_BUTTON),
            ("enable", enable, ENABLE_BITS),
            ("control", control, SCI_ENABLED | SLEEP_TYPE),
        ];
        for (field, value, bits) in known {
            if value & !bits != 0 {
                return Err(PowerError::BadField { id: parts.id, field, value });
            }
        }
        Ok(Self::with(parts, Registers { status, enable, control: control | SCI_ENABLED }))
    }

    fn with(parts: PowerParts, registers: Registers) -> Self {
        let PowerParts { id, sci, listener } = parts;
        Self { id, sci, listener: Listener(listener), registers: Mutex::new(registers) }
    }

    /// Presses the power button. A guest that listens to it shuts down.
    pub fn press_power_button(&self) {
        let mut registers = self.lock();
        registers.status |= POWER_BUTTON;
        self.update_sci(*registers);
    }

    /// Whether the guest listens to the power button.
    #[must_use]
    pub fn is_power_button_enabled(&self) -> bool {
        self.lock().enable & POWER_BUTTON != 0
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update_sci(&self, registers: Registers) {
        if registers.raises_sci() {
            // The only refusal is a counter at its end, and then the interrupt is up already.
            let _ = self.sci.write(1);
        }
    }
}

/// The bytes of a write that fall on the register of two bytes at `register`, as a value and a mask.
fn written(offset: u64, data: &[u8], register: usize) -> (u16, u16) {
    let (mut value, mut mask) = ([0; 2], [0; 2]);
    let first = usize::try_from(offset).unwrap_or(usize::MAX);
    for (position, &byte) in data.iter().enumerate() {
        if let Some(place) = first.saturating_add(position).checked_sub(register).filter(|at| *at < 2) {
            (value[place], mask[place]) = (byte, u8::MAX);
        }
    }
    (u16::from_le_bytes(value), u16::from_le_bytes(mask))
}

impl BusDevice for PowerManagement {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.lock().bytes();
        read_bytes(&bytes, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut registers = self.lock();
        let before = *registers;
        // A status bit is cleared by writing 1 to it.
        registers.status &= !written(offset, data, STATUS).0;
        let (enable, mask) = written(offset, data, ENABLE);
        registers.enable = registers.enable & !mask | enable & ENABLE_BITS;
        let (control, mask) = written(offset, data, CONTROL);
        let kept = registers.control & SLEEP_TYPE & !mask;
        registers.control = SCI_ENABLED | kept | control & SLEEP_TYPE;
        if registers.raises_sci() && !before.raises_sci() {
            self.update_sci(*registers);
        }
        let sleep_type = (registers.control & SLEEP_TYPE) >> SLEEP_TYPE_SHIFT;
        drop(registers);
        if control & SLEEP_ENABLE != 0 && sleep_type == u16::from(SLEEP_TYPE_S5) {
            (self.listener.0)(PowerEvent::PowerOff);
        }
    }
}

impl Device for PowerManagement {
    fn id(&self) -> &str {
        &self.id
    }

    fn quiesce(&self, _: Duration) -> Result<(), QuiesceError> {
        Ok(())
    }

    fn resume(&self) {
        self.update_sci(*self.lock());
    }

    fn save(&self, state: &mut SavedState) -> Result<(), SavedError> {
        let Registers { status, enable, control } = *self.lock();
        state.put(&self.id, &PowerSavedV1 { status, enable, control })
    }

    fn reset(&self) {
        *self.lock() = Registers::POWER_ON;
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

/// A port without state that turns one write into a [`PowerEvent`]. It has nothing to lead, save or restore, so it is
/// put on the bus and forgotten.
#[derive(Debug)]
pub struct PowerPort {
    kind: PortKind,
    listener: Listener,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PortKind {
    ResetRegister,
    KeyboardController,
    PanicNotifier,
}

/// The FADT's reset register: bit 2 of port 0xcf9 resets the CPU (ACPI 6.5, 4.8.3.6, with the chipset's usual value 6).
const RESET_CPU: u8 = 1 << 2;
/// The keyboard controller's command to pulse the line that resets the CPU.
const PULSE_RESET: u8 = 0xfe;
/// Its status and command port, counted from 0x60.
const KEYBOARD_COMMAND: u64 = 4;
/// `PVPANIC_PANICKED` (QEMU's docs/specs/pvpanic.rst).
const PANICKED: u8 = 1;

impl PowerPort {
    /// The reset register that the FADT names: one port.
    #[must_use]
    pub fn reset_register(listener: Arc<dyn Fn(PowerEvent) + Send + Sync>) -> Self {
        Self { kind: PortKind::ResetRegister, listener: Listener(listener) }
    }

    /// The part of a keyboard controller that old guests reset by: five ports from 0x60.
    #[must_use]
    pub fn keyboard_controller(listener: Arc<dyn Fn(PowerEvent) + Send + Sync>) -> Self {
        Self { kind: PortKind::KeyboardController, listener: Listener(listener) }
    }

    /// pvpanic: one port.
    #[must_use]
    pub fn panic_notifier(listener: Arc<dyn Fn(PowerEvent) + Send + Sync>) -> Self {
        Self { kind: PortKind::PanicNotifier, listener: Listener(listener) }
    }
}

impl BusDevice for PowerPort {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(match self.kind {
            PortKind::PanicNotifier => PANICKED,
            PortKind::ResetRegister | PortKind::KeyboardController => 0,
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let event = match self.kind {
            PortKind::ResetRegister if value & RESET_CPU != 0 => PowerEvent::Reset,
            PortKind::KeyboardController if offset == KEYBOARD_COMMAND && value == PULSE_RESET => PowerEvent::Reset,
            PortKind::PanicNotifier if value & PANICKED != 0 => PowerEvent::Panicked,
            PortKind::ResetRegister | PortKind::KeyboardController | PortKind::PanicNotifier => return,
        };
        (self.listener.0)(event);
    }
}

#[cfg(test)]
mod tests;
