//! Free memory that costs the same to take for every contender.
//!
//! Where the machine is itself a guest whose host takes free pages back (free page reporting of virtio-balloon), the first
//! touch of such a page costs some ten microseconds, twenty times what it does otherwise: more than the whole migration of
//! that page. Whoever comes after one that has just freed its memory would be spared that.

use std::io;

use memmap2::{Advice, MmapMut};

use super::cell::{Content, Link, Micro};

/// What a VMM takes beside the content, for working sets and for itself, in MiB.
const BESIDE_MIB: u64 = 128;

/// So many times what is taken must be warm: the kernel does not give out first what was freed last.
const TIMES: u64 = 4;

/// Small pages, which a VMM may take like huge ones.
const PAGE: usize = 4096;

/// Has the host back as much free memory as the target may take, where a slow link does not leave time for that. To be called
/// right before a move: what stays free is taken back after some seconds.
///
/// # Errors
/// If the machine has not so much memory.
pub(super) fn warm_up(guest: &Micro, link: Link) -> io::Result<()> {
    if is_slow(link) && !may_be_short(guest) {
        return Ok(());
    }
    let content = guest.content.map_or(0, |(_, mib)| mib);
    let mib = guest.memory_mib.min(content + BESIDE_MIB) * TIMES;
    let bytes = usize::try_from(mib << 20).expect("sizes have 64 bits on x86-64");
    // Huge pages and small ones come from different lists of the kernel.
    for advice in [Some(Advice::HugePage), None] {
        let mut memory = MmapMut::map_anon(bytes)?;
        if let Some(advice) = advice {
            memory.advise(advice)?;
        }
        memory.iter_mut().step_by(PAGE).for_each(|byte| *byte = 1);
    }
    Ok(())
}

/// Whether pages come more slowly than memory is taken for them, however cold it is.
fn is_slow(link: Link) -> bool {
    link.rate().is_some() && link != Link::TenGigabit
}

/// Whether the guest's pages may be next to nothing on the link.
fn may_be_short(guest: &Micro) -> bool {
    matches!(guest.content, Some((Content::Zero | Content::Colour | Content::Twin, _)))
}
