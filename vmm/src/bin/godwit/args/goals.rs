//! What a migration is to keep to: the options of `migrate` that say when it is good enough, and what to do if it is not.

use crate::values::{rate, time};
use clap::{Args, ValueEnum};
use control::OnStall;
use std::num::{NonZeroU32, NonZeroU64};

// Part of `migrate`.
#[derive(Debug, Args)]
pub(crate) struct Goals {
    /// Pause the guest when it will stand still for at most this long, in milliseconds
    #[arg(long, default_value = "50", value_name = "MS")]
    pub(crate) max_downtime: NonZeroU32,
    /// Send at most this many rounds with the guest running
    #[arg(long, default_value = "30", value_name = "N")]
    pub(crate) max_rounds: NonZeroU32,
    /// Be done within this time, such as 90s, 500ms, 10m or 1h; as it nears, no more rounds are sent
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub(crate) deadline: Option<NonZeroU32>,
    /// What to do when the guest would stand still for longer whatever is sent, or no time is left
    #[arg(long, value_enum, default_value = "stop")]
    pub(crate) on_stall: OnStallArg,
    /// Send at most this much a second: bytes as 100M or 1GiB (K, M, G of 1024), or bits as 100Mbit or 1Gbit (of 1000)
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(crate) bandwidth: Option<NonZeroU64>,
}

/// What to do with a goal out of reach, on the command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum OnStallArg {
    /// Give up; the guest stays here
    Cancel,
    /// Slow its vCPUs down step by step until the goal holds
    Throttle,
    /// Pause it nevertheless, at a moment when little remains
    Stop,
}

impl From<OnStallArg> for OnStall {
    fn from(on_stall: OnStallArg) -> Self {
        match on_stall {
            OnStallArg::Cancel => Self::Cancel,
            OnStallArg::Throttle => Self::Throttle,
            OnStallArg::Stop => Self::Stop,
        }
    }
}
