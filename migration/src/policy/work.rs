//! What the codecs cost and gain on the pages seen lately, for [`Policy`](super::Policy).
//!
//! What a codec gains is counted. What packing costs is measured, a block at a time. What the other codecs cost is measured
//! for all that are on together, a frame at a time, and shared out as their costs are to each other on usual machines. Where
//! that is far from the truth, what the combination has cost is believed: an emulated processor, or one that lacks an
//! instruction, may take a thousand times as long to digest a page and hardly longer to copy it.

use super::Measured;
use crate::codec::Codecs;
use crate::codec::block::{Packing, ZstdLevel};
use crate::region::PAGE_SIZE;

/// Bytes of a page.
pub(super) const PAGE: f64 = PAGE_SIZE as f64;

/// Costs of a page in seconds of one core of a Xeon with AMX and warm caches. These are estimates: to look whether it is zero,
/// to copy it out of guest memory, and to put what no codec took into a block and out of it again.
const SCAN: f64 = 0.1e-6;
const COPY: f64 = 0.35e-6;
const PLAIN: f64 = 0.6e-6;
/// To compare it with the copy last sent (11 GB/s were measured), to digest (8.4 GB/s) and look it up, and to look for runs in
/// vain (9.8 GB/s); what tables and caches cost beside that is estimated.
const DELTA: f64 = 0.9e-6;
const DEDUP: f64 = 0.9e-6;
const RLE: f64 = 0.45e-6;
/// To send a byte, until it is measured.
const SEND: f64 = 0.25e-9;

/// How much slower or faster than that machine another one is taken to be at most: the first pages also pay for memory that
/// the host has to find.
const PACE: (f64, f64) = (0.25, 2.0);

/// A combination of codecs that costs so many times what it should costs what was measured.
const FAR_OFF: f64 = 4.0;

/// A host is taken to be crowded by no more than this factor.
const CROWDED: f64 = 2.0;

/// What packing usually costs, in seconds a byte, and leaves, as a share: a tar of libraries, where LZ4 and levels 1 and 3 were
/// measured. What the higher levels cost and leave is estimated until they are.
const USUAL: [(Packing, f64, f64); 5] = [
    (Packing::Lz4, 2.2e-9, 0.53),
    (Packing::Zstd(ZstdLevel::MIN), 3.4e-9, 0.42),
    (Packing::Zstd(ZstdLevel::new(3).expect("there is a level 3")), 5.0e-9, 0.38),
    (Packing::Zstd(ZstdLevel::new(6).expect("there is a level 6")), 12.0e-9, 0.365),
    (Packing::Zstd(ZstdLevel::MAX), 22.0e-9, 0.355),
];

/// How many of these are tried where nothing is known yet; the others would make a trial long. They cost so many seconds a
/// byte then.
const FIRST_TRIED: usize = 2;
const NEVER: f64 = 1.0;

/// Frames until a codec that did not pay is tried again, at first and in the end.
const FIRST_REST: u64 = 32;
const LONGEST_REST: u64 = 1024;

/// A codec that was on for no more frames than this did not pay.
const SHORT_STAY: u64 = 64;

/// How many pages like usual ones are taken to have been packed before the first one, and before the first one of later
/// trials: memory has stretches that pack and others that do not, and one frame may be of the latter.
const BENEFIT_OF_DOUBT: (f64, f64) = (512.0, 128.0);

/// Frames after which another packing than the one in use is judged by the latter, and a combination of codecs as on a usual
/// machine.
const STALE: u64 = 256;

/// An average of which the older half counts half as much, the older half of the rest half of that, and so on.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Recent {
    sum: f64,
    weight: f64,
}

impl Recent {
    /// The weight that halves what was before: eight full frames of pages.
    const HALF: f64 = 2048.0;

    fn add(&mut self, sum: f64, weight: f64) {
        if weight > 0.0 {
            let keep = 0.5_f64.powf(weight / Self::HALF);
            *self = Self { sum: self.sum * keep + sum, weight: self.weight * keep + weight };
        }
    }

    fn mean(&self) -> Option<f64> {
        (self.weight > 0.0).then(|| self.sum / self.weight)
    }
}

/// When a codec was on, and when it is worth to be tried again.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Rest {
    on: bool,
    /// Since it was last turned on or off, in frames.
    since: u64,
    /// How long it is to rest once it is off.
    length: u64,
    /// Whether it is on, or was never, and not measured since.
    fresh: bool,
}

impl Rest {
    const NEVER: Self = Self { on: false, since: 0, length: FIRST_REST, fresh: true };

    /// Whether what was measured before is to be believed at this frame.
    fn believed(&self, frame: u64) -> bool {
        !self.fresh && (self.on || frame < self.since + self.length)
    }

    fn turn(&mut self, on: bool, frame: u64) {
        if on == self.on {
            return;
        }
        let stayed = frame - self.since;
        if on {
            self.fresh = true;
        } else {
            self.length = if stayed > SHORT_STAY { FIRST_REST } else { (self.length * 2).min(LONGEST_REST) };
        }
        (self.on, self.since) = (on, frame);
    }
}

/// What a codec of single pages gained.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Class {
    /// Pages that it took, of those that it was tried on.
    hits: Recent,
    /// Bytes of a page that it took.
    bytes: Recent,
    rest: Rest,
    /// What it is taken to gain before it was tried.
    usual: Gain,
}

/// What a codec of single pages gains: the share of pages that it takes, and their bytes in the block.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Gain {
    pub(super) hits: f64,
    pub(super) bytes: f64,
}

impl Class {
    fn new(usual: Gain) -> Self {
        Self { hits: Recent::default(), bytes: Recent::default(), rest: Rest::NEVER, usual }
    }

    fn gain(&self, frame: u64) -> Gain {
        match self.hits.mean().filter(|_| self.rest.believed(frame)) {
            Some(hits) => Gain { hits, bytes: self.bytes.mean().unwrap_or(self.usual.bytes) },
            None => self.usual,
        }
    }

    /// Adds that of `tried` pages so many were taken, and how many bytes they are; what was not taken.
    fn note(&mut self, tried: u64, hits: u64, bytes: u64) -> u64 {
        if tried > 0 && std::mem::take(&mut self.rest.fresh) {
            (self.hits, self.bytes) = (Recent::default(), Recent::default());
        }
        self.hits.add(real(hits), real(tried));
        self.bytes.add(real(bytes), real(hits));
        tried.saturating_sub(hits)
    }
}

/// What one way to pack cost and left.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Packed {
    /// Seconds, and bytes, of the bytes that went in.
    seconds: Recent,
    bytes: Recent,
    /// The frame in which it was last used.
    at: u64,
}

/// What pages cost with one combination of codecs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Cost {
    /// Seconds of processor time.
    page: Recent,
    /// The frame in which it was last measured.
    at: u64,
}

/// The codecs of single pages that are on, and whether the rest goes into a block, as bits.
fn combination(codecs: &Codecs) -> usize {
    let bits = [codecs.rle, codecs.delta, codecs.dedup, !codecs.leave_raw()];
    bits.into_iter().fold(0, |bits, on| bits << 1 | usize::from(on))
}

/// How many combinations there are.
const COMBINATIONS: usize = 16;

/// Cost and gain of all codecs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Work {
    frame: u64,
    rle: Class,
    delta: Class,
    dedup: Class,
    packings: [Packed; USUAL.len()],
    packing: Rest,
    /// The packing that was measured last.
    anchor: Option<usize>,
    /// Frames sent raw only to see whether the link is faster than it was.
    raw: Rest,
    /// Time that encoding took, and processor time of it.
    time: Recent,
    cpu: Recent,
    /// Processor time of pages, and what it would have been on a usual machine.
    spent: Recent,
    usual: Recent,
    /// By [`combination`].
    costs: [Cost; COMBINATIONS],
    /// Seconds of processor time of sending, and bytes.
    send: Recent,
    /// Pages of the rounds before of which copies were kept, and all.
    kept: u64,
    seen: u64,
}

impl Work {
    pub(super) fn new() -> Self {
        Self {
            frame: 0,
            rle: Class::new(Gain { hits: 0.5, bytes: 64.0 }),
            delta: Class::new(Gain { hits: 0.0, bytes: 400.0 }),
            dedup: Class::new(Gain { hits: 0.05, bytes: 8.0 }),
            packings: [Packed::default(); USUAL.len()],
            packing: Rest::NEVER,
            anchor: None,
            raw: Rest { fresh: false, ..Rest::NEVER },
            time: Recent::default(),
            cpu: Recent::default(),
            spent: Recent::default(),
            usual: Recent::default(),
            costs: [Cost::default(); COMBINATIONS],
            send: Recent::default(),
            kept: 0,
            seen: 0,
        }
    }

    /// Begins a round. After the first one there is something to compare pages with.
    pub(super) fn begin_round(&mut self, round: u32) {
        if round == 2 {
            let kept = real(self.kept) / real(self.seen.max(1));
            let on = self.delta.rest.on;
            self.delta = Class::new(Gain { hits: kept / 2.0, ..self.delta.usual });
            self.delta.rest.on = on;
        }
    }

    /// Begins a frame.
    pub(super) fn frame(&mut self) {
        self.frame += 1;
    }

    /// Notes which codecs are on from now on.
    pub(super) fn changed(&mut self, codecs: &Codecs) {
        let frame = self.frame;
        self.rle.rest.turn(codecs.rle, frame);
        self.delta.rest.turn(codecs.delta, frame);
        self.dedup.rest.turn(codecs.dedup, frame);
        self.packing.turn(codecs.packing != Packing::Stored, frame);
    }

    /// Whether a codec that is on is not measured yet.
    pub(super) fn is_trial(&self) -> bool {
        [self.rle.rest, self.delta.rest, self.dedup.rest, self.packing].iter().any(|rest| rest.on && rest.fresh)
    }

    /// Whether to send a frame unpacked, only to see whether the link takes it. It is asked ever more rarely.
    pub(super) fn try_raw(&mut self) -> bool {
        let due = self.frame >= self.raw.since + self.raw.length;
        if due {
            self.raw = Rest { since: self.frame, length: (self.raw.length * 2).min(LONGEST_REST), ..self.raw };
        }
        due
    }

    /// Adds what a frame cost and gained.
    pub(super) fn note(&mut self, codecs: &Codecs, measured: &Measured, round: u32) {
        let pages = &measured.pages;
        let all = pages.all() - pages.zero;
        if round <= 1 {
            self.seen += all;
            self.kept += if codecs.delta { all } else { 0 };
        }
        let mut rest = all;
        let mut usual = real(pages.all()) * SCAN;
        if codecs.rle || codecs.delta || codecs.dedup || codecs.packing != Packing::Stored {
            usual += real(rest) * COPY;
        }
        if codecs.delta {
            usual += real(rest) * DELTA;
            // In the first round there is nothing to compare with.
            let tried = if round > 1 { rest } else { 0 };
            self.delta.note(tried, pages.delta + pages.same, measured.delta_bytes);
            self.delta.rest.fresh &= round > 1;
            rest = rest.saturating_sub(pages.delta + pages.same);
        }
        if codecs.rle {
            usual += real(rest) * RLE;
            rest = self.rle.note(rest, pages.rle, measured.rle_bytes);
        }
        if codecs.dedup {
            usual += real(rest) * DEDUP;
            self.dedup.note(rest, pages.copy, pages.copy * 8);
        }
        usual += real(pages.plain) * PLAIN;
        if all * 2 > pages.all() {
            // Now and then a frame pays for memory that those after it use: this is to be a long average.
            let weight = real(pages.all()) / 8.0;
            self.spent.add(measured.pages_cpu.as_secs_f64(), weight);
            self.usual.add(usual, weight);
            let cost = &mut self.costs[combination(codecs)];
            if self.frame > cost.at + STALE {
                cost.page = Recent::default();
            }
            cost.page.add(measured.pages_cpu.as_secs_f64(), real(all));
            cost.at = self.frame;
        }
        let weight = real(pages.all() - pages.zero);
        self.time.add(measured.between.as_secs_f64(), weight);
        self.cpu.add((measured.pages_cpu + measured.pack_cpu).as_secs_f64(), weight);
        self.send.add(measured.send_cpu.as_secs_f64(), real(measured.bytes));
        self.note_packing(codecs.packing, measured);
    }

    fn note_packing(&mut self, packing: Packing, measured: &Measured) {
        let Some(index) = USUAL.iter().position(|(of, ..)| *of == packing) else { return };
        if measured.block == 0 {
            return;
        }
        let doubt = if self.anchor.is_none() { BENEFIT_OF_DOUBT.0 } else { BENEFIT_OF_DOUBT.1 };
        if std::mem::take(&mut self.packing.fresh) {
            (self.packings, self.anchor) = ([Packed::default(); USUAL.len()], None);
        }
        if self.measured(index).is_none() {
            // It may pack smaller than the one before, but that is to be seen.
            let left = self.anchor.and_then(|anchor| self.measured(anchor)).map(|(_, left)| left);
            let (cost, expected) = self.expected(index);
            let left = left.unwrap_or(expected);
            self.packings[index] = Packed::default();
            self.packings[index].seconds.add(cost * doubt, doubt);
            self.packings[index].bytes.add(left * doubt, doubt);
        }
        let (packed, weight) = (&mut self.packings[index], real(measured.block) / PAGE);
        packed.seconds.add(measured.pack_cpu.as_secs_f64() / PAGE, weight);
        packed.bytes.add(real(measured.packed) / PAGE, weight);
        packed.at = self.frame;
        self.anchor = Some(index);
    }
}

impl Work {
    pub(super) fn rle(&self) -> Gain {
        self.rle.gain(self.frame)
    }

    pub(super) fn delta(&self) -> Gain {
        self.delta.gain(self.frame)
    }

    pub(super) fn dedup(&self) -> Gain {
        self.dedup.gain(self.frame)
    }

    /// Seconds to pack a byte, and what it leaves of it.
    pub(super) fn packing(&self, packing: Packing) -> (f64, f64) {
        let Some(index) = USUAL.iter().position(|(of, ..)| *of == packing) else { return (0.0, 1.0) };
        if self.anchor.is_none() || !self.packing.believed(self.frame) {
            let (_, cost, left) = USUAL[index];
            return if index < FIRST_TRIED { (cost, left) } else { (NEVER, left) };
        }
        self.measured(index).unwrap_or_else(|| self.expected(index))
    }

    /// What a packing cost and left lately.
    fn measured(&self, index: usize) -> Option<(f64, f64)> {
        let Packed { seconds, bytes, at } = self.packings[index];
        (self.frame <= at + STALE).then_some(seconds.mean()?).zip(bytes.mean())
    }

    /// What a packing may cost and leave, by the one that was measured last.
    fn expected(&self, index: usize) -> (f64, f64) {
        let (_, usual_cost, usual_left) = USUAL[index];
        let last = self.anchor.and_then(|anchor| Some((USUAL[anchor], self.measured(anchor)?)));
        last.map_or((usual_cost, usual_left), |((_, its_cost, its_left), (cost, left))| {
            let gained = (1.0 - left) * (1.0 - usual_left) / (1.0 - its_left);
            (usual_cost * cost / its_cost, (1.0 - gained).clamp(0.01, 1.0))
        })
    }

    /// Seconds of processor time for a page that is not zero, up to what no codec takes, which is the rest: each page, and
    /// that share of them that comes as far as the codec.
    pub(super) fn page_cost(&self, codecs: &Codecs, to_rle: f64, to_dedup: f64, plain: f64) -> f64 {
        let encodes = codecs.rle || !codecs.leave_raw();
        let when = |on: bool, cost: f64| if on { cost } else { 0.0 };
        let usual = SCAN
            + when(encodes, COPY)
            + when(codecs.delta, DELTA)
            + when(codecs.dedup, to_dedup * DEDUP)
            + when(codecs.rle, to_rle * RLE)
            + when(!codecs.leave_raw(), plain * PLAIN);
        let expected = usual * self.pace();
        let bits = combination(codecs);
        let lately = |part: usize| {
            let Cost { page, at } = self.costs[part];
            page.mean().filter(|_| self.frame <= at + STALE)
        };
        // What some of the codecs cost is a guess at what more of them do, and no more than that: one may spare another work.
        let parts = || (0..COMBINATIONS).filter(|part| part & bits == *part).filter_map(lately);
        let cost = lately(bits).or_else(|| parts().max_by(f64::total_cmp));
        cost.filter(|cost| *cost > expected * FAR_OFF).unwrap_or(expected)
    }

    /// How long this machine takes for what takes a usual one a second.
    fn pace(&self) -> f64 {
        self.spent.mean().zip(self.usual.mean()).map_or(1.0, |(spent, usual)| (spent / usual).clamp(PACE.0, PACE.1))
    }

    /// How long a second of encoding takes on a host with other work.
    pub(super) fn crowding(&self) -> f64 {
        self.time
            .mean()
            .zip(self.cpu.mean().filter(|cpu| *cpu > 0.0))
            .map_or(1.0, |(time, cpu)| (time / cpu).clamp(1.0, CROWDED))
    }

    /// Seconds of processor time to send a byte.
    pub(super) fn send_cost(&self) -> f64 {
        self.send.mean().filter(|cost| *cost > 0.0).unwrap_or(SEND)
    }

    /// The same with packing as it usually is.
    pub(super) fn with_usual_packing(&self) -> Self {
        Self { anchor: None, ..self.clone() }
    }
}

#[expect(clippy::cast_precision_loss, reason = "53 bits are precise enough for an average")]
pub(super) fn real(count: u64) -> f64 {
    count as f64
}
