//! The FADT: the fixed hardware of the machine (ACPI 6.5, 5.2.9).

use super::{OEM, OEM_REVISION, OEM_TABLE};
use crate::layout::{
    PM1A_CONTROL_LENGTH, PM1A_CONTROL_PORT, PM1A_EVENT_LENGTH, PM1A_EVENT_PORT, RESET_PORT, RESET_VALUE, SCI_GSI,
};
use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use devices::Gpa;

// IA-PC boot architecture flags (ACPI 6.5, 5.2.9.3). The bit for a keyboard controller stays clear: what answers at its
// ports has only the reset line, and a driver would search for a keyboard.
const LEGACY_DEVICES: u16 = 1 << 0;
const VGA_NOT_PRESENT: u16 = 1 << 2;
const NO_PCIE_ASPM: u16 = 1 << 4;
const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;

pub(super) fn table(facs: Gpa, dsdt: Gpa) -> FADT {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .firmware_ctrl_32(u32::try_from(facs.0).expect("the tables lie below 1 MiB"))
        .dsdt_64(dsdt.0)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        // Without PWR_BUTTON the power button is the fixed one; these two say that there is no fixed one of the kind.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    // No SMI command port: ACPI mode is always on.
    fadt.sci_int = u16::try_from(SCI_GSI).expect("an ISA interrupt").into();
    fadt.pm1a_evt_blk = u32::from(PM1A_EVENT_PORT).into();
    fadt.pm1_evt_len = PM1A_EVENT_LENGTH;
    fadt.pm1a_cnt_blk = u32::from(PM1A_CONTROL_PORT).into();
    fadt.pm1_cnt_len = PM1A_CONTROL_LENGTH;
    fadt.x_pm1a_evt_blk = port(PM1A_EVENT_PORT, PM1A_EVENT_LENGTH * 8, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = port(PM1A_CONTROL_PORT, PM1A_CONTROL_LENGTH * 8, AccessSize::WordAccess);
    fadt.iapc_boot_arch = (LEGACY_DEVICES | VGA_NOT_PRESENT | NO_PCIE_ASPM | CMOS_RTC_NOT_PRESENT).into();
    fadt.reset_reg = port(RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    // C2 and C3 do not exist: latencies above 100 and 1000 microseconds say so.
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.finalize()
}

fn port(port: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into())
}
