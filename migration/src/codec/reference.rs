//! A reference: the target has the bytes of a page already, in another page.

use super::{Malformed, PageId};
use crate::region::{MAX_REGION_PAGES, PageIndex, RegionId};

/// Bytes of a reference in a block.
pub const REFERENCE_BYTES: usize = size_of::<u64>();

const PAGE_BITS: u32 = 48;
const REGION_BITS: u32 = 15;
const SAME_ROUND: u64 = 1 << 63;

/// Where the bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reference {
    /// The page that has them.
    pub page: PageId,
    /// Whether it was sent in the round under way: another stream may bring it later than the reference to it.
    pub same_round: bool,
}

impl Reference {
    /// Appends it: page in bits 0 to 47, region in bits 48 to 62, bit 63 if the page is of the same round.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let Self { page: PageId { region, page }, same_round } = self;
        let flag = if *same_round { SAME_ROUND } else { 0 };
        out.extend((page.0 | u64::from(region.0) << PAGE_BITS | flag).to_le_bytes());
    }

    /// Reads it. Whether there is such a page is for the receiver to check.
    ///
    /// # Errors
    /// [`Malformed`] if no region can be so long.
    pub fn decode(bytes: &[u8; REFERENCE_BYTES]) -> Result<Self, Malformed> {
        let number = u64::from_le_bytes(*bytes);
        let page = number & ((1 << PAGE_BITS) - 1);
        if page >= MAX_REGION_PAGES {
            return Err(Malformed::Value { what: "A referred page", found: page, max: MAX_REGION_PAGES - 1 });
        }
        let region = (number >> PAGE_BITS) & ((1 << REGION_BITS) - 1);
        let region = RegionId(u16::try_from(region).expect("15 bits fit in 16"));
        Ok(Self { page: PageId { region, page: PageIndex(page) }, same_round: number & SAME_ROUND != 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_as_documented() {
        let page = PageId { region: RegionId(3), page: PageIndex(0x0102_0304) };
        for (same_round, last) in [(false, 0), (true, 0x80)] {
            let reference = Reference { page, same_round };
            let mut out = Vec::new();
            reference.encode(&mut out);
            assert_eq!(out, [4, 3, 2, 1, 0, 0, 3, last]);
            assert_eq!(Reference::decode(out.as_slice().try_into().unwrap()), Ok(reference));
        }
    }

    #[test]
    fn a_page_beyond_any_region_is_malformed() {
        let found = MAX_REGION_PAGES;
        let expected = Malformed::Value { what: "A referred page", found, max: MAX_REGION_PAGES - 1 };
        assert_eq!(Reference::decode(&found.to_le_bytes()), Err(expected));
    }
}
