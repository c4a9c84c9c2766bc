//! How many passed and how many failed: counted here, read from other programs' closing lines, and added up.

use std::fmt;
use std::ops::AddAssign;

/// A count of passed and failed tests or scenarios.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// Passed.
    pub passed: u32,
    /// Failed.
    pub failed: u32,
}

impl Tally {
    /// Counts one more.
    pub fn count(&mut self, passed: bool) {
        *self += Self { passed: u32::from(passed), failed: u32::from(!passed) };
    }

    /// Reads our own closing line, `12 passed, 0 failed`.
    pub fn from_closing_line(line: &str) -> Option<Self> {
        let (passed, failed) = line.trim().split_once(" passed, ")?;
        Some(Self { passed: passed.parse().ok()?, failed: failed.strip_suffix(" failed")?.parse().ok()? })
    }

    /// Reads the closing line of a test binary, `test result: ok. 12 passed; 0 failed; 0 ignored; …`.
    pub fn from_test_binary(line: &str) -> Option<Self> {
        let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
        let mut counts = counts.split("; ");
        let passed = counts.next()?.strip_suffix(" passed")?.parse().ok()?;
        let failed = counts.next()?.strip_suffix(" failed")?.parse().ok()?;
        Some(Self { passed, failed })
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed = self.passed.saturating_add(other.passed);
        self.failed = self.failed.saturating_add(other.failed);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_line_reads_back() {
        let mut tally = Tally { passed: 12, failed: 1 };
        assert_eq!(Tally::from_closing_line(&tally.to_string()), Some(tally));
        tally.count(true);
        tally.count(false);
        assert_eq!(tally, Tally { passed: 13, failed: 2 });
    }

    #[test]
    fn other_lines_are_no_closing_lines() {
        for line in ["", "passed, failed", "1 passed", "x passed, 2 failed", "1 passed, 2 failed, 3 more"] {
            assert_eq!(Tally::from_closing_line(line), None, "{line}");
        }
    }

    #[test]
    fn the_line_of_a_test_binary_is_read() {
        let line = "test result: FAILED. 12 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s";
        assert_eq!(Tally::from_test_binary(line), Some(Tally { passed: 12, failed: 3 }));
        assert_eq!(Tally::from_test_binary("running 3 tests"), None);
    }
}
