//! The life of one Godwit process: who has the machine, what is asked of it, how it ends.
//!
//! One loop owns the machine, or knows who does, and takes messages in order: requests from API threads, the guest's end,
//! ends of migrations, signals. Nobody else leads the machine, so there are no locks around it.
//!
//! ```text
//!  run:      Here ---start--> Away (a migration thread has it) --moved--> end
//!  receive:  Expected --arrived--> Here     ^--still ours--'   '--in doubt--> InDoubt --asked or settled--> ...
//! ```
//! Who has moved away with disks that come after the guest ends when the target has them: until then it is `Lent`.

mod board;
mod desk;
mod ends;
mod incoming;
mod measuring;
mod metrics;
mod moves;
mod outgoing;
mod requests;
mod watcher;

pub use ends::{Ended, ServiceError};

use crate::config::{HostLimits, HostResources, MachineConfig, Serial};
use crate::dirty_rate::Measurement;
use crate::kvm::KvmHost;
use crate::machine::{
    DiskLocks, EmptyMachine, LineInput, Machine, MachineError, Notice, NoticeListener, Resources, SerialLine,
};
use crate::migrate::claims::ClaimRecord;
use crate::migrate::leaving::Leaving;
use crate::migrate::lending::Lending;
use crate::migrate::ownership::{Owner, Ownership};
use crate::seccomp::{self, Seccomp, ThreadKind};
use crate::vcpu::GuestEnd;
use board::Board;
use control::{
    ApiError, ControlSocket, Events, Happening, JobId, PeerAddress, Phase, Reply, Request, Server, ServerOptions,
    TestRequests, random_uuid,
};
use desk::Desk;
use devices::serial::ConsoleLink;
use incoming::{Host, Incoming};
use migration::{InDoubt, in_words};
use outgoing::{Departure, Outgoing};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel};
use std::thread;
use std::time::Instant;

/// What the loop is told.
#[derive(Debug)]
pub(crate) enum Message {
    /// A request, admitted by phase, and where its answer goes.
    Asked(Request, SyncSender<Result<Reply, ApiError>>),
    /// The word of the machine of this generation: a reset makes a new one.
    Noticed(u64, Notice),
    /// Somebody wants the process to end.
    Quit(&'static str),
    /// The guest could not be put together again.
    Lost(&'static str),
    /// A migration out of here ended.
    Left(Departure),
    /// A guest came, and is posted.
    Arrived(Box<Machine>),
    /// A migration into here failed.
    NotArrived(String),
    /// The target needs nothing of a disk any more that was lent to it.
    DiskFree,
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
    /// The target, which reads disks from here that it does not have yet.
    Lent,
}

/// Where a guest goes.
#[derive(Debug)]
struct Journey {
    job: JobId,
    to: PeerAddress,
    /// Disks that come after it.
    lending: Option<Arc<Lending>>,
}

/// One Godwit process.
#[derive(Debug)]
pub struct Service {
    kvm: Arc<KvmHost>,
    settings: Settings,
    board: Board,
    inbox: (Sender<Message>, Receiver<Message>),
    holding: Holding,
    // Dropped before the line: it feeds the port, and gives the terminal back as it was.
    _console: Option<ConsoleLink>,
    line: Arc<SerialLine>,
    incoming: Option<Incoming>,
    once: bool,
    /// The last migration out of here.
    journey: Option<Journey>,
    /// When a guest that was asked to power off is ended. Not while a migration has it.
    force_stop_at: Option<Instant>,
    /// The measurement under way, of the machine that is here.
    measurement: Option<Measurement>,
    /// Which machine this is, counted by resets.
    generation: u64,
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
        let (mut service, input) = Self::new(kvm, &config.serial, settings, quitter)?;
        let kvm = Arc::clone(&service.kvm);
        let mut machine = thread::scope(|scope| {
            // KVM thinks about its CPUID while the VM is made. Without this thread it does so when it is asked.
            let _ =
                thread::Builder::new().name("cpuid".to_owned()).spawn_scoped(scope, || kvm.supported_cpuid().is_ok());
            service.power_on(config, resources)
        })?;
        machine.run();
        service._console = input.connect().map_err(MachineError::from)?;
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
        Ownership::check_folder(&settings.state_dir)?;
        let serial = resources.serial.clone().unwrap_or_default();
        let (mut service, input) = Self::new(kvm, &serial, settings, quitter)?;
        service._console = input.connect().map_err(MachineError::from)?;
        service.once = once;
        let host = Host {
            kvm: Arc::clone(&service.kvm),
            resources,
            line: Arc::clone(&service.line),
            listener: service.notice_listener(),
        };
        let (board, inbox) = (service.board.clone(), service.inbox.0.clone());
        let claims = ClaimRecord::new(random_uuid()?, &service.settings.state_dir);
        service.incoming = Some(Incoming::start(address, claims, host, board, inbox)?);
        Ok(service)
    }

    fn new(
        kvm: Arc<KvmHost>,
        serial: &Serial,
        settings: Settings,
        quitter: impl FnOnce(Quitter),
    ) -> Result<(Self, LineInput), ServiceError> {
        if settings.seccomp == Seccomp::On {
            seccomp::switch_on()?;
        }
        let inbox = channel();
        quitter(Quitter(inbox.0.clone()));
        let escape = Quitter(inbox.0.clone());
        let line = SerialLine::open(serial, Box::new(move || escape.quit("ended from the terminal")));
        let (line, input) = line.map_err(MachineError::from)?;
        let events = Events::default();
        let board = Board::new(Phase::Starting, events.clone());
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
        let service = Self {
            kvm,
            settings,
            board,
            inbox,
            holding: Holding::Expected,
            _console: None,
            line: Arc::new(line),
            incoming: None,
            once: false,
            journey: None,
            force_stop_at: None,
            measurement: None,
            generation: 0,
            end: None,
            _server: server,
        };
        Ok((service, input))
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
            Message::Asked(request, answer) => {
                let kill = matches!(request, Request::Kill);
                let answered = self.answer(request);
                let killed = kill && answered.is_ok();
                // The client may have given up waiting.
                let _ = answer.send(answered);
                if killed {
                    return Ok(Some(self.quit("ended by request")));
                }
            }
            Message::Noticed(generation, _) if generation != self.generation => {}
            Message::Noticed(_, Notice::DeviceFailed { device, cause }) => {
                self.board.events().publish(Happening::DeviceNeedsReset { device, cause });
            }
            Message::Noticed(_, Notice::DiskWhole { disk }) => {
                self.settle_disks();
                self.board.events().publish(Happening::DiskWhole { disk });
                return Ok(self.end.take().and_then(|end| self.guest_ended(end)));
            }
            Message::Noticed(_, Notice::Ended(end)) => match &mut self.holding {
                Holding::Here(_) => return Ok(self.guest_ended(end)),
                Holding::Away(outgoing) => {
                    outgoing.cancel();
                    self.end = Some(end);
                }
                Holding::Expected | Holding::InDoubt { .. } | Holding::Asking | Holding::Lent => self.end = Some(end),
            },
            Message::Quit(why) => return Ok(Some(self.quit(why))),
            Message::Lost(why) => return Ok(Some(Ended::Lost(why))),
            Message::Left(departure) => return Ok(self.on_left(departure)),
            Message::Arrived(machine) => {
                self.holding = Holding::Here(machine);
                self.settle_disks();
                return Ok(self.end.take().and_then(|end| self.guest_ended(end)));
            }
            Message::DiskFree => return Ok(self.on_free_disk()),
            Message::NotArrived(why) if self.once => return Err(ServiceError::NotArrived(why)),
            Message::NotArrived(why) => tracing::warn!(why, "no guest has arrived; waiting for the next"),
        }
        Ok(None)
    }

    /// The guest has ended here. Its disks are waited for, if they are not all here: nobody else brings them.
    pub(super) fn guest_ended(&mut self, end: GuestEnd) -> Option<Ended> {
        let ended = Ended::Guest(end.clone());
        match &self.holding {
            Holding::Here(machine) if machine.coming_disks().next().is_some() => {
                tracing::info!("The guest has ended; what is missing of its disks comes before this process ends");
                self.say_that_it_ended(&ended);
                (self.end, self.force_stop_at) = (Some(end), None);
                None
            }
            _ => Some(ended),
        }
    }

    /// The end that somebody wants.
    fn quit(&mut self, why: &'static str) -> Ended {
        match (&self.holding, &self.journey, self.end.take()) {
            (Holding::Lent, Some(Journey { to, .. }), _) => {
                tracing::warn!(
                    "The target does not have all of the guest's disks, and reads nothing from here any more"
                );
                Ended::MovedAway(to.clone())
            }
            (Holding::Here(_), _, Some(end)) => {
                tracing::warn!("Not all of the guest's disks is here");
                Ended::Guest(end)
            }
            _ => Ended::Quit(why),
        }
    }

    fn wakes_at(&self) -> Option<Instant> {
        let due = match &self.holding {
            Holding::InDoubt { ask_at, .. } => Some(*ask_at),
            Holding::Away(outgoing) => outgoing.cut_at(),
            Holding::Expected | Holding::Here(_) | Holding::Asking | Holding::Lent => None,
        };
        [due, self.forced_stop(), self.measures_at()].into_iter().flatten().min()
    }

    /// When the guest is ended by force, if it is here.
    fn forced_stop(&self) -> Option<Instant> {
        self.force_stop_at.filter(|_| matches!(self.holding, Holding::Here(_)))
    }

    fn on_time(&mut self) -> Option<Ended> {
        if self.forced_stop().is_some_and(|at| at <= Instant::now()) {
            return Some(Ended::Quit("ended because it did not power off in time"));
        }
        self.go_on_measuring();
        let handed_over = self.is_handed_over();
        match &mut self.holding {
            // The target's word that it has the guest is on its way, or soon will be: no cut may lose it.
            Holding::Away(outgoing) if handed_over => outgoing.let_come(),
            Holding::Away(outgoing) => outgoing.cut_if_due(),
            Holding::InDoubt { .. } => self.ask_target(),
            Holding::Expected | Holding::Here(_) | Holding::Asking | Holding::Lent => {}
        }
        None
    }

    /// Takes a machine in and posts it.
    fn keep(&mut self, machine: Box<Machine>) {
        self.board.post_machine(&machine);
        self.holding = Holding::Here(machine);
    }

    fn power_on(&self, config: MachineConfig, resources: Resources) -> Result<Machine, MachineError> {
        EmptyMachine::new(&self.kvm, config, resources, Arc::clone(&self.line), self.notice_listener())?
            .power_on(&self.kvm)
    }

    fn notice_listener(&self) -> NoticeListener {
        let (inbox, generation) = (self.inbox.0.clone(), self.generation);
        Arc::new(move |notice| {
            // A loop that has ended knows of an end already, and needs to know no more.
            let _ = inbox.send(Message::Noticed(generation, notice));
        })
    }

    fn ownership(&self, guest: uuid::Uuid) -> Ownership {
        Ownership::of(&self.settings.state_dir, guest)
    }

    /// Says how it ended. The record of a guest that has certainly ended or left asks no question any more.
    fn finish(&mut self, ended: Ended) -> Ended {
        self.end_measurement("The guest has ended");
        let settled = match &self.holding {
            Holding::Here(_) | Holding::Expected => true,
            // The journey is over when the target has all of the disks. Before that they are not this host's to use.
            Holding::Lent => self.journey.is_none(),
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
        self.say_that_it_ended(&ended);
        ended
    }

    /// Tells those who watch, once.
    fn say_that_it_ended(&self, ended: &Ended) {
        if let Some((reason, message)) = ended.reason()
            && self.board.phase() != Phase::Ended
        {
            self.board.enter(Phase::Ended);
            self.board.events().publish(Happening::GuestEnded { reason, message });
        }
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
