//! What a machine uses of its host: disks and taps. Opened before anything is built, so that what is missing
//! is told early, and at the target of a migration before the source has sent a page.

use crate::config::{Disk, MachineConfig, Nic, Tap as TapChoice, Vhost as VhostChoice};
use devices::GuestRam;
use devices::virtio::blk::{Access, DiskError, FileBackend};
use devices::virtio::net::{NetParts, Tap, TapError, Vhost, VhostError, VhostMode};
use std::path::Path;
use thiserror::Error;

/// Why the host does not have what a machine needs.
#[derive(Debug, Error)]
pub enum ResourceError {
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The kernel does not move a NIC's frames.
    #[error(transparent)]
    Vhost(#[from] VhostError),
    /// A tap that was to be used is not there.
    #[error(
        "There is no tap {name}: make it with `ip tuntap add dev {name} mode tap`, or let it be made by create={name}"
    )]
    NoTap {
        /// The tap.
        name: String,
    },
    /// A tap that was to be made is there.
    #[error("There is a network device {name} already: use it by tap={name}, or choose another name")]
    TapThere {
        /// The tap.
        name: String,
    },
}

/// Whether the locks of disks are free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskLocks {
    /// Take them now.
    Take,
    /// The source of a migration still holds them; they are taken with the guest.
    Leave,
}

/// What is open of a machine's host resources.
#[derive(Debug)]
pub struct Resources {
    pub(crate) disks: Vec<FileBackend>,
    pub(crate) taps: Vec<Tap>,
}

impl Resources {
    /// Opens the disks and taps of `config`, in its order.
    ///
    /// # Errors
    /// [`ResourceError`]; what was opened is closed again.
    pub fn open(config: &MachineConfig, locks: DiskLocks) -> Result<Self, ResourceError> {
        let disks = Self::open_disks(config, locks)?;
        let taps = config.nics.iter().map(open_tap).collect::<Result<_, _>>()?;
        Ok(Self { disks, taps })
    }

    /// Opens the disks of `config` alone.
    pub(crate) fn open_disks(config: &MachineConfig, locks: DiskLocks) -> Result<Vec<FileBackend>, ResourceError> {
        config.disks.iter().map(|disk| Ok(open_disk(disk, locks)?)).collect()
    }
}

/// What the NIC `nic` needs, on the open `tap`.
pub(crate) fn net_parts(nic: &Nic, tap: Tap, ram: &GuestRam) -> Result<NetParts, VhostError> {
    let mode = match nic.vhost {
        VhostChoice::Auto => VhostMode::Auto,
        VhostChoice::On => VhostMode::On,
        VhostChoice::Off => VhostMode::Off,
    };
    Ok(NetParts { vhost: Vhost::open(mode, ram)?, port: Box::new(tap) })
}

fn open_disk(disk: &Disk, locks: DiskLocks) -> Result<FileBackend, DiskError> {
    let access = if disk.read_only { Access::ReadOnly } else { Access::ReadWrite };
    match locks {
        DiskLocks::Take => FileBackend::open(&disk.path, access),
        DiskLocks::Leave => FileBackend::open_unlocked(&disk.path, access),
    }
}

fn open_tap(nic: &Nic) -> Result<Tap, ResourceError> {
    let name = nic.tap.name();
    let there = Path::new("/sys/class/net").join(name).exists();
    match (&nic.tap, there) {
        (TapChoice::Existing(_), false) => Err(ResourceError::NoTap { name: name.to_owned() }),
        (TapChoice::Create(_), true) => Err(ResourceError::TapThere { name: name.to_owned() }),
        (TapChoice::Existing(_), true) | (TapChoice::Create(_), false) => Ok(Tap::open(name)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Mac;

    fn nic(tap: TapChoice) -> Nic {
        Nic { id: "net0".into(), tap, mac: Mac([0x52, 0, 0, 0, 0, 1]), vhost: VhostChoice::Off }
    }

    #[test]
    fn a_tap_must_be_there_or_must_not_be() {
        let error = open_tap(&nic(TapChoice::Existing("no-such-tap".into()))).unwrap_err();
        assert!(error.to_string().contains("create=no-such-tap"), "{error}");
        let error = open_tap(&nic(TapChoice::Create("lo".into()))).unwrap_err();
        assert!(error.to_string().contains("tap=lo"), "{error}");
    }

    #[test]
    fn a_disk_is_opened_with_and_without_its_lock() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let disk = Disk { id: "blk0".into(), path: file.path().into(), read_only: false };
        let held = open_disk(&disk, DiskLocks::Take).unwrap();
        assert!(matches!(open_disk(&disk, DiskLocks::Take), Err(DiskError::Locked { .. })));
        open_disk(&disk, DiskLocks::Leave).unwrap();
        drop(held);
        open_disk(&disk, DiskLocks::Take).unwrap();
    }
}
