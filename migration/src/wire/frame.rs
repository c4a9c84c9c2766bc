//! The frames, and their bodies to and from bytes.

use super::cursor::Cursor;
use super::header::{HEADER_BYTES, Header, Kind, finish};
use super::pages::Pages;
use super::{FrameError, MAX_BUILD, MAX_MACHINE, MAX_REASON, MAX_STREAMS};
use crate::digest::TranscriptDigest;
use crate::guest::Claim;
use crate::region::{MAX_REGION_PAGES, MAX_REGIONS, PageIndex, PageRun, RamRegion, Region, RegionId};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use uuid::Uuid;
use vm_memory::GuestAddress;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Whether the guest runs while its memory moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The guest is paused first, and its memory moves once.
    Stop,
    /// The guest runs, and what it changes is sent again, in rounds.
    Live,
}

/// How a guest's memory gets to the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transfer {
    /// Its content is sent, page by page.
    Copied,
    /// The memory itself is passed: both ends are on one host, and map the same pages.
    Passed,
}

impl Transfer {
    fn to_wire(self) -> u8 {
        match self {
            Self::Copied => 0,
            Self::Passed => 1,
        }
    }

    fn from_wire(found: u8, kind: Kind) -> Result<Self, FrameError> {
        match found {
            0 => Ok(Self::Copied),
            1 => Ok(Self::Passed),
            _ => Err(FrameError::Value { what: "The way of memory", kind, found: found.into() }),
        }
    }
}

/// One frame, borrowing from the buffer that it was read into.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame<'a> {
    /// The offer.
    Hello(Hello<'a>),
    /// The offer is taken.
    Accept {
        /// The identity of the target's record of claims.
        claims: Uuid,
        /// Whether the target has got the memory that was passed, if any was.
        transfer: Transfer,
        /// The regions of which it has an old copy: a bit for each, the lowest for region 0.
        old: u64,
    },
    /// The offer is not taken.
    Refuse {
        /// Why.
        reason: &'a str,
    },
    /// Pages; the bytes of raw runs follow the frame.
    Pages(Pages<'a>),
    /// The end of a pass over memory.
    RoundEnd(RoundEnd),
    /// The saved state.
    State(&'a [u8]),
    /// The last frame before the hand-over.
    Seal(Seal),
    /// The target could run the guest.
    Ready,
    /// The guest is the target's.
    Go,
    /// The guest runs at the target.
    Running(Running),
    /// A question about a session.
    Query {
        /// The session.
        session: Uuid,
        /// The record of claims that can answer.
        claims: Uuid,
    },
    /// The answer to it.
    Verdict(Claim),
    /// One end gives up.
    Abort {
        /// Why.
        reason: &'a str,
    },
    /// A sign of life.
    Heartbeat,
    /// The source's report, in JSON.
    Report(&'a [u8]),
    /// The first frame of one more stream.
    Join(Join),
    /// How far the target is.
    Installed {
        /// The last round, from 1, of which all pages are in the guest's memory.
        round: u32,
    },
    /// Pages that the target's old copies of disks do not have, of the round under way; at least one run, and at most [`MAX_LACKS`].
    Lacks(Vec<PageRun>),
}

/// The offer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello<'a> {
    /// The migration session, made up by the source.
    pub session: Uuid,
    /// The guest's identity.
    pub vm: Uuid,
    /// Whether the guest runs while its memory moves.
    pub mode: Mode,
    /// Whether `Seal` will hold digests of memory.
    pub verify: bool,
    /// Over how many streams pages will come, this link included: 1 to [`MAX_STREAMS`].
    pub streams: u16,
    /// Whether a handle to the guest's memory follows the frame.
    pub transfer: Transfer,
    /// The build of the source's engine.
    pub build: &'a str,
    /// What moves page by page, at most [`MAX_REGIONS`] pieces.
    pub regions: Vec<Region>,
    /// The machine in JSON.
    pub machine: &'a [u8],
}

/// Which migration a stream belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Join {
    /// The migration session.
    pub session: Uuid,
    /// The stream's number, from 1. The link that the offer came over is number 0.
    pub stream: u16,
}

/// What a pass over memory held, on the stream that says so; on the first stream, what it held on all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoundEnd {
    /// The round, from 1.
    pub round: u32,
    /// Its pages, zero pages included.
    pub pages: u64,
    /// Those of them that were zero.
    pub zero_pages: u64,
}

/// What the target spent, by its own clocks, to the microsecond.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Running {
    /// From `Seal` until all was compared and restored.
    pub restore: Duration,
    /// From `Go` until the claim was recorded and the guest ran.
    pub start: Duration,
    /// Processor time from `Hello` up to `Go`, of all threads that took memory and state in.
    pub cpu: Duration,
}

/// The source's account of all it has sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seal {
    /// The frames on this link before.
    pub link: TranscriptDigest,
    /// The frames of each further stream, by number.
    pub streams: Vec<TranscriptDigest>,
    /// The digest of each region's content, if `Hello` announced it; else empty.
    pub memory: Vec<u64>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireHello {
    session: [u8; 16],
    vm: [u8; 16],
    mode: u8,
    verify: u8,
    regions: U16,
    build_bytes: U16,
    streams: U16,
    machine_bytes: U32,
    transfer: u8,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireRegion {
    /// 0 for a disk.
    start: U64,
    pages: U64,
    kind: u8,
}

/// The kinds of regions.
const RAM: u8 = 0;
const DISK: u8 = 1;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireRoundEnd {
    pages: U64,
    zero_pages: U64,
    round: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireTranscript {
    frames: U64,
    digest: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireJoin {
    session: [u8; 16],
    stream: U16,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireRunning {
    restore_us: U64,
    start_us: U64,
    cpu_us: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireRun {
    first: U64,
    pages: U32,
    region: U16,
}

/// The most runs of one [`Frame::Lacks`].
pub const MAX_LACKS: usize = 1024;

pub(super) const MAX_LACKS_BYTES: usize = MAX_LACKS * size_of::<WireRun>();
pub(super) const HELLO_BYTES: usize = size_of::<WireHello>();
pub(super) const MAX_REGION_BYTES: usize = MAX_REGIONS * size_of::<WireRegion>();
pub(super) const ROUND_END_BYTES: usize = size_of::<WireRoundEnd>();
pub(super) const RUNNING_BYTES: usize = size_of::<WireRunning>();
pub(super) const MAX_SEAL_BYTES: usize =
    size_of::<U16>() + MAX_STREAMS as usize * size_of::<WireTranscript>() + MAX_REGIONS * size_of::<U64>();
pub(super) const JOIN_BYTES: usize = size_of::<WireJoin>();

impl<'a> Frame<'a> {
    /// The frame's kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Hello(_) => Kind::Hello,
            Self::Accept { .. } => Kind::Accept,
            Self::Refuse { .. } => Kind::Refuse,
            Self::Pages(_) => Kind::Pages,
            Self::RoundEnd(_) => Kind::RoundEnd,
            Self::State(_) => Kind::State,
            Self::Seal(_) => Kind::Seal,
            Self::Ready => Kind::Ready,
            Self::Go => Kind::Go,
            Self::Running(_) => Kind::Running,
            Self::Query { .. } => Kind::Query,
            Self::Verdict(_) => Kind::Verdict,
            Self::Abort { .. } => Kind::Abort,
            Self::Heartbeat => Kind::Heartbeat,
            Self::Report(_) => Kind::Report,
            Self::Join(_) => Kind::Join,
            Self::Installed { .. } => Kind::Installed,
            Self::Lacks(_) => Kind::Lacks,
        }
    }

    /// Replaces `out` by the frame's bytes. Reasons that are too long are cut.
    ///
    /// # Panics
    /// If another field is over its bound; the engine checks before it makes a frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.clear();
        out.resize(HEADER_BYTES, 0);
        match self {
            Self::Hello(hello) => hello.encode(out),
            Self::Accept { claims, transfer, old } => {
                out.extend(claims.as_bytes());
                out.push(transfer.to_wire());
                out.extend(old.to_le_bytes());
            }
            Self::Refuse { reason } | Self::Abort { reason } => {
                out.extend(&reason.as_bytes()[..reason.floor_char_boundary(MAX_REASON)]);
            }
            Self::Pages(pages) => pages.encode(out),
            Self::RoundEnd(RoundEnd { round, pages, zero_pages }) => {
                let (pages, zero_pages, round) = ((*pages).into(), (*zero_pages).into(), (*round).into());
                out.extend(WireRoundEnd { pages, zero_pages, round }.as_bytes());
            }
            Self::State(bytes) | Self::Report(bytes) => out.extend(*bytes),
            Self::Seal(seal) => seal.encode(out),
            Self::Join(Join { session, stream }) => {
                out.extend(WireJoin { session: *session.as_bytes(), stream: (*stream).into() }.as_bytes());
            }
            Self::Installed { round } => out.extend(round.to_le_bytes()),
            Self::Lacks(runs) => {
                for PageRun { region, first, pages } in runs {
                    let run = WireRun { first: first.0.into(), pages: (*pages).into(), region: region.0.into() };
                    out.extend(run.as_bytes());
                }
            }
            Self::Running(Running { restore, start, cpu }) => {
                let [restore_us, start_us, cpu_us] = [restore, start, cpu].map(|time| micros(*time).into());
                out.extend(WireRunning { restore_us, start_us, cpu_us }.as_bytes());
            }
            Self::Query { session, claims } => {
                out.extend(session.as_bytes());
                out.extend(claims.as_bytes());
            }
            Self::Verdict(claim) => out.push(match claim {
                Claim::NotMine => 0,
                Claim::Mine => 1,
            }),
            Self::Ready | Self::Go | Self::Heartbeat => {}
        }
        finish(self.kind(), out);
    }

    /// Reads the body that belongs to `header`.
    ///
    /// # Errors
    /// [`FrameError`] if the checksum or anything in the body is wrong.
    pub fn parse(header: &Header, body: &'a [u8]) -> Result<Self, FrameError> {
        header.check(body)?;
        let kind = header.kind();
        let mut cursor = Cursor::new(kind, body);
        let frame = match kind {
            Kind::Hello => Self::Hello(Hello::parse(&mut cursor)?),
            Kind::Accept => {
                let claims = Uuid::from_bytes(*cursor.field()?);
                let transfer = Transfer::from_wire(*cursor.field()?, kind)?;
                Self::Accept { claims, transfer, old: cursor.field::<U64>()?.get() }
            }
            Kind::Refuse => Self::Refuse { reason: cursor.text(cursor.left())? },
            Kind::Pages => Self::Pages(Pages::parse(&mut cursor)?),
            Kind::RoundEnd => {
                let WireRoundEnd { pages, zero_pages, round } = cursor.field()?;
                Self::RoundEnd(RoundEnd { round: round.get(), pages: pages.get(), zero_pages: zero_pages.get() })
            }
            Kind::State => Self::State(cursor.bytes(cursor.left())?),
            Kind::Seal => Self::Seal(Seal::parse(&mut cursor)?),
            Kind::Ready => Self::Ready,
            Kind::Go => Self::Go,
            Kind::Running => {
                let WireRunning { restore_us, start_us, cpu_us } = cursor.field()?;
                let [restore, start, cpu] = [restore_us, start_us, cpu_us].map(|us| Duration::from_micros(us.get()));
                Self::Running(Running { restore, start, cpu })
            }
            Kind::Query => {
                Self::Query { session: Uuid::from_bytes(*cursor.field()?), claims: Uuid::from_bytes(*cursor.field()?) }
            }
            Kind::Verdict => Self::Verdict(match cursor.field::<u8>()? {
                0 => Claim::NotMine,
                1 => Claim::Mine,
                &found => return Err(FrameError::Value { what: "The verdict", kind, found: found.into() }),
            }),
            Kind::Abort => Self::Abort { reason: cursor.text(cursor.left())? },
            Kind::Heartbeat => Self::Heartbeat,
            Kind::Report => Self::Report(cursor.bytes(cursor.left())?),
            Kind::Join => {
                let WireJoin { session, stream } = cursor.field()?;
                Self::Join(Join { session: Uuid::from_bytes(*session), stream: stream.get() })
            }
            Kind::Installed => Self::Installed { round: cursor.field::<U32>()?.get() },
            Kind::Lacks => {
                let mut runs = Vec::new();
                while cursor.left() > 0 || runs.is_empty() {
                    let WireRun { first, pages, region } = cursor.field()?;
                    let first = PageIndex(first.get());
                    runs.push(PageRun { region: RegionId(region.get()), first, pages: pages.get() });
                }
                Self::Lacks(runs)
            }
        };
        cursor.end()?;
        Ok(frame)
    }
}

impl<'a> Hello<'a> {
    fn encode(&self, out: &mut Vec<u8>) {
        const BOUNDED: &str = "the engine bounds what it offers";
        let Self { session, vm, mode, verify, streams, transfer, build, regions, machine } = self;
        let fixed = WireHello {
            session: *session.as_bytes(),
            vm: *vm.as_bytes(),
            mode: match mode {
                Mode::Stop => 0,
                Mode::Live => 1,
            },
            verify: u8::from(*verify),
            regions: u16::try_from(regions.len()).expect(BOUNDED).into(),
            build_bytes: u16::try_from(build.len()).expect(BOUNDED).into(),
            streams: (*streams).into(),
            machine_bytes: u32::try_from(machine.len()).expect(BOUNDED).into(),
            transfer: transfer.to_wire(),
        };
        out.extend(fixed.as_bytes());
        out.extend(build.as_bytes());
        for region in regions {
            let (start, kind) = match region {
                Region::Ram(ram) => (ram.start.0, RAM),
                Region::Disk { .. } => (0, DISK),
            };
            out.extend(WireRegion { start: start.into(), pages: region.pages().into(), kind }.as_bytes());
        }
        out.extend(*machine);
    }

    fn parse(cursor: &mut Cursor<'a>) -> Result<Self, FrameError> {
        let kind = Kind::Hello;
        let WireHello { session, vm, mode, verify, regions, build_bytes, streams, machine_bytes, transfer } =
            cursor.field()?;
        let bounded = |what, found: u32, max: usize| {
            let length = FrameError::Length { what, kind, found: found.into(), max: max as u64 };
            if found as usize <= max { Ok(found as usize) } else { Err(length) }
        };
        let value = |what, found: u8| FrameError::Value { what, kind, found: found.into() };
        let mode = match mode {
            0 => Mode::Stop,
            1 => Mode::Live,
            &found => return Err(value("The mode", found)),
        };
        let verify = match verify {
            0 => false,
            1 => true,
            &found => return Err(value("The wish to verify", found)),
        };
        let transfer = Transfer::from_wire(*transfer, kind)?;
        let streams = streams.get();
        if !(1..=MAX_STREAMS).contains(&streams) {
            let (found, max) = (streams.into(), MAX_STREAMS.into());
            return Err(FrameError::Length { what: "The number of streams", kind, found, max });
        }
        let build = cursor.text(bounded("The build's name", build_bytes.get().into(), MAX_BUILD)?)?;
        let count = bounded("The number of regions", regions.get().into(), MAX_REGIONS)?;
        let regions = (0..count).map(|_| parse_region(cursor)).collect::<Result<_, _>>()?;
        let machine = cursor.bytes(bounded("The machine", machine_bytes.get(), MAX_MACHINE)?)?;
        let (session, vm) = (Uuid::from_bytes(*session), Uuid::from_bytes(*vm));
        Ok(Self { session, vm, mode, verify, streams, transfer, build, regions, machine })
    }
}

fn parse_region(cursor: &mut Cursor<'_>) -> Result<Region, FrameError> {
    let WireRegion { start, pages, kind } = cursor.field()?;
    let pages = pages.get();
    if pages > MAX_REGION_PAGES {
        let (found, max) = (pages, MAX_REGION_PAGES);
        return Err(FrameError::Length { what: "A region", kind: Kind::Hello, found, max });
    }
    match *kind {
        RAM => Ok(Region::Ram(RamRegion { start: GuestAddress(start.get()), pages })),
        DISK => Ok(Region::Disk { pages }),
        found => Err(FrameError::Value { what: "The kind of a region", kind: Kind::Hello, found: found.into() }),
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

impl Seal {
    fn encode(&self, out: &mut Vec<u8>) {
        let Self { link, streams, memory } = self;
        out.extend(U16::new(u16::try_from(streams.len()).expect("the engine bounds its streams")).as_bytes());
        for TranscriptDigest { frames, digest } in [link].into_iter().chain(streams) {
            out.extend(WireTranscript { frames: (*frames).into(), digest: (*digest).into() }.as_bytes());
        }
        out.extend(memory.iter().flat_map(|digest| digest.to_le_bytes()));
    }

    fn parse(cursor: &mut Cursor<'_>) -> Result<Self, FrameError> {
        let further = cursor.field::<U16>()?.get();
        if further >= MAX_STREAMS {
            let (found, max) = (further.into(), (MAX_STREAMS - 1).into());
            return Err(FrameError::Length { what: "The number of streams", kind: Kind::Seal, found, max });
        }
        let link = parse_transcript(cursor)?;
        let streams = (0..further).map(|_| parse_transcript(cursor)).collect::<Result<_, _>>()?;
        let mut memory = Vec::new();
        while cursor.left() > 0 {
            memory.push(cursor.field::<U64>()?.get());
        }
        Ok(Self { link, streams, memory })
    }
}

fn parse_transcript(cursor: &mut Cursor<'_>) -> Result<TranscriptDigest, FrameError> {
    let WireTranscript { frames, digest } = cursor.field()?;
    Ok(TranscriptDigest { frames: frames.get(), digest: digest.get() })
}
