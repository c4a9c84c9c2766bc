//! What a balloon leaves behind when its guest moves. Its pages are zeros in guest memory and move as such; statistics
//! are asked for anew.

use crate::virtio::MmioSavedV1;
use saved::Saved;
use serde::{Deserialize, Serialize};

/// A virtio-balloon device, version 1. Frozen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonSavedV1 {
    /// The transport's part.
    pub transport: MmioSavedV1,
    /// `num_pages`: how large the balloon is asked to be.
    pub target_pages: u32,
    /// `actual`: how large the driver says that it is.
    pub actual_pages: u32,
}

impl Saved for BalloonSavedV1 {
    const KIND: &'static str = "virtio-balloon";
    const VERSION: u16 = 1;
}
