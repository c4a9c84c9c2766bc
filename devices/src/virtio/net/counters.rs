//! What went through a NIC whose frames this process moves, counted on the NIC's thread and read by any other. Directions
//! are the guest's. Each number is right by itself; two that are read together may be one frame apart.

use super::port::HEADER;
use std::sync::atomic::{AtomicU64, Ordering};

/// The running counts of one NIC.
#[derive(Debug, Default)]
pub struct NetCounters {
    received_frames: AtomicU64,
    received_bytes: AtomicU64,
    sent_frames: AtomicU64,
    sent_bytes: AtomicU64,
    dropped_frames: AtomicU64,
}

/// The counts at one moment. What an offload passes in one piece is one frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NetCounts {
    /// Frames that the driver got.
    pub received_frames: u64,
    /// Their bytes, without the virtio-net header.
    pub received_bytes: u64,
    /// Frames that the port took.
    pub sent_frames: u64,
    /// Their bytes, without the virtio-net header.
    pub sent_bytes: u64,
    /// Frames of either direction that were dropped here.
    pub dropped_frames: u64,
}

impl NetCounters {
    /// A frame went to the driver; `length` includes its virtio-net header.
    pub(super) fn received(&self, length: usize) {
        add(&self.received_frames, 1);
        add(&self.received_bytes, payload(length));
    }

    /// A frame went to the port; `length` includes its virtio-net header.
    pub(super) fn sent(&self, length: usize) {
        add(&self.sent_frames, 1);
        add(&self.sent_bytes, payload(length));
    }

    /// A frame was dropped.
    pub(super) fn dropped(&self) {
        add(&self.dropped_frames, 1);
    }

    /// The counts now.
    #[must_use]
    pub fn now(&self) -> NetCounts {
        let Self { received_frames, received_bytes, sent_frames, sent_bytes, dropped_frames } = self;
        let [received_frames, received_bytes, sent_frames, sent_bytes, dropped_frames] =
            [received_frames, received_bytes, sent_frames, sent_bytes, dropped_frames]
                .map(|counter| counter.load(Ordering::Relaxed));
        NetCounts { received_frames, received_bytes, sent_frames, sent_bytes, dropped_frames }
    }
}

fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

fn payload(length: usize) -> u64 {
    length.saturating_sub(HEADER) as u64
}
