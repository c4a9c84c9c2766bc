//! The MADT: processors and interrupt controllers (ACPI 6.5, 5.2.12).

use super::{OEM, OEM_REVISION, OEM_TABLE};
use crate::layout::{IOAPIC_ADDRESS, LOCAL_APIC_ADDRESS, SCI_GSI};
use acpi_tables::sdt::Sdt;

const REVISION: u8 = 5;
/// PCAT_COMPAT: there are two 8259 as well.
const PCAT_COMPAT: u32 = 1;
/// Length of the table without its structures.
const FIXED_LENGTH: u32 = 44;

// Structure types and their lengths.
const LOCAL_APIC: [u8; 2] = [0, 8];
const IO_APIC: [u8; 2] = [1, 12];
const INTERRUPT_SOURCE_OVERRIDE: [u8; 2] = [2, 10];
const LOCAL_APIC_NMI: [u8; 2] = [4, 6];

/// The processor can be used.
const ENABLED: u32 = 1;
/// Interrupt flags: as the bus says; active high and edge-triggered.
const AS_BUS: u16 = 0;
const HIGH_EDGE: u16 = 0b0101;
const ISA_BUS: u8 = 0;
const ALL_PROCESSORS: u8 = 0xff;

/// The table for processors with APIC ids 0 to `vcpus - 1`.
pub(super) fn table(vcpus: u32) -> Sdt {
    let mut table = Sdt::new(*b"APIC", FIXED_LENGTH, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    table.write_u32(36, LOCAL_APIC_ADDRESS);
    table.write_u32(40, PCAT_COMPAT);
    let ids = 0..u8::try_from(vcpus).expect("a machine has at most 32 vCPUs");
    let processors: Vec<_> = ids.clone().flat_map(processor).collect();
    table.append_slice(&processors);
    table.append_slice(&io_apic(ids.end));
    // The timer is wired to pin 2 and not to pin 0, as on every PC; the SCI is edge-triggered here.
    table.append_slice(&source_override(0, 2, AS_BUS));
    let sci = u8::try_from(SCI_GSI).expect("an ISA interrupt");
    table.append_slice(&source_override(sci, SCI_GSI, HIGH_EDGE));
    table.append_slice(&nmi());
    table
}

fn processor(id: u8) -> Vec<u8> {
    [&LOCAL_APIC[..], &[id, id], &ENABLED.to_le_bytes()].concat()
}

fn io_apic(id: u8) -> Vec<u8> {
    [&IO_APIC[..], &[id, 0], &IOAPIC_ADDRESS.to_le_bytes(), &0_u32.to_le_bytes()].concat()
}

fn source_override(irq: u8, gsi: u32, flags: u16) -> Vec<u8> {
    [&INTERRUPT_SOURCE_OVERRIDE[..], &[ISA_BUS, irq], &gsi.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// The NMI comes in at LINT1 of each processor.
fn nmi() -> Vec<u8> {
    [&LOCAL_APIC_NMI[..], &[ALL_PROCESSORS], &AS_BUS.to_le_bytes(), &[1]].concat()
}
