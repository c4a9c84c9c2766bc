//! The one way back: applies the records of a frame and its unpacked block to a guest's memory.

use super::delta::Delta;
use super::input::Input;
use super::kept::{Digest, groups};
use super::reference::Reference;
use super::{MAX_ENCODED, Malformed, Page, PageCode, PageId, rle};
use crate::region::{MAX_REGION_PAGES, PAGE_SIZE, PageIndex, PageRun};
use thiserror::Error;

const WHAT: &str = "A block";

/// The memory that decoded pages go to. Whether a page exists is for it to check; so is whether a page that another one
/// is a copy of has arrived already.
pub trait PageSink {
    /// Why a page cannot be written.
    type Error;

    /// Makes the pages of a run zero.
    ///
    /// # Errors
    /// If that is not possible.
    fn clear(&mut self, run: PageRun) -> Result<(), Self::Error>;

    /// Gives a page new content.
    ///
    /// # Errors
    /// If that is not possible.
    fn write(&mut self, page: PageId, content: &Page) -> Result<(), Self::Error>;

    /// Changes a page that holds what was last sent of it.
    ///
    /// # Errors
    /// If that is not possible.
    fn patch(&mut self, page: PageId, delta: &Delta<'_>) -> Result<(), Self::Error>;

    /// Gives a page the content of another one.
    ///
    /// # Errors
    /// If that is not possible.
    fn copy(&mut self, page: PageId, from: Reference) -> Result<(), Self::Error>;

    /// Notes whether the pages of a group, as they are, have this digest.
    ///
    /// # Errors
    /// If they cannot be looked at.
    fn check(&mut self, group: PageRun, digest: &Digest) -> Result<(), Self::Error>;
}

/// Why a frame's pages were not all applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum DecodeError<E> {
    /// The peer sent what is no encoding.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The memory does not take it.
    #[error("A page cannot be applied")]
    Sink(#[source] E),
}

/// Applies everything that `records` and `block` say, in order. Raw runs are passed over: their bytes follow the frame.
///
/// # Errors
/// [`DecodeError`] at the first byte that is wrong, missing or left over. Pages before it have been applied.
pub fn decode<S: PageSink>(
    records: impl IntoIterator<Item = (PageRun, PageCode)>,
    block: &[u8],
    sink: &mut S,
) -> Result<(), DecodeError<S::Error>> {
    let mut block = Input::new(WHAT, block);
    let mut scratch = [0; PAGE_SIZE];
    for (run, code) in records {
        let pages = pages(run)?;
        match code {
            PageCode::Raw => {}
            PageCode::Zero => sink.clear(run).map_err(DecodeError::Sink)?,
            PageCode::Plain => {
                for page in pages {
                    sink.write(page, block.array()?).map_err(DecodeError::Sink)?;
                }
            }
            PageCode::Rle => {
                for page in pages {
                    rle::decode(body(&mut block)?, &mut scratch)?;
                    sink.write(page, &scratch).map_err(DecodeError::Sink)?;
                }
            }
            PageCode::Delta => {
                for page in pages {
                    let delta = Delta::parse(body(&mut block)?)?;
                    sink.patch(page, &delta).map_err(DecodeError::Sink)?;
                }
            }
            PageCode::Copy => {
                for page in pages {
                    let from = Reference::decode(block.array()?)?;
                    sink.copy(page, from).map_err(DecodeError::Sink)?;
                }
            }
            PageCode::Kept => {
                for group in groups(run) {
                    sink.check(group, block.array()?).map_err(DecodeError::Sink)?;
                }
            }
        }
    }
    Ok(block.end()?)
}

/// The pages of a run, which must begin where a region can be.
fn pages(run: PageRun) -> Result<impl Iterator<Item = PageId>, Malformed> {
    let PageRun { region, first: PageIndex(first), pages } = run;
    if first >= MAX_REGION_PAGES {
        return Err(Malformed::Value { what: "A first page", found: first, max: MAX_REGION_PAGES - 1 });
    }
    Ok((first..first + u64::from(pages)).map(move |page| PageId { region, page: PageIndex(page) }))
}

/// The body of an encoded page, after its length.
fn body<'a>(block: &mut Input<'a>) -> Result<&'a [u8], Malformed> {
    let length = usize::from(u16::from_le_bytes(*block.array()?));
    if length > MAX_ENCODED {
        let (found, max) = (length as u64, MAX_ENCODED as u64);
        return Err(Malformed::Value { what: "The length of an encoded page", found, max });
    }
    block.bytes(length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::delta::{self, Compared};
    use crate::codec::samples::{Memory, pattern};
    use crate::codec::{Tried, kept};
    use crate::region::RegionId;

    fn run(first: u64, pages: u32) -> PageRun {
        PageRun { region: RegionId(0), first: PageIndex(first), pages }
    }

    fn id(page: u64) -> PageId {
        PageId { region: RegionId(0), page: PageIndex(page) }
    }

    /// A frame with a run of each code.
    fn frame() -> (Vec<(PageRun, PageCode)>, Vec<u8>, Memory) {
        let (mut before, mut block) = (Memory::default(), Vec::new());
        before.write(id(6), &pattern(6)).unwrap();
        for page in [2, 3] {
            block.extend(pattern(page));
        }
        assert_eq!(rle::encode(&[5; PAGE_SIZE], &mut block), Tried::Written);
        let mut changed = pattern(6);
        changed[77] ^= 1;
        assert_eq!(delta::encode(&pattern(6), &changed, &mut block), Compared::Written);
        Reference { page: id(3), same_round: true }.encode(&mut block);
        block.extend([1; 2 * kept::DIGEST_BYTES]);
        use PageCode::{Copy, Delta, Kept, Plain, Raw, Rle, Zero};
        let codes = [Raw, Plain, Rle, Delta, Copy, Zero, Kept];
        let runs = [run(0, 2), run(2, 2), run(4, 1), run(6, 1), run(7, 1), run(8, 900), run(908, 17)];
        (runs.into_iter().zip(codes).collect(), block, before)
    }

    #[test]
    fn every_code_is_applied_in_order() {
        let (records, block, mut memory) = frame();
        decode(records, &block, &mut memory).unwrap();
        let mut changed = pattern(6);
        changed[77] ^= 1;
        for (page, content) in [(2, pattern(2)), (3, pattern(3)), (4, [5; PAGE_SIZE]), (6, changed), (7, pattern(3))] {
            assert_eq!(memory.pages.get(&id(page)), Some(&content), "page {page}");
        }
        assert_eq!(memory.pages.len(), 5, "raw pages are passed over");
        assert_eq!(memory.cleared, [run(8, 900)]);
        assert_eq!(memory.checked, [(run(908, 16), [1; 16]), (run(924, 1), [1; 16])]);
    }

    #[test]
    fn a_block_that_is_too_short_or_too_long_is_malformed() {
        let (records, mut block, memory) = frame();
        for length in 0..block.len() {
            let error = decode(records.iter().copied(), &block[..length], &mut memory.clone()).unwrap_err();
            assert!(matches!(error, DecodeError::Malformed(Malformed::Truncated { .. })), "{length}: {error}");
        }
        block.push(0);
        let error = decode(records, &block, &mut memory.clone()).unwrap_err();
        assert_eq!(error, DecodeError::Malformed(Malformed::LeftOver { what: WHAT, extra: 1 }));
    }

    #[test]
    fn lengths_and_places_have_maxima() {
        let found = MAX_ENCODED as u64 + 1;
        let block = [u16::try_from(found).unwrap().to_le_bytes().as_slice(), &[0; PAGE_SIZE]].concat();
        for code in [PageCode::Rle, PageCode::Delta] {
            let error = decode([(run(0, 1), code)], &block, &mut Memory::default()).unwrap_err();
            let what = "The length of an encoded page";
            assert_eq!(error, DecodeError::Malformed(Malformed::Value { what, found, max: found - 1 }));
        }
        let error = decode([(run(u64::MAX, 1), PageCode::Zero)], &[], &mut Memory::default()).unwrap_err();
        assert!(matches!(error, DecodeError::Malformed(Malformed::Value { what: "A first page", .. })));
    }

    #[test]
    fn what_memory_refuses_is_told_from_what_the_peer_did() {
        let mut block = Vec::new();
        Reference { page: id(1), same_round: false }.encode(&mut block);
        let error = decode([(run(0, 1), PageCode::Copy)], &block, &mut Memory::default()).unwrap_err();
        assert_eq!(error, DecodeError::Sink("nothing there"));
    }
}
