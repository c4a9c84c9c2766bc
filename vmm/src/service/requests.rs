//! What API threads ask for, done in order by the loop that has the machine.
//!
//! A request is admitted by phase first. Who has lost the guest by what it was asked says so to the loop, which ends.

use super::incoming::Incoming;
use super::{Holding, Message, Service};
use crate::config::{Boot, Disk, DiskPlace, Layer};
use crate::machine::{DiskLocks, Machine, MachineError, Resources};
use crate::migrate::ownership::Ownership;
use crate::old_copy;
use control::{ApiError, Code, MigrationStep, Phase, Pulsed, Refusal, Reply, Request, ResizeDisk, admit};
use std::fs::File;
use std::time::{Duration, Instant};

/// How long a disk's server may take to be connected to.
const REACH_WITHIN: Duration = Duration::from_secs(3);

impl Service {
    /// Does what is asked of a machine that is here.
    pub(super) fn answer(&mut self, request: Request) -> Result<Reply, ApiError> {
        // The phase may have changed since the server asked.
        admit(self.board.phase(), &request)?;
        match request {
            Request::ShowVm => Ok(Reply::Vm(self.board.vm())),
            Request::ListDisks => Ok(Reply::Disks(self.board.disks())),
            Request::ListNics => Ok(Reply::Nics(self.board.nics())),
            Request::ShowMigration => Ok(Reply::Migration(self.board.last_migration())),
            Request::ShowDirtyRate => Ok(Reply::DirtyRate(self.board.last_dirty_rate())),
            Request::ShowBalloon => self.board.balloon().map(Reply::Balloon).ok_or_else(no_balloon),
            Request::Pause => self.pause(),
            Request::Resume => self.resume(),
            Request::PowerButton => self.press_power_button(),
            Request::Stop(stop) => {
                self.force_stop_at =
                    stop.force_after_s.map(|seconds| Instant::now() + Duration::from_secs(seconds.get().into()));
                self.press_power_button()
            }
            Request::Kill => Ok(Reply::Done),
            Request::Reset => self.reset(),
            Request::SetBalloon(target) => self.set_balloon(target.target_bytes),
            Request::ResizeDisk(resize) => self.resize_disk(&resize),
            Request::StartMigration(migration) => self.start_migration(&migration),
            Request::CancelMigration => {
                let too_late_now = self.is_handed_over();
                match &mut self.holding {
                    Holding::Away(_) if too_late_now => return Err(too_late()),
                    Holding::Away(outgoing) => outgoing.cancel(),
                    Holding::Expected => self.incoming.iter().for_each(Incoming::cancel),
                    Holding::Here(_) | Holding::InDoubt { .. } | Holding::Asking | Holding::Lent => {}
                }
                Ok(Reply::Done)
            }
            Request::MeasureDirtyRate(measure) => self.measure_dirty_rate(&measure),
            Request::ResolveMigration(resolve) => self.resolve(resolve.owner),
            Request::Pulse(pulse) => self.pulse(pulse.times.get()),
        }
    }

    fn pause(&mut self) -> Result<Reply, ApiError> {
        self.end_measurement("The guest was paused");
        self.with_machine(Machine::stand)?;
        self.board.enter(Phase::Paused);
        Ok(Reply::Done)
    }

    /// Lets the guest run. After a failed move it may be here without what it had given up: its disks' locks, the record
    /// that it is this host's. It gets them back first, or does not run.
    fn resume(&mut self) -> Result<Reply, ApiError> {
        let Holding::Here(machine) = &mut self.holding else { return Err(not_here()) };
        let record = Ownership::of(&self.settings.state_dir, machine.config().uuid);
        record.take_back().map_err(|error| ApiError::failed(&error))?;
        machine.reacquire().map_err(|error| ApiError::failed(&error))?;
        machine.run();
        self.board.enter(Phase::Running);
        Ok(Reply::Done)
    }

    /// Whether the target has been told to go on with the guest.
    pub(super) fn is_handed_over(&self) -> bool {
        self.board.migration().is_some_and(|migration| migration.progress.step == MigrationStep::HandOver)
    }

    fn on_machine(&mut self, lead: impl FnOnce(&mut Machine)) -> Result<(), ApiError> {
        self.with_machine(|machine| {
            lead(machine);
            Ok(())
        })
    }

    fn with_machine<T>(&mut self, lead: impl FnOnce(&mut Machine) -> Result<T, MachineError>) -> Result<T, ApiError> {
        let Holding::Here(machine) = &mut self.holding else { return Err(not_here()) };
        lead(machine).map_err(|error| ApiError::failed(&error))
    }

    fn press_power_button(&mut self) -> Result<Reply, ApiError> {
        self.on_machine(|machine| machine.press_power_button()).map(|()| Reply::Done)
    }

    fn set_balloon(&mut self, bytes: u64) -> Result<Reply, ApiError> {
        let Holding::Here(machine) = &self.holding else { return Err(not_here()) };
        let balloon = machine.balloon().ok_or_else(no_balloon)?;
        balloon
            .with(|balloon, io| balloon.set_target(io, bytes))
            .map(|()| Reply::Done)
            .map_err(|error| ApiError::InvalidValue { field: "target_bytes", reason: error.to_string() })
    }

    fn resize_disk(&mut self, ResizeDisk { id, bytes }: &ResizeDisk) -> Result<Reply, ApiError> {
        let Holding::Here(machine) = &self.holding else { return Err(not_here()) };
        let place = machine.config().disks.iter().position(|disk| disk.id == *id);
        let no_disk = || ApiError::NoSuchDevice { device: format!("disk {id:?}") };
        let disk = place.and_then(|place| machine.disks().get(place)).ok_or_else(no_disk)?;
        let grown = disk.with(|disk, io| disk.grow(io, *bytes));
        let bytes = grown.map_err(|error| ApiError::InvalidValue { field: "bytes", reason: error.to_string() })?;
        self.board.note_disk_length(id, bytes);
        Ok(Reply::Done)
    }

    /// Takes the machine apart and powers a new one on, on the same console.
    fn reset(&mut self) -> Result<Reply, ApiError> {
        let failed = |error: MachineError| ApiError::failed(&error);
        self.settle_disks();
        let Holding::Here(machine) = &self.holding else { return Err(not_here()) };
        let config = machine.config().clone();
        can_boot(&config.boot)?;
        can_reach(&config.disks)?;
        config.disks.iter().try_for_each(old_copy::check).map_err(|error| failed(error.into()))?;
        self.end_measurement("The guest was reset");
        self.holding = Holding::Expected;
        // What the old machine still has to say of its end is not about the new one, which is not to be stopped either.
        self.generation += 1;
        self.force_stop_at = None;
        let resources = Resources::open(&config, DiskLocks::Take).map_err(|error| failed(error.into()));
        let machine = resources.and_then(|resources| self.power_on(config, resources).map_err(failed));
        match machine {
            Ok(mut machine) => {
                machine.run();
                self.keep(Box::new(machine));
                Ok(Reply::Done)
            }
            Err(error) => {
                // There is no guest any more, and nobody to give one.
                let _ = self.inbox.0.send(Message::Lost("The guest ended because it could not be reset"));
                Err(error)
            }
        }
    }

    /// Saves the machine, takes it apart and restores it from its saved state, with its memory and resources kept.
    fn pulse(&mut self, times: u32) -> Result<Reply, ApiError> {
        self.end_measurement("The machine was pulsed");
        self.settle_disks();
        let (mut longest, mut state_bytes) = (Duration::ZERO, 0);
        for _ in 0..times {
            let Holding::Here(machine) = std::mem::replace(&mut self.holding, Holding::Expected) else {
                return Err(not_here());
            };
            let begun = Instant::now();
            let running = machine.is_running();
            match machine.pulse(&self.kvm, self.notice_listener()) {
                Ok((mut restored, bytes)) => {
                    if running {
                        restored.run();
                    }
                    state_bytes = bytes;
                    self.keep(Box::new(restored));
                }
                Err(error) => {
                    let _ = self.inbox.0.send(Message::Lost("The guest ended because a pulse failed"));
                    return Err(ApiError::failed(&error));
                }
            }
            longest = longest.max(begun.elapsed());
        }
        Ok(Reply::Pulsed(Pulsed { times, state_bytes, longest_ms: longest.into() }))
    }
}

/// Whether what a guest boots from is here, as it need not be where a guest has moved to.
fn can_boot(boot: &Boot) -> Result<(), ApiError> {
    for path in std::iter::once(&boot.kernel).chain(&boot.initramfs) {
        File::open(path).map_err(|error| ApiError::Failed {
            message: format!("The guest goes on as it was, since it could not boot: {}: {error}", path.display()),
        })?;
    }
    Ok(())
}

/// Whether the servers of a guest's disks are there: with a lost one a guest goes on, but none can begin.
fn can_reach(disks: &[Disk]) -> Result<(), ApiError> {
    for disk in disks {
        let (DiskPlace::Nbd(uri) | DiskPlace::Layered(Layer { base: uri, .. })) = &disk.place else { continue };
        block::nbd::reach(&uri.0, REACH_WITHIN).map_err(|error| ApiError::Failed {
            message: format!("The guest goes on as it was, since disk {} would be lost: {}: {error}", disk.id, uri.0),
        })?;
    }
    Ok(())
}

fn too_late() -> ApiError {
    let words = "It is too late to cancel: the target has been told to go on with the guest";
    ApiError::Refused(Refusal::new(Phase::Migrating, Code::TooLate, words))
}

fn no_balloon() -> ApiError {
    ApiError::NoSuchDevice { device: "balloon; start it with --balloon on".to_owned() }
}

pub(super) fn not_here() -> ApiError {
    ApiError::Failed { message: "The guest is not here at this moment; try again".to_owned() }
}
