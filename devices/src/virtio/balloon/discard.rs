//! Giving guest pages back to the host: they hold no memory afterwards, and read as zeros.

#![expect(unsafe_code, reason = "madvise is not wrapped by std")]

use crate::{Gpa, GuestRam};
use std::io;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

/// The size of a page of the host, and of one in a balloon (virtio 1.3, 5.5.6).
pub(super) const PAGE: u64 = 4096;

/// Discards the whole pages in the `bytes` bytes at `start` and marks them as changed. What is not guest memory is passed
/// over.
///
/// # Errors
/// The host's refusal, for instance of a part of a huge page.
pub(super) fn discard(ram: &GuestRam, start: Gpa, bytes: u64) -> io::Result<()> {
    let end = start.0.saturating_add(bytes) & !(PAGE - 1);
    let Some(start) = start.0.checked_next_multiple_of(PAGE) else { return Ok(()) };
    for region in ram.iter() {
        let base = region.start_addr().0;
        let (from, to) = (start.max(base), end.min(base.saturating_add(region.len())));
        if from < to {
            discard_in(region, MemoryRegionAddress(from - base), to - from)?;
        }
    }
    Ok(())
}

fn discard_in(region: &<GuestRam as GuestMemoryBackend>::R, start: MemoryRegionAddress, bytes: u64) -> io::Result<()> {
    // A range of a region that is mapped here fits its address space.
    let length = usize::try_from(bytes).map_err(io::Error::other)?;
    let slice = region.get_slice(start, length).map_err(io::Error::other)?;
    // Of memory behind a file, only a hole in the file gives it back: another mapping may still show the pages.
    let advice = if region.file_offset().is_some() { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
    // SAFETY: the range is whole pages inside one mapping of guest memory, which the slice keeps alive and to which no
    // Rust reference points. Guest and devices may lose what they wrote there, as the guest asked for.
    if unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), length, advice) } < 0 {
        return Err(io::Error::last_os_error());
    }
    slice.bitmap().mark_dirty(0, length);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::bitmap::AtomicBitmap;
    use vm_memory::{Address, Bytes, FileOffset, GuestRegionMmap, MmapRegion};

    const PAGES: u64 = 16;

    fn region(base: u64, file: Option<FileOffset>) -> GuestRegionMmap<AtomicBitmap> {
        let length = usize::try_from(PAGES * PAGE).unwrap();
        let mapping = match file {
            Some(file) => MmapRegion::from_file(file, length).unwrap(),
            None => MmapRegion::new(length).unwrap(),
        };
        GuestRegionMmap::new(mapping, Gpa::new(base)).unwrap()
    }

    /// Two regions with a hole between them, the second behind a file.
    fn ram() -> (GuestRam, std::fs::File) {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(PAGES * PAGE).unwrap();
        let shared = FileOffset::new(file.try_clone().unwrap(), 0);
        let ram = GuestRam::from_regions(vec![region(0, None), region(1 << 20, Some(shared))]).unwrap();
        for base in [0, 1 << 20] {
            ram.write_slice(&[7; 16 * 4096], Gpa::new(base)).unwrap();
        }
        for region in ram.iter() {
            (**region).bitmap().reset();
        }
        (ram, file)
    }

    fn blocks(file: &std::fs::File) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap())
    }

    fn is_zero(ram: &GuestRam, page: u64) -> bool {
        let mut bytes = [1; 4096];
        ram.read_slice(&mut bytes, Gpa::new(page * PAGE)).unwrap();
        bytes == [0; 4096]
    }

    #[test]
    fn discarded_pages_are_zero_given_back_and_marked() {
        let (ram, file) = ram();
        let full = blocks(&file);
        for first in [1, 256 + 1] {
            discard(&ram, Gpa::new(first * PAGE), 3 * PAGE).unwrap();
        }
        // Counted first: a look at a hole fills it.
        assert_eq!(blocks(&file), full - 3 * PAGE / 512);
        for first in [1, 256 + 1] {
            for page in first - 1..first + 4 {
                let inside = (first..first + 3).contains(&page);
                assert_eq!(is_zero(&ram, page), inside, "page {page}");
                let (region, offset) = ram.to_region_addr(Gpa::new(page * PAGE)).unwrap();
                assert_eq!(region.bitmap().dirty_at(usize::try_from(offset.0).unwrap()), inside, "page {page}");
            }
        }
    }

    #[test]
    fn parts_of_pages_stay() {
        let (ram, _file) = ram();
        discard(&ram, Gpa::new(1), 2 * PAGE).unwrap();
        assert!(!is_zero(&ram, 0) && is_zero(&ram, 1) && !is_zero(&ram, 2));
        discard(&ram, Gpa::new(3 * PAGE + 1), PAGE).unwrap();
        discard(&ram, Gpa::new(3 * PAGE), 0).unwrap();
        discard(&ram, Gpa::new(3 * PAGE), PAGE - 1).unwrap();
        assert!(!is_zero(&ram, 3) && !is_zero(&ram, 4));
    }

    #[test]
    fn what_is_not_memory_is_passed_over() {
        let (ram, _file) = ram();
        for (start, bytes) in [(PAGES * PAGE, PAGE), (u64::MAX, 1), (u64::MAX - PAGE, u64::MAX), (1 << 40, PAGE)] {
            discard(&ram, Gpa::new(start), bytes).unwrap();
        }
        assert!((0..PAGES).all(|page| !is_zero(&ram, page)));
        discard(&ram, Gpa::new(0), u64::MAX).unwrap();
        assert!((0..PAGES).all(|page| is_zero(&ram, page) && is_zero(&ram, 256 + page)));
    }
}
