//! Compressed kernels (bzImage, as distributions ship them): checks the setup header and lets linux-loader load the
//! protected-mode part, which unpacks itself in the guest (Documentation/arch/x86/boot.rst).

use super::{BootError, Image, Kernel};
use crate::layout::HIGH_MEMORY;
use devices::GuestRam;
use linux_loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::ByteValued;

/// Where the setup header lies in the file.
const HEADER: u64 = 0x1f1;
/// Offset of the second byte of the jump in the header; the header ends that many bytes behind it.
const JUMP_DISTANCE: usize = 0x10;
/// The first boot protocol with `xloadflags` (Linux 3.8).
const FIRST_WITH_LONG_MODE: u16 = 0x020c;
/// XLF_KERNEL_64: there is a 64-bit entry.
const XLF_KERNEL_64: u16 = 1;
/// LOADED_HIGH: the protected-mode code is loaded at 1 MiB.
const LOADED_HIGH: u8 = 1;
/// Offset of the 64-bit entry in the protected-mode code.
const LONG_MODE_ENTRY: u64 = 0x200;
const SECTOR: u64 = 512;

pub(super) fn load(ram: &GuestRam, image: &mut Image) -> Result<Kernel, BootError> {
    let header = read_header(image)?;
    if header.version < FIRST_WITH_LONG_MODE || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(image.no_entry("64-bit"));
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(image.damaged("it is 64-bit, but not to be loaded high"));
    }
    // 0 stands for 4 setup sectors, and the boot sector comes before them; `syssize` counts 16 bytes.
    let setup_sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let setup = (setup_sectors + 1) * SECTOR;
    image.needs(setup + u64::from(header.syssize) * 16)?;
    let loaded_end = HIGH_MEMORY.0 + (image.bytes - setup);
    // The kernel unpacks itself at `pref_address` and needs `init_size` there before it reads the memory map.
    let unpacked_end = header.pref_address.saturating_add(header.init_size.into());
    let end = loaded_end.max(unpacked_end);
    image.fits(ram, end)?;
    BzImage::load(ram, Some(HIGH_MEMORY), &mut image.file, None).map_err(|source| image.load_error(source))?;
    Ok(Kernel { end, long64: Some(HIGH_MEMORY.0 + LONG_MODE_ENTRY), pvh: None, header: Some(header) })
}

fn read_header(image: &mut Image) -> Result<setup_header, BootError> {
    let mut header = setup_header::default();
    let bytes = header.as_mut_slice();
    image.read_at(HEADER, bytes)?;
    // What follows the header of an older kernel is code.
    let known = JUMP_DISTANCE + 1 + usize::from(bytes[JUMP_DISTANCE]);
    if let Some(beyond) = bytes.get_mut(known..) {
        beyond.fill(0);
    }
    Ok(header)
}
