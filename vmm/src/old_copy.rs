//! Files that hold a disk as it was at some moment, and not as it is: the place that a disk has left, and the place that it
//! has not come to yet.
//!
//! Beside such a file, `NAME.godwit-old` says so: whose disk it is, and why it is old. Nobody opens the file as a disk then; a move
//! that brings the same disk there takes the file for a start. Invariant: a file that is a guest's disk has no such note from
//! the moment on at which the guest runs on it; at a crash in between there is a note too many, never one too few.

use crate::config::{Disk, DiskPlace};
use crate::machine::{OpenError, ResourceError};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// The longest note, in bytes: far longer than an address.
const LONGEST: u64 = 64 << 10;

/// What is noted of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OldCopy {
    /// The disk: see [`identity`].
    pub(crate) disk: Uuid,
    /// Why, for people: a sentence about the file without its name.
    pub(crate) why: String,
}

/// What a disk is known by, wherever it is: the machine, and the disk's name in it.
pub(crate) fn identity(machine: Uuid, id: &str) -> Uuid {
    Uuid::new_v5(&machine, id.as_bytes())
}

/// Where the note of `file` is.
pub(crate) fn place(file: &Path) -> PathBuf {
    let mut name = OsString::from(file);
    name.push(".godwit-old");
    name.into()
}

/// What is noted of `file`; `None` if nothing is.
///
/// # Errors
/// The note is there and cannot be read: then the file is not to be used.
pub(crate) fn read(file: &Path) -> io::Result<Option<OldCopy>> {
    let note = match File::open(place(file)) {
        Ok(note) => note,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut json = Vec::new();
    note.take(LONGEST).read_to_end(&mut json)?;
    Ok(Some(serde_json::from_slice(&json)?))
}

/// Whether a disk is one: that it is in no file that holds an old copy.
///
/// # Errors
/// [`OpenError::Old`], or that it is not known.
pub(crate) fn check(disk: &Disk) -> Result<(), ResourceError> {
    let path = match &disk.place {
        DiskPlace::File(file) => file.clone(),
        DiskPlace::Layered(layer) if layer.file.exists() => layer.file.clone(),
        DiskPlace::Layered(_) | DiskPlace::Nbd(_) => return Ok(()),
    };
    match read(&path) {
        Ok(None) => Ok(()),
        Ok(Some(OldCopy { why, .. })) => Err(OpenError::Old { note: place(&path), path, why }.into()),
        Err(source) => Err(OpenError::Held { id: disk.id.clone(), source }.into()),
    }
}

/// Notes that `file` is old. When this returns, a crash of the host does not undo it.
///
/// # Errors
/// The host's refusal, or something of this name is no note; after a crash there is the whole note then, or none.
pub(crate) fn write(file: &Path, note: &OldCopy) -> io::Result<()> {
    read(file)?;
    let unfinished = unfinished(file);
    let written = File::create(&unfinished).and_then(|mut made| {
        made.write_all(&serde_json::to_vec(note)?)?;
        made.sync_all()?;
        fs::rename(&unfinished, place(file))
    });
    written.inspect_err(|_| drop(fs::remove_file(&unfinished)))?;
    sync_folder(file)
}

/// Whether a note of `file` could be written.
///
/// # Errors
/// Why not.
pub(crate) fn try_write(file: &Path) -> io::Result<()> {
    read(file)?;
    File::create(unfinished(file))?;
    fs::remove_file(unfinished(file))
}

/// Takes a note back, if there is one. A crash of the host may undo that, until [`sync_folder`].
///
/// # Errors
/// The host's refusal, or something of this name is no note.
pub(crate) fn remove(file: &Path) -> io::Result<()> {
    if read(file)?.is_some() { fs::remove_file(place(file)) } else { Ok(()) }
}

/// Where a note is made.
fn unfinished(file: &Path) -> PathBuf {
    let mut name = OsString::from(place(file));
    name.push(".new");
    name.into()
}

/// Makes durable which files are beside `file`.
///
/// # Errors
/// The host's refusal.
pub(crate) fn sync_folder(file: &Path) -> io::Result<()> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_there_whole_or_not() {
        let folder = tempfile::TempDir::new().unwrap();
        let file = folder.path().join("disk.img");
        let note = OldCopy { disk: identity(Uuid::from_u128(1), "data"), why: "It has moved".into() };
        assert_eq!(read(&file).unwrap(), None);
        remove(&file).unwrap();
        write(&file, &note).unwrap();
        write(&file, &note).unwrap();
        assert_eq!(read(&file).unwrap(), Some(note.clone()));
        try_write(&file).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
        remove(&file).unwrap();
        assert_eq!(read(&file).unwrap(), None);
        // What is no note is nobody's to write over or to remove.
        fs::write(place(&file), "{").unwrap();
        read(&file).unwrap_err();
        write(&file, &note).unwrap_err();
        try_write(&file).unwrap_err();
        remove(&file).unwrap_err();
        assert_eq!(fs::read(place(&file)).unwrap(), b"{");
        assert_ne!(identity(Uuid::from_u128(1), "data"), identity(Uuid::from_u128(1), "date"));
    }
}
