//! A machine on its way in: what the migration engine does with this host at the target.

use super::mirrored::{NoRoom, Room, room_for};
use super::offer::{ComingDisk, MachineOffer};
use super::ownership::OwnershipError;
use super::pages::GuestPlaces;
use crate::config::{ConfigError, Disk, DiskPlace, HostLimits, HostResources, Layer, MachineConfig, Memory, Places};
use crate::cpuid::{self, GuestCpu};
use crate::kvm::KvmHost;
use crate::machine::{DiskLocks, EmptyMachine, Machine, MachineError, NoticeListener, Resources, SerialLine};
use crate::memory::{GuestMemory, MemoryError};
use crate::old_copy;
use block::layered::is_partial;
use control::DiskBefore;
use migration::{Offer, Refusal, Region, TargetHost, in_words};
use saved::{SavedError, SavedState};
use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use thiserror::Error;

/// Why the machine does not come to life here.
#[derive(Debug, Error)]
pub enum ArriveError {
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The saved state is malformed.
    #[error(transparent)]
    Saved(#[from] SavedError),
    /// What came of its disks.
    #[error("What came of its disks is not durable")]
    Settle(#[source] std::io::Error),
    /// The engine asked for something out of order.
    #[error("No machine is being received")]
    NothingHere,
}

/// Why this host does not want a machine.
#[derive(Debug, Error)]
enum Unsuited {
    #[error("The machine's description is not one of this version")]
    Description(#[from] serde_json::Error),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("The target's CPU lacks what the guest was started with: {}", .0.join(", "))]
    Cpu(Vec<String>),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Ownership(#[from] OwnershipError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    #[error(
        "Disk {id:?} comes after the guest, and this host has no file for it: name one by `godwit receive --disk {id}=FILE`"
    )]
    NoFile { id: String },
    #[error(
        "Disk {id:?} comes after the guest to {}, where something is left of a move that has not ended: remove it and {}.map, or name another file",
        file.display(), file.display()
    )]
    Left { id: String, file: PathBuf },
    #[error("There are {free} bytes free for disk {id:?} at {}, and it takes {space}: make room, or name another file", file.display())]
    Full { id: String, file: PathBuf, free: u64, space: u64 },
    #[error(
        "The regions offered are not those of a machine with {bytes} bytes of memory and the disks that move with it"
    )]
    Regions { bytes: u64 },
}

/// How far an incoming machine is.
#[derive(Debug)]
enum Stage {
    Nothing,
    Empty { machine: Box<EmptyMachine>, cpu: GuestCpu, running: bool, came: Came },
    Restored { machine: Box<Machine>, running: bool, room: Room },
}

/// What comes page by page, and the files of disks among it.
#[derive(Debug)]
struct Came {
    places: GuestPlaces,
    room: Room,
}

/// Whom a machine comes to.
pub trait Recipient: Send {
    /// Takes note of a machine that is let in, before its memory comes.
    ///
    /// # Errors
    /// No record of it can be kept.
    fn let_in(&mut self, config: &MachineConfig, offer: &Offer<'_>) -> Result<(), OwnershipError>;

    /// Hears what the machine's disks were like at the source, by their ids.
    fn hear_of_disks(&mut self, before: BTreeMap<String, DiskBefore>);

    /// Takes the machine, whose guest goes on from now on. The source does not hear of it before this has returned.
    fn take(&mut self, machine: Machine);
}

/// This host, as it waits for one machine.
pub struct Arriving {
    host: Arc<KvmHost>,
    resources: HostResources,
    line: Arc<SerialLine>,
    listener: NoticeListener,
    recipient: Box<dyn Recipient>,
    stage: Stage,
}

impl fmt::Debug for Arriving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arriving").field("stage", &self.stage).finish_non_exhaustive()
    }
}

impl Arriving {
    /// A host that lays `resources` over what a machine brings along, and gives it to `recipient`. `listener` hears what
    /// happens to it.
    #[must_use]
    pub fn new(
        host: Arc<KvmHost>,
        resources: HostResources,
        line: Arc<SerialLine>,
        listener: NoticeListener,
        recipient: Box<dyn Recipient>,
    ) -> Self {
        Self { host, resources, line, listener, recipient, stage: Stage::Nothing }
    }

    fn build(&mut self, offer: &Offer<'_>, passed: Option<OwnedFd>) -> Result<(Stage, GuestPlaces), Unsuited> {
        let MachineOffer { machine, cpu, running, mirrored, coming, before } = serde_json::from_slice(offer.machine)?;
        let mut config = lay_over(machine.with_host_resources(&self.resources)?, coming, &self.resources.name)?;
        config.validate()?;
        config.validate_for(HostLimits::of(&self.host.capabilities())?)?;
        let supported = self.host.supported_cpuid().map_err(MachineError::from)?;
        cpuid::check_compatible(&cpu, supported, self.host.arch_capabilities()).map_err(Unsuited::Cpu)?;
        let mut room = Room::make(&mut config, &mirrored, &self.resources.name)?;
        let is_old = |disk: &&Disk| !room.has(&disk.id);
        config.disks.iter().filter(is_old).try_for_each(old_copy::check).map_err(MachineError::from)?;
        let resources = Resources::open(&config, DiskLocks::Leave).map_err(MachineError::from)?;
        let Memory { bytes, huge_pages } = config.memory;
        let memory = match passed {
            Some(file) => GuestMemory::adopt(file, bytes, huge_pages)?,
            None => GuestMemory::create(bytes, huge_pages)?,
        };
        let places = GuestPlaces::new(memory.clone(), room.open(&config, &resources)?);
        if places.regions() != offer.regions {
            return Err(Unsuited::Regions { bytes });
        }
        self.recipient.let_in(&config, offer)?;
        self.recipient.hear_of_disks(before);
        let (line, listener) = (Arc::clone(&self.line), Arc::clone(&self.listener));
        let machine = EmptyMachine::around(&self.host, config, memory.clone(), resources, line, listener)?;
        room.keep();
        let came = Came { places: places.clone(), room };
        Ok((Stage::Empty { machine: Box::new(machine), cpu, running, came }, places))
    }
}

/// The machine with the disks that come after it laid over where they come from, in the files that they have at `host`.
fn lay_over(mut config: MachineConfig, coming: Vec<ComingDisk>, host: &str) -> Result<MachineConfig, Unsuited> {
    for ComingDisk { id, base, lent, space } in coming {
        let Some(disk) = config.disks.iter_mut().find(|disk| disk.id == id) else {
            return Err(Unsuited::NoFile { id });
        };
        let file = match &disk.place {
            DiskPlace::File(file) => Some(file),
            // It is not there yet, as a file that is to be made should not be.
            DiskPlace::Nbd(_) | DiskPlace::Layered(_) => disk.places.local.get(host),
        };
        let Some(file) = file.cloned() else { return Err(Unsuited::NoFile { id }) };
        // What was begun for the same disk before is of another moment of it.
        if is_partial(&file) {
            return Err(Unsuited::Left { id, file });
        }
        if let (Some(space), Some(free)) = (space, room_for(&file))
            && space > free
        {
            return Err(Unsuited::Full { id, file, free, space });
        }
        disk.place = DiskPlace::Layered(Layer { file, base, lent });
        // From now on no other place has what the guest writes.
        disk.places = Places::default();
    }
    Ok(config)
}

impl TargetHost for Arriving {
    type Error = ArriveError;
    type Memory = GuestPlaces;

    fn prepare(&mut self, offer: &Offer<'_>, passed: Option<OwnedFd>) -> Result<GuestPlaces, Refusal> {
        let (stage, places) = self.build(offer, passed).map_err(|error| Refusal::new(in_words(&error)))?;
        self.stage = stage;
        Ok(places)
    }

    fn regions(&self) -> Vec<Region> {
        match &self.stage {
            Stage::Empty { came, .. } => came.places.regions(),
            Stage::Nothing | Stage::Restored { .. } => Vec::new(),
        }
    }

    fn settle(&mut self) -> Result<(), ArriveError> {
        match &self.stage {
            Stage::Empty { came, .. } => Ok(came.places.settle().map_err(ArriveError::Settle)?),
            Stage::Nothing | Stage::Restored { .. } => Err(ArriveError::NothingHere),
        }
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), ArriveError> {
        let Stage::Empty { machine, cpu, running, came } = std::mem::replace(&mut self.stage, Stage::Nothing) else {
            return Err(ArriveError::NothingHere);
        };
        let machine = machine.restore(SavedState::decode(state)?, cpu)?;
        machine.reacquire()?;
        self.stage = Stage::Restored { machine: Box::new(machine), running, room: came.room };
        Ok(())
    }

    fn run(&mut self) -> Result<(), ArriveError> {
        let Stage::Restored { mut machine, running, room } = std::mem::replace(&mut self.stage, Stage::Nothing) else {
            return Err(ArriveError::NothingHere);
        };
        room.settle();
        if running {
            machine.run();
        }
        machine.announce();
        self.recipient.take(*machine);
        Ok(())
    }

    fn abandon(&mut self, _: &str) {
        self.stage = Stage::Nothing;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DiskCache, DiskLimits};
    use std::path::Path;
    use tempfile::TempDir;

    fn comes_to(file: &Path, space: Option<u64>) -> Result<MachineConfig, Unsuited> {
        let json = r#"{"version":1,"name":"m","uuid":"00000000-0000-0000-0000-000000000000","cpus":{"count":1},
            "memory":{"bytes":33554432},"boot":{"kernel":"/k"}}"#;
        let mut config: MachineConfig = serde_json::from_str(json).unwrap();
        config.disks.push(Disk {
            id: "data".into(),
            place: DiskPlace::File(file.to_owned()),
            read_only: false,
            cache: DiskCache::default(),
            queues: 1,
            timeout_ms: None,
            limits: DiskLimits::default(),
            places: Places { remote: None, local: [("here".to_owned(), file.to_owned())].into() },
        });
        let base = "nbd://127.0.0.1:9/data".to_owned().try_into().unwrap();
        lay_over(config, vec![ComingDisk { id: "data".into(), base, lent: true, space }], "here")
    }

    #[test]
    fn a_disk_comes_where_there_is_room_and_nothing_else() {
        let folder = TempDir::new().unwrap();
        let file = folder.path().join("disk.img");
        let config = comes_to(&file, Some(4096)).unwrap();
        assert!(matches!(config.disks[0].place, DiskPlace::Layered(_)));
        assert!(config.disks[0].places.is_empty(), "it is nowhere else from then on");
        let told = comes_to(&file, Some(u64::MAX)).unwrap_err().to_string();
        assert!(told.contains("bytes free for disk") && told.contains("make room"), "{told}");
        comes_to(&file, None).unwrap();
        std::fs::write(folder.path().join("disk.img.map"), []).unwrap();
        let told = comes_to(&file, None).unwrap_err().to_string();
        assert!(told.contains("a move that has not ended"), "{told}");
    }
}
