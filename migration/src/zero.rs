//! Whether a page is zero, and making it so, in memory that a guest may be writing at the same moment.
//!
//! A page that is found zero and changes afterwards is no loss: the dirty log was cleared before the page was looked at,
//! so the change is in the next harvest.

use crate::region::PAGE_SIZE;
use vm_memory::{VolatileMemory, VolatileSlice};

/// What is looked at between two decisions to go on: one cache line.
type Line = [u64; 8];

/// The pages of `slice`, which is a whole number of them long.
pub(crate) fn pages<'a>(slice: &VolatileSlice<'a>) -> impl Iterator<Item = VolatileSlice<'a>> + use<'a> {
    let slice = *slice;
    (0..slice.len() / PAGE_SIZE).map_while(move |page| slice.subslice(page * PAGE_SIZE, PAGE_SIZE).ok())
}

/// Whether every byte of a page is zero.
pub(crate) fn is_zero(page: &VolatileSlice<'_>) -> bool {
    let Ok(lines) = page.get_array_ref::<Line>(0, PAGE_SIZE / size_of::<Line>()) else { return false };
    (0..lines.len()).all(|line| lines.load(line).into_iter().fold(0, |all, word| all | word) == 0)
}

/// Makes every byte of a page zero. A page that is so already is only read.
pub(crate) fn clear(page: &VolatileSlice<'_>) {
    if !is_zero(page) {
        page.copy_from(&[0_u8; PAGE_SIZE]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        let mut bytes = vec![0_u8; 3 * PAGE_SIZE];
        for at in 0..PAGE_SIZE {
            bytes[PAGE_SIZE + at] = 0x10;
            let found: Vec<bool> =
                pages(&VolatileSlice::from(bytes.as_mut_slice())).map(|page| is_zero(&page)).collect();
            assert_eq!(found, [true, false, true], "byte {at}");
            bytes[PAGE_SIZE + at] = 0;
        }
    }

    #[test]
    fn clearing_a_page_clears_no_other() {
        let mut bytes = vec![7_u8; 3 * PAGE_SIZE];
        let middle = pages(&VolatileSlice::from(bytes.as_mut_slice())).nth(1).unwrap();
        clear(&middle);
        let (first, rest) = bytes.split_at(PAGE_SIZE);
        let (middle, last) = rest.split_at(PAGE_SIZE);
        assert!(first.iter().chain(last).all(|&byte| byte == 7) && middle.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_slice_shorter_than_a_page_is_not_taken_for_zero() {
        let mut bytes = vec![0_u8; PAGE_SIZE - 1];
        assert!(!is_zero(&VolatileSlice::from(bytes.as_mut_slice())));
    }
}
