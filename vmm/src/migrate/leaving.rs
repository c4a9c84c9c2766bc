//! A machine on its way out: what the migration engine does with it at the source.

use super::lending::Lending;
use super::mirror::{Mirror, MirrorError};
use super::offer::MachineOffer;
use super::ownership::{Owner, Ownership, OwnershipError};
use super::pages::GuestPlaces;
use crate::machine::{Machine, MachineError};
use control::{DiskBefore, Millis, PeerAddress};
use migration::{Description, DirtyLedger, SourceGuest};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use uuid::Uuid;

/// Why the machine does not go.
#[derive(Debug, Error)]
pub enum LeaveError {
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The record of who owns the guest.
    #[error(transparent)]
    Ownership(#[from] OwnershipError),
    /// The disks that move with it.
    #[error(transparent)]
    Mirror(#[from] MirrorError),
    /// The description cannot be written.
    #[error("The machine's description cannot be encoded")]
    Describe(#[from] serde_json::Error),
}

/// A machine that is to leave, and whether it ran before.
#[derive(Debug)]
pub struct Leaving {
    machine: Machine,
    running: bool,
    ownership: Ownership,
    to: PeerAddress,
    /// Disks that come before it.
    mirror: Mirror,
    /// Disks that come after it.
    lending: Option<Arc<Lending>>,
}

impl Leaving {
    /// Prepares `machine` to leave to `to`. `ownership` is the guest's record; `mirror` has the disks that come before it, and
    /// `lending` those that come after it.
    #[must_use]
    pub fn new(
        machine: Machine,
        ownership: Ownership,
        to: PeerAddress,
        mirror: Mirror,
        lending: Option<Arc<Lending>>,
    ) -> Self {
        Self { running: machine.is_running(), machine, ownership, to, mirror, lending }
    }

    /// The machine that stays after all.
    #[must_use]
    pub fn into_machine(self) -> Machine {
        self.machine
    }

    /// The machine.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }
}

/// What the disks of `machine` are like here.
fn before(machine: &Machine) -> BTreeMap<String, DiskBefore> {
    let disks = machine.config().disks.iter().zip(machine.disks());
    disks
        .map(|(config, disk)| {
            let counts = disk.with(|disk, _| disk.counters().now());
            let mean = |sum: Duration, count: u64| {
                let count = u32::try_from(count).unwrap_or(u32::MAX);
                sum.checked_div(count).map(Millis::from)
            };
            let before = DiskBefore {
                place: config.place.to_string(),
                mean_read_ms: mean(counts.read_time, counts.reads),
                mean_write_ms: mean(counts.write_time, counts.writes),
            };
            (config.id.clone(), before)
        })
        .collect()
}

impl SourceGuest for Leaving {
    type Error = LeaveError;
    type Memory = GuestPlaces;

    fn memory(&self) -> GuestPlaces {
        self.mirror.places().clone()
    }

    fn describe(&self) -> Result<Description, LeaveError> {
        let offer = MachineOffer {
            machine: self.machine.config().clone(),
            cpu: self.machine.cpu().clone(),
            running: self.running,
            before: before(&self.machine),
            mirrored: self.mirror.offered(),
            coming: self.lending.iter().flat_map(|lending| lending.offered()).cloned().collect(),
        };
        Ok(Description {
            vm: self.machine.config().uuid,
            regions: self.mirror.places().regions(),
            machine: serde_json::to_vec(&offer)?,
        })
    }

    fn start_dirty_log(&mut self) -> Result<(), LeaveError> {
        self.mirror.start_log();
        Ok(self.machine.start_dirty_log()?)
    }

    fn harvest_dirty(&mut self, ledger: &mut DirtyLedger) -> Result<(), LeaveError> {
        self.machine.harvest_dirty(ledger)?;
        self.mirror.harvest(ledger);
        Ok(())
    }

    fn written_by_vcpu(&self) -> Option<Vec<u64>> {
        self.machine.written_by_vcpu()
    }

    fn throttle(&mut self, shares: &[f64]) -> Result<(), LeaveError> {
        Ok(self.machine.throttle(shares)?)
    }

    fn unthrottle(&mut self) -> Result<(), LeaveError> {
        let nothing = vec![0.0; self.machine.time_taken().len()];
        Ok(self.machine.throttle(&nothing)?)
    }

    fn time_taken(&self) -> Vec<Duration> {
        self.machine.time_taken()
    }

    fn stop_dirty_log(&mut self) -> Result<(), LeaveError> {
        self.mirror.stop_log();
        Ok(self.machine.stop_dirty_log()?)
    }

    fn pause(&mut self) -> Result<(), LeaveError> {
        self.machine.stand()?;
        match self.machine.ended() {
            None => Ok(()),
            Some(end) => Err(MachineError::Ended(end.clone()).into()),
        }
    }

    fn save(&mut self) -> Result<Vec<u8>, LeaveError> {
        Ok(self.machine.save()?.encode())
    }

    fn release(&mut self) -> Result<(), LeaveError> {
        self.machine.release();
        Ok(())
    }

    fn reacquire(&mut self) -> Result<(), LeaveError> {
        self.lending.iter().for_each(|lending| lending.end());
        Ok(self.machine.reacquire()?)
    }

    fn record_given_away(&mut self, session: Uuid) -> Result<(), LeaveError> {
        self.mirror.note_gone(&self.to)?;
        Ok(self.ownership.write(&Owner::GivenAway { session, to: self.to.to_string() })?)
    }

    fn record_kept(&mut self, _: Uuid) -> Result<(), LeaveError> {
        self.mirror.note_kept()?;
        Ok(self.ownership.remove()?)
    }

    fn resume(&mut self) -> Result<(), LeaveError> {
        if self.running {
            self.machine.run();
        }
        Ok(())
    }
}
