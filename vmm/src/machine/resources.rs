//! What a machine uses of its host: disks and taps. Opened before anything is built, so that what is missing
//! is told early, and at the target of a migration before the source has sent a page.

use super::disks::{DiskLocks, Disks, OpenError};
use crate::config::{MachineConfig, Nic, Tap as TapChoice, Vhost as VhostChoice};
use crate::old_copy;
use devices::GuestRam;
use devices::virtio::net::{NetParts, Tap, TapError, Vhost, VhostError, VhostMode};
use std::path::Path;
use thiserror::Error;

/// Why the host does not have what a machine needs.
#[derive(Debug, Error)]
pub enum ResourceError {
    /// A disk.
    #[error(transparent)]
    Disk(#[from] OpenError),
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

/// What is open of a machine's host resources.
#[derive(Debug)]
pub struct Resources {
    pub(crate) disks: Disks,
    pub(crate) taps: Vec<Tap>,
}

impl Resources {
    /// Opens the disks and taps of `config`, in its order. Whoever does not take locks sees to it that no file is an old copy.
    ///
    /// # Errors
    /// [`ResourceError`]; what was opened is closed again.
    pub fn open(config: &MachineConfig, locks: DiskLocks) -> Result<Self, ResourceError> {
        if locks == DiskLocks::Take {
            config.disks.iter().try_for_each(old_copy::check)?;
        }
        let disks = Disks::open(config, locks)?;
        let taps = config.nics.iter().map(open_tap).collect::<Result<_, _>>()?;
        Ok(Self { disks, taps })
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
}
