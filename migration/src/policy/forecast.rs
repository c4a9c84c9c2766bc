//! What the next pages would take with certain codecs, for [`Policy`](super::Policy).
//!
//! A stream either encodes a frame or sends it, and the link works while either goes on, as long as it has bytes: those of
//! the frames before, which the socket buffers. So a frame takes the time to encode it and then, while the link takes what
//! it did not take meanwhile, at least as long as the kernel is busy sending it:
//!
//! ```text
//! encode ────────────► send ─────────────►        frame = encode + max(bytes · kernel, bytes / rate − covered)
//! link:  buffered ──►  (idle)  this frame ───►    covered = min(encode, buffered / rate)
//! ```

use super::link::LinkRate;
use super::work::{PAGE, Work};
use super::{CHANCE, CPU_PRICE, Terms};
use crate::codec::Codecs;
use crate::codec::block::{MAX_BLOCK, Packing};

/// Bytes of a record, as a page that goes in another way than its neighbours needs one.
const RECORD: f64 = 16.0;

/// What pages would take that are not zero, for each of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Forecast {
    /// Bytes on the link.
    pub(super) bytes: f64,
    /// Seconds of processor time to encode it.
    pub(super) encode: f64,
    /// Seconds, corrected by what speaks for or against the codecs beside time; less is better.
    pub(super) score: f64,
    /// Whether the processor time stays within the budget.
    pub(super) fits: bool,
}

/// Foretells what pages take, where the link's rate is known.
pub(super) fn forecast(codecs: &Codecs, work: &Work, link: &LinkRate, terms: &Terms) -> Forecast {
    let none = Default::default();
    let delta = if codecs.delta { work.delta() } else { none };
    let dedup = if codecs.dedup { work.dedup() } else { none };
    let rle = if codecs.rle { work.rle() } else { none };
    let to_rle = 1.0 - delta.hits;
    let to_dedup = to_rle * (1.0 - rle.hits);
    let rest = to_dedup * (1.0 - dedup.hits);
    let encoded = delta.hits * delta.bytes + to_dedup * dedup.hits * dedup.bytes + to_rle * rle.hits * rle.bytes;
    let records = (1.0 - rest) * RECORD;
    let (in_block, beside) = if codecs.leave_raw() { (encoded, rest * PAGE) } else { (encoded + rest * PAGE, 0.0) };
    let (pack_cost, left) = work.packing(codecs.packing);
    let bytes = in_block * left + beside + records;
    let encode = work.page_cost(codecs, to_rle, to_dedup, rest) + in_block * pack_cost;
    let (streams, cpu) = (f64::from(terms.streams), encode);
    let encode = encode * work.crowding();
    let seconds = match link.of(codecs.packing != Packing::Stored) {
        None => encode,
        Some(rate) => {
            let buffered = link.buffer() / (MAX_BLOCK as f64 / PAGE);
            let covered = encode.min(buffered / rate);
            encode + (bytes * work.send_cost()).max(bytes / rate - covered)
        }
    };
    // No more streams encode at once than there are processors.
    let seconds = seconds.max(cpu * streams / terms.cpus);
    // Runs are found whenever they come; the other two miss what they did not see before.
    let chances = f64::from(u8::from(codecs.rle) + 2 * (u8::from(codecs.dedup) + u8::from(codecs.delta)));
    Forecast {
        bytes,
        encode: cpu,
        score: seconds * (1.0 - CHANCE * chances) + CPU_PRICE * cpu,
        fits: cpu * streams <= terms.budget * seconds * 1.001,
    }
}
