//! Run-length coded pages: any body, and any page.

#![no_main]

use libfuzzer_sys::fuzz_target;
use migration::PAGE_SIZE;
use migration::codec::{MAX_ENCODED, Page, Tried, rle};

fuzz_target!(|data: &[u8]| {
    let mut page = [0; PAGE_SIZE];
    if rle::decode(data, &mut page).is_ok() {
        encode(&page);
    }
    for (place, byte) in page.iter_mut().zip(data.iter().cycle()) {
        *place = *byte;
    }
    encode(&page);
});

/// A page that is encoded decodes to itself.
fn encode(page: &Page) {
    let mut out = Vec::new();
    match rle::encode(page, &mut out) {
        Tried::Declined => assert!(out.is_empty()),
        Tried::Written => {
            let (length, body) = out.split_first_chunk().expect("a length is before the body");
            assert!(body.len() == usize::from(u16::from_le_bytes(*length)) && body.len() <= MAX_ENCODED);
            let mut decoded = [0xff; PAGE_SIZE];
            assert!(rle::decode(body, &mut decoded) == Ok(()) && decoded == *page);
        }
    }
}
