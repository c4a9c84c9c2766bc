//! Blocks: any packed bytes of any told length, and any bytes to pack.
//!
//! The packers live through all inputs, as they do through all frames of a stream: what one leaves in them must not harm
//! the next.

#![no_main]

use libfuzzer_sys::fuzz_target;
use migration::codec::BlockCode;
use migration::codec::block::{MAX_BLOCK, Packer, Packing, Unpacker, ZstdLevel};
use std::cell::RefCell;

thread_local! {
    static PACKERS: RefCell<(Packer, Unpacker)> = RefCell::default();
}

fuzz_target!(|data: &[u8]| {
    let Some(([choice, length @ ..], data)) = data.split_first_chunk::<4>() else { return };
    let [low, middle, high] = *length;
    let length = u32::from_le_bytes([low, middle, high, 0]) as usize;
    PACKERS.with_borrow_mut(|(packer, unpacker)| {
        for code in BlockCode::ALL {
            if let Ok(plain) = unpacker.unpack(code, data, length) {
                assert!(plain.len() == length && length <= MAX_BLOCK);
            }
        }
        let level = ZstdLevel::new(choice % 9 + 1).expect("1 to 9");
        for packing in [Packing::Stored, Packing::Lz4, Packing::Zstd(level)] {
            let (code, packed) = packer.pack(packing, data);
            assert!(unpacker.unpack(code, packed, data.len()) == Ok(data));
        }
    });
});
