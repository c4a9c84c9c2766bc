//! Frames: any header, and any body behind a header that is right. What parses encodes to a frame that parses to the same.

#![no_main]

use libfuzzer_sys::fuzz_target;
use migration::wire::{Frame, HEADER_BYTES, Header, VERSION};

/// Bytes of a header before its length.
const BEFORE_LENGTH: usize = 8;
/// Bytes of a header that its checksum covers.
const CHECKED: usize = HEADER_BYTES - size_of::<u32>();

fuzz_target!(|data: &[u8]| {
    if let Some((head, body)) = data.split_first_chunk() {
        parse(head, body);
    }
    if let Some((kind, body)) = data.split_first_chunk::<2>() {
        parse(&header(*kind, body), body);
    }
});

/// No fuzzer finds a checksum by itself.
fn header(kind: [u8; 2], body: &[u8]) -> [u8; HEADER_BYTES] {
    let mut head = [0; HEADER_BYTES];
    head[..4].copy_from_slice(b"GWMG");
    head[4..6].copy_from_slice(&VERSION.to_le_bytes());
    head[6..BEFORE_LENGTH].copy_from_slice(&kind);
    let length = u32::try_from(body.len()).expect("inputs are far below 4 GiB");
    head[BEFORE_LENGTH..CHECKED].copy_from_slice(&length.to_le_bytes());
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&head[..CHECKED]), body);
    head[CHECKED..].copy_from_slice(&checksum.to_le_bytes());
    head
}

fn parse(head: &[u8; HEADER_BYTES], body: &[u8]) {
    let Ok(header) = Header::parse(head) else { return };
    let Some(body) = body.get(..header.body_bytes()) else { return };
    let Ok(frame) = Frame::parse(&header, body) else { return };
    let mut again = Vec::new();
    frame.encode(&mut again);
    let (head, body) = again.split_first_chunk().expect("a frame begins with a header");
    let header = Header::parse(head).expect("an encoded header is right");
    assert_eq!(Frame::parse(&header, body), Ok(frame));
}
