//! Why pages went by the codecs that they went by, for reports and for people.

use crate::codec::Codecs;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Why a combination of codecs was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// They were asked for.
    Asked,
    /// Nothing was measured yet.
    Unmeasured,
    /// Only to see what they gain.
    Trial,
    /// The link takes pages faster than they can be packed.
    FastLink,
    /// The link is slower than packing.
    SlowLink,
    /// The link is slow, and pages are short without packing.
    ShortPages,
    /// The link is slow, but pages do not pack.
    NothingGained,
    /// More would take more processor time than it may.
    Budget,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Asked => "as asked",
            Self::Unmeasured => "nothing was measured yet",
            Self::Trial => "a trial",
            Self::FastLink => "the link takes pages faster than they pack",
            Self::SlowLink => "the link is slower than packing",
            Self::ShortPages => "the link is slow, and pages are short without packing",
            Self::NothingGained => "the link is slow, but pages do not pack",
            Self::Budget => "more would be over the CPU budget",
        })
    }
}

/// What most pages of a round went by.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Chosen {
    /// The codecs, as users write them.
    pub codecs: Codecs,
    /// Why these.
    pub why: Why,
    /// How fast the link took bytes, over all streams, where that was measured.
    pub link_bytes_per_second: Option<f64>,
}
