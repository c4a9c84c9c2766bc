//! The target's record of the sessions it has decided, as the engine wants it: the first claim of a session stands.
//!
//! Claims live in memory; that a guest may be claimed is durable before it is offered, so that a claim itself, for which the
//! guest stands still, waits for no disk. One record serves all links of a process, so that a question on one link and a
//! `Go` on another are decided in one order.

use super::ownership::{Owner, Ownership, OwnershipError};
use migration::{Claim, Claims};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use thiserror::Error;
use uuid::Uuid;

/// The most sessions a record knows. A process receives one guest; more than this are questions of strangers.
const MAX_SESSIONS: usize = 4096;

/// Why a claim could not be recorded.
#[derive(Debug, Error)]
pub enum ClaimError {
    /// The durable record.
    #[error(transparent)]
    Ownership(#[from] OwnershipError),
    /// Too many sessions.
    #[error("This host has been asked after {MAX_SESSIONS} migrations and records no more")]
    Full,
    /// No guest has been let in, so none can be claimed.
    #[error("No guest has been offered that could be claimed")]
    NoGuest,
}

#[derive(Debug, Default)]
struct Decided {
    sessions: HashMap<Uuid, Claim>,
    expected: Option<Expected>,
}

/// A guest that has been let in.
#[derive(Debug)]
struct Expected {
    session: Uuid,
    record: Ownership,
}

/// The claims of one process.
#[derive(Debug)]
pub struct ClaimRecord {
    identity: Uuid,
    state_dir: PathBuf,
    decided: Mutex<Decided>,
}

impl ClaimRecord {
    /// An empty record with an identity that no other record has, whose durable part is under `state_dir`.
    #[must_use]
    pub fn new(identity: Uuid, state_dir: &Path) -> Self {
        Self { identity, state_dir: state_dir.to_owned(), decided: Mutex::default() }
    }

    /// Tells which guest the claim `Mine` of a session would be to, and notes durably that it may be made.
    ///
    /// # Errors
    /// [`OwnershipError`] if that cannot be noted; the guest must not be let in then.
    pub fn expect(&self, session: Uuid, guest: Uuid) -> Result<(), OwnershipError> {
        let record = Ownership::of(&self.state_dir, guest);
        record.announce(&Owner::Mine { session })?;
        self.lock().expected = Some(Expected { session, record });
        Ok(())
    }

    /// Makes a claim `Mine` that stands durable as such. Called when the guest runs.
    ///
    /// # Errors
    /// [`OwnershipError`]; after a crash of the host the record may still be the note that it may be made.
    pub fn sync(&self) -> Result<(), OwnershipError> {
        self.lock().expected.as_ref().map_or(Ok(()), |expected| expected.record.sync())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Decided> {
        self.decided.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claims for ClaimRecord {
    type Error = ClaimError;

    fn identity(&self) -> Uuid {
        self.identity
    }

    fn claim(&self, session: Uuid, claim: Claim) -> Result<Claim, ClaimError> {
        let mut decided = self.lock();
        if let Some(stands) = decided.sessions.get(&session) {
            return Ok(*stands);
        }
        if decided.sessions.len() >= MAX_SESSIONS {
            return Err(ClaimError::Full);
        }
        let expected = decided.expected.as_ref().filter(|expected| expected.session == session);
        match (claim, expected) {
            (Claim::Mine, Some(expected)) => expected.record.confirm()?,
            (Claim::Mine, None) => return Err(ClaimError::NoGuest),
            (Claim::NotMine, Some(expected)) => expected.record.withdraw()?,
            (Claim::NotMine, None) => {}
        }
        decided.sessions.insert(session, claim);
        Ok(claim)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: Uuid = Uuid::from_u128(1);
    const IDENTITY: Uuid = Uuid::from_u128(9);

    #[test]
    fn the_first_claim_stands_and_mine_becomes_the_record() {
        let dir = tempfile::tempdir().unwrap();
        let record = ClaimRecord::new(IDENTITY, dir.path());
        let (first, second) = (Uuid::from_u128(2), Uuid::from_u128(3));
        assert_eq!(record.claim(first, Claim::NotMine).unwrap(), Claim::NotMine);
        assert_eq!(record.claim(first, Claim::Mine).unwrap(), Claim::NotMine);
        assert!(matches!(record.claim(second, Claim::Mine), Err(ClaimError::NoGuest)));
        record.expect(second, GUEST).unwrap();
        assert!(matches!(record.claim(Uuid::from_u128(4), Claim::Mine), Err(ClaimError::NoGuest)));
        assert_eq!(record.claim(second, Claim::Mine).unwrap(), Claim::Mine);
        record.sync().unwrap();
        assert_eq!(record.claim(second, Claim::NotMine).unwrap(), Claim::Mine);
        assert_eq!(Ownership::of(dir.path(), GUEST).read().unwrap(), Some(Owner::Mine { session: second }));
    }

    #[test]
    fn a_claim_that_cannot_be_recorded_does_not_count() {
        let (file, dir) = (tempfile::NamedTempFile::new().unwrap(), tempfile::tempdir().unwrap());
        let session = Uuid::from_u128(2);
        assert!(ClaimRecord::new(IDENTITY, file.path()).expect(session, GUEST).is_err());
        let record = ClaimRecord::new(IDENTITY, dir.path());
        record.expect(session, GUEST).unwrap();
        Ownership::of(dir.path(), GUEST).withdraw().unwrap();
        assert!(matches!(record.claim(session, Claim::Mine), Err(ClaimError::Ownership(_))));
        assert_eq!(record.claim(session, Claim::NotMine).unwrap(), Claim::NotMine);
    }

    #[test]
    fn a_claim_that_is_not_made_leaves_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        let (record, session) = (ClaimRecord::new(IDENTITY, dir.path()), Uuid::from_u128(2));
        record.expect(session, GUEST).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(record.claim(session, Claim::NotMine).unwrap(), Claim::NotMine);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn strangers_do_not_fill_memory() {
        let record = ClaimRecord::new(IDENTITY, Path::new("/nonexistent"));
        for number in 0..MAX_SESSIONS as u128 {
            record.claim(Uuid::from_u128(number), Claim::NotMine).unwrap();
        }
        assert!(matches!(record.claim(Uuid::max(), Claim::NotMine), Err(ClaimError::Full)));
    }
}
