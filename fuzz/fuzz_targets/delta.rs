//! Deltas: any body on a page, and the delta back from what it makes.

#![no_main]

use libfuzzer_sys::fuzz_target;
use migration::PAGE_SIZE;
use migration::codec::delta::{self, Compared, Delta};
use migration::codec::{MAX_ENCODED, Page};

fuzz_target!(|data: &[u8]| {
    let old = [0x5a; PAGE_SIZE];
    if let Ok(delta) = Delta::parse(data) {
        let mut new = old;
        delta.apply(&mut new);
        encode(&old, &new);
    }
    let mut new = old;
    for (place, byte) in new.iter_mut().zip(data.iter().cycle()) {
        *place = *byte;
    }
    encode(&old, &new);
});

/// A delta makes the new page of the old one.
fn encode(old: &Page, new: &Page) {
    let mut out = Vec::new();
    match delta::encode(old, new, &mut out) {
        Compared::Same => assert!(out.is_empty() && old == new),
        Compared::Declined => assert!(out.is_empty() && old != new),
        Compared::Written => {
            let (length, body) = out.split_first_chunk().expect("a length is before the body");
            assert!(body.len() == usize::from(u16::from_le_bytes(*length)) && body.len() <= MAX_ENCODED);
            let mut page = *old;
            Delta::parse(body).expect("an encoded delta is right").apply(&mut page);
            assert!(page == *new);
        }
    }
}
