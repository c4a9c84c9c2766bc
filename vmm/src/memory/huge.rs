//! Transparent huge pages for guest memory: a place in the address space where they can be, and asking for them.

use crate::layout::HUGE_PAGE_SIZE;
use std::io;
use vm_memory::{Bytes, VolatileSlice};

#[expect(clippy::cast_possible_truncation, reason = "sizes have 64 bits on x86-64")]
const HUGE: usize = HUGE_PAGE_SIZE as usize;

/// Has the host back memory with transparent huge pages, whatever its setting for shared memory is (madvise(2),
/// `MADV_COLLAPSE`, since Linux 6.1). `false` if it cannot.
pub(super) fn collapse(slice: &VolatileSlice<'_>) -> bool {
    for start in (0..slice.len()).step_by(HUGE) {
        // A huge page of which nothing is there yet is refused; a read puts a zero page there.
        if slice.read_obj::<u8>(start).is_err() {
            return false;
        }
    }
    let memory = slice.ptr_guard_mut();
    // SAFETY: the range is mapped guest memory, which lives as long as `slice`; what it holds does not change.
    let answer = unsafe { libc::madvise(memory.as_ptr().cast(), memory.len(), libc::MADV_COLLAPSE) };
    // Some page may be in use for a moment; that says nothing of the next.
    answer == 0 || io::Error::last_os_error().raw_os_error() == Some(libc::EAGAIN)
}

/// Address space that is kept from use while a mapping is made, so that the kernel, which fills gaps from their upper end,
/// puts it at a multiple of the huge page: only then can transparent ones back it, here and in KVM's tables.
///
/// Where another thread maps something in between, or another gap suits the kernel better, the mapping lies elsewhere,
/// which costs speed and nothing else.
#[derive(Debug)]
pub(super) struct Spacer {
    start: *mut libc::c_void,
    length: usize,
}

impl Spacer {
    /// For a mapping of `length` bytes; `None` where there is nothing to keep.
    pub(super) fn before(length: usize) -> Option<Self> {
        let gap = length.checked_add(HUGE)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), gap, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        // The highest multiple from which the mapping still fits.
        let place = (start as usize + HUGE) / HUGE * HUGE - start as usize;
        // SAFETY: this is the lower part of the mapping that was just made, which nobody uses.
        unsafe { libc::munmap(start, place + length) };
        let (start, length) = (start.wrapping_byte_add(place + length), HUGE - place);
        (length > 0).then_some(Self { start, length })
    }
}

impl Drop for Spacer {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `before`, and nobody uses it.
        unsafe { libc::munmap(self.start, self.length) };
    }
}
