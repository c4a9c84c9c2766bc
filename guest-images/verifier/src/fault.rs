//! What was found wrong: a count, and the first few in words.
//!
//! Every mode keeps one. A guest whose memory is broken everywhere must not drown its console in it.

use serde::{Deserialize, Serialize};

/// Faults that are told in words.
const IN_WORDS: usize = 8;

/// The faults of one mode.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Faults {
    /// How many there were.
    pub count: u64,
    /// The first of them.
    pub first: Vec<String>,
}

impl Faults {
    /// Notes a fault.
    pub fn add(&mut self, fault: impl Into<String>) {
        self.count += 1;
        if self.first.len() < IN_WORDS {
            self.first.push(fault.into());
        }
    }

    /// Adds another mode's faults to these.
    pub fn merge(&mut self, other: Self) {
        let Self { count, first } = other;
        self.count += count;
        let room = IN_WORDS.saturating_sub(self.first.len());
        self.first.extend(first.into_iter().take(room));
    }

    /// Whether there were none.
    pub fn none(&self) -> bool {
        self.count == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_counted_and_some_are_kept() {
        let mut faults = Faults::default();
        assert!(faults.none());
        (0..20).for_each(|number| faults.add(number.to_string()));
        assert_eq!((faults.count, faults.first.len()), (20, IN_WORDS));
        let mut sum = Faults { count: 1, first: vec!["x".to_owned()] };
        sum.merge(faults);
        assert_eq!((sum.count, sum.first.len(), &*sum.first[1]), (21, IN_WORDS, "0"));
    }
}
