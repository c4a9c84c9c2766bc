//! Frames from the driver's transmit queue to the port, written straight from its buffers.

use super::TRANSMIT;
use super::counters::NetCounters;
use super::port::{self, HEADER, MAX_FRAME};
use crate::virtio::queue::{BrokenRing, slices, total_bytes};
use crate::virtio::serve::serve;
use crate::virtio::{Io, Progress};
use std::fs::File;

/// Sends what the driver offers, at most as many frames as the queue is long.
///
/// What the port does not take (a frame that is too long, a header that asks for an offload in a wrong way, a link that
/// is down) is dropped, as a wire would.
pub(super) fn transmit(io: &mut Io, port: &File, counters: &NetCounters) -> Result<Progress, BrokenRing> {
    serve(io, TRANSMIT, |ram, chain| {
        let length = total_bytes(chain.readable());
        if length < HEADER {
            let head = chain.head();
            return Err(BrokenRing::Incomplete { queue: TRANSMIT, head, what: "the header of a frame" });
        }
        if length > MAX_FRAME {
            tracing::debug!(length, "A frame longer than any wire takes was dropped");
            counters.dropped();
        } else if let Err(error) = port::send(port, &slices(ram, chain.readable(), 0, length)) {
            tracing::debug!(%error, length, "A NIC's port did not take a frame");
            counters.dropped();
        } else {
            counters.sent(length);
        }
        Ok(0)
    })
}
