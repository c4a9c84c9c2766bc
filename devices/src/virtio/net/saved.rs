//! What a NIC leaves behind when its guest moves. The tap, vhost and the frames under way stay where they are.

use crate::virtio::MmioSavedV1;
use saved::Saved;
use serde::{Deserialize, Serialize};

/// A virtio-net device, version 1. Frozen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetSavedV1 {
    /// The transport's part.
    pub transport: MmioSavedV1,
    /// The address that the NIC was made with.
    pub permanent_mac: [u8; 6],
    /// The address that the driver has chosen since, or the same.
    pub mac: [u8; 6],
    /// Whether the guest was asked to announce itself and has not answered.
    pub guest_announces: bool,
}

impl Saved for NetSavedV1 {
    const KIND: &'static str = "virtio-net";
    const VERSION: u16 = 1;
}
