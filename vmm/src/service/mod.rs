//! The life of one Godwit process: who has the machine, what is asked of it, how it ends.
//!
//! One loop owns the machine, or knows who does, and takes messages in order: requests from API threads, the guest's end,
//! ends of migrations, signals. Nobody else leads the machine, so there are no locks around it.
//!
//! ```text
//!  run:      Here ---start--> Away (a migration thread has it) --moved--> end
//!  receive:  Expected --arrived--> Here     ^--still ours--'   '--in doubt--> InDoubt --asked or settled--> ...
//! ```

mod board;
mod desk;
mod incoming;
mod outgoing;
mod watcher;

use crate::config::{HostLimits, HostResources, MachineConfig, Serial};
use crate::kvm::KvmHost;
use crate::machine::{DiskLocks, EmptyMachine, EndListener, Machine, MachineError, Resources, SerialLine};
use crate::migrate::address::AddressUseError;
use crate::migrate::leaving::Leaving;
use crate::migrate::ownership::{Owner, Ownership, OwnershipError};
use crate::seccomp::{self, Seccomp, SeccompError, ThreadKind};
use crate::vcpu::GuestEnd;
use board::Board;
use control::{
    ApiError, ControlSocket, EndReason, Events, Happening, JobId, JobStarted, MigrationRole, MigrationState,
    MigrationStep, PeerAddress, Phase, Pulsed, Reply, Request, Server, ServerOptions, StartMigration, TestRequests,
    admit,
};
use desk::Desk;
use incoming::{Host, Incoming};
use migration::wire::FrameError;
use migration::{Failed, HostClock, InDoubt, Outcome, SourceError, in_words};
use outgoing::{Departure, Outgoing, ask_target};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel};
use std::time::{Duration, Instant};
use thiserror::Error;
use watcher::{begun, post_failure, post_report};

/// How often a target is asked whose the guest is.
const ASK_EVERY: Duration = Duration::from_secs(2);

/// What the loop is told.
#[derive(Debug)]
pub(crate) enum Message {
    /// A request, admitted by phase, and where its answer goes.
    Asked(Request, SyncSender<Result<Reply, ApiError>>),
    /// The guest ended by itself.
    GuestEnded(GuestEnd),
    /// Somebody wants the process to end.
    Quit(&'static str),
    /// The guest could not be put together again.
    Lost(&'static str),
    /// A migration out of here ended.
    Left(Departure),
    /// A guest came.
    Arrived(Box<Machine>),
    /// A migration into here failed.
    NotArrived(String),
}

/// What `run` and `receive` share.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The control socket, if there is to be one.
    pub api: Option<PathBuf>,
    /// Where ownership records are.
    pub state_dir: PathBuf,
    /// Whether test requests are admitted.
    pub test_requests: bool,
    /// Whether threads are confined.
    pub seccomp: Seccomp,
}

/// How a process ended that did what it was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The guest ended.
    Guest(GuestEnd),
    /// The guest runs elsewhere now.
    MovedAway(PeerAddress),
    /// Somebody ended it.
    Quit(&'static str),
    /// There is no guest any more, and nobody wanted that.
    Lost(&'static str),
}

/// Why a process could not do what it was asked.
#[derive(Debug, Error)]
pub enum ServiceError {
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Its description.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// The control socket.
    #[error(transparent)]
    Socket(#[from] control::SocketError),
    /// The control server.
    #[error(transparent)]
    Server(#[from] control::ServerError),
    /// The place to wait for migrations.
    #[error(transparent)]
    Listen(#[from] AddressUseError),
    /// The ownership record.
    #[error(transparent)]
    Ownership(#[from] OwnershipError),
    /// The guest was given to another host, so it must not be started here.
    #[error("Guest {guest} was given to {to}. If it does not run there, remove {} and start it again", record.display())]
    GivenAway {
        /// The guest.
        guest: uuid::Uuid,
        /// Where it went.
        to: String,
        /// The record that says so.
        record: PathBuf,
    },
    /// The threads cannot be confined.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// `receive --once` and the migration failed.
    #[error("No guest has arrived: {0}")]
    NotArrived(String),
}

/// Ends the process's loop from other threads: signals, the terminal's escape.
#[derive(Debug, Clone)]
pub struct Quitter(Sender<Message>);

impl Quitter {
    /// Asks for the end; `why` is told to the user.
    pub fn quit(&self, why: &'static str) {
        // A loop that has ended needs no asking.
        let _ = self.0.send(Message::Quit(why));
    }
}

/// Who has the machine.
#[derive(Debug)]
enum Holding {
    /// A guest is to come.
    Expected,
    /// The service, and the guest runs or is paused.
    Here(Box<Machine>),
    /// A migration thread.
    Away(Outgoing),
    /// The service, but perhaps the target runs it.
    InDoubt { doubt: Box<InDoubt<Leaving>>, ask_at: Instant },
    /// A thread that asks the target; an operator's word that comes meanwhile waits for it.
    Asking,
}

/// One Godwit process.
#[derive(Debug)]
pub struct Service {
    kvm: Arc<KvmHost>,
    settings: Settings,
    board: Board,
    inbox: (Sender<Message>, Receiver<Message>),
    holding: Holding,
    line: Arc<SerialLine>,
    incoming: Option<Incoming>,
    once: bool,
    /// Where the migration under way goes, and whether the guest ran before it.
    destination: Option<PeerAddress>,
    force_stop_at: Option<Instant>,
    /// The guest's end, if it came while a migration had the machine.
    end: Option<GuestEnd>,
    // Dropped last, so that clients hear of the end.
    _server: Option<Server>,
}

impl Service {
    /// Boots the machine of `config`. `quitter` is given away before anything that could block, for signal handlers.
    ///
    /// # Errors
    /// [`ServiceError`]; nothing is left behind.
    pub fn boot(
        config: MachineConfig,
        settings: Settings,
        quitter: impl FnOnce(Quitter),
    ) -> Result<Self, ServiceError> {
        config.validate()?;
        let kvm = Arc::new(KvmHost::open().map_err(MachineError::from)?);
        config.validate_for(HostLimits::of(&kvm.capabilities())?)?;
        refuse_given_away(&settings.state_dir, config.uuid)?;
        let resources = Resources::open(&config, DiskLocks::Take).map_err(MachineError::from)?;
        let mut service = Self::new(kvm, &config.serial, settings, Phase::Starting, quitter)?;
        let mut machine = service.power_on(config, resources)?;
        machine.run();
        service.keep(Box::new(machine));
        Ok(service)
    }

    /// Waits at `address` for a guest.
    ///
    /// # Errors
    /// [`ServiceError`]; nothing is left behind.
    pub fn receive(
        address: &PeerAddress,
        resources: HostResources,
        once: bool,
        settings: Settings,
        quitter: impl FnOnce(Quitter),
    ) -> Result<Self, ServiceError> {
        let kvm = Arc::new(KvmHost::open().map_err(MachineError::from)?);
        let serial = resources.serial.clone().unwrap_or_default();
        let mut service = Self::new(kvm, &serial, settings, Phase::Receiving, quitter)?;
        service.once = once;
        let host = Host {
            kvm: Arc::clone(&service.kvm),
            resources,
            line: Arc::clone(&service.line),
            listener: service.end_listener(),
        };
        let (board, inbox) = (service.board.clone(), service.inbox.0.clone());
        service.incoming = Some(Incoming::start(address, &service.settings.state_dir, host, board, inbox)?);
        Ok(service)
    }

    fn new(
        kvm: Arc<KvmHost>,
        serial: &Serial,
        settings: Settings,
        phase: Phase,
        quitter: impl FnOnce(Quitter),
    ) -> Result<Self, ServiceError> {
        if settings.seccomp == Seccomp::On {
            seccomp::switch_on()?;
        }
        let inbox = channel();
        quitter(Quitter(inbox.0.clone()));
        let escape = Quitter(inbox.0.clone());
        let line = SerialLine::open(serial, Box::new(move || escape.quit("ended from the terminal")));
        let line = Arc::new(line.map_err(MachineError::from)?);
        let events = Events::default();
        let board = Board::new(phase, events.clone());
        let server = match &settings.api {
            None => None,
            Some(path) => {
                let test_requests = if settings.test_requests { TestRequests::Admitted } else { TestRequests::Refused };
                let options =
                    ServerOptions { test_requests, thread_start: seccomp::enter_api, ..ServerOptions::default() };
                let desk = Arc::new(Desk::new(board.clone(), inbox.0.clone()));
                Some(Server::start(ControlSocket::bind(path)?, desk, events, options)?)
            }
        };
        Ok(Self {
            kvm,
            settings,
            board,
            inbox,
            holding: Holding::Expected,
            line,
            incoming: None,
            once: false,
            destination: None,
            force_stop_at: None,
            end: None,
            _server: server,
        })
    }

    /// Where a `receive` waits.
    #[must_use]
    pub fn listens_at(&self) -> Option<PeerAddress> {
        self.incoming.as_ref().map(Incoming::address)
    }

    /// Takes messages until the guest ends, has moved away, or somebody ends the process.
    ///
    /// # Errors
    /// [`ServiceError::NotArrived`], for a `receive` that waits only once.
    pub fn run(mut self) -> Result<Ended, ServiceError> {
        seccomp::enter(ThreadKind::Service);
        loop {
            let message = match self.wakes_at() {
                None => self.inbox.1.recv().expect("the service itself holds a sender"),
                Some(at) => match self.inbox.1.recv_timeout(at.saturating_duration_since(Instant::now())) {
                    Ok(message) => message,
                    Err(RecvTimeoutError::Timeout) => {
                        if let Some(ended) = self.on_time() {
                            return Ok(self.finish(ended));
                        }
                        continue;
                    }
                    Err(RecvTimeoutError::Disconnected) => unreachable!("the service itself holds a sender"),
                },
            };
            match self.on(message) {
                Ok(None) => {}
                Ok(Some(ended)) => return Ok(self.finish(ended)),
                Err(error) => return Err(error),
            }
        }
    }

    fn on(&mut self, message: Message) -> Result<Option<Ended>, ServiceError> {
        match message {
            Message::Asked(Request::Kill, answer) => {
                let _ = answer.send(Ok(Reply::Done));
                return Ok(Some(Ended::Quit("ended by request")));
            }
            Message::Asked(request, answer) => {
                // The client may have given up waiting.
                let _ = answer.send(self.answer(request));
            }
            Message::GuestEnded(end) => match &self.holding {
                Holding::Here(_) => return Ok(Some(Ended::Guest(end))),
                Holding::Away(outgoing) => {
                    outgoing.cancel();
                    self.end = Some(end);
                }
                Holding::Expected | Holding::InDoubt { .. } | Holding::Asking => self.end = Some(end),
            },
            Message::Quit(why) => return Ok(Some(Ended::Quit(why))),
            Message::Lost(why) => return Ok(Some(Ended::Lost(why))),
            Message::Left(departure) => return Ok(self.on_left(departure)),
            Message::Arrived(machine) => {
                self.keep(machine);
                if let Some(end) = self.end.take() {
                    return Ok(Some(Ended::Guest(end)));
                }
            }
            Message::NotArrived(why) if self.once => return Err(ServiceError::NotArrived(why)),
            Message::NotArrived(why) => tracing::warn!(why, "no guest has arrived; waiting for the next"),
        }
        Ok(None)
    }

    fn wakes_at(&self) -> Option<Instant> {
        let ask_at = match &self.holding {
            Holding::InDoubt { ask_at, .. } => Some(*ask_at),
            Holding::Expected | Holding::Here(_) | Holding::Away(_) | Holding::Asking => None,
        };
        [ask_at, self.force_stop_at].into_iter().flatten().min()
    }

    fn on_time(&mut self) -> Option<Ended> {
        if self.force_stop_at.is_some_and(|at| at <= Instant::now()) {
            return Some(Ended::Quit("ended because it did not power off in time"));
        }
        if let Holding::InDoubt { doubt, .. } = std::mem::replace(&mut self.holding, Holding::Asking)
            && let Some(to) = self.destination.clone()
        {
            ask_target(doubt, to, &self.inbox.0);
        }
        None
    }

    /// Does what is asked of a machine that is here.
    fn answer(&mut self, request: Request) -> Result<Reply, ApiError> {
        // The phase may have changed since the server asked.
        admit(self.board.phase(), &request)?;
        match request {
            Request::ShowVm => Ok(Reply::Vm(self.board.vm())),
            Request::ListDisks => Ok(Reply::Disks(self.board.disks())),
            Request::ListNics => Ok(Reply::Nics(self.board.nics())),
            Request::ShowMigration => Ok(Reply::Migration(self.board.last_migration())),
            Request::ShowBalloon => self.board.balloon().map(Reply::Balloon).ok_or_else(no_balloon),
            Request::Pause => self.with_machine(Machine::stand).map(|()| {
                self.board.enter(Phase::Paused);
                Reply::Done
            }),
            Request::Resume => self.on_machine(Machine::run).map(|()| {
                self.board.enter(Phase::Running);
                Reply::Done
            }),
            Request::PowerButton => self.press_power_button(),
            Request::Stop(stop) => {
                self.force_stop_at =
                    stop.force_after_s.map(|seconds| Instant::now() + Duration::from_secs(seconds.get().into()));
                self.press_power_button()
            }
            Request::Kill => Ok(Reply::Done),
            Request::Reset => self.reset(),
            Request::SetBalloon(target) => self.set_balloon(target.target_bytes),
            Request::StartMigration(migration) => self.start_migration(&migration),
            Request::CancelMigration => {
                match &self.holding {
                    Holding::Away(outgoing) => outgoing.cancel(),
                    Holding::Expected => self.incoming.iter().for_each(Incoming::cancel),
                    Holding::Here(_) | Holding::InDoubt { .. } | Holding::Asking => {}
                }
                Ok(Reply::Done)
            }
            Request::ResolveMigration(resolve) => self.resolve(resolve.owner),
            Request::Pulse(pulse) => self.pulse(pulse.times.get()),
        }
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

    /// Takes the machine apart and powers a new one on, on the same console.
    fn reset(&mut self) -> Result<Reply, ApiError> {
        let failed = |error: MachineError| ApiError::failed(&error);
        let Holding::Here(machine) = std::mem::replace(&mut self.holding, Holding::Expected) else {
            return Err(not_here());
        };
        let config = machine.config().clone();
        drop(machine);
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
        let (mut longest, mut state_bytes) = (Duration::ZERO, 0);
        for _ in 0..times {
            let Holding::Here(machine) = std::mem::replace(&mut self.holding, Holding::Expected) else {
                return Err(not_here());
            };
            let begun = Instant::now();
            let running = machine.is_running();
            match machine.pulse(&self.kvm, self.end_listener()) {
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

    fn start_migration(&mut self, request: &StartMigration) -> Result<Reply, ApiError> {
        let Holding::Here(machine) = std::mem::replace(&mut self.holding, Holding::Asking) else {
            return Err(not_here());
        };
        let job = JobId::random();
        let phase = self.board.phase();
        self.board.enter(Phase::Migrating);
        let step = MigrationStep::Connecting;
        self.board.begin_migration(begun(job, MigrationRole::Source, request.to.clone(), request.mode, step));
        let ownership = self.ownership(machine.config().uuid);
        match Outgoing::start(machine, request, job, ownership, self.board.clone(), self.inbox.0.clone()) {
            Ok(outgoing) => {
                self.destination = Some(request.to.clone());
                self.holding = Holding::Away(outgoing);
                Ok(Reply::Started(JobStarted { job }))
            }
            Err((machine, error)) => {
                self.holding = Holding::Here(machine);
                self.board.enter(phase);
                post_failure(&self.board, MigrationState::Failed, error.to_string());
                Err(ApiError::failed(&error))
            }
        }
    }

    fn on_left(&mut self, departure: Departure) -> Option<Ended> {
        match departure {
            Departure::Unreachable(machine, error) => self.stays(machine, MigrationState::Failed, in_words(&error)),
            Departure::Decided(outcome) => match *outcome {
                Outcome::HandedOver(report) => {
                    self.board.enter(Phase::MovedAway);
                    post_report(&self.board, &report);
                    self.destination.take().map(Ended::MovedAway)
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
            },
        }
    }

    fn doubts(&mut self, doubt: InDoubt<Leaving>) {
        if self.board.phase() != Phase::InDoubt {
            self.board.enter(Phase::InDoubt);
            post_failure(&self.board, MigrationState::InDoubt, in_words(doubt.cause()));
        }
        self.holding = Holding::InDoubt { doubt: Box::new(doubt), ask_at: Instant::now() + ASK_EVERY };
    }

    /// The guest is this host's after all.
    fn stays(&mut self, machine: Box<Machine>, state: MigrationState, why: String) -> Option<Ended> {
        tracing::warn!(why, "the guest has not moved");
        self.keep(machine);
        post_failure(&self.board, state, why);
        self.end.take().map(Ended::Guest)
    }

    fn resolve(&mut self, owner: control::Owner) -> Result<Reply, ApiError> {
        let Holding::InDoubt { doubt, .. } = std::mem::replace(&mut self.holding, Holding::Asking) else {
            return Err(ApiError::Busy { what: "questions to the target" });
        };
        let owner = match owner {
            control::Owner::Source => migration::Owner::Source,
            control::Owner::Target => migration::Owner::Target,
        };
        let settled = Departure::Decided(Box::new(doubt.settle(owner, &HostClock::new())));
        let _ = self.inbox.0.send(Message::Left(settled));
        Ok(Reply::Done)
    }

    /// Takes a machine in and posts it.
    fn keep(&mut self, machine: Box<Machine>) {
        self.board.post_machine(&machine);
        self.board.enter(if machine.is_running() { Phase::Running } else { Phase::Paused });
        self.holding = Holding::Here(machine);
    }

    fn power_on(&self, config: MachineConfig, resources: Resources) -> Result<Machine, MachineError> {
        EmptyMachine::new(&self.kvm, config, resources, Arc::clone(&self.line), self.end_listener())?
            .power_on(&self.kvm)
    }

    fn end_listener(&self) -> EndListener {
        let inbox = self.inbox.0.clone();
        Arc::new(move |end| {
            // A loop that has ended knows of an end already.
            let _ = inbox.send(Message::GuestEnded(end));
        })
    }

    fn ownership(&self, guest: uuid::Uuid) -> Ownership {
        Ownership::of(&self.settings.state_dir, guest)
    }

    /// Says how it ended. The record of a guest that has certainly ended or left asks no question any more.
    fn finish(&mut self, ended: Ended) -> Ended {
        let settled = match &self.holding {
            Holding::Here(_) | Holding::Expected => true,
            Holding::Away(_) | Holding::Asking => matches!(ended, Ended::MovedAway(_)),
            Holding::InDoubt { .. } => false,
        };
        let guest = self.board.vm().id;
        if settled
            && !guest.is_nil()
            && let Err(error) = self.ownership(guest).remove()
        {
            tracing::warn!(error = in_words(&error), "the ownership record stays");
        }
        if let Some((reason, message)) = end_of(&ended) {
            self.board.enter(Phase::Ended);
            self.board.events().publish(Happening::GuestEnded { reason, message });
        }
        ended
    }
}

fn end_of(ended: &Ended) -> Option<(EndReason, String)> {
    let reason = match ended {
        Ended::MovedAway(_) => return None,
        Ended::Quit(why) => return Some((EndReason::Killed, (*why).to_owned())),
        Ended::Lost(why) => return Some((EndReason::Failed, (*why).to_owned())),
        Ended::Guest(GuestEnd::PowerOff) => EndReason::PowerOff,
        Ended::Guest(GuestEnd::Reboot) => EndReason::Reboot,
        Ended::Guest(GuestEnd::TripleFault) => EndReason::TripleFault,
        Ended::Guest(GuestEnd::Panic) => EndReason::Panic,
        Ended::Guest(GuestEnd::KvmFailure(_)) => EndReason::Failed,
    };
    let Ended::Guest(end) = ended else { return None };
    Some((reason, end.to_string()))
}

/// What to do about a target with which there is no talking.
fn remedy(cause: &SourceError) -> &'static str {
    match cause {
        SourceError::Frame(FrameError::NotOurs { .. }) => "; give the address of a `godwit receive`",
        SourceError::Frame(FrameError::Version { .. }) => "; run the same version of godwit at both ends",
        _ => "",
    }
}

fn refuse_given_away(state_dir: &Path, guest: uuid::Uuid) -> Result<(), ServiceError> {
    let ownership = Ownership::of(state_dir, guest);
    match ownership.read()? {
        Some(Owner::GivenAway { session: _, to }) => {
            Err(ServiceError::GivenAway { guest, to, record: ownership.path().to_owned() })
        }
        Some(Owner::Mine { .. }) | None => Ok(()),
    }
}

fn no_balloon() -> ApiError {
    ApiError::NoSuchDevice { device: "balloon; start it with --balloon on".to_owned() }
}

fn not_here() -> ApiError {
    ApiError::Failed { message: "The guest is not here at this moment; try again".to_owned() }
}
