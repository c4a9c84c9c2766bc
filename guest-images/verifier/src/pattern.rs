//! Pages whose content says where and when they were written.
//!
//! Called by the memory and disk modes. The content is a function of (stream, page number, generation), so a page that
//! is stale, lost, torn or in the wrong place differs from what its owner expects of it. One page in eight is all
//! zeroes, and three differ from the generation before in a few words only: what a migration treats differently is
//! there to be treated differently.

use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes};

const WORDS: usize = 512;
/// Words that change between two generations of a sparse page: at the front, in the middle, and at the end.
const SPARSE_WORDS: [usize; 3] = [1, WORDS / 2, WORDS - 1];

/// A page, or a block of a disk.
#[derive(Clone, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C, align(4096))]
pub struct Page([u64; WORDS]);

/// Who wrote a page: keeps the pages of two owners apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(pub u64);

/// A page is not what it should be.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "page {number} of generation {generation} is wrong from word {word} on: {found:#x} instead of {expected:#x} (it begins with {first:#x}, {second:#x})"
)]
pub struct Mismatch {
    /// The page's number.
    pub number: u64,
    /// The generation that was expected.
    pub generation: u64,
    /// The first wrong word of the page.
    pub word: usize,
    /// What it should be.
    pub expected: u64,
    /// What it is.
    pub found: u64,
    /// The page's first word: its number, unless it is a zero page.
    pub first: u64,
    /// The page's second word: its generation, unless it is a zero page.
    pub second: u64,
}

enum Kind {
    Zero,
    Sparse,
    Random,
}

impl Page {
    /// Bytes of a page.
    pub const BYTES: usize = WORDS * 8;

    /// A page of zeroes.
    pub const fn zeroed() -> Self {
        Self([0; WORDS])
    }

    /// Makes it the page `number` of a generation.
    pub fn fill(&mut self, stream: Stream, number: u64, generation: u64) {
        let content = Content::of(stream, number, generation);
        for (word, place) in self.0.iter_mut().enumerate() {
            *place = content.word(word);
        }
    }

    /// Whether it is the page `number` of a generation.
    pub fn check(&self, stream: Stream, number: u64, generation: u64) -> Result<(), Mismatch> {
        let content = Content::of(stream, number, generation);
        let wrong = self.0.iter().enumerate().find(|(word, found)| **found != content.word(*word));
        let Some((word, &found)) = wrong else { return Ok(()) };
        let [first, second, ..] = self.0;
        Err(Mismatch { number, generation, word, expected: content.word(word), found, first, second })
    }
}

/// A page's content, word by word.
struct Content {
    kind: Kind,
    number: u64,
    generation: u64,
    base: u64,
}

impl Content {
    fn of(stream: Stream, number: u64, generation: u64) -> Self {
        let page = scramble(stream.0 ^ scramble(number));
        let this = scramble(page ^ scramble(generation));
        let kind = match this % 8 {
            0 => Kind::Zero,
            1..=3 => Kind::Sparse,
            _ => Kind::Random,
        };
        let base = match kind {
            Kind::Zero => 0,
            Kind::Sparse => page,
            Kind::Random => this,
        };
        Self { kind, number, generation, base }
    }

    fn word(&self, word: usize) -> u64 {
        match (&self.kind, word) {
            (Kind::Zero, _) => 0,
            (_, 0) => self.number,
            (_, 1) => self.generation,
            (Kind::Sparse, _) if SPARSE_WORDS.contains(&word) => scramble(self.base ^ self.generation),
            (Kind::Sparse | Kind::Random, _) => scramble(self.base.wrapping_add(word as u64)),
        }
    }
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
pub(crate) fn scramble(seed: u64) -> u64 {
    let mixed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: Stream = Stream(7);

    fn page(number: u64, generation: u64) -> Page {
        let mut page = Page::zeroed();
        page.fill(STREAM, number, generation);
        page
    }

    #[test]
    fn a_page_is_itself_and_no_other() {
        for number in 0..50 {
            for generation in 1..20 {
                let page = page(number, generation);
                page.check(STREAM, number, generation).unwrap();
                // Two zero pages are alike; nothing else is.
                if page != Page::zeroed() {
                    page.check(STREAM, number, generation + 1).unwrap_err();
                    page.check(STREAM, number + 1, generation).unwrap_err();
                    page.check(Stream(8), number, generation).unwrap_err();
                }
            }
        }
    }

    #[test]
    fn any_changed_bit_is_found() {
        for number in 0..40 {
            let good = page(number, 3);
            for word in [0, 1, 2, 255, 256, 510, 511] {
                let mut bad = good.clone();
                bad.0[word] ^= 1 << (number % 64);
                let mismatch = bad.check(STREAM, number, 3).unwrap_err();
                assert_eq!((mismatch.word, mismatch.found), (word, bad.0[word]));
            }
        }
    }

    #[test]
    fn every_kind_of_page_occurs() {
        let zero = (1..400).filter(|&generation| page(0, generation) == Page::zeroed()).count();
        assert!((30..70).contains(&zero), "{zero}");
        let words_changed = |generation| {
            let (before, after) = (page(0, generation), page(0, generation + 1));
            before.0.iter().zip(&after.0).filter(|(a, b)| a != b).count()
        };
        assert!((1..400).any(|generation| words_changed(generation) == SPARSE_WORDS.len()));
        assert!((1..400).any(|generation| words_changed(generation) > 500));
    }

    #[test]
    fn a_mismatch_explains_itself() {
        let (number, generation) = (3, (1..).find(|&generation| page(3, generation) != Page::zeroed()).unwrap());
        let text = page(number, generation).check(STREAM, 99, generation).unwrap_err().to_string();
        assert!(
            text.starts_with(&format!("page 99 of generation {generation} is wrong from word 0 on: 0x3")),
            "{text}"
        );
    }
}
