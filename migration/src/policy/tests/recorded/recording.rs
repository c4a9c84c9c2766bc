//! One recording: what became of each frame of a migration that really took place, as the log of the source has it.
//!
//! Lines that begin with `#` say what it is of, one `key: value` each; every key is there once, in this order. Every other
//! line is a frame: its round, its codecs, and what was measured of it, in the order of [`Measured`]. Anything else is a
//! mistake.

use super::super::super::{Measured, Terms, work};
use crate::codec::Codecs;
use crate::codec::block::{Packing, ZstdLevel};
use crate::counts::PageCounts;
use std::str::FromStr;
use std::time::Duration;

const HEADER: [&str; 6] = ["machine", "date", "link", "guest", "options", "processors, budget, same host"];

#[derive(Debug, Clone)]
pub(super) struct Recording {
    pub(super) terms: Terms,
    pub(super) frames: Vec<Frame>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Frame {
    pub(super) round: u32,
    pub(super) codecs: Codecs,
    pub(super) measured: Measured,
}

impl Frame {
    /// Pages that are not zero.
    pub(super) fn pages(&self) -> u64 {
        self.measured.pages.all() - self.measured.pages.zero
    }

    /// What so many of them took, if that is fewer.
    pub(super) fn cut(mut self, most: u64) -> Self {
        let (pages, whole) = (self.pages().min(most), self.pages());
        let part = |count: &mut u64| *count = *count * pages / whole;
        let Measured { pages: counts, rle_bytes, delta_bytes, block, packed, bytes, .. } = &mut self.measured;
        let PageCounts { raw, zero: _, plain, rle, delta, copy, kept: _, same } = counts;
        [raw, plain, rle, delta, copy, same, rle_bytes, delta_bytes, block, packed, bytes].into_iter().for_each(part);
        let Measured { pages_cpu, pack_cpu, send_cpu, send, between, queued_last, queued_after, .. } =
            &mut self.measured;
        let share = work::real(pages) / work::real(whole);
        for time in [pages_cpu, pack_cpu, send_cpu, send, between] {
            *time = time.mul_f64(share);
        }
        // As much more or less is under way as these pages make of the whole difference.
        *queued_after = (*queued_last * (whole - pages) + *queued_after * pages) / whole;
        self
    }

    pub(super) fn seconds(&self) -> f64 {
        (self.measured.between + self.measured.send).as_secs_f64()
    }

    pub(super) fn cpu(&self) -> f64 {
        (self.measured.pages_cpu + self.measured.pack_cpu).as_secs_f64()
    }
}

impl Recording {
    pub(super) fn read(text: &str) -> Self {
        let mut lines = text.lines();
        let mut values = HEADER.map(|key| {
            let line = lines.next().and_then(|line| line.strip_prefix("# "));
            let value = line.and_then(|line| line.strip_prefix(key)?.strip_prefix(": "));
            value.unwrap_or_else(|| panic!("no line of {key}"))
        });
        let [.., last] = &mut values;
        let mut words = last.split(' ');
        let (cpus, budget, same_host) = (next(&mut words), next(&mut words), next(&mut words));
        assert_eq!(words.next(), None, "{last}");
        let terms = Terms { cpus, budget, streams: 1, resends: true, same_host };
        Self { terms, frames: lines.map(frame).collect() }
    }

    /// The frames of the first round, in which every page goes once.
    pub(super) fn first_round(&self) -> impl Iterator<Item = &Frame> {
        self.frames.iter().take_while(|frame| frame.round == 1)
    }
}

fn next<'a, T: FromStr>(words: &mut impl Iterator<Item = &'a str>) -> T {
    let word = words.next().expect("a line is whole");
    word.parse().unwrap_or_else(|_| panic!("{word} is not what is expected here"))
}

fn time<'a>(words: &mut impl Iterator<Item = &'a str>) -> Duration {
    let word = words.next().expect("a line is whole");
    let (number, unit) =
        word.split_at(word.find(|c: char| c != '.' && !c.is_ascii_digit()).expect("a time has a unit"));
    let unit = match unit {
        "ns" => 1e-9,
        "µs" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        other => panic!("{other} is no unit"),
    };
    Duration::from_secs_f64(number.parse::<f64>().expect("a time is a number") * unit)
}

fn packing(word: &str) -> Packing {
    let level = || word.strip_prefix("Zstd(ZstdLevel(")?.strip_suffix("))")?.parse().ok().and_then(ZstdLevel::new);
    match word {
        "Stored" => Packing::Stored,
        "Lz4" => Packing::Lz4,
        other => Packing::Zstd(level().unwrap_or_else(|| panic!("{other} is no way to pack"))),
    }
}

fn frame(line: &str) -> Frame {
    let mut words = line.split(' ');
    let words = &mut words;
    let round = next(words);
    let (zero, rle, delta, dedup) = (next(words), next(words), next(words), next(words));
    let codecs = Codecs { zero, rle, delta, dedup, packing: packing(words.next().expect("a line is whole")) };
    let [raw, zero, plain, rle, delta, copy, same] = [(); 7].map(|()| next(words));
    let [rle_bytes, delta_bytes, block, packed] = [(); 4].map(|()| next(words));
    let [pages_cpu, pack_cpu, send_cpu, send, between] = [(); 5].map(|()| time(words));
    let [bytes, queued_last, queued_before, queued_after] = [(); 4].map(|()| next(words));
    let measured = Measured {
        pages: PageCounts { raw, zero, plain, rle, delta, copy, kept: 0, same },
        rle_bytes,
        delta_bytes,
        block,
        packed,
        pages_cpu,
        pack_cpu,
        send_cpu,
        send,
        between,
        bytes,
        queued_last,
        queued_before,
        queued_after,
        round_trip: time(words),
    };
    assert_eq!(words.next(), None, "{line}");
    Frame { round, codecs, measured }
}
