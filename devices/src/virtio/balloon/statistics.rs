//! What a guest tells of its memory through the balloon's statistics queue (virtio 1.3, 5.5.6.3).

use std::fmt;
use std::time::Instant;

/// A `struct virtio_balloon_stat`: a 16-bit tag and a 64-bit value, packed.
const RECORD: usize = 10;
/// The longest buffer that is read. Drivers send each tag once; room is left for tags to come.
pub(super) const LONGEST: usize = 64 * RECORD;

/// What a guest may tell of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Statistic {
    /// Bytes swapped in since boot.
    SwapIn = 0,
    /// Bytes swapped out since boot.
    SwapOut = 1,
    /// Page faults that needed I/O.
    MajorFaults = 2,
    /// Page faults that did not.
    MinorFaults = 3,
    /// Bytes that nothing uses.
    Free = 4,
    /// Bytes of memory that the guest has.
    Total = 5,
    /// Bytes that new programs could have without swapping.
    Available = 6,
    /// Bytes of files that are cached.
    DiskCaches = 7,
    /// Huge pages handed out.
    HugePagesGiven = 8,
    /// Huge pages that could not be handed out.
    HugePagesRefused = 9,
    /// Processes that were ended for lack of memory (this and the following since Linux 6.12).
    OutOfMemoryKills = 10,
    /// Allocations that had to wait.
    AllocationStalls = 11,
    /// Pages scanned in the background.
    BackgroundScans = 12,
    /// Pages scanned by who needed memory.
    DirectScans = 13,
    /// Pages reclaimed in the background.
    BackgroundReclaims = 14,
    /// Pages reclaimed by who needed memory.
    DirectReclaims = 15,
}

impl Statistic {
    /// All of them, each at the index that is its tag.
    pub const ALL: [Self; 16] = [
        Self::SwapIn,
        Self::SwapOut,
        Self::MajorFaults,
        Self::MinorFaults,
        Self::Free,
        Self::Total,
        Self::Available,
        Self::DiskCaches,
        Self::HugePagesGiven,
        Self::HugePagesRefused,
        Self::OutOfMemoryKills,
        Self::AllocationStalls,
        Self::BackgroundScans,
        Self::DirectScans,
        Self::BackgroundReclaims,
        Self::DirectReclaims,
    ];

    /// Its name for programs, with the unit where it has one.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SwapIn => "swap_in_bytes",
            Self::SwapOut => "swap_out_bytes",
            Self::MajorFaults => "major_faults",
            Self::MinorFaults => "minor_faults",
            Self::Free => "free_bytes",
            Self::Total => "total_bytes",
            Self::Available => "available_bytes",
            Self::DiskCaches => "disk_caches_bytes",
            Self::HugePagesGiven => "huge_pages_given",
            Self::HugePagesRefused => "huge_pages_refused",
            Self::OutOfMemoryKills => "out_of_memory_kills",
            Self::AllocationStalls => "allocation_stalls",
            Self::BackgroundScans => "background_scans",
            Self::DirectScans => "direct_scans",
            Self::BackgroundReclaims => "background_reclaims",
            Self::DirectReclaims => "direct_reclaims",
        }
    }
}

impl fmt::Display for Statistic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The last that a guest told. The values are the guest's word and nothing more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statistics {
    values: [Option<u64>; 16],
    told: Option<Instant>,
}

impl Statistics {
    /// When the guest told it; `None` if it never did.
    #[must_use]
    pub fn told(&self) -> Option<Instant> {
        self.told
    }

    /// One value, if the guest told it.
    #[must_use]
    pub fn value(&self, statistic: Statistic) -> Option<u64> {
        self.values[statistic as usize]
    }

    /// All that the guest told.
    pub fn iter(&self) -> impl Iterator<Item = (Statistic, u64)> + '_ {
        Statistic::ALL.into_iter().filter_map(|statistic| Some((statistic, self.value(statistic)?)))
    }

    /// Reads what the driver sent. Tags that are not known and a record that is cut are passed over.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let mut values = [None; 16];
        let (records, _) = bytes.as_chunks::<RECORD>();
        for &[t0, t1, v0, v1, v2, v3, v4, v5, v6, v7] in records {
            let tag = usize::from(u16::from_le_bytes([t0, t1]));
            if let Some(value) = values.get_mut(tag) {
                *value = Some(u64::from_le_bytes([v0, v1, v2, v3, v4, v5, v6, v7]));
            }
        }
        Self { values, told: Some(Instant::now()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(tag: u16, value: u64) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
    }

    #[test]
    fn each_tag_has_its_place_and_name() {
        let mut names = Vec::new();
        for (tag, statistic) in (0_u16..).zip(Statistic::ALL) {
            let statistics = Statistics::parse(&record(tag, 1 << 40));
            assert_eq!(statistics.iter().collect::<Vec<_>>(), [(statistic, 1 << 40)]);
            names.push(statistic.to_string());
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Statistic::ALL.len());
    }

    #[test]
    fn odd_records_are_passed_over() {
        let mut bytes = [record(16, 1), record(u16::MAX, 2), record(4, 3), record(4, 4), record(5, 6)].concat();
        bytes.truncate(49);
        let statistics = Statistics::parse(&bytes);
        assert_eq!(statistics.iter().collect::<Vec<_>>(), [(Statistic::Free, 4)]);
        assert!(statistics.told().is_some());
        assert_eq!(Statistics::parse(&[]).iter().count(), 0);
        assert_eq!(Statistics::default().told(), None);
    }
}
