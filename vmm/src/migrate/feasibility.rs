//! Whether the goals of a migration can hold together for this guest, asked before anything of it is touched.

use crate::dirty_rate::{self, MeasureError};
use crate::memory::GuestMemory;
use control::{MemorySample, StartMigration};
use migration::feasibility::{Basis, Contradiction, Load};
use migration::{Codecs, PAGE_SIZE, feasibility};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use thiserror::Error;

/// The unit in which a file tells how much of it is backed (stat(2), `st_blocks`).
const BLOCK: u64 = 512;

/// Why a migration is not begun.
#[derive(Debug, Error)]
pub enum Infeasible {
    /// Its goals contradict each other.
    #[error(transparent)]
    Contradiction(#[from] Contradiction),
    /// The guest's memory could not be looked at.
    #[error("How much memory must go is not known")]
    Memory(#[from] MeasureError),
}

/// Checks what `request` asks for. `codecs` may make pages smaller; any of them, if absent. `space` bytes of disks go with
/// memory; how little of them has to be sent is not known.
///
/// # Errors
/// [`Infeasible`], with the arithmetic.
pub(crate) fn check(
    memory: &GuestMemory,
    space: u64,
    request: &StartMigration,
    codecs: Option<Codecs>,
) -> Result<(), Infeasible> {
    let (deadline, timeout, bandwidth) = (request.deadline(), request.timeout(), request.bandwidth_bytes_per_second);
    feasibility::check(deadline, timeout, bandwidth, || {
        let load = load(memory, codecs)?;
        Ok(Load { backed: load.backed + space, ..load })
    })
}

/// What has to go at the least.
fn load(memory: &GuestMemory, codecs: Option<Codecs>) -> Result<Load, MeasureError> {
    let file = File::from(memory.file().try_clone_to_owned()?);
    let backed = backed(&file)?;
    if codecs == Some(Codecs::NONE) {
        return Ok(Load { backed, least: backed, basis: Basis::NoCodecs });
    }
    let sample = dirty_rate::sample(memory)?;
    let share =
        if codecs == Some(Codecs::ZERO) { data_share(&sample) } else { data_share(&sample) * packed_share(&sample) };
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share")]
    let least = (backed as f64 * share) as u64;
    Ok(Load { backed, least, basis: Basis::Sample })
}

fn backed(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.blocks() * BLOCK)
}

/// Pages that are not zero.
fn data_share(sample: &MemorySample) -> f64 {
    share(sample.data_pages(), sample.pages)
}

/// What the best of the compressors leaves of them, if those that are equal go once.
fn packed_share(sample: &MemorySample) -> f64 {
    let data = sample.data_pages();
    let packed = share(sample.lz4_bytes.min(sample.zstd_bytes), data * PAGE_SIZE as u64);
    packed.min(1.0) * (1.0 - share(sample.duplicate_pages, data))
}

#[expect(clippy::cast_precision_loss, reason = "a sample has few pages")]
fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use migration::PageRun;
    use migration::{PageIndex, RegionId};
    use vm_memory::VolatileMemory;

    const MIB: u64 = 1 << 20;

    /// A guest of 64 MiB that has used 8 MiB, half of them for zeros.
    fn memory() -> GuestMemory {
        let memory = GuestMemory::create(64 * MIB, false).unwrap();
        for page in 0..2048 {
            let run = PageRun { region: RegionId(0), first: PageIndex(page), pages: 1 };
            let slice = memory.untracked_slice(run).unwrap();
            let word = if page % 2 == 0 { 0 } else { page.wrapping_mul(0x9e37_79b9_7f4a_7c15) };
            for at in (0..PAGE_SIZE).step_by(8) {
                slice.get_ref::<u64>(at).unwrap().store(word.rotate_left(u32::try_from(at % 64).unwrap()));
            }
        }
        memory
    }

    #[test]
    fn what_must_go_is_all_that_is_backed_or_what_a_sample_says() {
        let memory = memory();
        let all = load(&memory, Some(Codecs::NONE)).unwrap();
        assert_eq!(all, Load { backed: 8 * MIB, least: 8 * MIB, basis: Basis::NoCodecs });
        let zero = load(&memory, Some(Codecs::ZERO)).unwrap();
        assert_eq!((zero.backed, zero.basis), (8 * MIB, Basis::Sample));
        assert!((3 * MIB..5 * MIB).contains(&zero.least), "{zero:?}");
        let packed = load(&memory, Some(Codecs { rle: true, ..Codecs::ZERO })).unwrap();
        assert!(packed.least > 0 && packed.least < MIB, "{packed:?}");
        assert_eq!(load(&memory, None).unwrap(), packed);
        let empty = GuestMemory::create(64 * MIB, false).unwrap();
        assert_eq!(load(&empty, None).unwrap().least, 0);
    }
}
