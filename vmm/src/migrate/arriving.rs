//! A machine on its way in: what the migration engine does with this host at the target.

use super::offer::MachineOffer;
use super::ownership::OwnershipError;
use crate::config::{ConfigError, HostLimits, HostResources, MachineConfig, Memory};
use crate::cpuid::{self, GuestCpu};
use crate::kvm::KvmHost;
use crate::machine::{DiskLocks, EmptyMachine, Machine, MachineError, NoticeListener, Resources, SerialLine};
use crate::memory::{GuestMemory, MemoryError};
use migration::{Offer, RamRegion, Refusal, TargetHost, in_words};
use saved::{SavedError, SavedState};
use std::fmt;
use std::os::fd::OwnedFd;
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
    #[error("The memory regions offered are not those of a machine with {bytes} bytes of memory")]
    Regions { bytes: u64 },
}

/// How far an incoming machine is.
#[derive(Debug)]
enum Stage {
    Nothing,
    Empty { machine: Box<EmptyMachine>, cpu: GuestCpu, running: bool },
    Restored { machine: Box<Machine>, running: bool },
}

/// Whom a machine comes to.
pub trait Recipient: Send {
    /// Takes note of a machine that is let in, before its memory comes.
    ///
    /// # Errors
    /// No record of it can be kept.
    fn let_in(&mut self, config: &MachineConfig, offer: &Offer<'_>) -> Result<(), OwnershipError>;

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

    fn build(&mut self, offer: &Offer<'_>, passed: Option<OwnedFd>) -> Result<(Stage, GuestMemory), Unsuited> {
        let MachineOffer { machine, cpu, running } = serde_json::from_slice(offer.machine)?;
        let config = machine.with_host_resources(&self.resources)?;
        config.validate()?;
        config.validate_for(HostLimits::of(&self.host.capabilities())?)?;
        let supported = self.host.supported_cpuid().map_err(MachineError::from)?;
        cpuid::check_compatible(&cpu, supported, self.host.arch_capabilities()).map_err(Unsuited::Cpu)?;
        let resources = Resources::open(&config, DiskLocks::Leave).map_err(MachineError::from)?;
        let Memory { bytes, huge_pages } = config.memory;
        let memory = match passed {
            Some(file) => GuestMemory::adopt(file, bytes, huge_pages)?,
            None => GuestMemory::create(bytes, huge_pages)?,
        };
        if memory.regions() != offer.regions {
            return Err(Unsuited::Regions { bytes });
        }
        self.recipient.let_in(&config, offer)?;
        let (line, listener) = (Arc::clone(&self.line), Arc::clone(&self.listener));
        let machine = EmptyMachine::around(&self.host, config, memory.clone(), resources, line, listener)?;
        Ok((Stage::Empty { machine: Box::new(machine), cpu, running }, memory))
    }
}

impl TargetHost for Arriving {
    type Error = ArriveError;
    type Memory = GuestMemory;

    fn prepare(&mut self, offer: &Offer<'_>, passed: Option<OwnedFd>) -> Result<GuestMemory, Refusal> {
        let (stage, memory) = self.build(offer, passed).map_err(|error| Refusal::new(in_words(&error)))?;
        self.stage = stage;
        Ok(memory)
    }

    fn regions(&self) -> Vec<RamRegion> {
        match &self.stage {
            Stage::Nothing => Vec::new(),
            Stage::Empty { machine, .. } => machine.memory().regions().to_vec(),
            Stage::Restored { machine, .. } => machine.memory().regions().to_vec(),
        }
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), ArriveError> {
        let Stage::Empty { machine, cpu, running } = std::mem::replace(&mut self.stage, Stage::Nothing) else {
            return Err(ArriveError::NothingHere);
        };
        let machine = machine.restore(SavedState::decode(state)?, cpu)?;
        machine.reacquire()?;
        self.stage = Stage::Restored { machine: Box::new(machine), running };
        Ok(())
    }

    fn run(&mut self) -> Result<(), ArriveError> {
        let Stage::Restored { mut machine, running } = std::mem::replace(&mut self.stage, Stage::Nothing) else {
            return Err(ArriveError::NothingHere);
        };
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
