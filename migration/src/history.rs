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

/// The most memory for finding equal pages, in bytes.
const DEDUP_BYTES: usize = 16 << 20;

/// The pages that were sent, as far as they are remembered.
#[derive(Debug)]
pub(crate) struct History {
    copies: Option<DeltaCache>,
    digests: Option<DedupTable>,
}

impl History {
    /// Nothing, and no memory for more.
    pub(crate) fn none() -> Self {
        Self { copies: None, digests: None }
    }

    /// Nothing yet, with what `codecs` need. `delta_cache` is the most memory for copies of pages, in bytes.
    pub(crate) fn new(codecs: &Codecs, delta_cache: usize, pages_per_region: &[u64]) -> Result<Self, HostError> {
        let copies = codecs.delta.then(|| DeltaCache::new(delta_cache));
        let digests = codecs.dedup.then(|| DedupTable::new(DEDUP_BYTES, pages_per_region)).transpose()?;
        Ok(Self { copies, digests })
    }

    /// Begins a round that will send the pages of `ledger`.
    pub(crate) fn begin_round(&self, round: u32, ledger: &DirtyLedger) {
        if let Some(digests) = self.digests.as_ref().filter(|_| round > 1) {
            let mut set = ledger.clone();
            digests.begin_round(round, std::iter::from_fn(|| set.take_run(u32::MAX)));
        }
    }

    /// Appends what changed since the page was last sent, and remembers the page as it is now. Declined if that is not
    /// remembered, or too much has changed.
    pub(crate) fn compare(&self, page: PageId, content: &Page, round: u32, out: &mut Vec<u8>) -> Compared {
        let Some(copies) = &self.copies else { return Compared::Declined };
        copies.exchange(page, content, round, |old| delta::encode(old, content, out)).unwrap_or(Compared::Declined)
    }

    /// Another page in which the target has these bytes. If there is none, this page is remembered for them.
    pub(crate) fn find(&self, page: PageId, content: &Page) -> Option<Reference> {
        let digests = self.digests.as_ref()?;
        digests.look_up_or_insert(digests.digest(content), page)
    }

    /// The pages of a run were sent in a way that leaves it open what they hold, or as zero.
    pub(crate) fn forget(&self, run: PageRun) {
        if let Some(copies) = &self.copies {
            run.ids().for_each(|page| copies.forget(page));
        }
    }
}
