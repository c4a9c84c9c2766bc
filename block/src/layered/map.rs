//! Which clusters of a disk are here: what all channels of a layered disk, and its puller, agree on.
//!
//! ```text
//!            claim                     settle(Here)
//! Missing ----------> Claimed --------------------------> Here
//!    ^                   | settle(Missing)
//!    '-------------------'
//! ```
//!
//! Who claims a cluster fetches it or writes all of it; everybody else who needs it waits for that. A cluster that is here is
//! nobody's: it is read and written without the map. Invariant: a cluster is here only when all of it is in the local file.

use crate::backend::SECTOR;
use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The unit in which a disk moves, in bytes: long enough that a round trip over a WAN pays, short enough that a guest that
/// touches one sector does not wait long.
pub const CLUSTER: u64 = 64 << 10;

/// Who waits for clusters, and is woken when one that it waits for is settled.
#[derive(Debug)]
pub(super) struct Sleeper {
    woken: Mutex<Vec<usize>>,
    event: OwnedFd,
}

impl Sleeper {
    pub(super) fn new() -> std::io::Result<Arc<Self>> {
        use rustix::event::{EventfdFlags, eventfd};
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Arc::new(Self { woken: Mutex::default(), event }))
    }

    /// Readable when there is something to be taken.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Those who were woken since the last call; one may be named several times.
    pub(super) fn take(&self) -> Vec<usize> {
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        std::mem::take(&mut *self.woken.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn wake(&self, who: usize) {
        self.woken.lock().unwrap_or_else(PoisonError::into_inner).push(who);
        self.look();
    }

    /// Has the channel look around.
    pub(super) fn look(&self) {
        // The only refusal is a counter at its end, and then it is readable.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }
}

/// What has become of a claimed cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Settled {
    /// All of it is in the local file.
    Here,
    /// It is as it was.
    Missing,
}

/// What was found when clusters were to be claimed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// All of them are here.
    Here,
    /// Those of them that are missing are the caller's now.
    Claimed(Vec<u64>),
    /// One of them is another's. The caller is woken when that is settled, and has claimed nothing.
    Waits,
}

#[derive(Debug)]
struct State {
    /// A bit for each cluster that is here.
    here: Vec<u64>,
    missing: u64,
    /// Clusters that are claimed, and who waits for each.
    claimed: BTreeMap<u64, Vec<(Arc<Sleeper>, usize)>>,
    /// What those who wait have asked for. The background leaves it to them, or they would wait for all of it.
    wanted: Vec<(Arc<Sleeper>, usize, Range<u64>)>,
}

/// The map of one disk.
#[derive(Debug)]
pub(super) struct Map {
    clusters: u64,
    state: Mutex<State>,
}

impl Map {
    /// A map in which only the clusters of `here` are here: a bit for each, in words of 64.
    pub(super) fn new(clusters: u64, mut here: Vec<u64>) -> Self {
        here.resize(index(clusters.div_ceil(64)), 0);
        if let Some(last) = here.last_mut()
            && !clusters.is_multiple_of(64)
        {
            *last &= (1 << (clusters % 64)) - 1;
        }
        let there: u64 = here.iter().map(|word| u64::from(word.count_ones())).sum();
        let state = State { here, missing: clusters - there, claimed: BTreeMap::new(), wanted: Vec::new() };
        Self { clusters, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many clusters are not here.
    pub(super) fn missing(&self) -> u64 {
        self.lock().missing
    }

    /// How many bytes of a disk of this length are not here.
    pub(super) fn missing_bytes(&self, capacity: u64) -> u64 {
        let state = self.lock();
        let short = if state.is_here(self.clusters - 1) { 0 } else { self.clusters * CLUSTER - capacity };
        state.missing * CLUSTER - short
    }

    /// Claims those of `clusters` that are missing, if none of them is another's.
    pub(super) fn claim(&self, clusters: Range<u64>, sleeper: &Arc<Sleeper>, who: usize) -> Claim {
        let mut state = self.lock();
        state.wanted.retain(|(other, wants, _)| !(Arc::ptr_eq(other, sleeper) && *wants == who));
        if state.missing == 0 {
            return Claim::Here;
        }
        if let Some((_, waiters)) = state.claimed.range_mut(clusters.clone()).next() {
            waiters.push((Arc::clone(sleeper), who));
            state.wanted.push((Arc::clone(sleeper), who, clusters));
            return Claim::Waits;
        }
        let missing: Vec<u64> = clusters.filter(|&cluster| !state.is_here(cluster)).collect();
        if missing.is_empty() {
            return Claim::Here;
        }
        state.claimed.extend(missing.iter().map(|&cluster| (cluster, Vec::new())));
        Claim::Claimed(missing)
    }

    /// Whether none of some clusters is here.
    pub(super) fn lacks(&self, clusters: Range<u64>) -> bool {
        let state = self.lock();
        clusters.into_iter().all(|cluster| !state.is_here(cluster))
    }

    /// Nobody waits by way of `sleeper` any more.
    pub(super) fn forget(&self, sleeper: &Arc<Sleeper>) {
        self.lock().wanted.retain(|(other, ..)| !Arc::ptr_eq(other, sleeper));
    }

    /// Claims up to `most` clusters in a row for the background, the first of them at `from` or after it, or else from the
    /// beginning on. `None` if all are here, claimed or waited for.
    pub(super) fn claim_next(&self, from: u64, most: u64) -> Option<Range<u64>> {
        let mut state = self.lock();
        if state.missing == 0 {
            return None;
        }
        let free = |state: &State, cluster: &u64| {
            let is_wanted = state.wanted.iter().any(|(.., clusters)| clusters.contains(cluster));
            !state.is_here(*cluster) && !state.claimed.contains_key(cluster) && !is_wanted
        };
        let first = (from..self.clusters).chain(0..from.min(self.clusters)).find(|cluster| free(&state, cluster))?;
        let end = (first..self.clusters.min(first.saturating_add(most))).take_while(|cluster| free(&state, cluster));
        let run = first..end.last().map_or(first, |last| last + 1);
        state.claimed.extend(run.clone().map(|cluster| (cluster, Vec::new())));
        Some(run)
    }

    /// Ends claims, and wakes who waits for them.
    pub(super) fn settle(&self, clusters: impl IntoIterator<Item = u64>, settled: Settled) {
        let mut state = self.lock();
        let mut woken = Vec::new();
        for cluster in clusters {
            woken.extend(state.claimed.remove(&cluster).into_iter().flatten());
            if settled == Settled::Here && !state.is_here(cluster) {
                state.here[index(cluster / 64)] |= 1 << (cluster % 64);
                state.missing -= 1;
            }
        }
        drop(state);
        for (sleeper, who) in woken {
            sleeper.wake(who);
        }
    }

    /// Where the next stretch of clusters ends that are all here, or all not, from `cluster` on; and which of both.
    pub(super) fn stretch(&self, cluster: u64) -> (u64, bool) {
        let state = self.lock();
        let is_here = state.is_here(cluster);
        let end = (cluster..self.clusters).find(|&other| state.is_here(other) != is_here).unwrap_or(self.clusters);
        (end, is_here)
    }

    /// A bit for each cluster that is here.
    pub(super) fn bits(&self) -> Vec<u64> {
        self.lock().here.clone()
    }
}

impl State {
    fn is_here(&self, cluster: u64) -> bool {
        self.here[index(cluster / 64)] & 1 << (cluster % 64) != 0
    }
}

/// The clusters that a range of bytes touches.
pub(super) fn touched(offset: u64, length: u64) -> Range<u64> {
    offset / CLUSTER..(offset + length).div_ceil(CLUSTER)
}

/// The clusters that a range of bytes covers: that all of it lies in. The last one of a disk may be shorter.
pub(super) fn covered(offset: u64, length: u64, capacity: u64) -> Range<u64> {
    let end = if offset + length == capacity { capacity.div_ceil(CLUSTER) } else { (offset + length) / CLUSTER };
    let start = offset.div_ceil(CLUSTER);
    start..end.max(start)
}

/// The range of bytes of clusters, as offset and length.
pub(super) fn bytes_of(clusters: &Range<u64>, capacity: u64) -> (u64, u64) {
    let start = clusters.start * CLUSTER;
    (start, (clusters.end * CLUSTER).min(capacity) - start)
}

const _: () = assert!(CLUSTER.is_multiple_of(SECTOR), "clusters are made of sectors");

fn index(at: u64) -> usize {
    usize::try_from(at).expect("this VMM is 64-bit only")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_are_claimed_once_and_waited_for() {
        let (map, sleeper) = (Map::new(100, Vec::new()), Sleeper::new().unwrap());
        assert_eq!(map.claim(3..6, &sleeper, 1), Claim::Claimed(vec![3, 4, 5]));
        assert_eq!(map.claim(5..8, &sleeper, 2), Claim::Waits);
        assert_eq!(map.claim(6..8, &sleeper, 3), Claim::Claimed(vec![6, 7]), "who waits has claimed nothing");
        assert!(sleeper.take().is_empty());
        map.settle([3, 4, 5], Settled::Here);
        assert_eq!((sleeper.take(), map.missing()), (vec![2], 97));
        assert_eq!(map.claim_next(0, 100), Some(0..3));
        assert_eq!(map.claim_next(3, 100), Some(8..100), "5..8 is for who waits");
        map.settle((0..3).chain(8..100), Settled::Missing);
        assert_eq!(map.claim(3..6, &sleeper, 4), Claim::Here);
        map.settle([6, 7], Settled::Missing);
        assert_eq!(map.claim(5..8, &sleeper, 2), Claim::Claimed(vec![6, 7]));
        assert_eq!(map.missing(), 97);
        assert_eq!(map.claim(7..9, &sleeper, 5), Claim::Waits);
        assert_eq!(map.claim_next(8, 2), Some(9..11));
        map.forget(&sleeper);
        assert_eq!(map.claim_next(8, 2), Some(8..9));
    }

    #[test]
    fn the_background_takes_what_nobody_has() {
        let (map, sleeper) = (Map::new(10, vec![0b11]), Sleeper::new().unwrap());
        assert_eq!(map.missing(), 8);
        map.claim(5..6, &sleeper, 0);
        assert_eq!(map.claim_next(0, 16), Some(2..5));
        assert_eq!(map.claim_next(9, 16), Some(9..10));
        assert_eq!(map.claim_next(9, 2), Some(6..8), "round the end");
        assert_eq!(map.claim_next(0, 16), Some(8..9));
        assert_eq!(map.claim_next(0, 16), None);
        map.settle(0..10, Settled::Here);
        assert_eq!((map.missing(), map.claim_next(0, 1)), (0, None));
        assert_eq!(map.claim(0..10, &sleeper, 0), Claim::Here);
    }

    #[test]
    fn clusters_beyond_the_end_do_not_exist() {
        let map = Map::new(70, vec![u64::MAX, u64::MAX]);
        assert_eq!((map.missing(), map.bits()), (0, vec![u64::MAX, 0x3f]));
    }

    #[test]
    fn stretches() {
        let map = Map::new(10, vec![0b0001_1000]);
        assert_eq!([0, 3, 4, 5].map(|cluster| map.stretch(cluster)), [(3, false), (5, true), (5, true), (10, false)]);
    }

    #[test]
    fn ranges_and_their_clusters() {
        let capacity = 5 * CLUSTER + 512;
        assert_eq!(touched(CLUSTER - 512, 1024), 0..2);
        assert_eq!(covered(CLUSTER - 512, 1024, capacity), 1..1);
        assert_eq!(covered(CLUSTER, 2 * CLUSTER, capacity), 1..3);
        assert_eq!(covered(1, 3 * CLUSTER, capacity), 1..3);
        assert_eq!(covered(5 * CLUSTER, 512, capacity), 5..6, "the last one is short");
        assert_eq!(covered(4 * CLUSTER + 512, CLUSTER - 512, capacity), 5..5);
        assert_eq!(bytes_of(&(4..6), capacity), (4 * CLUSTER, CLUSTER + 512));
    }
}
