//! Pages of a disk of which the target has an old copy: instead of their bytes go digests, of some pages each, and the target
//! says which of them its copy does not have.
//!
//! The digest is the first half of BLAKE3: whoever writes the disk may try to have two contents for one, and 2^64 attempts are
//! too many.

use crate::region::{PAGE_SIZE, PageIndex, PageRun};

/// Pages of a digest: 64 KiB, so that digests of a disk that has not changed are a four-thousandth of it, and little more than
/// what has changed is sent again. The last group of a run may have fewer.
pub const GROUP_PAGES: u32 = 16;

/// Bytes of a digest.
pub const DIGEST_BYTES: usize = 16;

/// The digest of a group of pages.
pub type Digest = [u8; DIGEST_BYTES];

/// The digest of the bytes of a group.
#[must_use]
pub fn digest(pages: &[u8]) -> Digest {
    let hash = blake3::hash(pages);
    *hash.as_bytes().first_chunk().expect("a hash has 32 bytes")
}

/// The groups of a run.
pub fn groups(run: PageRun) -> impl Iterator<Item = PageRun> {
    let PageRun { region, first, pages } = run;
    (0..pages).step_by(GROUP_PAGES as usize).map(move |offset| PageRun {
        region,
        first: PageIndex(first.0 + u64::from(offset)),
        pages: GROUP_PAGES.min(pages - offset),
    })
}

/// Appends the digests of the groups of some pages.
pub(crate) fn encode(pages: &[u8], out: &mut Vec<u8>) {
    pages.chunks(GROUP_PAGES as usize * PAGE_SIZE).for_each(|group| out.extend(digest(group)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::RegionId;

    #[test]
    fn a_run_has_a_digest_for_each_group() {
        let run = PageRun { region: RegionId(2), first: PageIndex(5), pages: 35 };
        let parts: Vec<_> = groups(run).map(|group| (group.first.0, group.pages)).collect();
        assert_eq!(parts, [(5, 16), (21, 16), (37, 3)]);
        let mut block = Vec::new();
        let mut bytes = vec![7; run.bytes()];
        encode(&bytes, &mut block);
        assert_eq!(block.len(), 3 * DIGEST_BYTES);
        assert_eq!(
            (&block[..16], &block[32..]),
            (&digest(&bytes[..16 * PAGE_SIZE])[..], &digest(&[7; 3 * PAGE_SIZE])[..])
        );
        assert_eq!(block[..16], block[16..32]);
        bytes[16 * PAGE_SIZE] = 8;
        let before = std::mem::take(&mut block);
        encode(&bytes, &mut block);
        assert!(block[..16] == before[..16] && block[16..32] != before[16..32] && block[32..] == before[32..]);
    }
}
