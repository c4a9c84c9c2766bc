//! What a source remembers of the pages that it has sent, for the codecs that refer to them. All its streams share it.
//!
//! What is remembered must be what the target has. So a page whose content is remembered is copied out of guest memory
//! first, and encoded and sent from that copy; the guest may write to the page itself at any moment. A page that was sent
//! in another way is forgotten.

use crate::codec::dedup::DedupTable;
use crate::codec::delta::{self, Compared};
use crate::codec::delta_cache::DeltaCache;
use crate::codec::reference::Reference;
use crate::codec::{Codecs, Page, PageId};
use crate::guest::HostError;
use crate::ledger::DirtyLedger;
use crate::region::PageRun;
use std::sync::OnceLock;

/// The most memory for finding equal pages, in bytes.
const DEDUP_BYTES: usize = 16 << 20;

/// The pages that were sent, as far as they are remembered. What a codec needs is made when it is first used.
#[derive(Debug)]
pub(crate) struct History {
    copies: OnceLock<DeltaCache>,
    digests: OnceLock<DedupTable>,
    /// The most memory for copies of pages, in bytes.
    delta_cache: usize,
    pages_per_region: Vec<u64>,
}

impl History {
    /// Nothing yet, for regions of these lengths in pages. `delta_cache` is the most memory for copies of pages, in bytes.
    pub(crate) fn new(delta_cache: usize, pages_per_region: &[u64]) -> Self {
        let pages_per_region = pages_per_region.to_owned();
        Self { copies: OnceLock::new(), digests: OnceLock::new(), delta_cache, pages_per_region }
    }

    /// Begins a round that will send the pages of `ledger`.
    pub(crate) fn begin_round(&self, round: u32, ledger: &DirtyLedger) {
        if let Some(digests) = self.digests.get().filter(|_| round > 1) {
            let mut set = ledger.clone();
            digests.begin_round(round, std::iter::from_fn(|| set.take_run(u32::MAX)));
        }
    }

    /// Makes what `codecs` need, in the middle of a round as at its beginning.
    pub(crate) fn prepare(&self, codecs: &Codecs, round: u32) -> Result<(), HostError> {
        if codecs.delta {
            self.copies.get_or_init(|| DeltaCache::new(self.delta_cache));
        }
        if codecs.dedup && self.digests.get().is_none() {
            let digests = DedupTable::new(DEDUP_BYTES, &self.pages_per_region)?;
            // It has no page of an earlier round, so that it need not know which are sent again.
            digests.begin_round(round, []);
            self.digests.get_or_init(|| digests);
        }
        Ok(())
    }

    /// Appends what changed since the page was last sent, and remembers the page as it is now. Declined if that is not
    /// remembered, or too much has changed.
    pub(crate) fn compare(&self, page: PageId, content: &Page, round: u32, out: &mut Vec<u8>) -> Compared {
        let Some(copies) = self.copies.get() else { return Compared::Declined };
        copies.exchange(page, content, round, |old| delta::encode(old, content, out)).unwrap_or(Compared::Declined)
    }

    /// Another page in which the target has these bytes. If there is none, this page is remembered for them.
    pub(crate) fn find(&self, page: PageId, content: &Page) -> Option<Reference> {
        let digests = self.digests.get()?;
        digests.look_up_or_insert(digests.digest(content), page)
    }

    /// The pages of a run were sent in a way that leaves it open what they hold, or without being remembered.
    pub(crate) fn forget(&self, run: PageRun) {
        if let Some(copies) = self.copies.get() {
            run.ids().for_each(|page| copies.forget(page));
        }
    }
}
