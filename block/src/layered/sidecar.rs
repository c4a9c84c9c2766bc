//! The file beside a layered disk's local file that says which clusters are there: what survives the end of the process, and
//! of the host.
//!
//! `NAME.map`: a header, and a bit for each cluster. A bit is set in it only when the cluster is durable in the local file, so
//! after a crash too little is believed to be here, never too much.

use super::map::CLUSTER;
use rustix::fs::{FlockOperation, flock};
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use thiserror::Error;
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

/// "GWDISKM1".
const MAGIC: u64 = u64::from_le_bytes(*b"GWDISKM1");

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Header {
    magic: U64,
    capacity: U64,
    cluster: U64,
    /// The disk's identity.
    identity: [u8; 16],
}

/// Why a sidecar cannot be used.
#[derive(Debug, Error)]
pub enum SidecarError {
    /// It belongs to another disk, or to none.
    #[error("{} is not of this disk: {why}; remove it and {} to begin anew", path.display(), image_of(path).display())]
    Foreign {
        /// The sidecar.
        path: PathBuf,
        /// What differs.
        why: &'static str,
    },
    /// Another process has it.
    #[error("{} is in use by another process", path.display())]
    InUse {
        /// The sidecar.
        path: PathBuf,
    },
    /// Anything else.
    #[error("Could not use {}", path.display())]
    Host {
        /// The sidecar.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// An open sidecar.
#[derive(Debug)]
pub(super) struct Sidecar {
    file: File,
    path: PathBuf,
    /// What is in it and durable.
    kept: Mutex<Vec<u64>>,
}

/// Where the sidecar of `image` is.
pub(super) fn path_of(image: &Path) -> PathBuf {
    let mut name = OsString::from(image);
    name.push(".map");
    name.into()
}

fn image_of(sidecar: &Path) -> PathBuf {
    sidecar.with_extension("")
}

impl Sidecar {
    /// Opens or makes the sidecar of `image`, and tells which clusters it says are there. One that is there must be of
    /// `identity`, where that is known.
    pub(super) fn open(
        image: &Path,
        capacity: u64,
        identity: Option<[u8; 16]>,
    ) -> Result<(Self, Vec<u64>), SidecarError> {
        let path = path_of(image);
        let host = |source| SidecarError::Host { path: path.clone(), source };
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = opened.map_err(host)?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(SidecarError::InUse { path });
        }
        let words = usize::try_from(capacity.div_ceil(CLUSTER).div_ceil(64)).expect("this VMM is 64-bit only");
        let length = file.metadata().map_err(host)?.len();
        let header = Header {
            magic: MAGIC.into(),
            capacity: capacity.into(),
            cluster: CLUSTER.into(),
            identity: identity.unwrap_or_default(),
        };
        if length == 0 {
            file.write_all_at(header.as_bytes(), 0).map_err(host)?;
            file.sync_all().map_err(host)?;
            let here = vec![0; words];
            return Ok((Self { file, path, kept: Mutex::new(here.clone()) }, here));
        }
        let mut found = Header::new_zeroed();
        file.read_exact_at(found.as_mut_bytes(), 0).map_err(host)?;
        let foreign = |why| SidecarError::Foreign { path: path.clone(), why };
        if found.magic.get() != MAGIC {
            return Err(foreign("it is no map of clusters"));
        }
        if identity.is_some_and(|identity| identity != found.identity) {
            return Err(foreign("it has another identity"));
        }
        if (found.capacity.get(), found.cluster.get()) != (capacity, CLUSTER) {
            return Err(foreign("it has another length"));
        }
        let mut here = vec![0_u64; words];
        // What was never written is not here.
        let there = usize::try_from(length - size_of::<Header>() as u64).unwrap_or(usize::MAX);
        let bytes = here.as_mut_bytes();
        let there = there.min(bytes.len());
        file.read_exact_at(&mut bytes[..there], size_of::<Header>() as u64).map_err(host)?;
        Ok((Self { file, path, kept: Mutex::new(here.clone()) }, here))
    }

    /// Makes durable that these clusters are there, which must be durable themselves. What others said before stays.
    pub(super) fn keep(&self, here: &[u64]) -> io::Result<()> {
        // Held to the end: who finds nothing to do may believe that it is done.
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let all: Vec<u64> = kept.iter().zip(here).map(|(kept, here)| kept | here).collect();
        if *kept != all {
            self.file.write_all_at(all.as_bytes(), size_of::<Header>() as u64)?;
            self.file.sync_data()?;
            *kept = all;
        }
        Ok(())
    }

    /// Takes back all that it says.
    pub(super) fn forget(&self) -> Result<(), SidecarError> {
        let host = |source| SidecarError::Host { path: self.path.clone(), source };
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        self.file.set_len(size_of::<Header>() as u64).map_err(host)?;
        self.file.sync_all().map_err(host)?;
        kept.fill(0);
        Ok(())
    }

    /// Removes it, if nobody has: all clusters are there, and the local file is the disk.
    pub(super) fn remove(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    #[test]
    fn what_is_here_survives_and_belongs_to_one_disk() {
        let folder = TempDir::new().unwrap();
        let image = folder.path().join("disk.img");
        let capacity = 130 * CLUSTER;
        let (sidecar, here) = Sidecar::open(&image, capacity, Some([7; 16])).unwrap();
        assert_eq!(here, [0; 3]);
        assert!(matches!(Sidecar::open(&image, capacity, Some([7; 16])), Err(SidecarError::InUse { .. })));
        sidecar.keep(&[5, u64::MAX, 0]).unwrap();
        sidecar.keep(&[4, 0, 1]).unwrap();
        drop(sidecar);
        let (sidecar, here) = Sidecar::open(&image, capacity, Some([7; 16])).unwrap();
        assert_eq!(here, [5, u64::MAX, 1]);
        sidecar.forget().unwrap();
        sidecar.keep(&[8, 0, 0]).unwrap();
        drop(sidecar);
        let (sidecar, here) = Sidecar::open(&image, capacity, None).unwrap();
        assert_eq!(here, [8, 0, 0]);
        drop(sidecar);
        let error = |capacity, identity| Sidecar::open(&image, capacity, identity).unwrap_err().to_string();
        assert!(error(capacity, Some([8; 16])).contains("another identity"));
        assert!(error(CLUSTER, Some([7; 16])).contains("another length"));
        std::fs::write(path_of(&image), [0; 100]).unwrap();
        let told = error(capacity, Some([7; 16]));
        assert!(told.contains("no map of clusters") && told.ends_with(&format!("{} to begin anew", image.display())));
    }

    #[test]
    fn a_map_that_was_cut_says_too_little_and_not_too_much() {
        let folder = TempDir::new().unwrap();
        let image = folder.path().join("disk.img");
        Sidecar::open(&image, 130 * CLUSTER, None).unwrap().0.keep(&[u64::MAX; 3]).unwrap();
        let file = OpenOptions::new().write(true).open(path_of(&image)).unwrap();
        file.set_len(size_of::<Header>() as u64 + 9).unwrap();
        let (sidecar, here) = Sidecar::open(&image, 130 * CLUSTER, None).unwrap();
        assert_eq!(here, [u64::MAX, 0xff, 0]);
        sidecar.remove().unwrap();
        assert!(!path_of(&image).exists());
    }
}
