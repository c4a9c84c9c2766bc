//! The tables are walked as a guest walks them, from the root pointer down.

use super::*;
use crate::config::MAX_VCPUS;
use crate::layout::{VIRTIO_GSIS, virtio_window};
use crate::memory::GuestMemory;

struct Tables(Vec<u8>);

impl Tables {
    fn bytes(&self, address: u64, length: usize) -> &[u8] {
        let start = usize::try_from(address - ACPI_TABLES.0).unwrap();
        &self.0[start..start + length]
    }

    fn word(&self, address: u64) -> u32 {
        u32::from_le_bytes(self.bytes(address, 4).try_into().unwrap())
    }

    fn long(&self, address: u64) -> u64 {
        u64::from_le_bytes(self.bytes(address, 8).try_into().unwrap())
    }

    /// A whole table, its signature and its checksum checked.
    fn table(&self, address: u64, signature: &[u8; 4]) -> &[u8] {
        assert_eq!(self.bytes(address, 4), signature);
        let table = self.bytes(address, self.word(address + 4) as usize);
        assert_eq!(sum(table), 0, "checksum of {}", String::from_utf8_lossy(signature));
        table
    }

    fn pointed_to(&self, index: u64, signature: &[u8; 4]) -> &[u8] {
        let xsdt = self.long(ACPI_TABLES.0 + 24);
        self.table(self.long(xsdt + 36 + index * 8), signature)
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn every_table_is_reached_with_a_right_checksum() {
    let tables = Tables(build(4, 3));
    let root = tables.bytes(ACPI_TABLES.0, 36);
    assert_eq!(&root[..8], b"RSD PTR ");
    assert_eq!((sum(&root[..20]), sum(root), root[15]), (0, 0, 2));
    let xsdt = tables.table(tables.long(ACPI_TABLES.0 + 24), b"XSDT");
    assert_eq!(xsdt.len(), 36 + 2 * 8);
    let fadt = tables.pointed_to(0, b"FACP");
    assert_eq!(fadt.len(), 276, "ACPI 6.5, table 5.9");
    tables.pointed_to(1, b"APIC");
    let dsdt = u64::from_le_bytes(fadt[140..148].try_into().unwrap());
    tables.table(dsdt, b"DSDT");
    let facs = u64::from(u32::from_le_bytes(fadt[36..40].try_into().unwrap()));
    assert_eq!((tables.bytes(facs, 4), facs % 64), (&b"FACS"[..], 0));
}

#[test]
fn fixed_hardware_is_where_the_devices_are() {
    let tables = Tables(build(1, 0));
    let fadt = tables.pointed_to(0, b"FACP");
    let word = |at: usize| u32::from_le_bytes(fadt[at..at + 4].try_into().unwrap());
    assert_eq!((fadt[46], fadt[47]), (9, 0), "SCI");
    assert_eq!((word(56), fadt[88]), (0x600, 4), "PM1a event block");
    assert_eq!((word(64), fadt[89]), (0x604, 2), "PM1a control block");
    assert_eq!(&fadt[116..128], [1, 8, 0, 1, 0xf9, 0xc, 0, 0, 0, 0, 0, 0], "reset register");
    assert_eq!(fadt[128], 6, "reset value");
    let flags = word(112);
    assert_eq!(flags & (1 << 10), 1 << 10, "RESET_REG_SUP");
    assert_eq!(flags & (1 << 4), 0, "the power button is the fixed one");
    assert_eq!(flags & (1 << 20), 0, "not hardware-reduced");
    assert_eq!(fadt[109] & 0b10_0010, 0b10_0000, "no RTC and no keyboard controller");
    assert_eq!(&fadt[148..160], [1, 32, 0, 2, 0, 6, 0, 0, 0, 0, 0, 0], "extended event block");
}

#[test]
fn each_processor_and_both_overrides_are_listed() {
    for vcpus in [1, 2, MAX_VCPUS] {
        let tables = Tables(build(vcpus, 0));
        let madt = tables.pointed_to(1, b"APIC");
        let (mut at, mut found) = (44, vec![]);
        while at < madt.len() {
            let structure = &madt[at..at + usize::from(madt[at + 1])];
            found.push(structure);
            at += structure.len();
        }
        assert_eq!(at, madt.len());
        let processors: Vec<_> =
            found.iter().filter(|structure| structure[0] == 0).map(|s| (s[2], s[3], s[4])).collect();
        let expected: Vec<_> = (0..u8::try_from(vcpus).unwrap()).map(|id| (id, id, 1)).collect();
        assert_eq!(processors, expected);
        assert!(found.contains(&&[2, 10, 0, 0, 2, 0, 0, 0, 0, 0][..]), "timer");
        assert!(found.contains(&&[2, 10, 0, 9, 9, 0, 0, 0, 5, 0][..]), "SCI");
        assert!(found.contains(&&[4, 6, 0xff, 0, 0, 1][..]), "NMI");
        let io_apic = found.iter().find(|structure| structure[0] == 1).unwrap();
        assert_eq!(u32::from(io_apic[2]), vcpus);
        assert_eq!(io_apic[4..], [0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    }
}

#[test]
fn devices_have_their_resources() {
    let tables = Tables(build(1, VIRTIO_GSIS.len()));
    let fadt = tables.pointed_to(0, b"FACP");
    let dsdt = tables.table(u64::from_le_bytes(fadt[140..148].try_into().unwrap()), b"DSDT");
    assert!(contains(dsdt, b"_S5_\x12\x08\x04\x0a\x05\x0a\x05"), "soft-off is type 5");
    for name in [&b"COM1"[..], b"PEVT", b"QEMU0001", b"VR00", b"VR16"] {
        assert!(contains(dsdt, name), "{}", String::from_utf8_lossy(name));
    }
    for index in 0..VIRTIO_GSIS.len() {
        let window = virtio_window(index).unwrap();
        let base = u32::try_from(window.base.0).unwrap().to_le_bytes();
        let memory = [&[0x86, 9, 0, 1][..], &base, &[0, 0x10, 0, 0]].concat();
        let interrupt = [&[0x89, 6, 0, 0b0011, 1][..], &window.gsi.to_le_bytes()].concat();
        assert!(contains(dsdt, &[memory, interrupt].concat()), "window {index}");
    }
}

#[test]
fn the_largest_machine_fits_and_lands_in_memory() {
    let largest = build(MAX_VCPUS, VIRTIO_GSIS.len());
    assert!(largest.len() as u64 <= ACPI_TABLES_SIZE, "{} bytes", largest.len());
    let memory = GuestMemory::create(32 << 20, false).unwrap();
    let json = r#"{"version":1,"name":"m","uuid":"00000000-0000-0000-0000-000000000000","cpus":{"count":2},
        "memory":{"bytes":33554432},"boot":{"kernel":"/k"},"rng":true}"#;
    let machine: MachineConfig = serde_json::from_str(json).unwrap();
    assert_eq!(write_tables(memory.ram(), &machine).unwrap(), ACPI_TABLES);
    let mut written = vec![0; build(2, 1).len()];
    memory.ram().read_slice(&mut written, ACPI_TABLES).unwrap();
    assert_eq!(written, build(2, 1));
    let nothing = GuestMemory::create(4096, false).unwrap();
    assert!(matches!(write_tables(nothing.ram(), &machine), Err(AcpiError::Memory { .. })));
}
