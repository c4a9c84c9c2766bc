//! What holds for every codec: what was encoded decodes to itself, what was declined left nothing behind, no encoding is
//! longer than its bound, and no bytes of a peer make a decoder panic.

use super::block::{MAX_BLOCK, Packer, Packing, Unpacker, ZstdLevel};
use super::decode::{DecodeError, PageSink, decode};
use super::delta::{Compared, Delta};
use super::reference::Reference;
use super::samples::{Memory, changes, noise, pages};
use super::{BlockCode, MAX_ENCODED, Page, PageCode, PageId, Tried, delta, rle};
use crate::region::{PAGE_SIZE, PageIndex, PageRun, RegionId};
use proptest::collection::vec;
use proptest::prelude::*;

/// The page that is encoded, and another one to refer to.
const PAGE: PageId = PageId { region: RegionId(0), page: PageIndex(5) };
const OTHER: PageId = PageId { region: RegionId(1), page: PageIndex(6) };

/// Appends an encoding of the second page to a block; the first was sent before.
type Encode = fn(&Page, &Page, &mut Vec<u8>) -> Tried;

/// The encoders of pages.
const ENCODERS: [(PageCode, Encode); 4] = [
    (PageCode::Plain, |_, new, out| {
        out.extend(new);
        Tried::Written
    }),
    (PageCode::Rle, |_, new, out| rle::encode(new, out)),
    (PageCode::Delta, |old, new, out| match delta::encode(old, new, out) {
        Compared::Same | Compared::Declined => Tried::Declined,
        Compared::Written => Tried::Written,
    }),
    (PageCode::Copy, |_, _, out| {
        Reference { page: OTHER, same_round: false }.encode(out);
        Tried::Written
    }),
];

/// What decoding a block of one page makes of a memory that has `old`, and `new` in another page.
fn decoded(code: PageCode, block: &[u8], old: &Page, new: &Page) -> Result<Page, DecodeError<&'static str>> {
    let mut memory = Memory::default();
    memory.write(PAGE, old).unwrap();
    memory.write(OTHER, new).unwrap();
    let run = PageRun { region: PAGE.region, first: PAGE.page, pages: 1 };
    decode([(run, code)], block, &mut memory).map(|()| memory.pages[&PAGE])
}

fn every_packing() -> Vec<(BlockCode, Packing)> {
    let zstd = (ZstdLevel::MIN.number()..=ZstdLevel::MAX.number()).filter_map(ZstdLevel::new).map(Packing::Zstd);
    let others = [(BlockCode::Stored, Packing::Stored), (BlockCode::Lz4, Packing::Lz4)];
    others.into_iter().chain(zstd.map(|packing| (BlockCode::Zstd, packing))).collect()
}

/// Blocks as frames have them: a few pages, and a length that is no whole number of them.
fn blocks() -> impl Strategy<Value = Vec<u8>> {
    (vec(pages(), 0..6), 0..PAGE_SIZE).prop_map(|(pages, cut)| {
        let mut block = pages.concat();
        block.truncate(block.len().saturating_sub(cut));
        block
    })
}

#[test]
fn numbers_on_the_wire_are_the_documented_ones() {
    let pages = PageCode::ALL.map(|code| (code as u8, code));
    let blocks = BlockCode::ALL.map(|code| (code as u8, code));
    assert_eq!(pages.map(|(number, _)| number), [0, 1, 2, 3, 4, 5, 6]);
    assert_eq!(blocks.map(|(number, _)| number), [0, 1, 2]);
    assert!(pages.iter().all(|(number, code)| PageCode::from_wire(*number) == Some(*code)));
    assert!(blocks.iter().all(|(number, code)| BlockCode::from_wire(*number) == Some(*code)));
    assert_eq!((PageCode::from_wire(7), BlockCode::from_wire(3)), (None, None));
    let levels: Vec<u8> = (0..=255).filter(|level| ZstdLevel::new(*level).is_some()).collect();
    assert_eq!(levels, [1, 2, 3, 4, 5, 6, 7, 8, 9]);
}

#[test]
fn what_a_delta_costs_is_what_has_changed() {
    let old = noise(1);
    let mut out = vec![9];
    assert_eq!((delta::encode(&old, &old, &mut out), &out[..]), (Compared::Same, &[9][..]));
    let mut new = old;
    for byte in &mut new[1021..1085] {
        *byte ^= 0xff;
    }
    out.clear();
    assert_eq!((delta::encode(&old, &new, &mut out), out.len()), (Compared::Written, 2 + 2 + 1 + 64));
    assert_eq!((delta::encode(&old, &noise(2), &mut out), out.len()), (Compared::Declined, 69));
    // Each change of one byte far from the next costs three.
    let mut new = old;
    for byte in new.iter_mut().step_by(64) {
        *byte ^= 1;
    }
    out.clear();
    assert_eq!((delta::encode(&old, &new, &mut out), out.len()), (Compared::Written, 2 + 64 * 3));
}

#[test]
fn a_delta_that_leaves_the_page_is_malformed() {
    let parse = |body: &[u8]| Delta::parse(body).map(|_| ());
    assert_eq!(parse(&[]), Ok(()));
    assert_eq!(parse(&[0xff, 31, 1, 7]), Ok(()), "the last byte");
    assert!(parse(&[0x80, 32, 1, 7]).is_err(), "a byte behind the page");
    assert!(parse(&[0xff, 31, 2, 7, 7]).is_err(), "a span over the end");
    assert!(parse(&[0, 0]).is_err(), "an empty span");
    assert!(parse(&[0, 2, 7]).is_err() && parse(&[0]).is_err() && parse(&[0x80]).is_err(), "early ends");
    assert!(parse(&[0xff, 31, 1, 7, 0, 1, 7]).is_err(), "a span behind the last byte");
}

#[test]
fn pages_in_a_block_pack_together() {
    let page = noise(3);
    let block = page.repeat(256);
    for (code, packing) in every_packing() {
        let (mut packer, mut unpacker) = (Packer::new(), Unpacker::new());
        let (found, packed) = packer.pack(packing, &block);
        assert_eq!(found, code);
        assert!(code == BlockCode::Stored || packed.len() < 3 * PAGE_SIZE, "{packing:?}: {} bytes", packed.len());
        assert!(unpacker.unpack(code, packed, block.len()) == Ok(&block));
    }
}

/// A block that did not fit in its buffer is no burden for the next one.
#[test]
fn noise_is_stored_and_the_next_block_is_packed() {
    let noise: Vec<u8> = (1..=256).flat_map(noise).collect();
    let zeros = vec![0; MAX_BLOCK];
    let mut packer = Packer::new();
    for (code, packing) in every_packing() {
        assert!(packer.pack(packing, &noise) == (BlockCode::Stored, &noise));
        assert_eq!(packer.pack(packing, &zeros).0, code);
    }
}

#[test]
fn a_block_has_the_length_that_its_frame_tells() {
    let plain = [b'a'; 10_000];
    for (code, packing) in every_packing() {
        let (mut packer, mut unpacker) = (Packer::new(), Unpacker::new());
        let packed = packer.pack(packing, &plain).1;
        for length in [0, 1, plain.len() - 1, plain.len() + 1, MAX_BLOCK, MAX_BLOCK + 1, usize::MAX] {
            assert!(unpacker.unpack(code, packed, length).is_err(), "{packing:?} of {length}");
        }
        assert!(unpacker.unpack(code, packed, plain.len()) == Ok(&plain));
    }
}

proptest! {
    #[test]
    fn pages_decode_to_themselves((old, new) in changes()) {
        for (code, encode) in ENCODERS {
            let mut block = b"before".to_vec();
            match encode(&old, &new, &mut block) {
                Tried::Declined => prop_assert_eq!(&block, b"before", "{:?}", code),
                Tried::Written => {
                    prop_assert!(block.starts_with(b"before") && block.len() <= 6 + code.max_in_block());
                    prop_assert!(decoded(code, &block[6..], &old, &new) == Ok(new), "{:?}", code);
                }
            }
        }
    }

    /// Only what is not smaller by a quarter is declined.
    #[test]
    fn what_has_runs_and_what_has_not_changed_much_is_not_declined(seed: u64, kept in 0..=PAGE_SIZE / 4 * 3 - 16) {
        let (mut zeros, mut same) = (noise(seed), noise(seed));
        zeros[kept..].fill(0);
        same[..kept].copy_from_slice(&noise(!seed)[..kept]);
        prop_assert_eq!(rle::encode(&zeros, &mut Vec::new()), Tried::Written);
        let compared = delta::encode(&noise(seed), &same, &mut Vec::new());
        prop_assert_eq!(compared, if same == noise(seed) { Compared::Same } else { Compared::Written });
    }

    #[test]
    fn a_shortened_page_is_an_error((old, new) in changes(), keep in any::<prop::sample::Index>()) {
        for (code, encode) in ENCODERS {
            let mut block = Vec::new();
            if encode(&old, &new, &mut block) == Tried::Written {
                block.truncate(keep.index(block.len()));
                prop_assert!(decoded(code, &block, &old, &new).is_err(), "{:?}", code);
            }
        }
    }

    #[test]
    fn garbage_is_an_error_or_a_page(
        (old, new) in changes(),
        garbage in vec(prop_oneof![any::<u8>(), 0..4_u8], 0..200),
        change in (any::<prop::sample::Index>(), 1..=255_u8),
    ) {
        for (code, encode) in ENCODERS {
            let _any = decoded(code, &garbage, &old, &new);
            let mut block = Vec::new();
            if encode(&old, &new, &mut block) == Tried::Written {
                let at = change.0.index(block.len());
                block[at] ^= change.1;
                let _any = decoded(code, &block, &old, &new);
            }
        }
        let mut page = [0; PAGE_SIZE];
        let _any = rle::decode(&garbage, &mut page);
        if let Ok(delta) = Delta::parse(&garbage) {
            delta.apply(&mut page);
        }
    }

    #[test]
    fn blocks_unpack_to_themselves(blocks in vec(blocks(), 1..4)) {
        let (mut packer, mut unpacker) = (Packer::new(), Unpacker::new());
        for (wanted, packing) in every_packing() {
            for plain in &blocks {
                let (code, packed) = packer.pack(packing, plain);
                prop_assert!(packed.len() <= plain.len() && (code == wanted || code == BlockCode::Stored));
                prop_assert_eq!(unpacker.unpack(code, packed, plain.len()), Ok(&plain[..]));
            }
        }
    }

    #[test]
    fn garbage_is_an_error_or_a_block(
        plain in blocks(),
        garbage in vec(any::<u8>(), 0..400),
        length in 0..5000_usize,
        change in (any::<prop::sample::Index>(), 1..=255_u8),
    ) {
        let (mut packer, mut unpacker) = (Packer::new(), Unpacker::new());
        for (_, packing) in every_packing() {
            let (code, packed) = packer.pack(packing, &plain);
            let mut packed = packed.to_vec();
            if code != BlockCode::Stored {
                let shorter = &packed[..packed.len() - 1];
                prop_assert!(unpacker.unpack(code, shorter, plain.len()).is_err());
            }
            if !packed.is_empty() {
                let at = change.0.index(packed.len());
                packed[at] ^= change.1;
            }
            for (packed, length) in [(&packed, plain.len()), (&garbage, length)] {
                if let Ok(unpacked) = unpacker.unpack(code, packed, length) {
                    prop_assert_eq!(unpacked.len(), length);
                }
            }
        }
    }
}

const _: () = assert!(MAX_ENCODED < PAGE_SIZE && MAX_ENCODED <= u16::MAX as usize, "a length fits before the body");
