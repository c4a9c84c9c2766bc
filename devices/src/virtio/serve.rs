//! One turn of a device at a queue, the same for each queue whose chains are answered one by one as they come.

use super::queue::{BrokenRing, Chain};
use super::{Io, Progress};
use crate::GuestRam;

/// Pops the chains that the driver offers to `queue`, at most as many as the queue is long, and gives each back with as
/// many bytes written as `answer` says. The driver is interrupted once, at the end, if there were any.
///
/// # Errors
/// [`BrokenRing`], from the queue or from `answer`.
pub(super) fn serve(
    io: &mut Io,
    queue: usize,
    mut answer: impl FnMut(&GuestRam, &Chain) -> Result<u32, BrokenRing>,
) -> Result<Progress, BrokenRing> {
    let ring = &mut io.queues[queue];
    let used_before = ring.state().next_used;
    ring.suppress_kicks()?;
    let mut progress = Progress::More;
    for _ in 0..ring.state().size {
        if let Some(chain) = ring.pop()? {
            let written = answer(&io.ram, &chain)?;
            ring.push(&chain, written)?;
        } else if !ring.accept_kicks()? {
            progress = Progress::Idle;
            break;
        }
    }
    if ring.state().next_used != used_before {
        io.signal(queue)?;
    }
    Ok(progress)
}
