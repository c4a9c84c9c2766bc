//! Disks that come to the target after the guest: this host serves them by NBD until the target has all of them.
//!
//! ```text
//! source: Lending::start -- offer --> ... release ... Go ... serves ... all given up --> on_free
//! target:                    looks at each export ... holds it ... reads ......... gives up
//! ```
//! An export's name is a key that nobody guesses, since whoever knows it may read the disk. Invariant: the disk's lock is
//! taken for the target only when the guest's machine has released it, and the target is turned out before that takes it
//! back.

use super::offer::ComingDisk;
use crate::config::{Disk, DiskPlace, ExportUri};
use crate::machine::file_options;
use crate::seccomp;
use block::nbd::server::ListenError;
use block::nbd::uri::{Address, Privacy};
use block::{Access, DiskError, Export, FileBackend, LentBackend, Listener, NbdServer, NbdUri, ServerOptions};
use control::{NoRandomness, random_uuid};
use std::fs::Metadata;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use thiserror::Error;

/// The most connections of a target for each disk: more than a client makes.
const CLIENTS_OF_DISK: usize = 40;

/// Who hears that nothing of a disk is needed any more.
pub type OnFree = Arc<dyn Fn() + Send + Sync>;

/// Why disks cannot be lent.
#[derive(Debug, Error)]
pub enum LendError {
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// There is nowhere to wait for the target.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// No key can be made.
    #[error(transparent)]
    Randomness(#[from] NoRandomness),
    /// Anything else.
    #[error("The guest's disks cannot be served to the target")]
    Host(#[source] io::Error),
}

/// Disks that are lent to the target.
#[derive(Debug)]
pub struct Lending {
    server: Mutex<Option<NbdServer>>,
    lent: Vec<Arc<LentBackend>>,
    offered: Vec<ComingDisk>,
}

impl Lending {
    /// Serves those of `disks` that are files, at the address `here` of this host, or at a Unix socket in `state_dir`; those
    /// that are exports the target reads where they are. `on_free` hears of each file that is not needed any more.
    ///
    /// # Errors
    /// [`LendError`]; nothing is served then.
    pub fn start(disks: &[Disk], here: Option<IpAddr>, state_dir: &Path, on_free: &OnFree) -> Result<Self, LendError> {
        let mut offered: Vec<_> = disks.iter().filter_map(read_there).collect();
        let files = disks.iter().filter_map(|disk| match &disk.place {
            DiskPlace::File(path) => Some((disk, path)),
            // One that is not all here does not leave.
            DiskPlace::Nbd(_) | DiskPlace::Layered(_) => None,
        });
        let files: Vec<_> = files.collect();
        if files.is_empty() {
            return Ok(Self { server: Mutex::default(), lent: Vec::new(), offered });
        }
        let key = random_uuid()?;
        let listener = Listener::bind(&match here {
            Some(here) => Address::Tcp { host: here.to_string(), port: 0 },
            None => {
                std::fs::create_dir_all(state_dir).map_err(LendError::Host)?;
                Address::Unix(state_dir.join(format!("lent-{key}.sock")))
            }
        })?;
        let address = listener.address().clone();
        let (mut exports, mut lent) = (Vec::new(), Vec::new());
        for (disk, path) in files {
            let id = disk.id.clone();
            let file = FileBackend::open_unlocked(path, file_options(disk, Access::ReadOnly))?;
            let on_free = Arc::clone(on_free);
            let backend = Arc::new(LentBackend::new(Arc::new(file), move || on_free()));
            lent.push(Arc::clone(&backend));
            let name = format!("{key}/{id}");
            let uri = NbdUri { address: address.clone(), export: name.clone(), privacy: Privacy::Plain };
            offered.push(ComingDisk { id, base: ExportUri(uri), lent: true, space: space_of(path) });
            let description = format!("disk {}", disk.id);
            exports.push(Export { name, description, backend, access: Access::ReadWrite });
        }
        let options = ServerOptions {
            clients: CLIENTS_OF_DISK * lent.len(),
            lists: false,
            thread_start: seccomp::enter_disk_server,
            ..ServerOptions::default()
        };
        let server = NbdServer::start(vec![listener], exports, options).map_err(LendError::Host)?;
        Ok(Self { server: Mutex::new(Some(server)), lent, offered })
    }

    /// What the target is told.
    #[must_use]
    pub fn offered(&self) -> &[ComingDisk] {
        &self.offered
    }

    /// Whether the target needs nothing of it any more.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.lent.iter().all(|disk| disk.is_free())
    }

    /// Turns the target out, and takes no other in.
    pub fn end(&self) {
        drop(self.server.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.lent.iter().for_each(|disk| disk.end());
    }
}

/// What the target is told of a disk that it reads where it is: an export.
fn read_there(disk: &Disk) -> Option<ComingDisk> {
    let DiskPlace::Nbd(uri) = &disk.place else { return None };
    Some(ComingDisk { id: disk.id.clone(), base: uri.clone(), lent: false, space: None })
}

/// How much space a file takes; of a block device that is not known.
pub(crate) fn space_of(path: &Path) -> Option<u64> {
    let metadata = std::fs::metadata(path).ok().filter(Metadata::is_file)?;
    // The unit is 512 bytes, whatever the file system's is (stat(2)).
    Some(metadata.blocks() * 512)
}
