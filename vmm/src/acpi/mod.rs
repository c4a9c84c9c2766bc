//! The ACPI tables: what hardware the guest finds, how it is switched off and reset.
//!
//! Written once by the machine's assembly, before `boot` tells the guest where the root pointer is; a guest that moves has
//! them in its memory. The machine is a classic PC and not a "hardware-reduced" one, because only the classic fixed
//! registers bring a power button without further devices. Layout, all in the room at [`ACPI_TABLES`]:
//!
//! ```text
//! RSDP | FACS | DSDT | FADT -> FACS, DSDT | MADT | XSDT -> FADT, MADT
//! ```

mod dsdt;
mod fixed;
mod madt;

use crate::config::MachineConfig;
use crate::layout::{ACPI_TABLES, ACPI_TABLES_SIZE};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, facs::FACS};
use devices::{Gpa, GuestRam};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// Who made the tables, padded as ACPI 6.5, 5.2.6 wants it.
const OEM: [u8; 6] = *b"GODWIT";
const OEM_TABLE: [u8; 8] = *b"GODWITVM";
const OEM_REVISION: u32 = 1;
/// The strictest alignment of any table: that of the FACS (ACPI 6.5, 5.2.10).
const ALIGNMENT: u64 = 64;

/// Why the tables could not be written.
#[derive(Debug, Error)]
pub enum AcpiError {
    /// The tables do not fit into their room.
    #[error("The ACPI tables of {bytes} bytes do not fit into {ACPI_TABLES_SIZE} bytes")]
    TooLarge {
        /// Their length.
        bytes: u64,
    },
    /// There is no memory where the tables belong.
    #[error("Could not write the ACPI tables to guest memory")]
    Memory {
        /// What was wrong.
        #[source]
        source: GuestMemoryError,
    },
}

/// Writes the tables for `machine` and returns the address of the root pointer.
///
/// # Errors
/// [`AcpiError`].
pub fn write_tables(ram: &GuestRam, machine: &MachineConfig) -> Result<Gpa, AcpiError> {
    let tables = build(machine.cpus.count, machine.virtio_ids().len());
    if tables.len() as u64 > ACPI_TABLES_SIZE {
        return Err(AcpiError::TooLarge { bytes: tables.len() as u64 });
    }
    ram.write_slice(&tables, ACPI_TABLES).map_err(|source| AcpiError::Memory { source })?;
    Ok(ACPI_TABLES)
}

/// All tables of a machine, as they lie at [`ACPI_TABLES`].
fn build(vcpus: u32, virtio_devices: usize) -> Vec<u8> {
    let mut room = Room { bytes: vec![0; Rsdp::len()] };
    let facs = room.put(&FACS::new());
    let dsdt = room.put(&dsdt::table(virtio_devices));
    let fadt = room.put(&fixed::table(facs, dsdt));
    let madt = room.put(&madt::table(vcpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt.0);
    xsdt.add_entry(madt.0);
    let xsdt = room.put(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt.0).to_aml_bytes(&mut rsdp);
    room.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    room.bytes
}

/// The tables so far.
struct Room {
    bytes: Vec<u8>,
}

impl Room {
    /// Appends a table and returns where it lies.
    fn put(&mut self, table: &dyn Aml) -> Gpa {
        let start = (self.bytes.len() as u64).next_multiple_of(ALIGNMENT);
        self.bytes.resize(usize::try_from(start).expect("sizes have 64 bits on x86-64"), 0);
        table.to_aml_bytes(&mut self.bytes);
        GuestAddress(ACPI_TABLES.0 + start)
    }
}

#[cfg(test)]
mod tests;
