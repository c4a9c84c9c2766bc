//! The DSDT: the soft-off state and the devices that cannot be found by probing (ACPI 6.5, 5.2.11.1).

use super::{OEM, OEM_REVISION, OEM_TABLE};
use crate::layout::{
    COM1_GSI, COM1_PORT, COM1_PORTS, PVPANIC_PORT, SLEEP_TYPE_S5, VIRTIO_WINDOW_SIZE, VirtioWindow, virtio_window,
};
use acpi_tables::Aml;
use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, ResourceTemplate};
use acpi_tables::sdt::Sdt;

/// Revision 2 and later mean 64-bit integers.
const REVISION: u8 = 2;
const HEADER_LENGTH: u32 = 36;
/// Present, enabled, shown, working (ACPI 6.5, 6.3.7).
const WORKING: u8 = 0xf;

pub(super) fn table(virtio_devices: usize) -> Sdt {
    let mut aml = Vec::new();
    soft_off(&mut aml);
    serial_port(&mut aml);
    panic_notifier(&mut aml);
    for (number, window) in (0_u8..).zip((0..virtio_devices).map_while(virtio_window)) {
        virtio(number, window, &mut aml);
    }
    let mut table = Sdt::new(*b"DSDT", HEADER_LENGTH, REVISION, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&aml);
    table
}

/// `\_S5`: SLP_TYP for PM1a and PM1b, and two reserved values (ACPI 6.5, 7.4.2).
fn soft_off(aml: &mut Vec<u8>) {
    let package = Package::new(vec![&SLEEP_TYPE_S5, &SLEEP_TYPE_S5, &0_u8, &0_u8]);
    Name::new("\\_S5_".into(), &package).to_aml_bytes(aml);
}

fn serial_port(aml: &mut Vec<u8>) {
    let length = u8::try_from(COM1_PORTS).expect("8 ports");
    let (ports, interrupt) = (IO::new(COM1_PORT, COM1_PORT, 1, length), edge(COM1_GSI));
    let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
    Device::new(
        "\\_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &1_u8),
            &Name::new("_CRS".into(), &resources),
        ],
    )
    .to_aml_bytes(aml);
}

/// What QEMU calls `pvpanic`; Linux finds it by this name.
fn panic_notifier(aml: &mut Vec<u8>) {
    let ports = IO::new(PVPANIC_PORT, PVPANIC_PORT, 1, 1);
    let resources = ResourceTemplate::new(vec![&ports]);
    Device::new(
        "\\_SB_.PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_STA".into(), &WORKING),
            &Name::new("_CRS".into(), &resources),
        ],
    )
    .to_aml_bytes(aml);
}

/// A virtio-mmio device, which Linux finds by `LNRO0005`.
fn virtio(number: u8, window: VirtioWindow, aml: &mut Vec<u8>) {
    let base = u32::try_from(window.base.0).expect("the windows lie below 4 GiB");
    let length = u32::try_from(VIRTIO_WINDOW_SIZE).expect("one page");
    let memory = Memory32Fixed::new(true, base, length);
    let interrupt = edge(window.gsi);
    let resources = ResourceTemplate::new(vec![&memory, &interrupt]);
    Device::new(
        format!("\\_SB_.VR{number:02}").as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &number),
            &Name::new("_CCA".into(), &1_u8),
            &Name::new("_CRS".into(), &resources),
        ],
    )
    .to_aml_bytes(aml);
}

/// An exclusive, active-high, edge-triggered interrupt.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}
