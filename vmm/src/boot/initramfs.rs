//! Reads the initramfs straight into guest memory, as high below the gap as the kernel allows.

use super::{BootError, Extent, Image, Kernel, low_memory_end};
use crate::layout::PAGE_SIZE;
use devices::GuestRam;
use std::path::Path;
use vm_memory::{GuestAddress, GuestMemoryBackend, ReadVolatile, VolatileMemoryError};

pub(super) fn load(ram: &GuestRam, path: &Path, kernel: &Kernel) -> Result<Extent, BootError> {
    let mut image = Image::open("initramfs", path)?;
    let bytes = image.bytes;
    let memory = low_memory_end(ram);
    let start = place(bytes, memory, kernel).ok_or(BootError::InitramfsTooBig { bytes, memory })?;
    let length = usize::try_from(bytes).expect("it fits in memory");
    let mut room = ram.get_slice(GuestAddress(start), length)?;
    image.file.read_exact_volatile(&mut room).map_err(|error| {
        let source = match error {
            VolatileMemoryError::IOError(source) => source,
            other => std::io::Error::other(other),
        };
        BootError::Read { what: image.what, path: image.path.clone(), source }
    })?;
    Ok(Extent { start: GuestAddress(start), bytes })
}

/// The highest page-aligned place that ends below `memory` and the kernel's limit, and begins above the kernel.
fn place(bytes: u64, memory: u64, kernel: &Kernel) -> Option<u64> {
    // `initrd_addr_max` is the last byte that it may have; a kernel without setup header takes all below 4 GiB.
    let limit = kernel.header.map_or(memory, |header| memory.min(u64::from(header.initrd_addr_max) + 1));
    let start = limit.checked_sub(bytes)? / PAGE_SIZE * PAGE_SIZE;
    (start >= kernel.end).then_some(start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use linux_loader::bootparam::setup_header;

    fn kernel(end: u64, initrd_addr_max: Option<u32>) -> Kernel {
        let header = initrd_addr_max.map(|initrd_addr_max| setup_header { initrd_addr_max, ..Default::default() });
        Kernel { end, long64: None, pvh: None, header }
    }

    #[test]
    fn it_lies_high_and_aligned() {
        assert_eq!(place(0x1001, 0x100_0000, &kernel(0x20_0000, None)), Some(0xff_e000));
        assert_eq!(place(0x1000, 0x100_0000, &kernel(0x20_0000, Some(0x7f_ffff))), Some(0x7f_f000));
        assert_eq!(place(0x1000, 0x100_0000, &kernel(0x20_0000, Some(u32::MAX))), Some(0xff_f000));
    }

    #[test]
    fn it_never_touches_the_kernel() {
        let kernel = kernel(0xff_f001, None);
        assert_eq!(place(0x1000, 0x100_0000, &kernel), None);
        assert_eq!(place(0x200_0000, 0x100_0000, &kernel), None);
        assert_eq!(place(u64::MAX, 0x100_0000, &kernel), None);
    }
}
