//! How much time is taken from each vCPU of a guest that dirties its memory too fast: pure functions.
//!
//! The guest as a whole is slowed down step by step. Where the host tells how much each vCPU writes, those that write the
//! most are slowed down to a common pace and the others are left alone; else all lose the same share.

use serde::{Deserialize, Serialize};

/// The largest share of its time that a vCPU loses. It must get some, or the guest would be paused under another name.
pub const MOST_SHARE: f64 = 0.99;

/// What a step leaves of the guest's pace.
const STEP: f64 = 0.8;

/// The same where the step before showed no effect at all: a working set that is written over many times in a round.
const LONG_STEP: f64 = 0.65;

/// A round that shrank what remains by less than this had no effect.
const NO_EFFECT: f64 = 0.95;

/// The share after one more step. `ratio` is what remained after the last round, of what remained before it.
#[must_use]
pub fn next_share(share: f64, ratio: f64) -> f64 {
    let step = if share > 0.0 && ratio >= NO_EFFECT { LONG_STEP } else { STEP };
    (1.0 - (1.0 - share) * step).min(MOST_SHARE)
}

/// The share that each vCPU loses, so that the guest writes `1 - share` of what it would write. `written` says how many
/// pages each wrote while `now` was taken from it.
#[must_use]
pub fn shares(share: f64, written: Option<&[u64]>, now: &[f64]) -> Vec<f64> {
    let Some(written) = written else { return vec![share; now.len()] };
    #[expect(clippy::cast_precision_loss, reason = "far fewer than 2^53 pages")]
    let paces: Vec<f64> = written.iter().zip(now).map(|(pages, taken)| *pages as f64 / (1.0 - taken)).collect();
    let limit = common_pace(&paces, paces.iter().sum::<f64>() * (1.0 - share));
    let share = |pace: &f64| if *pace > limit { (1.0 - limit / pace).clamp(0.0, MOST_SHARE) } else { 0.0 };
    paces.iter().map(share).collect()
}

/// The pace to which all must keep for `sum` to be their sum.
fn common_pace(paces: &[f64], mut sum: f64) -> f64 {
    let mut ascending = paces.to_vec();
    ascending.sort_by(f64::total_cmp);
    let mut rest = ascending.len();
    for pace in ascending {
        #[expect(clippy::cast_precision_loss, reason = "far fewer than 2^53 vCPUs")]
        let each = sum / rest as f64;
        if pace >= each {
            return each;
        }
        sum -= pace;
        rest -= 1;
    }
    f64::INFINITY
}

/// What live rounds took from the guest while it ran.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct GuestCost {
    /// How long the host needed to tell dirty pages and to watch them again, in all. A vCPU that writes to a page
    /// meanwhile may have to wait.
    pub log_ms: f64,
    /// The longest of these times without a break.
    pub longest_log_ms: f64,
    /// How long vCPUs were kept from running, summed over all of them.
    pub throttled_ms: f64,
    /// The same as a share of the time that all vCPUs had from the first throttling to the pause; 0 without any.
    pub throttled_share: f64,
    /// The largest share of its time that the guest as a whole lost.
    pub most_share: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_small_and_end_at_the_most() {
        let mut share = next_share(0.0, 1.0);
        assert!((share - 0.2).abs() < 1e-9, "the first step is small whatever was before: {share}");
        assert!((next_share(0.2, 0.8) - 0.36).abs() < 1e-9);
        assert!((next_share(0.2, 1.0) - 0.48).abs() < 1e-9);
        let mut steps = 1;
        while share < MOST_SHARE {
            let next = next_share(share, 1.0);
            assert!(next > share);
            (share, steps) = (next, steps + 1);
        }
        assert_eq!(steps, 12);
        assert!((next_share(MOST_SHARE, 1.0) - MOST_SHARE).abs() < f64::EPSILON);
    }

    fn close(found: &[f64], expected: &[f64]) {
        let near = found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-9);
        assert!(near, "{found:?}, expected {expected:?}");
    }

    #[test]
    fn a_log_slows_all_a_ring_those_that_write() {
        close(&shares(0.4, None, &[0.0; 3]), &[0.4; 3]);
        close(&shares(0.5, Some(&[0, 100]), &[0.0; 2]), &[0.0, 0.5]);
        // 110 pages are to become 55: 10 and 45.
        close(&shares(0.5, Some(&[10, 100]), &[0.0; 2]), &[0.0, 0.55]);
        close(&shares(0.5, Some(&[100, 100]), &[0.0; 2]), &[0.5, 0.5]);
        close(&shares(0.0, Some(&[10, 100]), &[0.0; 2]), &[0.0, 0.0]);
        close(&shares(0.9, Some(&[0, 0]), &[0.0; 2]), &[0.0, 0.0]);
    }

    #[test]
    fn what_a_throttled_vcpu_writes_counts_as_if_it_were_not() {
        // Half of its time is taken already: without that it would write 100.
        close(&shares(0.75, Some(&[50]), &[0.5]), &[0.75]);
        close(&shares(MOST_SHARE, Some(&[1, 1]), &[MOST_SHARE; 2]), &[MOST_SHARE; 2]);
    }
}
