//! The wire format: its bytes, its bounds, and that nothing a peer sends makes it panic.

use super::frame::HELLO_BYTES;
use super::*;
use crate::codec::block::MAX_BLOCK;
use crate::codec::{BlockCode, PageCode};
use crate::digest::TranscriptDigest;
use crate::guest::Claim;
use crate::region::{MAX_REGION_PAGES, MAX_REGIONS, PageIndex, PageRun, RamRegion, Region, RegionId};
use proptest::prelude::*;
use std::time::Duration;
use uuid::Uuid;
use vm_memory::GuestAddress;

fn record(region: u16, first: u64, pages: u32, code: PageCode) -> PageRecord {
    PageRecord::new(PageRun { region: RegionId(region), first: PageIndex(first), pages }, code)
}

fn hello() -> Hello<'static> {
    Hello {
        session: Uuid::from_u128(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10),
        vm: Uuid::from_u128(0x1112_1314_1516_1718_191a_1b1c_1d1e_1f20),
        mode: Mode::Live,
        verify: true,
        streams: 3,
        transfer: Transfer::Passed,
        build: "godwit 0",
        regions: vec![Region::Ram(RamRegion { start: GuestAddress(1 << 32), pages: 258 }), Region::Disk { pages: 90 }],
        machine: b"{}",
    }
}

fn bytes(frame: &Frame<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    frame.encode(&mut out);
    out
}

/// Reads a whole frame.
fn parse(bytes: &[u8]) -> Result<Frame<'_>, FrameError> {
    let (head, body) = bytes.split_at(HEADER_BYTES);
    let header = Header::parse(head.try_into().unwrap())?;
    Frame::parse(&header, &body[..header.body_bytes().min(body.len())])
}

/// A header of any content with a checksum that is right.
fn raw(version: u16, kind: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = b"GWMG".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&bytes), body);
    bytes.extend(checksum.to_le_bytes());
    bytes.extend(body);
    bytes
}

/// A frame in which no page travels encoded.
fn runs(records: &[PageRecord]) -> Frame<'_> {
    let block = PackedBlock { code: BlockCode::Stored, unpacked: 0, bytes: &[] };
    Frame::Pages(Pages { records: Records::new(records), block })
}

/// One frame of each kind.
fn all<'a>(records: &'a [PageRecord]) -> Vec<Frame<'a>> {
    vec![
        Frame::Hello(hello()),
        Frame::Accept { claims: Uuid::from_u128(3), transfer: Transfer::Passed, old: 0x0102 },
        Frame::Refuse { reason: "no room" },
        Frame::Pages(Pages {
            records: Records::new(records),
            block: PackedBlock { code: BlockCode::Lz4, unpacked: 0x1002, bytes: b"block" },
        }),
        Frame::RoundEnd(RoundEnd { round: 2, pages: 771, zero_pages: 2 }),
        Frame::State(b"state"),
        Frame::Seal(seal()),
        Frame::Ready,
        Frame::Go,
        Frame::Running(Running {
            restore: Duration::from_micros(3),
            start: Duration::from_micros(0x0201),
            cpu: Duration::from_micros(0x0403),
        }),
        Frame::Query { session: Uuid::from_u128(1), claims: Uuid::from_u128(3) },
        Frame::Verdict(Claim::Mine),
        Frame::Verdict(Claim::NotMine),
        Frame::Abort { reason: "cancelled" },
        Frame::Heartbeat,
        Frame::Report(b"{}"),
        Frame::Join(Join { session: Uuid::from_u128(1), stream: 0x0201 }),
        Frame::Installed { round: 0x0201 },
        Frame::Lacks(vec![PageRun { region: RegionId(2), first: PageIndex(0x0304), pages: 5 }]),
    ]
}

fn seal() -> Seal {
    let transcript = |frames, digest| TranscriptDigest { frames, digest };
    Seal { link: transcript(9, 0x0807_0605_0403_0201), streams: vec![transcript(3, 4)], memory: vec![5, 6] }
}

fn records() -> [PageRecord; 2] {
    [record(1, 0x0201, 3, PageCode::Raw), record(0, 7, 0x102, PageCode::Zero)]
}

/// The bytes of version 3, made by another program from the description of the format: magic, version, kind, length,
/// checksum, then the body in groups of 16. A change here is a new version of the protocol.
#[test]
fn golden_bytes() {
    let expected = [
        "47574d47 0400 0100 59000000 8d54c681 0102030405060708090a0b0c0d0e0f10 1112131415161718191a1b1c1d1e1f20 01010200080003000200000001676f64 77697420300000000001000000020100 00000000000000000000000000005a00 000000000000017b7d",
        "47574d47 0400 0200 19000000 761b3773 00000000000000000000000000000003 010201000000000000",
        "47574d47 0400 0300 07000000 8fac246b 6e6f20726f6f6d",
        "47574d47 0400 0400 2d000000 da2333e4 02000100021000000102000000000000 03000000010000000700000000000000 0201000000000100626c6f636b",
        "47574d47 0400 0500 14000000 75cba59f 03030000000000000200000000000000 02000000",
        "47574d47 0400 0600 05000000 0953d26f 7374617465",
        "47574d47 0400 0700 32000000 a92e04d2 01000900000000000000010203040506 07080300000000000000040000000000 00000500000000000000060000000000 0000",
        "47574d47 0400 0800 00000000 b2a69ad9",
        "47574d47 0400 0900 00000000 abcdaa36",
        "47574d47 0400 0a00 18000000 0dcbc91a 03000000000000000102000000000000 0304000000000000",
        "47574d47 0400 0b00 20000000 f4160124 00000000000000000000000000000001 00000000000000000000000000000003",
        "47574d47 0400 0c00 01000000 b7e2106e 01",
        "47574d47 0400 0c00 01000000 b4617b9c 00",
        "47574d47 0400 0d00 09000000 eb099941 63616e63656c6c6564",
        "47574d47 0400 0e00 00000000 0631e3b0",
        "47574d47 0400 0f00 02000000 2d268c10 7b7d",
        "47574d47 0400 1000 12000000 a5cc123f 00000000000000000000000000000001 0102",
        "47574d47 0400 1100 04000000 a9800b46 01020000",
        "47574d47 0400 1200 0e000000 cde3754d 0403000000000000050000000200",
    ];
    for (frame, expected) in all(&records()).iter().zip(expected) {
        let found: String = bytes(frame).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(found, expected.replace(' ', ""), "{frame:?}");
    }
}

#[test]
fn every_kind_is_read_as_it_was_written() {
    let records = records();
    let frames = all(&records);
    assert!(Kind::ALL.iter().all(|&kind| frames.iter().any(|frame| frame.kind() == kind)));
    for frame in frames {
        assert_eq!(parse(&bytes(&frame)).as_ref(), Ok(&frame));
    }
}

#[test]
fn every_cut_and_every_flip_is_noticed() {
    for frame in all(&records()) {
        let whole = bytes(&frame);
        for length in HEADER_BYTES..whole.len() {
            assert!(parse(&whole[..length]).is_err(), "{frame:?} cut at {length}");
        }
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(parse(&flipped).is_err(), "bit {bit} of {frame:?}");
        }
    }
}

/// What is missing or left over is noticed even if the sender meant it.
#[test]
fn every_body_of_another_length_is_refused() {
    let free = [Kind::Refuse, Kind::Abort, Kind::State, Kind::Report];
    for frame in all(&records()).iter().filter(|frame| !free.contains(&frame.kind())) {
        let (kind, whole) = (frame.kind(), bytes(frame));
        for length in 0..whole.len() - HEADER_BYTES {
            let cut = raw(VERSION, kind as u16, &whole[HEADER_BYTES..HEADER_BYTES + length]);
            // The head and two records; what is left is the block.
            let whole_records = kind == Kind::Pages && length >= 40;
            // The number of further streams, and two transcripts; then digests of memory.
            let whole_digests = kind == Kind::Seal && length >= 34 && (length - 34) % 8 == 0;
            assert_eq!(parse(&cut).is_ok(), whole_records || whole_digests, "{kind} of {length}");
        }
        let longer = [&whole[HEADER_BYTES..], b"x"].concat();
        assert_eq!(parse(&raw(VERSION, kind as u16, &longer)).is_ok(), kind == Kind::Pages, "{kind} with a byte more");
    }
}

#[test]
fn strangers_and_other_versions_are_told_apart() {
    assert_eq!(parse(b"GET / HTTP/1.1\r\n\r\n"), Err(FrameError::NotOurs { found: u32::from_le_bytes(*b"GET ") }));
    assert_eq!(parse(&raw(5, 1, &[])), Err(FrameError::Version { found: 5 }));
    assert_eq!(parse(&raw(2, 77, &[])), Err(FrameError::Version { found: 2 }));
    assert_eq!(parse(&raw(VERSION, 77, &[])), Err(FrameError::Kind { found: 77 }));
    assert_eq!(parse(&raw(VERSION, 0, &[])), Err(FrameError::Kind { found: 0 }));
    for (kind, frame) in [(3, Frame::Refuse { reason: "too new" }), (13, Frame::Abort { reason: "too new" })] {
        assert_eq!(parse(&raw(9, kind, b"too new")), Ok(frame), "what is refused must be readable in all versions");
    }
}

#[test]
fn lengths_are_bounded_before_anything_is_allocated() {
    for &kind in Kind::ALL {
        let mut head = raw(VERSION, kind as u16, &[]);
        for length in [kind.max_body() + 1, u32::MAX as usize] {
            head[8..12].copy_from_slice(&u32::try_from(length).unwrap().to_le_bytes());
            let refused = Header::parse(head.as_slice().try_into().unwrap());
            assert!(matches!(refused, Err(FrameError::Length { .. })), "{kind} of {length}");
        }
    }
}

/// Changes one part of a Hello and gives its body a checksum that is right.
fn hello_with(at: usize, value: &[u8]) -> Vec<u8> {
    let mut body = bytes(&Frame::Hello(hello()))[HEADER_BYTES..].to_vec();
    body[at..at + value.len()].copy_from_slice(value);
    raw(VERSION, 1, &body)
}

#[test]
fn numbers_in_hello_are_bounded() {
    let refused = |at, value: &[u8]| parse(&hello_with(at, value)).unwrap_err();
    assert!(matches!(refused(32, &[2]), FrameError::Value { what: "The mode", .. }));
    assert!(matches!(refused(33, &[2]), FrameError::Value { what: "The wish to verify", .. }));
    let regions = u16::try_from(MAX_REGIONS).unwrap() + 1;
    assert!(matches!(refused(34, &regions.to_le_bytes()), FrameError::Length { max: 64, .. }));
    assert!(matches!(refused(36, &65_u16.to_le_bytes()), FrameError::Length { max: 64, .. }));
    assert!(matches!(refused(40, &u32::MAX.to_le_bytes()), FrameError::Length { .. }));
    assert!(matches!(refused(44, &[2]), FrameError::Value { what: "The way of memory", .. }));
    assert!(matches!(refused(HELLO_BYTES, &[0xff]), FrameError::NotText { .. }));
    let pages = (MAX_REGION_PAGES + 1).to_le_bytes();
    let region = HELLO_BYTES + hello().build.len();
    assert!(matches!(refused(region + 8, &pages), FrameError::Length { what: "A region", .. }));
    assert!(matches!(refused(region + 16, &[2]), FrameError::Value { what: "The kind of a region", .. }));
}

#[test]
fn page_records_are_bounded() {
    let refused = |records: &[PageRecord]| {
        let frame = bytes(&runs(records));
        parse(&frame).map(|_| ()).unwrap_err()
    };
    let half = MAX_RAW_PAGES / 2 + 1;
    for records in [
        vec![record(0, 0, 0, PageCode::Raw)],
        vec![record(0, MAX_REGION_PAGES, 1, PageCode::Zero)],
        vec![record(0, u64::MAX, u32::MAX, PageCode::Zero)],
        vec![record(0, 0, MAX_PAGES + 1, PageCode::Zero)],
        vec![record(0, 0, half, PageCode::Raw), record(1, 0, half, PageCode::Raw)],
    ] {
        assert!(matches!(refused(&records), FrameError::Length { kind: Kind::Pages, .. }), "{records:?}");
    }
    let mut frame = bytes(&runs(&records()));
    frame[HEADER_BYTES + 8 + 14] = 7;
    let unknown = raw(VERSION, 4, &frame[HEADER_BYTES..]);
    assert!(matches!(parse(&unknown), Err(FrameError::Value { what: "An encoding", found: 7, .. })));
    let most =
        vec![record(0, 0, MAX_RAW_PAGES, PageCode::Raw), record(0, 0, MAX_PAGES - MAX_RAW_PAGES, PageCode::Zero)];
    let frame = bytes(&runs(&most));
    let Ok(Frame::Pages(pages)) = parse(&frame) else { panic!() };
    assert_eq!(pages.records.raw_runs().map(|run| run.bytes()).sum::<usize>(), 1 << 20);
}

#[test]
fn blocks_are_bounded() {
    let frame = bytes(&runs(&records()));
    let refused = |at: usize, value: &[u8]| {
        let mut body = frame[HEADER_BYTES..].to_vec();
        body[at..at + value.len()].copy_from_slice(value);
        parse(&raw(VERSION, 4, &body)).map(|_| ()).unwrap_err()
    };
    assert!(matches!(refused(0, &[1, 1]), FrameError::Length { what: "The number of records", found: 257, .. }));
    assert!(matches!(refused(2, &[3]), FrameError::Value { what: "The packing of a block", found: 3, .. }));
    assert!(matches!(refused(4, &[1, 0, 16, 0]), FrameError::Length { what: "A block", .. }));
    let packed = [&frame[HEADER_BYTES..], &[0; MAX_BLOCK + 1]].concat();
    assert!(matches!(parse(&raw(VERSION, 4, &packed)), Err(FrameError::Length { what: "A packed block", .. })));
}

#[test]
fn long_reasons_are_cut_between_characters() {
    let reason = "ä".repeat(MAX_REASON);
    let frame = bytes(&Frame::Abort { reason: &format!("x{reason}") });
    let Ok(Frame::Abort { reason }) = parse(&frame) else { panic!() };
    assert_eq!(reason.len(), MAX_REASON - 1);
}

proptest! {
    #[test]
    fn any_bytes_are_parsed_without_panic(bytes in prop::collection::vec(any::<u8>(), HEADER_BYTES..600)) {
        let _ = parse(&bytes);
    }

    #[test]
    fn any_body_is_parsed_without_panic(
        kind in 0_u16..18,
        body in prop::collection::vec(prop_oneof![Just(0_u8), Just(1), any::<u8>()], 0..600),
    ) {
        if body.len() <= Kind::ALL.iter().find(|&&known| known as u16 == kind).map_or(600, |known| known.max_body()) {
            let _ = parse(&raw(VERSION, kind, &body));
        }
    }

    #[test]
    fn any_hello_is_read_as_it_was_written(
        (session, vm) in any::<(u128, u128)>(),
        (live, verify, passed, streams) in (any::<bool>(), any::<bool>(), any::<bool>(), 1..=MAX_STREAMS),
        build in "[ -~]{0,64}",
        regions in prop::collection::vec((any::<u64>(), 0..=MAX_REGION_PAGES), 0..=MAX_REGIONS),
        machine in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let regions = regions.into_iter().map(|(start, pages)| Region::Ram(RamRegion { start: GuestAddress(start), pages })).collect();
        let mode = if live { Mode::Live } else { Mode::Stop };
        let transfer = if passed { Transfer::Passed } else { Transfer::Copied };
        let (session, vm) = (Uuid::from_u128(session), Uuid::from_u128(vm));
        let hello = Hello { session, vm, mode, verify, streams, transfer, build: &build, regions, machine: &machine };
        let frame = Frame::Hello(hello);
        let written = bytes(&frame);
        prop_assert_eq!(parse(&written), Ok(frame));
    }

    #[test]
    fn any_round_end_and_seal_are_read_as_they_were_written(
        (round, pages, zero_pages) in any::<(u32, u64, u64)>(),
        transcripts in prop::collection::vec(any::<(u64, u64)>(), 1..=usize::from(MAX_STREAMS)),
        memory in prop::collection::vec(any::<u64>(), 0..=MAX_REGIONS),
    ) {
        let transcript = |(frames, digest): (u64, u64)| TranscriptDigest { frames, digest };
        let mut transcripts = transcripts.into_iter().map(transcript);
        let (link, streams) = (transcripts.next().unwrap(), transcripts.collect());
        for frame in [
            Frame::RoundEnd(RoundEnd { round, pages, zero_pages }),
            Frame::Seal(Seal { link, streams, memory }),
        ] {
            let written = bytes(&frame);
            prop_assert_eq!(parse(&written), Ok(frame));
        }
    }
}
