//! The durable record of who owns a guest, one small file a guest.
//!
//! A hand-over writes it twice, and never while the guest stands still: the source says "given away" before it pauses the
//! guest; the target notes beside its record that it may become the owner before it takes the offer, and the note becomes
//! the record, "mine", when it does. A process that comes back after a crash reads it, so that a guest that was given away
//! is never started a second time by accident. Written by rename, with file and directory synced: after a crash the record
//! is the old one or the new one, never half of one. It is removed when the question it answers is settled.

use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use thiserror::Error;
use uuid::Uuid;

/// Who owns the guest, as this host last knew for certain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "owner", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Owner {
    /// The guest was received here, by this migration session.
    Mine {
        /// The migration session.
        session: Uuid,
    },
    /// The guest was given to another host, by this migration session.
    GivenAway {
        /// The migration session.
        session: Uuid,
        /// Where it went, as the operator named it.
        to: String,
    },
}

/// Why the record could not be read or written.
#[derive(Debug, Error)]
pub enum OwnershipError {
    /// The file system refused.
    #[error("Cannot {action} the ownership record {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The record.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// No records can be made.
    #[error("No ownership record can be written in {}; name another folder with --state-dir", path.display())]
    Folder {
        /// Where they belong.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The file is not a record.
    #[error("The ownership record {} is damaged; look at it, then remove it", path.display())]
    Damaged {
        /// The record.
        path: PathBuf,
        /// Where it stops making sense.
        #[source]
        source: serde_json::Error,
    },
}

/// The place of one guest's record.
#[derive(Debug, Clone)]
pub struct Ownership {
    path: PathBuf,
}

impl Ownership {
    /// The record of `guest` under `state_dir`, which is created when the first record is written.
    #[must_use]
    pub fn of(state_dir: &Path, guest: Uuid) -> Self {
        Self { path: state_dir.join(format!("{guest}.owner")) }
    }

    /// Checks that records can be written under `state_dir`, and creates it: a guest that arrives must not be the first
    /// to find out.
    ///
    /// # Errors
    /// [`OwnershipError::Folder`].
    pub fn check_folder(state_dir: &Path) -> Result<(), OwnershipError> {
        let trial = state_dir.join(format!("trial.{}", std::process::id()));
        let written =
            fs::create_dir_all(state_dir).and_then(|()| File::create(&trial)).and_then(|_| fs::remove_file(&trial));
        written.map_err(|source| OwnershipError::Folder { path: state_dir.to_owned(), source })
    }

    /// The folder of this host's records.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(&self.path)
    }

    /// Where the record lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the record says; `None` where there is none.
    ///
    /// # Errors
    /// [`OwnershipError`] if it cannot be read or is damaged.
    pub fn read(&self) -> Result<Option<Owner>, OwnershipError> {
        match fs::read(&self.path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|source| OwnershipError::Damaged { path: self.path.clone(), source }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(self.io("read", source)),
        }
    }

    /// Replaces the record. When this returns, a crash of the host does not undo it.
    ///
    /// # Errors
    /// [`OwnershipError::Io`]; after a crash of the host the old record or the new one stands then, whole.
    pub fn write(&self, owner: &Owner) -> Result<(), OwnershipError> {
        self.put(owner, &self.path).map_err(|source| self.io("write", source))
    }

    /// Notes beside the record what it is to become. When this returns, a crash of the host does not undo it.
    ///
    /// # Errors
    /// [`OwnershipError::Io`].
    pub fn announce(&self, owner: &Owner) -> Result<(), OwnershipError> {
        self.put(owner, &self.note()).map_err(|source| self.io("announce", source))
    }

    /// The note becomes the record, at once for this process; after a crash of the host either stands, until
    /// [`sync`](Self::sync) has returned.
    ///
    /// # Errors
    /// [`OwnershipError::Io`] if there is no note, or it cannot be moved.
    pub fn confirm(&self) -> Result<(), OwnershipError> {
        fs::rename(self.note(), &self.path).map_err(|source| self.io("confirm", source))
    }

    /// Removes the note, if there is one.
    ///
    /// # Errors
    /// [`OwnershipError::Io`] if it is there and stays.
    pub fn withdraw(&self) -> Result<(), OwnershipError> {
        match fs::remove_file(self.note()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.io("withdraw", error)),
            _ => Ok(()),
        }
    }

    /// Makes what was confirmed durable.
    ///
    /// # Errors
    /// [`OwnershipError::Io`].
    pub fn sync(&self) -> Result<(), OwnershipError> {
        let synced = File::open(self.directory()).and_then(|directory| directory.sync_all());
        synced.map_err(|source| self.io("sync", source))
    }

    /// Removes a record that says that the guest was given away, which it was not after all.
    ///
    /// # Errors
    /// [`OwnershipError`] if the record cannot be read, or is there and stays.
    pub fn take_back(&self) -> Result<(), OwnershipError> {
        match self.read()? {
            Some(Owner::GivenAway { .. }) => self.remove(),
            Some(Owner::Mine { .. }) | None => Ok(()),
        }
    }

    /// Removes the record, if there is one: nobody need ask any more. A crash of the host does not undo it.
    ///
    /// # Errors
    /// [`OwnershipError::Io`] if it is there and stays.
    pub fn remove(&self) -> Result<(), OwnershipError> {
        let removed = fs::remove_file(&self.path).and_then(|()| File::open(self.directory())?.sync_all());
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.io("remove", error)),
            _ => Ok(()),
        }
    }

    fn put(&self, owner: &Owner, place: &Path) -> io::Result<()> {
        let directory = self.directory();
        fs::create_dir_all(directory)?;
        let fresh = self.path.with_extension(format!("owner.{}", std::process::id()));
        let written = (|| {
            let mut file = File::create(&fresh)?;
            file.write_all(&serde_json::to_vec(owner)?)?;
            file.sync_all()?;
            fs::rename(&fresh, place)
        })();
        if written.is_err() {
            let _ = fs::remove_file(&fresh);
        }
        written?;
        File::open(directory)?.sync_all()
    }

    fn note(&self) -> PathBuf {
        self.path.with_extension("arriving")
    }

    fn directory(&self) -> &Path {
        self.path.parent().unwrap_or_else(|| Path::new("."))
    }

    fn io(&self, action: &'static str, source: io::Error) -> OwnershipError {
        OwnershipError::Io { action, path: self.path.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given_away() -> Owner {
        Owner::GivenAway { session: Uuid::from_u128(7), to: "tcp://b:4444".into() }
    }

    #[test]
    fn a_record_is_replaced_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let record = Ownership::of(&dir.path().join("not/yet/there"), Uuid::from_u128(1));
        assert_eq!(record.read().unwrap(), None);
        record.write(&Owner::Mine { session: Uuid::from_u128(6) }).unwrap();
        record.write(&given_away()).unwrap();
        assert_eq!(record.read().unwrap(), Some(given_away()));
        let beside: Vec<_> = fs::read_dir(record.path().parent().unwrap()).unwrap().collect();
        assert_eq!(beside.len(), 1, "the fresh file does not stay");
        record.remove().unwrap();
        record.remove().unwrap();
        assert_eq!(record.read().unwrap(), None);
    }

    #[test]
    fn a_note_becomes_the_record_or_goes() {
        let dir = tempfile::tempdir().unwrap();
        let record = Ownership::of(dir.path(), Uuid::from_u128(1));
        let mine = Owner::Mine { session: Uuid::from_u128(6) };
        record.write(&given_away()).unwrap();
        assert!(matches!(record.confirm(), Err(OwnershipError::Io { action: "confirm", .. })));
        record.announce(&mine).unwrap();
        assert_eq!(record.read().unwrap(), Some(given_away()), "nothing is decided");
        record.withdraw().unwrap();
        record.withdraw().unwrap();
        assert!(record.confirm().is_err());
        record.announce(&mine).unwrap();
        record.confirm().unwrap();
        record.sync().unwrap();
        assert_eq!(record.read().unwrap(), Some(mine));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the note does not stay");
    }

    #[test]
    fn only_what_was_given_away_is_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let record = Ownership::of(dir.path(), Uuid::from_u128(1));
        let mine = Owner::Mine { session: Uuid::from_u128(6) };
        record.write(&mine).unwrap();
        record.take_back().unwrap();
        assert_eq!(record.read().unwrap(), Some(mine));
        record.write(&given_away()).unwrap();
        record.take_back().unwrap();
        record.take_back().unwrap();
        assert_eq!(record.read().unwrap(), None);
    }

    #[test]
    fn the_record_is_readable_text() {
        assert_eq!(
            serde_json::to_string(&given_away()).unwrap(),
            r#"{"owner":"given-away","session":"00000000-0000-0000-0000-000000000007","to":"tcp://b:4444"}"#
        );
    }

    #[test]
    fn a_damaged_record_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let record = Ownership::of(dir.path(), Uuid::from_u128(1));
        fs::write(record.path(), b"{\"owner\":\"mi").unwrap();
        let error = record.read().unwrap_err();
        assert!(error.to_string().contains(".owner is damaged"), "{error}");
    }

    #[test]
    fn a_refusing_directory_is_an_error_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, b"").unwrap();
        let record = Ownership::of(&file, Uuid::from_u128(1));
        assert!(matches!(record.write(&given_away()), Err(OwnershipError::Io { action: "write", .. })));
    }
}
