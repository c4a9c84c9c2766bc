//! Delta coding: the bytes of a page that changed since it was last sent, for pages that are written here and there.
//!
//! ```text
//! body := span*      span := skip varint, length varint, `length` bytes: new XOR old
//! ```
//! `skip` counts the equal bytes since the span before, or since the start of the page. A varint is one byte below 128, or
//! two of which the first has its highest bit set and the low 7 bits. XOR and not the new bytes, because counters and
//! pointers change in few bits: their deltas have much in common, and packing the block finds it.

use super::input::Input;
use super::{MAX_ENCODED, Malformed, Page, Tried, append_body};
use crate::region::PAGE_SIZE;

/// What is compared at a time: one cache line, one bit of a mask for each byte.
const LINE: usize = 64;
const LINES: usize = PAGE_SIZE / LINE;

/// Equal bytes between two changed ones that end no span: skip and length of another would cost as much.
const GAP: usize = 2;

const WHAT: &str = "A delta";
const LOW_BITS: u16 = 0x7f;
const MORE: u8 = 0x80;

/// What comparing two contents of a page came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compared {
    /// They are equal: the target has this content.
    Same,
    /// The delta was appended.
    Written,
    /// It would not be clearly smaller; the output is as it was.
    Declined,
}

/// Appends length and body of the delta that makes `new` of `old` to `out`, if there is any.
pub fn encode(old: &Page, new: &Page, out: &mut Vec<u8>) -> Compared {
    let changed = changed_bytes(old, new);
    let count: u32 = changed.iter().map(|line| line.count_ones()).sum();
    if count == 0 {
        return Compared::Same;
    }
    if count as usize > MAX_ENCODED {
        return Compared::Declined;
    }
    match append_body(out, |out| append_spans(&changed, old, new, out)) {
        Tried::Written => Compared::Written,
        Tried::Declined => Compared::Declined,
    }
}

/// Which bytes differ: a mask for each line, the lowest bit for its first byte.
fn changed_bytes(old: &Page, new: &Page) -> [u64; LINES] {
    let mut changed = [0; LINES];
    let lines = old.as_chunks::<LINE>().0.iter().zip(new.as_chunks::<LINE>().0);
    for (mask, (old, new)) in changed.iter_mut().zip(lines) {
        if old != new {
            *mask = changed_in_line(old, new);
        }
    }
    changed
}

fn changed_in_line(old: &[u8; LINE], new: &[u8; LINE]) -> u64 {
    const LOW_7: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    /// Moves the lowest bits of 8 bytes side by side into the highest byte: 2 to the power of 56 - 7k for each byte k.
    const GATHER: u64 = 0x0102_0408_1020_4080;
    let words = old.as_chunks().0.iter().zip(new.as_chunks().0);
    words.enumerate().fold(0, |mask, (at, (old, new))| {
        let change = u64::from_le_bytes(*old) ^ u64::from_le_bytes(*new);
        let nonzero = ((((change & LOW_7) + LOW_7) | change) & !LOW_7) >> 7;
        mask | (nonzero.wrapping_mul(GATHER) >> 56) << (8 * at)
    })
}

fn append_spans(changed: &[u64; LINES], old: &Page, new: &Page, out: &mut Vec<u8>) -> Tried {
    let limit = out.len() + MAX_ENCODED;
    let mut written = 0;
    // The span under way. An empty one stands where nothing has changed yet.
    let (mut start, mut end) = (0, 0);
    for (line, &mask) in changed.iter().enumerate().filter(|&(_, &mask)| mask != 0) {
        let mut rest = mask;
        while rest != 0 {
            let first = line * LINE + rest.trailing_zeros() as usize;
            let length = (rest >> rest.trailing_zeros()).trailing_ones();
            if end == 0 {
                start = first;
            } else if first > end + GAP {
                append_span(written, start, &old[start..end], &new[start..end], out);
                (written, start) = (end, first);
            }
            end = first + length as usize;
            // Adding the lowest set bit carries through its run; a run at the top of the line carries out.
            rest &= rest.wrapping_add(rest & rest.wrapping_neg());
        }
        // A span of `end - start` bytes comes still.
        if out.len() + (end - start) > limit {
            return Tried::Declined;
        }
    }
    append_span(written, start, &old[start..end], &new[start..end], out);
    Tried::Written
}

fn append_span(written: usize, start: usize, old: &[u8], new: &[u8], out: &mut Vec<u8>) {
    append_varint(start - written, out);
    append_varint(new.len(), out);
    out.extend(old.iter().zip(new).map(|(old, new)| old ^ new));
}

fn append_varint(number: usize, out: &mut Vec<u8>) {
    let number = u16::try_from(number).expect("a place in a page is below 4096");
    let [low, _] = (number & LOW_BITS).to_le_bytes();
    if number <= LOW_BITS {
        out.push(low);
    } else {
        let [high, _] = (number >> LOW_BITS.count_ones()).to_le_bytes();
        out.extend([low | MORE, high]);
    }
}

fn varint(input: &mut Input<'_>) -> Result<usize, Malformed> {
    let [low] = *input.array()?;
    let high = if low & MORE == 0 { 0 } else { input.array::<1>()?[0] };
    Ok(usize::from(high) << LOW_BITS.count_ones() | usize::from(low & !MORE))
}

/// A delta that was read and lies within a page.
#[derive(Debug, Clone, Copy)]
pub struct Delta<'a>(&'a [u8]);

impl<'a> Delta<'a> {
    /// Reads a body, without the length before it.
    ///
    /// # Errors
    /// [`Malformed`] if it ends inside a span, or has a span that is empty or leaves the page.
    pub fn parse(body: &'a [u8]) -> Result<Self, Malformed> {
        let mut spans = Spans::new(body);
        while spans.next()?.is_some() {}
        Ok(Self(body))
    }

    /// Makes the new content of the old one.
    pub fn apply(&self, page: &mut Page) {
        let mut spans = Spans::new(self.0);
        // No span is an error: parsing saw them all.
        while let Ok(Some((start, change))) = spans.next() {
            for (byte, change) in page[start..].iter_mut().zip(change) {
                *byte ^= change;
            }
        }
    }
}

/// The spans of a body, one by one.
struct Spans<'a> {
    input: Input<'a>,
    at: usize,
}

impl<'a> Spans<'a> {
    fn new(body: &'a [u8]) -> Self {
        Self { input: Input::new(WHAT, body), at: 0 }
    }

    /// Where the next span starts and what changes there; `None` after the last.
    fn next(&mut self) -> Result<Option<(usize, &'a [u8])>, Malformed> {
        if self.input.is_empty() {
            return Ok(None);
        }
        let value = |what, found, max| Malformed::Value { what, found: found as u64, max: max as u64 };
        let left = PAGE_SIZE - self.at;
        let skip = varint(&mut self.input)?;
        if skip >= left {
            return Err(value("A skip in a delta", skip, left - usize::from(left > 0)));
        }
        let length = varint(&mut self.input)?;
        if length == 0 || length > left - skip {
            return Err(value("A span of a delta", length, left - skip));
        }
        let start = self.at + skip;
        self.at = start + length;
        Ok(Some((start, self.input.bytes(length)?)))
    }
}
