//! The log in which vhost marks each page of guest memory that it writes.
//!
//! One bit per 4 KiB page, by guest physical address from 0 (`log_write` in drivers/vhost/vhost.c). The kernel sets bits
//! atomically while [`DirtyLog::harvest`] takes them, so no mark is lost and none is reported twice.

use crate::Gpa;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::Address;

/// `VHOST_PAGE_SIZE`: what one bit stands for.
const PAGE: u64 = 4096;
const PAGES_PER_WORD: u64 = 64;

/// A log for guest memory from address 0 on.
#[derive(Debug)]
pub(super) struct DirtyLog {
    words: Box<[AtomicU64]>,
}

impl DirtyLog {
    /// A clean log for guest memory whose last byte is at `last`.
    pub(super) fn new(last: Gpa) -> Self {
        Self { words: (0..=last.0 / (PAGE * PAGES_PER_WORD)).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Where the kernel finds the log in this process. It must not do so after the log is dropped.
    pub(super) fn base(&self) -> u64 {
        self.words.as_ptr().expose_provenance() as u64
    }

    /// Calls `mark` for each page that was written since the last harvest, ascending.
    pub(super) fn harvest(&self, mark: &mut dyn FnMut(Gpa)) {
        for (word, first) in self.words.iter().zip((0_u64..).step_by(64)) {
            // A plain look first: most words are clean, and a swap would take their cache line from the kernel.
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut pages = word.swap(0, Ordering::AcqRel);
            while pages != 0 {
                mark(Gpa::new((first + u64::from(pages.trailing_zeros())) * PAGE));
                pages &= pages - 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn harvest(log: &DirtyLog) -> Vec<u64> {
        let mut pages = Vec::new();
        log.harvest(&mut |page| pages.push(page.0 / PAGE));
        pages
    }

    /// Sets a bit as the kernel does: byte by byte from the base (`set_bit_to_user`).
    fn write_as_kernel(log: &DirtyLog, page: u64) {
        let word = usize::try_from(page / 8 / 8).unwrap();
        let mut bytes = [0; 8];
        bytes[usize::try_from(page / 8 % 8).unwrap()] = 1 << (page % 8);
        log.words[word].fetch_or(u64::from_le_bytes(bytes), Ordering::AcqRel);
    }

    #[test]
    fn each_mark_is_harvested_once() {
        let log = DirtyLog::new(Gpa::new(1000 * PAGE - 1));
        assert_eq!(harvest(&log), [0; 0]);
        for page in [999, 0, 7, 8, 63, 64, 700] {
            write_as_kernel(&log, page);
        }
        assert_eq!(harvest(&log), [0, 7, 8, 63, 64, 700, 999]);
        assert_eq!(harvest(&log), [0; 0]);
    }

    #[test]
    fn the_log_reaches_the_last_page() {
        for pages in [1, 63, 64, 65, 1 << 20] {
            let log = DirtyLog::new(Gpa::new(pages * PAGE - 1));
            write_as_kernel(&log, pages - 1);
            assert_eq!(harvest(&log), [pages - 1]);
            assert_eq!(log.words.len() as u64, pages.div_ceil(PAGES_PER_WORD));
        }
    }

    #[test]
    fn no_mark_is_lost_to_a_race() {
        let log = DirtyLog::new(Gpa::new(4096 * PAGE - 1));
        let mut seen = Vec::new();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| (0..4096).for_each(|page| write_as_kernel(&log, page)));
            while !writer.is_finished() {
                seen.extend(harvest(&log));
            }
        });
        seen.extend(harvest(&log));
        seen.sort_unstable();
        assert_eq!(seen, (0..4096).collect::<Vec<_>>());
    }
}
