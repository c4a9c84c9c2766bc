//! The guest leaves: the machine goes to a migration's thread and comes back, or does not, or nobody knows yet.
//!
//! Invariant: a machine that came out of a doubt is kept only on the engine's word that it is this host's.

use super::outgoing::{self, Departure, MovingDisks, Outgoing};
use super::requests::not_here;
use super::watcher::{begun, post_failure, post_report};
use super::{Ended, Holding, Journey, Message, Service};
use crate::machine::Machine;
use crate::migrate::feasibility::{self, Infeasible};
use crate::migrate::leaving::Leaving;
use control::{
    ApiError, JobId, JobStarted, MemoryPolicy, MigrationRole, MigrationState, MigrationStep, PeerAddress, Phase, Reply,
    StartMigration, WithDisks,
};
use migration::wire::FrameError;
use migration::{Failed, HostClock, InDoubt, Outcome, SourceError, in_words};
use std::time::{Duration, Instant};

/// How often a target is asked whose the guest is.
const ASK_EVERY: Duration = Duration::from_secs(2);

impl Service {
    pub(super) fn start_migration(&mut self, request: &StartMigration) -> Result<Reply, ApiError> {
        check_memory_policy(request)?;
        self.settle_disks();
        let disks = self.disks_to_move(&request.with_disks)?;
        let space = disks.space_before();
        let job = JobId::random().map_err(|error| ApiError::failed(&error))?;
        if let (Holding::Here(machine), true) = (&self.holding, certainly_copies(request)) {
            let checked = feasibility::check(machine.memory(), space, request, outgoing::codecs(request.codec));
            checked.map_err(|error| match error {
                Infeasible::Contradiction(why) => {
                    ApiError::InvalidValue { field: "deadline_ms", reason: why.to_string() }
                }
                Infeasible::Memory(_) => ApiError::failed(&error),
            })?;
        }
        self.end_measurement("A migration was started");
        let Holding::Here(machine) = std::mem::replace(&mut self.holding, Holding::Asking) else {
            return Err(not_here());
        };
        let phase = self.board.phase();
        self.board.enter(Phase::Migrating);
        let step = MigrationStep::Connecting;
        self.board.begin_migration(begun(job, MigrationRole::Source, request.to.clone(), request.mode, step));
        let ownership = self.ownership(machine.config().uuid);
        match Outgoing::start(machine, request, job, ownership, disks, self.board.clone(), self.inbox.0.clone()) {
            Ok(outgoing) => {
                self.journey = Some(Journey { job, to: request.to.clone(), lending: None });
                self.holding = Holding::Away(outgoing);
                Ok(Reply::Started(JobStarted { job }))
            }
            Err((machine, error)) => {
                self.holding = Holding::Here(machine);
                self.board.enter(phase);
                post_failure(&self.board, job, MigrationState::Failed, error.to_string());
                Err(ApiError::failed(&error))
            }
        }
    }

    pub(super) fn on_left(&mut self, departure: Departure) -> Option<Ended> {
        match departure {
            Departure::NotBegun(machine, error) => self.stays(machine, MigrationState::Failed, in_words(&*error)),
            Departure::Decided(outcome, lending) => {
                if let (Some(journey), Some(lending)) = (&mut self.journey, lending) {
                    journey.lending = Some(lending);
                }
                self.on_decided(*outcome)
            }
        }
    }

    fn on_decided(&mut self, outcome: Outcome<Leaving>) -> Option<Ended> {
        match outcome {
            Outcome::HandedOver(report) => {
                self.board.enter(Phase::MovedAway);
                post_report(&self.board, &report);
                self.holding = Holding::Lent;
                self.on_free_disk()
            }
            Outcome::StillOurs(Failed { cause, guest, stuck }) => {
                let state = match cause {
                    SourceError::Cancelled => MigrationState::Cancelled,
                    _ => MigrationState::Failed,
                };
                let mut words = in_words(&cause) + remedy(&cause);
                if let Some(stuck) = stuck {
                    words += &format!(". The guest is still here, but {}", in_words(&stuck));
                }
                self.stays(Box::new(guest.into_machine()), state, words)
            }
            Outcome::InDoubt(doubt) => {
                self.doubts(doubt);
                None
            }
        }
    }

    /// Ends, if the guest has moved away and the target needs nothing from here any more.
    pub(super) fn on_free_disk(&mut self) -> Option<Ended> {
        let free = |journey: &Journey| journey.lending.as_ref().is_none_or(|lending| lending.is_free());
        if !matches!(self.holding, Holding::Lent) {
            return None;
        }
        if !self.journey.as_ref().is_some_and(free) {
            tracing::info!("The guest has moved; its disks are read from here until the target has all of them");
            return None;
        }
        self.journey.take().map(|journey| Ended::MovedAway(journey.to))
    }

    /// Takes note of disks that have come to this host.
    pub(super) fn settle_disks(&mut self) {
        if let Holding::Here(machine) = &mut self.holding
            && machine.settle_disks()
        {
            self.board.post_devices(machine);
        }
    }

    /// The disks of the machine that go along with it.
    fn disks_to_move(&self, with: &WithDisks) -> Result<MovingDisks, ApiError> {
        let Holding::Here(machine) = &self.holding else { return Err(not_here()) };
        if let Some((id, disk)) = machine.coming_disks().next() {
            let message = format!(
                "Disk {id} is still coming to this host: {} bytes are missing. Move the guest when it is here",
                disk.missing().bytes()
            );
            return Err(ApiError::Failed { message });
        }
        let invalid = |reason| ApiError::InvalidValue { field: "with_disks", reason };
        let disks = &machine.config().disks;
        let mut moving = MovingDisks::default();
        match with {
            WithDisks::All(policy) => {
                disks.iter().filter(|disk| !disk.read_only).for_each(|disk| moving.add(disk, *policy));
            }
            WithDisks::Each(each) => {
                for (id, policy) in each {
                    match disks.iter().find(|disk| disk.id == *id) {
                        Some(disk) if disk.read_only => {
                            return Err(invalid(format!("disk {id:?} is read-only, and not moved")));
                        }
                        Some(disk) => moving.add(disk, *policy),
                        None => return Err(invalid(format!("there is no disk {id:?}"))),
                    }
                }
            }
        }
        Ok(moving)
    }

    /// Asks the target of a migration in doubt, if it is time.
    pub(super) fn ask_target(&mut self) {
        if let Holding::InDoubt { doubt, .. } = std::mem::replace(&mut self.holding, Holding::Asking)
            && let Some(journey) = &self.journey
        {
            outgoing::ask_target(doubt, journey.to.clone(), &self.inbox.0);
        }
    }

    fn doubts(&mut self, doubt: InDoubt<Leaving>) {
        if self.board.phase() != Phase::InDoubt {
            self.board.enter(Phase::InDoubt);
            self.post_failure(MigrationState::InDoubt, in_words(doubt.cause()));
        }
        self.holding = Holding::InDoubt { doubt: Box::new(doubt), ask_at: Instant::now() + ASK_EVERY };
    }

    /// The guest is this host's after all.
    fn stays(&mut self, machine: Box<Machine>, state: MigrationState, why: String) -> Option<Ended> {
        tracing::warn!(why, "the guest has not moved");
        self.journey.iter_mut().for_each(|journey| journey.lending = None);
        self.keep(machine);
        self.post_failure(state, why);
        self.end.take().and_then(|end| self.guest_ended(end))
    }

    fn post_failure(&self, state: MigrationState, why: String) {
        if let Some(Journey { job, .. }) = &self.journey {
            post_failure(&self.board, *job, state, why);
        }
    }

    pub(super) fn resolve(&mut self, owner: control::Owner) -> Result<Reply, ApiError> {
        let Holding::InDoubt { doubt, .. } = std::mem::replace(&mut self.holding, Holding::Asking) else {
            return Err(ApiError::Busy { what: "questions to the target" });
        };
        let owner = match owner {
            control::Owner::Source => migration::Owner::Source,
            control::Owner::Target => migration::Owner::Target,
        };
        let settled = Departure::Decided(Box::new(doubt.settle(owner, &HostClock::new())), None);
        let _ = self.inbox.0.send(Message::Left(settled));
        Ok(Reply::Done)
    }
}

/// Whether the guest's memory goes over the link, whatever the target says.
fn certainly_copies(StartMigration { to, memory, .. }: &StartMigration) -> bool {
    *memory == MemoryPolicy::Copy || matches!(to, PeerAddress::Tcp { .. })
}

/// Refuses to pass memory where no handle to it can go.
fn check_memory_policy(StartMigration { to, memory, .. }: &StartMigration) -> Result<(), ApiError> {
    match (memory, to) {
        (MemoryPolicy::Pass, PeerAddress::Tcp { .. }) => {
            let reason = format!(
                "memory is passed over a Unix socket between two processes of one host, not to {to}; let it be copied"
            );
            Err(ApiError::InvalidValue { field: "memory", reason })
        }
        (MemoryPolicy::Auto | MemoryPolicy::Copy | MemoryPolicy::Pass, _) => Ok(()),
    }
}

/// What to do about a target with which there is no talking, and about a goal that is out of reach.
fn remedy(cause: &SourceError) -> &'static str {
    match cause {
        SourceError::Frame(FrameError::NotOurs { .. }) => "; give the address of a `godwit receive`",
        SourceError::Frame(FrameError::Version { .. }) => "; run the same version of godwit at both ends",
        SourceError::GoalUnreachable { .. } => "; allow a longer downtime, or let the guest be throttled or stopped",
        _ => "",
    }
}
