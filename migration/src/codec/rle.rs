//! Run-length coding: runs of equal 64-bit words, for pages of patterns and pages that are mostly zero.
//!
//! ```text
//! body := op*      op := u16 (kind in the upper 2 bits, count of words in the others), then by kind
//!   0 zeros        nothing
//!   1 repeat       8 bytes, the word
//!   2 literals     8 bytes for each word
//! ```
//! The counts, each of at least 1, add up to the 512 words of a page. Words rather than bytes, because compilers, kernels
//! and allocators fill memory by words, and a word is compared as fast as a byte.

use super::input::Input;
use super::{MAX_ENCODED, Malformed, Page, Tried, append_body};
use crate::region::PAGE_SIZE;

type Word = [u8; 8];

/// Words that an encoding must save: fewer and the body is over [`MAX_ENCODED`].
const MIN_SAVED: usize = (PAGE_SIZE - MAX_ENCODED) / size_of::<Word>();

const COUNT_BITS: u32 = 14;
const ZEROS: u16 = 0;
const REPEAT: u16 = 1;
const LITERALS: u16 = 2;

const WHAT: &str = "A run-length coded page";

/// Appends length and body of a page to `out`.
pub fn encode(page: &Page, out: &mut Vec<u8>) -> Tried {
    let words = page.as_chunks().0;
    if saved_at_most(words) < MIN_SAVED {
        return Tried::Declined;
    }
    append_body(out, |out| {
        append_ops(words, out);
        Tried::Written
    })
}

/// A bound on the words that runs can save, from one pass without branches: most pages that have to be declined are so by
/// this. A run of n words has n - 1 that equal their successor, and costs at least one word where it is not of zeros.
fn saved_at_most(words: &[Word]) -> usize {
    let pairs = words.iter().zip(&words[1..]);
    // The last word has no successor.
    1 + pairs.map(|(word, next)| usize::from((word == next) | (*word == Word::default()))).sum::<usize>()
}

fn append_ops(words: &[Word], out: &mut Vec<u8>) {
    let (mut literals, mut at) = (0, 0);
    while let Some(word) = words.get(at) {
        let run = words[at..].iter().take_while(|other| *other == word).count();
        let zero = *word == Word::default();
        // A lone zero word saves 8 bytes and costs at most two ops.
        if run > 1 || zero {
            append_literals(&words[literals..at], out);
            append_op(if zero { ZEROS } else { REPEAT }, run, out);
            if !zero {
                out.extend(word);
            }
            literals = at + run;
        }
        at += run;
    }
    append_literals(&words[literals..], out);
}

fn append_literals(words: &[Word], out: &mut Vec<u8>) {
    if !words.is_empty() {
        append_op(LITERALS, words.len(), out);
        out.extend_from_slice(words.as_flattened());
    }
}

fn append_op(kind: u16, count: usize, out: &mut Vec<u8>) {
    let count = u16::try_from(count).expect("a page has 512 words");
    out.extend((kind << COUNT_BITS | count).to_le_bytes());
}

/// Makes a page of a body, without the length before it.
///
/// # Errors
/// [`Malformed`] unless the body is exactly one page; `page` has any content then.
pub fn decode(body: &[u8], page: &mut Page) -> Result<(), Malformed> {
    let mut input = Input::new(WHAT, body);
    let mut rest = page.as_chunks_mut::<{ size_of::<Word>() }>().0;
    while !rest.is_empty() {
        let op = u16::from_le_bytes(*input.array()?);
        let (kind, count) = (op >> COUNT_BITS, usize::from(op & ((1 << COUNT_BITS) - 1)));
        let bad = |what, found, max| Malformed::Value { what, found, max };
        let left = rest.len();
        let run = match rest.split_at_mut_checked(count) {
            Some((run, others)) if count > 0 => {
                rest = others;
                run
            }
            _ => return Err(bad("A run of words", count as u64, left as u64)),
        };
        match kind {
            ZEROS => run.fill(Word::default()),
            REPEAT => run.fill(*input.array()?),
            LITERALS => run.as_flattened_mut().copy_from_slice(input.bytes(count * size_of::<Word>())?),
            _ => return Err(bad("A kind of run", kind.into(), LITERALS.into())),
        }
    }
    input.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(page: &Page) -> Vec<u8> {
        let mut out = Vec::new();
        assert_eq!(encode(page, &mut out), Tried::Written);
        out
    }

    /// The bytes as they travel, which must stay the same in every build.
    #[test]
    fn ops_are_as_documented() {
        let mut page = [0; PAGE_SIZE];
        page[..16].copy_from_slice(b"the first words!");
        page[4096 - 16..].fill(0xa5);
        let mut expected = vec![28, 0, 2, 0x80];
        expected.extend(b"the first words!");
        expected.extend([0xfc, 0x01, 2, 0x40]);
        expected.extend([0xa5; 8]);
        expected[0] = u8::try_from(expected.len() - 2).unwrap();
        assert_eq!(encoded(&page), expected);
    }

    #[test]
    fn zeros_and_patterns_are_tiny() {
        assert_eq!(encoded(&[0; PAGE_SIZE]).len(), 4);
        assert_eq!(encoded(&[7; PAGE_SIZE]).len(), 12);
    }

    #[test]
    fn a_page_is_declined_where_a_quarter_is_not_saved() {
        let mut page = [0; PAGE_SIZE];
        for (number, word) in (1_u64..).zip(page.as_chunks_mut().0) {
            *word = number.to_le_bytes();
        }
        let mut out = vec![1];
        assert_eq!((encode(&page, &mut out), &out[..]), (Tried::Declined, &[1][..]));
        // One run of zeros of exactly a quarter saves less than that, for its op and that of the literals.
        page[..1024].fill(0);
        assert_eq!((encode(&page, &mut out), &out[..]), (Tried::Declined, &[1][..]));
        page[..1032].fill(0);
        assert_eq!(encode(&page, &mut out), Tried::Written);
    }

    #[test]
    fn bad_bodies_are_named() {
        let mut page = [0; PAGE_SIZE];
        let truncated = Malformed::Truncated { what: WHAT };
        assert_eq!(decode(&[], &mut page), Err(truncated));
        assert_eq!(decode(&[0xff, 0x01], &mut page), Err(truncated), "511 zeros");
        assert_eq!(decode(&[0, 2, 0], &mut page), Err(Malformed::LeftOver { what: WHAT, extra: 1 }));
        assert_eq!(decode(&[0, 0x42, 1], &mut page), Err(truncated), "half a word");
        let value = |what, found, max| Err(Malformed::Value { what, found, max });
        assert_eq!(decode(&[1, 2], &mut page), value("A run of words", 513, 512));
        assert_eq!(decode(&[0, 0], &mut page), value("A run of words", 0, 512));
        assert_eq!(decode(&[1, 0xc0], &mut page), value("A kind of run", 3, 2));
    }
}
