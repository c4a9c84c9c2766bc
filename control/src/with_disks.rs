//! Which disks go along with a guest, and when their bytes do.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use thiserror::Error;

/// When the bytes of a disk go over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskPolicy {
    /// Before the guest, with its memory: it runs at the target when all is there.
    Before,
    /// After the guest, which runs at the target at once. The source serves what is missing there.
    After,
}

/// Which disks go along with a guest. The others are where the target finds them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum WithDisks {
    /// All that the guest may write.
    All(DiskPolicy),
    /// These, by their names.
    Each(BTreeMap<String, DiskPolicy>),
}

/// What is not a choice of disks.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "{0:?} is no choice of disks: give it before or after for all, or ID=before, ID=after for one, with commas between"
)]
pub struct WithDisksError(String);

impl WithDisks {
    /// Whether all stay.
    #[must_use]
    pub fn is_none(&self) -> bool {
        matches!(self, Self::Each(disks) if disks.is_empty())
    }
}

impl Default for WithDisks {
    fn default() -> Self {
        Self::Each(BTreeMap::new())
    }
}

impl fmt::Display for DiskPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Before => f.write_str("before"),
            Self::After => f.write_str("after"),
        }
    }
}

impl fmt::Display for WithDisks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All(policy) => policy.fmt(f),
            Self::Each(disks) if disks.is_empty() => f.write_str("none"),
            Self::Each(disks) => {
                let words: Vec<_> = disks.iter().map(|(id, policy)| format!("{id}={policy}")).collect();
                f.write_str(&words.join(","))
            }
        }
    }
}

impl FromStr for WithDisks {
    type Err = WithDisksError;

    fn from_str(text: &str) -> Result<Self, WithDisksError> {
        let wrong = || WithDisksError(text.to_owned());
        let policy = |word: &str| match word {
            "before" => Ok(DiskPolicy::Before),
            "after" => Ok(DiskPolicy::After),
            _ => Err(wrong()),
        };
        if text == "none" {
            return Ok(Self::default());
        }
        if !text.contains('=') {
            return policy(text).map(Self::All);
        }
        let mut disks = BTreeMap::new();
        for part in text.split(',') {
            let (id, word) = part.split_once('=').ok_or_else(wrong)?;
            if disks.insert(id.to_owned(), policy(word)?).is_some() {
                return Err(wrong());
            }
        }
        Ok(Self::Each(disks))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_json_and_back() {
        let each = |ids: &[&str]| WithDisks::Each(ids.iter().map(|id| ((*id).to_owned(), DiskPolicy::After)).collect());
        for (text, json, disks) in [
            ("none", "{}", WithDisks::default()),
            ("after", r#""after""#, WithDisks::All(DiskPolicy::After)),
            ("before", r#""before""#, WithDisks::All(DiskPolicy::Before)),
            ("data=after,root=after", r#"{"data":"after","root":"after"}"#, each(&["root", "data"])),
        ] {
            assert_eq!(text.parse(), Ok(disks.clone()));
            assert_eq!(disks.to_string(), text);
            assert_eq!(serde_json::to_string(&disks).unwrap(), json);
            assert_eq!(serde_json::from_str::<WithDisks>(json).unwrap(), disks);
        }
        assert!(WithDisks::default().is_none() && !each(&["a"]).is_none());
        for wrong in ["", "later", "data", "data=", "data=after,", "data=after,after", "data=after,data=after"] {
            let error = wrong.parse::<WithDisks>().unwrap_err().to_string();
            assert!(error.contains("ID=after"), "{error}");
            assert!(serde_json::from_str::<WithDisks>(&format!("{wrong:?}")).is_err());
        }
    }
}
