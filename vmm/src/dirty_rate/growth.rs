//! How the set of pages that a guest has dirtied grows, harvest by harvest.
//!
//! Two bits per page of the guest: one in the ledger that is harvested into, one in that of everything so far.

use migration::DirtyLedger;
use std::time::Duration;

/// Everything that was harvested so far.
#[derive(Debug)]
pub(super) struct Growth {
    /// Empty between harvests.
    fresh: DirtyLedger,
    all: DirtyLedger,
    /// The sum of the harvests' pages.
    dirtied: u64,
    /// Different pages after each harvest.
    working_set: Vec<u64>,
    by_vcpu: Option<Vec<u64>>,
}

impl Growth {
    pub(super) fn new(pages_per_region: &[u64]) -> Self {
        let ledger = DirtyLedger::new(pages_per_region);
        Self { fresh: ledger.clone(), all: ledger, dirtied: 0, working_set: Vec::new(), by_vcpu: None }
    }

    /// Where the next harvest goes.
    pub(super) fn harvest(&mut self) -> &mut DirtyLedger {
        &mut self.fresh
    }

    /// Adds what was harvested, and how much of it each vCPU wrote.
    pub(super) fn add_harvest(&mut self, by_vcpu: Option<&[u64]>) {
        self.dirtied += self.fresh.dirty_pages();
        while let Some(run) = self.fresh.take_run(u32::MAX) {
            self.all.put_back(run);
        }
        self.working_set.push(self.all.dirty_pages());
        if let Some(counts) = by_vcpu {
            let sums = self.by_vcpu.get_or_insert_with(|| vec![0; counts.len()]);
            sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        }
    }

    /// How many harvests were added.
    pub(super) fn harvests(&self) -> u32 {
        u32::try_from(self.working_set.len()).expect("a period has few harvests")
    }

    /// Pages of all harvests; one that is in several of them counts in each.
    pub(super) fn dirtied(&self) -> u64 {
        self.dirtied
    }

    /// Different pages after each harvest.
    pub(super) fn working_set(&self) -> &[u64] {
        &self.working_set
    }

    /// Pages that each vCPU wrote, if the tracker knows it.
    pub(super) fn by_vcpu(&self) -> Option<&[u64]> {
        self.by_vcpu.as_deref()
    }
}

/// How many a second `count` in `time` are.
pub(super) fn per_second(count: u64, time: Duration) -> u64 {
    let rate = u128::from(count) * 1_000_000_000 / time.as_nanos().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use migration::RegionId;

    fn add(growth: &mut Growth, pages: std::ops::Range<u64>, by_vcpu: Option<&[u64]>) {
        for page in pages {
            growth.harvest().mark(RegionId(0), page);
        }
        growth.add_harvest(by_vcpu);
    }

    #[test]
    fn pages_count_once_in_a_harvest_and_once_in_the_working_set() {
        let mut growth = Growth::new(&[1000, 1000]);
        add(&mut growth, 0..100, None);
        add(&mut growth, 50..150, None);
        add(&mut growth, 0..0, None);
        growth.harvest().mark(RegionId(1), 7);
        add(&mut growth, 0..10, None);
        assert_eq!(growth.working_set(), [100, 150, 150, 151]);
        assert_eq!((growth.dirtied(), growth.harvests(), growth.by_vcpu()), (211, 4, None));
    }

    #[test]
    fn the_counts_of_vcpus_are_sums() {
        let mut growth = Growth::new(&[1000]);
        add(&mut growth, 0..7, Some(&[3, 4]));
        add(&mut growth, 0..1, Some(&[0, 1]));
        assert_eq!(growth.by_vcpu(), Some([3, 5].as_slice()));
    }

    #[test]
    fn rates() {
        assert_eq!(per_second(100, Duration::from_millis(100)), 1000);
        assert_eq!(per_second(0, Duration::ZERO), 0);
        assert_eq!(per_second(u64::MAX, Duration::from_nanos(1)), u64::MAX);
        assert_eq!(per_second(3, Duration::from_secs(2)), 1);
    }
}
