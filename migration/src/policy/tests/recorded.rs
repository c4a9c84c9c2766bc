//! The policy beside migrations that really took place.
//!
//! Each file of `recorded/` is one of them: the frames that the log of its source tells of. They are used in two ways.
//! *Replayed*, the policy is told what became of each frame, whatever it would have chosen itself, and its estimates are
//! compared with the sums of the recording. In a [`Course`] it leads: all recordings of one guest over one link, each by
//! other codecs, lie side by side, and whichever codecs it chooses for the next pages, it is told what these pages really
//! took by them. So what its choices are worth is measured by what was the fastest there, not by an opinion.
//!
//! The recordings are of a source that walked memory from its beginning to its end, so that stretches which pack and others
//! which do not come one after the other. It is walked in many places at once now, and mixed: these are the harder case.
//!
//! A recording is made of the micro guest of the bench (`cargo xtask image micro`), whose memory holds the content as its
//! initrd, with both ends in network namespaces joined by a veth pair, which HTB shapes as `tests/src/bench/migrate/wire.rs`
//! has it:
//!
//! ```sh
//! ip netns exec a godwit run --log info,migration=trace --kernel micro.elf --initramfs CONTENT --memory 192M \
//!     --cmdline 'ws=0 tick=1' --api a.sock 2> a.log
//! ip netns exec b godwit receive tcp://198.18.0.2:4444 --api b.sock
//! godwit migrate --api a.sock --to tcp://198.18.0.2:4444 --max-downtime 20 --max-rounds 30 --streams 1 --codec ...
//! ```
//!
//! The guest that changes its pages has `over ws=128M rate=12000 pattern=patch tick=10` for its command line. A line of the
//! log is made one of a recording by
//!
//! ```sh
//! sed -nE 's/.* frame round=(.*) chosen=.*/\1/; T; s/[a-zA-Z_]+[:=]|Codecs|Measured|PageCounts|[{},]//g
//!     s/(\.[0-9]{2})[0-9]+/\1/g; s/ +/ /g; s/^ | $//g; p' a.log
//! ```

mod recording;

use super::super::*;
use super::packs;
use recording::{Frame, Recording};

macro_rules! recordings {
    ($($name:literal),+ $(,)?) => {
        [$(Recording::read(include_str!(concat!("recorded/", $name, ".txt")))),+]
    };
}

/// All recordings of a guest over a link, whose pages are taken in the same order.
struct Course {
    tracks: Vec<Track>,
    pages: u64,
}

/// One of them: its frames, and up to which page each goes.
struct Track {
    frames: Vec<(u64, Frame)>,
}

impl Track {
    /// The frames of the first round that have pages which are not zero, from a page on.
    fn new(recording: &Recording, from: u64) -> Self {
        let mut end = 0;
        let counted = recording.first_round().filter(|frame| frame.pages() > 0).map(|frame| {
            end += frame.pages();
            (end, *frame)
        });
        let frames = counted.filter(|(end, _)| *end > from).map(|(end, frame)| (end - from, frame)).collect();
        Self { frames }
    }

    fn codecs(&self) -> Codecs {
        self.frames.last().expect("there are frames").1.codecs
    }

    fn bytes_per_second(&self) -> f64 {
        let bytes: u64 = self.frames.iter().map(|(_, frame)| frame.measured.bytes).sum();
        work::real(bytes) / self.seconds()
    }

    fn seconds(&self) -> f64 {
        self.frames.iter().map(|(_, frame)| frame.seconds()).sum()
    }
}

impl Course {
    fn new(recordings: &[Recording]) -> Self {
        Self::from_page(recordings, 0)
    }

    /// Without the first pages of the guest.
    fn from_page(recordings: &[Recording], from: u64) -> Self {
        let tracks: Vec<_> = recordings.iter().map(|recording| Track::new(recording, from)).collect();
        let pages = tracks.iter().filter_map(|track| Some(track.frames.last()?.0)).min().expect("there are recordings");
        Self { tracks, pages }
    }

    /// The time of the fastest recording.
    fn best(&self) -> f64 {
        self.tracks.iter().map(Track::seconds).min_by(f64::total_cmp).expect("there are recordings")
    }

    /// What the pages at a place really took by the codecs that come closest to these.
    fn frame(&self, codecs: &Codecs, page: u64) -> Frame {
        let strength = |packing: Packing| PACKINGS.iter().position(|known| *known == packing).expect("all are known");
        let distance = |of: &Codecs| {
            let [rle, dedup] = [of.rle != codecs.rle, of.dedup != codecs.dedup].map(usize::from);
            10 * strength(of.packing).abs_diff(strength(codecs.packing)) + 2 * dedup + rle
        };
        let track = self.tracks.iter().min_by_key(|track| distance(&track.codecs())).expect("there are recordings");
        let (_, frame) = track.frames.iter().find(|(end, _)| *end > page).expect("the page is on the course");
        *frame
    }
}

/// A policy on its way along courses.
struct Walk {
    policy: Policy,
    page: u64,
    seconds: f64,
    cpu: f64,
}

impl Walk {
    fn begin(terms: Terms) -> Self {
        let mut policy = Policy::new(terms);
        policy.begin_round(1);
        Self { policy, page: 0, seconds: 0.0, cpu: 0.0 }
    }

    /// One frame, by the codecs of its choice. Behind the last page comes the first.
    fn step(&mut self, course: &Course) -> Codecs {
        let Choice { codecs, pages } = self.policy.choose();
        let frame = course.frame(&codecs, self.page).cut(pages.map_or(u64::MAX, u64::from));
        self.policy.note(&frame.codecs, &frame.measured);
        self.page = (self.page + frame.pages()) % course.pages;
        self.seconds += frame.seconds();
        self.cpu += frame.cpu();
        codecs
    }

    /// All pages once; the time of that.
    fn lap(&mut self, course: &Course) -> f64 {
        self.page %= course.pages;
        let (before, mut last) = (self.seconds, self.page);
        loop {
            self.step(course);
            if self.page < last {
                return self.seconds - before;
            }
            last = self.page;
        }
    }

    /// Goes on until a choice has held for [`HELD`] frames, which must be so within `most`.
    fn until(&mut self, course: &Course, most: u32, chosen: impl Fn(Codecs) -> bool) {
        self.page %= course.pages;
        let mut in_a_row = 0;
        for _ in 0..most {
            in_a_row = if chosen(self.step(course)) { in_a_row + 1 } else { 0 };
            if in_a_row == HELD {
                return;
            }
        }
        panic!("it was not chosen in {most} frames, but {:?}", self.policy.current);
    }
}

/// A choice for so many frames in a row is no trial.
const HELD: u32 = 8;

/// The page from which on the tar packs well.
const PACKS_WELL: u64 = 27_000;

fn gigabit_tar() -> Vec<Recording> {
    recordings!(
        "1gbit-tar-zero",
        "1gbit-tar-rd",
        "1gbit-tar-lz4",
        "1gbit-tar-rd-lz4",
        "1gbit-tar-zstd1",
        "1gbit-tar-rd-zstd1",
        "1gbit-tar-zstd3",
    )
    .into()
}

fn ten_gigabit_tar() -> Vec<Recording> {
    recordings!("10gbit-tar-zero", "10gbit-tar-rd", "10gbit-tar-lz4", "10gbit-tar-rd-lz4", "10gbit-tar-zstd1").into()
}

fn hundred_megabit_tar() -> Vec<Recording> {
    recordings!(
        "100mbit-tar-zero",
        "100mbit-tar-lz4",
        "100mbit-tar-rd-lz4",
        "100mbit-tar-zstd1",
        "100mbit-tar-rd-zstd1",
        "100mbit-tar-zstd3",
        "100mbit-tar-zstd6",
        "100mbit-tar-zstd9",
    )
    .into()
}

fn gigabit_random() -> Vec<Recording> {
    recordings!("1gbit-random-zero", "1gbit-random-rd", "1gbit-random-lz4", "1gbit-random-zstd1").into()
}

fn gigabit_twin() -> Vec<Recording> {
    recordings!("1gbit-twin-zero", "1gbit-twin-rd", "1gbit-twin-lz4", "1gbit-twin-rd-lz4").into()
}

fn gigabit_colour() -> Vec<Recording> {
    recordings!("1gbit-colour-zero", "1gbit-colour-rd", "1gbit-colour-lz4", "1gbit-colour-rd-lz4").into()
}

/// Tells a policy what became of the frames of a recording, and looks at it after each.
fn replay(recording: &Recording, mut look: impl FnMut(&mut Policy, &Frame, Codecs)) -> Policy {
    let (mut policy, mut round) = (Policy::new(recording.terms), 0);
    for frame in &recording.frames {
        if frame.round != round {
            round = frame.round;
            policy.begin_round(round);
        }
        let chosen = policy.choose().codecs;
        policy.note(&frame.codecs, &frame.measured);
        look(&mut policy, frame, chosen);
    }
    policy
}

/// No single codec that was recorded takes the whole guest to the other end much sooner than the policy's choices do; and
/// hardly sooner once it has seen the guest.
#[test]
fn it_chooses_what_really_ended_soonest() {
    // What a colour takes is less than what a busy machine adds now and then.
    let courses = [
        ("a tar over 10 Gbit/s", ten_gigabit_tar(), 1.10, 1.03),
        ("a tar over 1 Gbit/s", gigabit_tar(), 1.08, 1.06),
        ("a tar over 100 Mbit/s", hundred_megabit_tar(), 1.08, 1.05),
        ("random pages over 1 Gbit/s", gigabit_random(), 1.08, 1.02),
        ("twin pages over 1 Gbit/s", gigabit_twin(), 1.2, 1.2),
        ("colours over 1 Gbit/s", gigabit_colour(), 1.35, 1.35),
    ];
    for (name, recordings, at_first, later) in courses {
        let course = Course::new(&recordings);
        let mut walk = Walk::begin(recordings[0].terms);
        let [first, others @ ..] = [(); 4].map(|()| walk.lap(&course) / course.best());
        assert!(first < at_first, "{name}: {first} times what the fastest took");
        // Later laps differ by which frames are spent on trials.
        let mean = others.iter().sum::<f64>() / 3.0;
        assert!(mean < later, "{name}: {others:?} times what the fastest took, with {:?}", walk.policy.current);
    }
}

#[test]
fn it_changes_its_mind_when_the_link_changes() {
    let slow = Course::from_page(&gigabit_tar(), PACKS_WELL);
    let fast = Course::from_page(&ten_gigabit_tar(), PACKS_WELL);
    let mut walk = Walk::begin(gigabit_tar()[0].terms);
    for _ in 0..3 {
        walk.until(&slow, 50, packs);
        walk.lap(&slow);
        walk.until(&fast, 60, |codecs| !packs(codecs));
        walk.lap(&fast);
    }
}

#[test]
fn a_budget_is_kept() {
    let mut before = f64::INFINITY;
    for budget in [0.05, 0.1, 0.2, 0.5] {
        let course = Course::new(&gigabit_tar());
        let mut walk = Walk::begin(Terms { budget, ..gigabit_tar()[0].terms });
        let seconds = [(); 4].map(|()| walk.lap(&course)).iter().sum();
        assert!(walk.cpu < budget * seconds + 0.1, "{} in {seconds} for {budget}", walk.cpu);
        assert!(seconds < before * 1.02, "{seconds} with {budget}, {before} with less");
        before = seconds;
    }
}

/// A link takes no less than what went over it in all, and no more than what raw pages were sent at: where packing keeps it
/// waiting the policy must not take it for a much faster one.
#[test]
fn the_rate_of_a_link_is_that_of_the_recording() {
    for recordings in [gigabit_tar(), gigabit_random(), hundred_megabit_tar()] {
        let raw = Track::new(&recordings[0], 0).bytes_per_second();
        for recording in &recordings {
            let track = Track::new(recording, 0);
            let mut rates = Vec::new();
            replay(recording, |policy, frame, _| {
                rates.extend(policy.link.of(packs(frame.codecs)).filter(|_| frame.round == 1));
            });
            rates.sort_by(f64::total_cmp);
            let (low, middle, high) = (rates[rates.len() / 10], rates[rates.len() / 2], rates[rates.len() * 9 / 10]);
            let (codecs, least) = (track.codecs(), track.bytes_per_second());
            assert!((least * 0.95..raw * 1.08).contains(&middle), "{codecs:?}: {middle}, {least} to {raw}");
            assert!(low > least * 0.85 && high < raw * 1.5, "{codecs:?}: {low} to {high}, {least} to {raw}");
        }
    }
}

/// What a codec cost and gained on the last pages is what the policy takes it to cost and gain.
#[test]
fn cost_and_gain_of_codecs_are_those_of_the_recording() {
    let near = |estimate: f64, really: f64, what: &str| {
        assert!((estimate / really - 1.0).abs() < 0.2, "{what}: {estimate} instead of {really}");
    };
    let sums = |recording: &Recording, of: fn(&Measured) -> f64, by: fn(&Measured) -> f64| {
        let frames: Vec<_> = recording.first_round().collect();
        let last = frames[frames.len() - 16..].iter().map(|frame| frame.measured);
        let (of, by) = last.fold((0.0, 0.0), |sums, measured| (sums.0 + of(&measured), sums.1 + by(&measured)));
        of / by
    };
    for recording in [gigabit_tar(), gigabit_random(), hundred_megabit_tar()].concat() {
        let packing = recording.frames[0].codecs.packing;
        if packing == Packing::Stored {
            continue;
        }
        let first_round = Recording { frames: recording.first_round().copied().collect(), ..recording.clone() };
        let (cost, left) = replay(&first_round, |_, _, _| {}).work.packing(packing);
        near(cost, sums(&recording, |of| of.pack_cpu.as_secs_f64(), |of| work::real(of.block)), "seconds a byte");
        near(left, sums(&recording, |of| work::real(of.packed), |of| work::real(of.block)), "left of a byte");
    }
    let [twin, colour] = [&gigabit_twin()[1], &gigabit_colour()[1]].map(|recording| replay(recording, |_, _, _| {}));
    let pages = |of: &Measured| work::real(of.pages.all());
    near(
        twin.work.dedup().hits,
        sums(&gigabit_twin()[1], |of| work::real(of.pages.copy), pages),
        "pages that are like others",
    );
    near(colour.work.rle().hits, sums(&gigabit_colour()[1], |of| work::real(of.pages.rle), pages), "pages of runs");
}

/// In this migration the rate of packed frames was measured while the link stood still for a moment. The policy of that time
/// held packing for useless from then on, though the best was still to come.
#[test]
fn a_bad_moment_is_not_believed_for_long() {
    let [recording] = recordings!("1gbit-tar-auto");
    let (mut raw_in_a_row, mut most) = (0, 0);
    replay(&recording, |_, _, chosen| {
        raw_in_a_row = if packs(chosen) { 0 } else { raw_in_a_row + 1 };
        most = raw_in_a_row.max(most);
    });
    assert!(most < 25, "packing was not tried for {most} frames, on a link that is slower than packing");
}

#[test]
fn changes_are_sent_as_changes_in_later_rounds() {
    let [recording] = recordings!("1gbit-partial-auto");
    let (mut chosen, mut hits, mut pages) = (0, 0, 0);
    let policy = replay(&recording, |_, frame, codecs| {
        if frame.round > 1 {
            chosen += if codecs.delta { frame.pages() } else { 0 };
            (hits, pages) = (hits + frame.measured.pages.delta + frame.measured.pages.same, pages + frame.pages());
        }
    });
    let (estimate, really) = (policy.work.delta().hits, work::real(hits) / work::real(pages));
    assert!((estimate - really).abs() < 0.1, "{estimate} instead of {really}");
    assert!(chosen * 10 > pages * 9, "changes were looked for in {chosen} of {pages} pages");
}
