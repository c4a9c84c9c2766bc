//! The policy beside simulated guests and links. What LZ4, Zstandard at level 1 and the other codecs cost and gain there is
//! as it was measured on one core; the rates are those that links of these speeds showed.

use super::*;
use crate::codec::PageCode;

mod recorded;

const GIGABIT: f64 = 0.117e9;
const TEN_GIGABIT: f64 = 1.17e9;
const LOOPBACK: f64 = 2.4e9;

/// Pages of a frame.
const FULL: u32 = 256;

/// What a guest's pages are like.
#[derive(Debug, Clone, Copy)]
struct Content {
    /// The share of pages that are like another, that have changed little since they were sent, and that are of runs.
    twins: f64,
    partial: f64,
    runs: f64,
    /// How long it takes to look for an equal page.
    digest: f64,
    /// What LZ4 and Zstandard leave of the others, and how long each packs a byte.
    lz4: (f64, f64),
    zstd: (f64, f64),
}

const NOISE: Content =
    Content { twins: 0.0, partial: 0.0, runs: 0.0, digest: 0.9e-6, lz4: (1.0, 0.3e-9), zstd: (1.0, 0.9e-9) };
/// The beginning of a tar of libraries.
const TAR: Content = Content { lz4: (0.53, 2.2e-9), zstd: (0.42, 3.4e-9), ..NOISE };

/// A link as one stream sees it.
#[derive(Debug, Clone, Copy)]
struct Wire {
    bytes_per_second: f64,
    /// What the socket buffers.
    buffer: f64,
    /// How long the other end takes for each page, however it comes.
    page: f64,
}

fn wire(bytes_per_second: f64) -> Wire {
    Wire { bytes_per_second, buffer: 2e6, page: 0.0 }
}

/// A migration of endless rounds.
struct Scene {
    policy: Policy,
    round: u32,
    queued: f64,
    kept: bool,
    last: f64,
    cpu: f64,
    time: f64,
    pages: u64,
}

fn terms() -> Terms {
    Terms { cpus: 2.0, budget: 2.0, streams: 1, resends: true, same_host: false }
}

fn scene(terms: Terms) -> Scene {
    let mut policy = Policy::new(terms);
    policy.begin_round(1);
    Scene { policy, round: 1, queued: 0.0, kept: false, last: 0.0, cpu: 0.0, time: 0.0, pages: 0 }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a simulated count")]
fn whole(count: f64) -> u64 {
    count.round() as u64
}

fn time(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

impl Scene {
    fn next_round(&mut self) {
        self.round += 1;
        self.policy.begin_round(self.round);
    }

    /// Sends frames; the last one's choice.
    fn send(&mut self, frames: u32, content: Content, wire: Wire) -> Codecs {
        let mut last = Codecs::NONE;
        for _ in 0..frames {
            last = self.frame(content, wire);
        }
        last
    }

    fn frame(&mut self, content: Content, wire: Wire) -> Codecs {
        let Choice { codecs, pages } = self.policy.choose();
        let count = f64::from(pages.unwrap_or(FULL));
        let encodes = codecs.rle || !codecs.leave_raw();
        let mut page_cpu = 0.1e-6 + if encodes { 0.35e-6 } else { 0.0 };
        let (mut rest, mut counts, mut block) = (count, PageCounts::default(), 0.0);
        let mut take = |share: f64, cost: f64, bytes: f64, code: PageCode| {
            page_cpu += cost * rest / count;
            let taken = (rest * share).round();
            rest -= taken;
            block += taken * bytes;
            counts.add(code, whole(taken));
            whole(taken * bytes)
        };
        let (mut delta_bytes, mut rle_bytes) = (0, 0);
        if codecs.delta {
            let share = if self.round > 1 && self.kept { content.partial } else { 0.0 };
            delta_bytes = take(share, 0.9e-6, 400.0, PageCode::Delta);
        }
        if codecs.rle {
            rle_bytes = take(content.runs, 0.45e-6, 64.0, PageCode::Rle);
        }
        if codecs.dedup {
            take(content.twins, content.digest, 8.0, PageCode::Copy);
        }
        let raw = codecs.leave_raw();
        counts.add(if raw { PageCode::Raw } else { PageCode::Plain }, whole(rest));
        if !raw {
            page_cpu += 0.6e-6 * rest / count;
            block += rest * 4096.0;
        }
        let (left, pack) = match codecs.packing {
            Packing::Stored => (1.0, 0.0),
            Packing::Lz4 => content.lz4,
            // Each level packs somewhat smaller, for more time.
            Packing::Zstd(level) => {
                let more = f64::from(level.number() - 1);
                (content.zstd.0 * 0.98_f64.powf(more), content.zstd.1 * (1.0 + 0.7 * more))
            }
        };
        let bytes = block * left + if raw { rest * 4096.0 } else { 0.0 } + 64.0;
        let (pages_cpu, pack_cpu, send_cpu) = (page_cpu * count, pack * block, bytes * 0.25e-9);
        let encode = pages_cpu + pack_cpu;
        // The other end may take as long for a frame as for its pages.
        let rate = wire.bytes_per_second.min(if wire.page > 0.0 { bytes / (wire.page * count) } else { f64::INFINITY });
        let queued_last = self.queued;
        self.queued = (self.queued - rate * encode).max(0.0);
        let queued_before = self.queued;
        let send = send_cpu.max((self.queued + bytes - wire.buffer) / rate);
        self.queued = (self.queued + bytes - rate * send).clamp(0.0, wire.buffer);
        let measured = Measured {
            pages: counts,
            rle_bytes,
            delta_bytes,
            block: whole(block),
            packed: whole(block * left),
            pages_cpu: time(pages_cpu),
            pack_cpu: time(pack_cpu),
            send_cpu: time(send_cpu),
            send: time(send),
            between: time(encode),
            bytes: whole(bytes),
            queued_last: whole(queued_last),
            queued_before: whole(queued_before),
            queued_after: whole(self.queued),
            round_trip: Duration::from_micros(50),
        };
        self.policy.note(&codecs, &measured);
        self.kept |= codecs.delta;
        (self.cpu, self.time) = (self.cpu + encode, self.time + encode + send);
        (self.last, self.pages) = (bytes / count, self.pages + whole(count));
        codecs
    }

    /// Seconds for a page since the last time that somebody asked.
    fn pace(&mut self) -> f64 {
        let pace = self.time / work::real(self.pages);
        (self.time, self.cpu, self.pages) = (0.0, 0.0, 0);
        pace
    }

    fn why(&self) -> Why {
        self.policy.chosen().why
    }
}

fn packs(codecs: Codecs) -> bool {
    codecs.packing != Packing::Stored
}

#[test]
fn a_slow_link_packs_after_few_frames() {
    let mut scene = scene(terms());
    scene.send(6, TAR, wire(GIGABIT));
    let codecs = scene.send(200, TAR, wire(GIGABIT));
    assert!(matches!(codecs.packing, Packing::Zstd(_)), "{codecs:?}");
    assert_eq!(scene.why(), Why::SlowLink);
    let raw = 4096.0 / GIGABIT;
    let pace = scene.pace();
    assert!(pace < raw * 0.5, "{pace} of {raw}");
}

/// No codec is slower on a slower link, and the slowest ones are worth their time.
#[test]
fn the_slower_the_link_the_smaller_the_pages() {
    let mut before = f64::INFINITY;
    for rate in [LOOPBACK, TEN_GIGABIT, GIGABIT, GIGABIT / 10.0, GIGABIT / 100.0] {
        let mut scene = scene(terms());
        let codecs = scene.send(300, TAR, wire(rate));
        assert!(scene.last <= before, "{} bytes at {rate}, {before} before: {codecs:?} {}", scene.last, scene.why());
        before = scene.last;
    }
    assert!(before < 4096.0 * 0.41, "{before}: a high level at the end");
}

#[test]
fn a_fast_link_takes_raw_pages_at_no_cost() {
    for (rate, content) in [(LOOPBACK, TAR), (TEN_GIGABIT, TAR), (LOOPBACK, NOISE), (TEN_GIGABIT, NOISE)] {
        let mut scene = scene(terms());
        assert_eq!(scene.send(1000, content, wire(rate)), Codecs::ZERO, "{rate} {content:?}");
        assert_eq!(scene.why(), Why::FastLink);
        let (raw, pace) = ((4096.0 / rate).max(4096.0 * 0.25e-9 + 0.1e-6), scene.pace());
        assert!(pace < raw * 1.02, "{pace} instead of {raw}");
    }
}

#[test]
fn one_host_begins_raw() {
    let mut scene = scene(Terms { same_host: true, ..terms() });
    assert_eq!(scene.frame(TAR, wire(LOOPBACK)), Codecs::ZERO);
}

#[test]
fn a_link_that_changes_changes_its_mind() {
    let mut scene = scene(terms());
    assert!(!packs(scene.send(500, TAR, wire(TEN_GIGABIT))));
    assert!(packs(scene.send(60, TAR, wire(GIGABIT))), "slow from now on");
    assert!(!packs(scene.send(300, TAR, wire(TEN_GIGABIT))), "fast again");
    assert!(packs(scene.send(60, TAR, wire(GIGABIT / 4.0))), "slow again");
    assert!(packs(scene.send(300, TAR, wire(GIGABIT))), "not so slow, but slow");
}

#[test]
fn what_does_not_pack_is_tried_ever_more_rarely() {
    let mut scene = scene(terms());
    let mut tried = Vec::new();
    for frame in 0..3000 {
        if packs(scene.frame(NOISE, wire(GIGABIT))) {
            tried.push(frame);
        }
    }
    assert!(tried.len() < 500, "{} of 3000 frames are packed", tried.len());
    let rests: Vec<_> = tried.windows(2).map(|pair| pair[1] - pair[0]).filter(|rest| *rest > 3).collect();
    assert!(rests.len() > 2 && rests.is_sorted(), "{rests:?}");
    assert_eq!(scene.why(), Why::NothingGained);
    assert!(packs(scene.send(1100, TAR, wire(GIGABIT))), "other pages are found out");
}

#[test]
fn twins_are_found() {
    let mut scene = scene(terms());
    let twins = Content { twins: 15.0 / 16.0, ..NOISE };
    assert!((0..200).all(|_| scene.frame(twins, wire(GIGABIT)).dedup));
    assert!(scene.last < 4096.0 / 14.0, "{} bytes a page", scene.last);
}

/// An emulated processor digests a page in a millisecond, and does all else not much more slowly than others.
#[test]
fn what_a_processor_is_slow_at_is_left_out() {
    for content in [NOISE, TAR, Content { partial: 0.5, runs: 0.3, ..NOISE }] {
        let (mut scene, slow) = (scene(terms()), Content { digest: 900e-6, ..content });
        let mut looked_for = 0;
        for _ in 0..4 {
            looked_for += (0..300).filter(|_| scene.frame(slow, wire(GIGABIT / 10.0)).dedup).count();
            scene.next_round();
        }
        assert!(looked_for <= 24, "in {looked_for} of 1200 frames, of {content:?}");
    }
}

/// What frames cost that go into a block says nothing of those that do not.
#[test]
fn raw_pages_are_not_dear_after_packed_ones() {
    let mut scene = scene(terms());
    assert!(packs(scene.send(100, TAR, wire(GIGABIT))));
    let work = &scene.policy.work;
    let [raw, packed] = [Codecs::ZERO, scene.policy.current.0].map(|codecs| work.page_cost(&codecs, 1.0, 1.0, 1.0));
    assert!(raw < 0.3e-6 && packed > 3.0 * raw, "{raw} and {packed}");
}

#[test]
fn runs_are_found_on_any_link() {
    for rate in [GIGABIT, LOOPBACK] {
        let mut scene = scene(Terms { same_host: rate >= LOOPBACK, ..terms() });
        let codecs = scene.send(300, Content { runs: 0.9, ..NOISE }, wire(rate));
        assert!(codecs.rle, "{rate}: {codecs:?}");
    }
}

#[test]
fn partial_updates_are_sent_as_changes_where_copies_were_worth_keeping() {
    let partial = Content { partial: 0.95, ..NOISE };
    let mut slow = scene(terms());
    assert!(slow.send(200, partial, wire(GIGABIT)).delta, "copies are kept from the beginning");
    slow.next_round();
    assert!(slow.send(50, partial, wire(GIGABIT)).delta && slow.last < 1000.0, "{} bytes a page", slow.last);
    let mut fast = scene(terms());
    assert!(!fast.send(200, partial, wire(LOOPBACK)).delta);
    fast.next_round();
    assert!(!fast.send(200, partial, wire(LOOPBACK)).delta);
    let mut stopped = scene(Terms { resends: false, ..terms() });
    assert!(!stopped.send(200, partial, wire(GIGABIT)).delta, "no page is sent twice");
}

#[test]
fn encoding_keeps_to_its_budget() {
    for (budget, zstd) in [(0.1, false), (0.2, false), (1.0, true)] {
        let mut scene = scene(Terms { budget, ..terms() });
        let codecs = scene.send(600, TAR, wire(GIGABIT));
        assert_eq!(matches!(codecs.packing, Packing::Zstd(_)), zstd, "{budget}: {codecs:?}");
        assert_eq!(scene.why() == Why::Budget, !zstd, "{budget}");
        assert!(scene.cpu < scene.time * budget + 2.0 * OVERDRAFT, "{} in {} for {budget}", scene.cpu, scene.time);
    }
}

/// What the estimates get wrong the account of what was spent gets right.
#[test]
fn a_budget_is_kept_on_average_whatever_the_estimates() {
    let mut policy = Policy::new(Terms { budget: 0.1, ..terms() });
    policy.begin_round(1);
    let slow = Measured {
        pages: PageCounts { plain: 256, ..PageCounts::default() },
        pages_cpu: Duration::from_millis(100),
        send: Duration::from_millis(9),
        bytes: 1 << 20,
        ..Measured::default()
    };
    let codecs = policy.choose().codecs;
    policy.note(&codecs, &slow);
    assert_eq!((policy.choose().codecs, policy.current.1), (Codecs::ZERO, Why::Budget));
    let cheap = Measured { pages_cpu: Duration::ZERO, send: Duration::from_secs(1), ..slow };
    policy.note(&Codecs::ZERO, &cheap);
    assert_ne!(policy.choose().codecs, Codecs::ZERO, "it has saved enough since");
}

/// Where the other end cannot install pages any faster, fewer bytes a page help nobody, and look like a slower link.
#[test]
fn a_slow_target_is_not_taken_for_a_slow_link() {
    let mut scene = scene(terms());
    let target = Wire { page: 12e-6, ..wire(LOOPBACK) };
    scene.send(300, TAR, target);
    scene.pace();
    let packed: u32 = (0..1000).map(|_| u32::from(packs(scene.frame(TAR, target)))).sum();
    assert!(packed < 200, "{packed} of 1000 frames were packed in vain");
    assert!(scene.pace() < 12.5e-6);
    assert!(packs(scene.send(100, TAR, wire(GIGABIT / 2.0))), "a slow link is one still");
}

#[test]
fn streams_share_one_policy() {
    // Four streams on a link of 1 Gbit/s, with a processor each.
    let mut four = scene(Terms { cpus: 4.0, budget: 4.0, streams: 4, ..terms() });
    assert!(packs(four.send(200, TAR, wire(GIGABIT / 4.0))));
    let rate = four.policy.chosen().link_bytes_per_second.unwrap();
    assert!((0.9 * GIGABIT..1.2 * GIGABIT).contains(&rate), "{rate}");
    // On one processor they are not faster than one stream.
    let mut crowded = scene(Terms { cpus: 1.0, budget: 1.0, streams: 4, ..terms() });
    let codecs = crowded.send(200, TAR, wire(TEN_GIGABIT / 8.0));
    assert!(!matches!(codecs.packing, Packing::Zstd(_)), "{codecs:?}");
}

#[test]
fn a_round_tells_what_most_pages_went_by() {
    let mut scene = scene(terms());
    scene.send(100, NOISE, wire(GIGABIT));
    scene.next_round();
    scene.send(300, TAR, wire(GIGABIT));
    let Chosen { codecs, why, link_bytes_per_second } = scene.policy.chosen();
    assert!(packs(codecs) && why == Why::SlowLink, "{codecs:?} {why}");
    assert!(link_bytes_per_second.is_some_and(|rate| (0.9 * GIGABIT..1.2 * GIGABIT).contains(&rate)));
}
