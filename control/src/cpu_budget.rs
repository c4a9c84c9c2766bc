//! How many processors a piece of work may take.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use thiserror::Error;

/// Processors, or parts of one, on average; from 0.001 to 1024 of them, in thousandths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct CpuBudget(NonZeroU32);

/// What is no number of processors.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0:?} is no number of processors; write for example 0.5 or 2, from 0.001 to {max}", max = CpuBudget::MAX)]
pub struct CpuBudgetError(String);

impl CpuBudget {
    /// The most processors.
    pub const MAX: u16 = 1024;

    /// The number of processors.
    #[must_use]
    pub fn cores(self) -> f64 {
        f64::from(self.0.get()) / 1000.0
    }
}

impl TryFrom<f64> for CpuBudget {
    type Error = CpuBudgetError;

    fn try_from(cores: f64) -> Result<Self, CpuBudgetError> {
        let thousandths = (cores * 1000.0).round();
        // What is no number is in no range.
        if !(1.0..=f64::from(Self::MAX) * 1000.0).contains(&thousandths) {
            return Err(CpuBudgetError(cores.to_string()));
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is in the range above")]
        let thousandths = NonZeroU32::new(thousandths as u32);
        thousandths.map(Self).ok_or_else(|| CpuBudgetError(cores.to_string()))
    }
}

impl FromStr for CpuBudget {
    type Err = CpuBudgetError;

    fn from_str(text: &str) -> Result<Self, CpuBudgetError> {
        let wrong = |_| CpuBudgetError(text.to_owned());
        text.parse::<f64>()
            .map_err(|_| CpuBudgetError(text.to_owned()))
            .and_then(|cores| cores.try_into().map_err(wrong))
    }
}

impl From<CpuBudget> for f64 {
    fn from(budget: CpuBudget) -> Self {
        budget.cores()
    }
}

impl fmt::Display for CpuBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cores().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_read_as_they_are_written() {
        for text in ["0.001", "0.1", "0.5", "1", "2.25", "1024"] {
            assert_eq!(text.parse::<CpuBudget>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_budget_is_refused_with_its_text() {
        for text in ["0", "-1", "-0", "0.0001", "1025", "NaN", "inf", "1e300", "", "two", "50%"] {
            let error = text.parse::<CpuBudget>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{text:?}")) && error.contains("0.5 or 2"), "{text}: {error}");
        }
    }
}
