//! What the kernel is told about the machine: the memory map, and the start structure of either entry.

use super::{BootError, Extent};
use crate::layout::{
    ACPI_TABLES, ACPI_TABLES_SIZE, BOOT_PARAMS, COMMAND_LINE, HIGH_MEMORY, LOW_MEMORY_END, PVH_MEMORY_MAP, PVH_MODULES,
    PVH_START_INFO,
};
use devices::{Gpa, GuestRam};
use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::start_info::{XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

/// What a range of the memory map is; the numbers are those of E820 (ACPI 6.5, 15.4), which PVH uses too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Ram = 1,
    Reserved = 2,
}

/// A range of the memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    extent: Extent,
    kind: Kind,
}

/// The memory map: RAM but for the hole of a PC below 1 MiB, where only the ACPI tables are.
pub(super) fn memory_map(ram: &GuestRam) -> Vec<Range> {
    let range = |start: Gpa, end: u64, kind| Range { extent: Extent { start, bytes: end - start.0 }, kind };
    let mut map = vec![
        range(GuestAddress(0), LOW_MEMORY_END.0, Kind::Ram),
        range(ACPI_TABLES, ACPI_TABLES.0 + ACPI_TABLES_SIZE, Kind::Reserved),
    ];
    let regions = ram.iter().map(|region| (region.start_addr().max(HIGH_MEMORY), region.last_addr().0 + 1));
    map.extend(regions.filter(|(start, end)| start.0 < *end).map(|(start, end)| range(start, end, Kind::Ram)));
    map
}

/// The header of a kernel that has none, an ELF one: what the 64-bit entry reads of it.
fn plain_header() -> setup_header {
    setup_header { boot_flag: 0xaa55, header: u32::from_le_bytes(*b"HdrS"), version: 0x020f, ..Default::default() }
}

/// Writes `boot_params` for the 64-bit entry (Documentation/arch/x86/zero-page.rst).
pub(super) fn write_boot_params(
    ram: &GuestRam,
    map: &[Range],
    header: Option<setup_header>,
    initramfs: Option<Extent>,
    rsdp: Gpa,
) -> Result<(), BootError> {
    let mut params =
        boot_params { hdr: header.unwrap_or_else(plain_header), acpi_rsdp_addr: rsdp.0, ..Default::default() };
    params.hdr.type_of_loader = 0xff; // A loader without a number of its own.
    params.hdr.cmd_line_ptr = low(COMMAND_LINE);
    if let Some(Extent { start, bytes }) = initramfs {
        params.hdr.ramdisk_image = low(start);
        params.hdr.ramdisk_size = u32::try_from(bytes).expect("it lies below 4 GiB");
    }
    for (entry, range) in params.e820_table.iter_mut().zip(map) {
        let Range { extent: Extent { start, bytes }, kind } = *range;
        *entry = boot_e820_entry { addr: start.0, size: bytes, r#type: kind as u32 };
        params.e820_entries += 1;
    }
    Ok(ram.write_slice(params.as_slice(), BOOT_PARAMS)?)
}

/// Writes `hvm_start_info` and its tables for the PVH entry (xen/include/public/arch-x86/hvm/start_info.h).
pub(super) fn write_start_info(
    ram: &GuestRam,
    map: &[Range],
    initramfs: Option<Extent>,
    rsdp: Gpa,
) -> Result<(), BootError> {
    if let Some(Extent { start, bytes }) = initramfs {
        let module = hvm_modlist_entry { paddr: start.0, size: bytes, ..Default::default() };
        ram.write_slice(module.as_slice(), PVH_MODULES)?;
    }
    write_map(ram, map)?;
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        flags: 0,
        nr_modules: u32::from(initramfs.is_some()),
        modlist_paddr: PVH_MODULES.0,
        cmdline_paddr: COMMAND_LINE.0,
        rsdp_paddr: rsdp.0,
        memmap_paddr: PVH_MEMORY_MAP.0,
        memmap_entries: u32::try_from(map.len()).expect("a handful"),
        reserved: 0,
    };
    Ok(ram.write_slice(info.as_slice(), PVH_START_INFO)?)
}

fn write_map(ram: &GuestRam, map: &[Range]) -> Result<(), GuestMemoryError> {
    let size = size_of::<hvm_memmap_table_entry>() as u64;
    for (range, index) in map.iter().zip(0..) {
        let Range { extent: Extent { start, bytes }, kind } = *range;
        let entry = hvm_memmap_table_entry { addr: start.0, size: bytes, type_: kind as u32, reserved: 0 };
        ram.write_slice(entry.as_slice(), GuestAddress(PVH_MEMORY_MAP.0 + index * size))?;
    }
    Ok(())
}

fn low(address: Gpa) -> u32 {
    u32::try_from(address.0).expect("everything is loaded below the gap")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::MMIO_GAP_END;
    use crate::memory::GuestMemory;

    fn ranges(bytes: u64) -> Vec<(u64, u64, Kind)> {
        let memory = GuestMemory::create(bytes, false).unwrap();
        let map = memory_map(memory.ram());
        map.iter().map(|range| (range.extent.start.0, range.extent.bytes, range.kind)).collect()
    }

    #[test]
    fn the_map_has_both_regions_and_the_hole() {
        let low = (0, LOW_MEMORY_END.0, Kind::Ram);
        let tables = (ACPI_TABLES.0, ACPI_TABLES_SIZE, Kind::Reserved);
        assert_eq!(ranges(64 << 20), [low, tables, (1 << 20, 63 << 20, Kind::Ram)]);
        let high = (MMIO_GAP_END.0, 2 << 30, Kind::Ram);
        assert_eq!(ranges(5 << 30), [low, tables, (1 << 20, (3 << 30) - (1 << 20), Kind::Ram), high]);
    }

    #[test]
    fn start_structures_do_not_overlap() {
        let end_of_info = PVH_START_INFO.0 + size_of::<hvm_start_info>() as u64;
        let end_of_modules = PVH_MODULES.0 + size_of::<hvm_modlist_entry>() as u64;
        let end_of_map = PVH_MEMORY_MAP.0 + 4 * size_of::<hvm_memmap_table_entry>() as u64;
        assert!(end_of_info <= PVH_MODULES.0 && end_of_modules <= PVH_MEMORY_MAP.0 && end_of_map <= BOOT_PARAMS.0);
        assert_eq!(size_of::<boot_params>(), 4096);
    }

    #[test]
    fn both_structures_tell_the_same() {
        let memory = GuestMemory::create(64 << 20, false).unwrap();
        let ram = memory.ram();
        let map = memory_map(ram);
        let initramfs = Some(Extent { start: GuestAddress(0x300_0000), bytes: 0x1234 });
        write_boot_params(ram, &map, None, initramfs, GuestAddress(0xe_0000)).unwrap();
        let params: boot_params = ram.read_obj(BOOT_PARAMS).unwrap();
        assert_eq!(params.e820_entries, 3);
        assert_eq!({ params.hdr.ramdisk_image }, 0x300_0000);
        assert_eq!({ params.acpi_rsdp_addr }, 0xe_0000);
        write_start_info(ram, &map, initramfs, GuestAddress(0xe_0000)).unwrap();
        let info: hvm_start_info = ram.read_obj(PVH_START_INFO).unwrap();
        assert_eq!((info.magic, info.nr_modules, info.memmap_entries), (0x336e_c578, 1, 3));
        let module: hvm_modlist_entry = ram.read_obj(PVH_MODULES).unwrap();
        assert_eq!((module.paddr, module.size), (0x300_0000, 0x1234));
        let third: hvm_memmap_table_entry = ram.read_obj(GuestAddress(PVH_MEMORY_MAP.0 + 48)).unwrap();
        assert_eq!({ params.e820_table[2].addr }, third.addr);
    }
}
