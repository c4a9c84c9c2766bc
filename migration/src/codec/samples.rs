//! Pages and a memory to try codecs on.

use super::decode::PageSink;
use super::delta::Delta;
use super::kept::Digest;
use super::reference::Reference;
use super::{Page, PageId};
use crate::region::{PAGE_SIZE, PageRun};
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::HashMap;

/// Memory whose pages are not there before they are written.
#[derive(Debug, Clone, Default)]
pub(super) struct Memory {
    pub(super) pages: HashMap<PageId, Page>,
    pub(super) cleared: Vec<PageRun>,
    pub(super) checked: Vec<(PageRun, Digest)>,
}

impl PageSink for Memory {
    type Error = &'static str;

    fn clear(&mut self, run: PageRun) -> Result<(), Self::Error> {
        self.cleared.push(run);
        Ok(())
    }

    fn write(&mut self, page: PageId, content: &Page) -> Result<(), Self::Error> {
        self.pages.insert(page, *content);
        Ok(())
    }

    fn patch(&mut self, page: PageId, delta: &Delta<'_>) -> Result<(), Self::Error> {
        delta.apply(self.pages.get_mut(&page).ok_or("nothing there")?);
        Ok(())
    }

    fn copy(&mut self, page: PageId, from: Reference) -> Result<(), Self::Error> {
        let content = *self.pages.get(&from.page).ok_or("nothing there")?;
        self.write(page, &content)
    }

    fn check(&mut self, group: PageRun, digest: &Digest) -> Result<(), Self::Error> {
        self.checked.push((group, *digest));
        Ok(())
    }
}

/// A page that no codec makes smaller, another one for each `seed`: xorshift64*.
pub(super) fn noise(seed: u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    let mut state = seed | 1 << 63;
    for word in page.as_chunks_mut().0 {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        *word = state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
    }
    page
}

/// A page of one byte and, at its start, its number.
pub(super) fn pattern(number: u64) -> Page {
    let mut page = [0x5a; PAGE_SIZE];
    page[..8].copy_from_slice(&number.to_le_bytes());
    page
}

/// Pages of the kinds that guests have.
pub(super) fn pages() -> impl Strategy<Value = Page> {
    prop_oneof![
        Just([0; PAGE_SIZE]),
        any::<[u8; 8]>().prop_map(|word| repeated(&word)),
        vec(any::<u8>(), 1..64).prop_map(|text| repeated(&text)),
        any::<u64>().prop_map(noise),
        vec("[a-z]{1,9}", 1..60).prop_map(|words| repeated(words.join(" ").as_bytes())),
        runs(),
        (Just([0; PAGE_SIZE]), writes()).prop_map(|(page, writes)| written(page, &writes)),
        (any::<u64>(), 0..=PAGE_SIZE).prop_map(|(seed, zeros)| {
            let mut page = noise(seed);
            page[..zeros].fill(0);
            page
        }),
    ]
}

/// Two contents of a page: a few places of the second are written anew, or all of it.
pub(super) fn changes() -> impl Strategy<Value = (Page, Page)> {
    prop_oneof![
        8 => (pages(), writes()).prop_map(|(old, writes)| (old, written(old, &writes))),
        1 => (pages(), pages()),
    ]
}

/// Stretches of one byte, of any length and at any place.
fn runs() -> impl Strategy<Value = Page> {
    vec((any::<u8>(), 1..1024_usize), 1..40).prop_map(|runs| {
        let bytes: Vec<u8> = runs.into_iter().flat_map(|(byte, length)| std::iter::repeat_n(byte, length)).collect();
        repeated(&bytes)
    })
}

fn writes() -> impl Strategy<Value = Vec<(usize, Vec<u8>)>> {
    let length = prop_oneof![4 => 1..12_usize, 1 => 1..500_usize];
    vec((0..PAGE_SIZE, length.prop_flat_map(|length| vec(any::<u8>(), length))), 0..40)
}

fn written(mut page: Page, writes: &[(usize, Vec<u8>)]) -> Page {
    for (start, bytes) in writes {
        for (place, byte) in page[*start..].iter_mut().zip(bytes) {
            *place = *byte;
        }
    }
    page
}

fn repeated(bytes: &[u8]) -> Page {
    let mut page = [0; PAGE_SIZE];
    for (place, byte) in page.iter_mut().zip(bytes.iter().cycle()) {
        *place = *byte;
    }
    page
}
