//! Migrations into this process: a thread that serves one link after another, and goes on to answer questions after a
//! guest has arrived.

use super::Message;
use super::board::Board;
use super::watcher::{Watcher, begun, post_failure, post_report};
use crate::config::{HostResources, MachineConfig};
use crate::kvm::KvmHost;
use crate::machine::{Machine, NoticeListener, SerialLine};
use crate::migrate::address::{Accepted, AddressUseError, Listener};
use crate::migrate::arriving::{Arriving, Recipient};
use crate::migrate::claims::ClaimRecord;
use crate::migrate::link::{SocketCutter, SocketLink};
use crate::migrate::ownership::OwnershipError;
use crate::migrate::pages::GuestPlaces;
use crate::seccomp::{self, ThreadKind};
use control::{
    DiskBefore, JobId, MigrationMode, MigrationRole, MigrationState, MigrationStatus, MigrationStep, PeerAddress, Phase,
};
use migration::target::Further;
use migration::{
    Arrival, Cutter, Fault, HostClock, Link, LinkError, Mode, Observer, Offer, Progress, Reception, Refusal, Region,
    TargetHost, Unobserved, in_words, target,
};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long a source may be silent.
const PATIENCE: Duration = Duration::from_secs(30);

/// What an incoming machine is built with.
#[derive(Clone)]
pub(crate) struct Host {
    pub(crate) kvm: Arc<KvmHost>,
    pub(crate) resources: HostResources,
    pub(crate) line: Arc<SerialLine>,
    pub(crate) listener: NoticeListener,
}

/// The thread that serves links. It ends, with its socket, on drop.
#[derive(Debug)]
pub(crate) struct Incoming {
    desk: Arc<Desk>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread and its owner share.
#[derive(Debug)]
struct Desk {
    listener: Listener,
    link: Mutex<Option<SocketCutter>>,
}

impl Desk {
    fn cut(&self) {
        if let Some(cutter) = &*self.link.lock().unwrap_or_else(PoisonError::into_inner) {
            cutter.cut();
        }
    }

    /// Serves one link, with whatever links come to it.
    fn receive<H: TargetHost<Memory = GuestPlaces>>(
        &self,
        link: &mut SocketLink,
        host: &mut H,
        claims: &ClaimRecord,
        observer: &mut dyn Observer,
    ) -> Result<Arrival, Fault> {
        let around = Reception { clock: &HostClock::new(), observer, patience: PATIENCE };
        let mut accept = |limit| match self.listener.accept_within(limit)? {
            Accepted::Link(link) => Ok(Some(link)),
            Accepted::Nobody => Ok(None),
            Accepted::Ended => Err(LinkError::Closed),
        };
        let further = Further { accept: &mut accept, thread: &|| seccomp::enter(ThreadKind::MigrateStream) };
        target::receive(link, host, claims, around, further)
    }
}

impl Incoming {
    /// Listens at `address`; a machine that arrives comes as [`Message::Arrived`].
    pub(crate) fn start(
        address: &PeerAddress,
        claims: ClaimRecord,
        host: Host,
        board: Board,
        inbox: Sender<Message>,
    ) -> Result<Self, AddressUseError> {
        let desk = Arc::new(Desk { listener: Listener::bind(address)?, link: Mutex::new(None) });
        // Not before a source can connect, and not after one has.
        board.enter(Phase::Receiving);
        let claims = Arc::new(claims);
        let porter = Porter { desk: Arc::clone(&desk), claims, host, board, inbox, guest_is_here: false };
        let thread = std::thread::Builder::new()
            .name("migrate-target".to_owned())
            .spawn(|| {
                seccomp::enter(ThreadKind::MigrateTarget);
                porter.serve();
            })
            .map_err(|source| AddressUseError::Listen { address: address.clone(), source })?;
        Ok(Self { desk, thread: Some(thread) })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> PeerAddress {
        self.desk.listener.address()
    }

    /// Ends the migration that is under way; the guest stays at the source.
    pub(crate) fn cancel(&self) {
        self.desk.cut();
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.desk.listener.end();
        self.desk.cut();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread of incoming migrations had panicked");
        }
    }
}

/// Serves links in its thread.
struct Porter {
    desk: Arc<Desk>,
    claims: Arc<ClaimRecord>,
    host: Host,
    board: Board,
    inbox: Sender<Message>,
    guest_is_here: bool,
}

impl Porter {
    fn serve(mut self) {
        loop {
            match self.desk.listener.accept() {
                Ok(Some(link)) => self.serve_link(link),
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(%error, "a source could not be accepted");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn serve_link(&mut self, mut link: SocketLink) {
        *self.desk.link.lock().unwrap_or_else(PoisonError::into_inner) = link.cutter().ok();
        let was_here = self.guest_is_here;
        if was_here {
            self.answer(&mut link);
        } else {
            self.admit(&mut link);
        }
        *self.desk.link.lock().unwrap_or_else(PoisonError::into_inner) = None;
        drop(link);
        // Nobody is to wait for a disk.
        if self.guest_is_here
            && !was_here
            && let Err(error) = self.claims.sync()
        {
            tracing::warn!(error = in_words(&error), "a crash of this host may leave it open whose the guest is");
        }
    }

    /// Serves a link after a guest has come: questions are answered, offers refused.
    fn answer(&self, link: &mut SocketLink) {
        if let Err(fault) = self.desk.receive(link, &mut Occupied, &self.claims, &mut Unobserved) {
            tracing::info!(fault = in_words(&fault), "a late source was refused");
        }
    }

    /// Serves a link while there is room for a guest.
    fn admit(&mut self, link: &mut SocketLink) {
        let Host { kvm, resources, line, listener } = self.host.clone();
        let recipient = ToService {
            claims: Arc::clone(&self.claims),
            peer: self.desk.listener.address(),
            board: self.board.clone(),
            inbox: self.inbox.clone(),
        };
        let mut arriving = Arriving::new(kvm, resources, line, listener, Box::new(recipient));
        let mut onlooker = Onlooker { board: self.board.clone(), watcher: None };
        match self.desk.receive(link, &mut arriving, &self.claims, &mut onlooker) {
            Ok(Arrival::Running(report)) => {
                self.guest_is_here = true;
                post_report(&self.board, &report);
            }
            Ok(Arrival::Answered(_)) => {}
            Err(fault) => self.see_off(&fault),
        }
    }

    fn see_off(&self, fault: &Fault) {
        if self.board.phase() == Phase::Incoming {
            self.board.enter(Phase::Receiving);
            if let Some(MigrationStatus { job, .. }) = self.board.migration() {
                post_failure(&self.board, job, MigrationState::Failed, in_words(fault));
            }
        }
        let _ = self.inbox.send(Message::NotArrived(in_words(fault)));
    }
}

/// Gives a machine to the service.
struct ToService {
    claims: Arc<ClaimRecord>,
    /// Where it comes in.
    peer: PeerAddress,
    board: Board,
    inbox: Sender<Message>,
}

impl Recipient for ToService {
    fn let_in(&mut self, config: &MachineConfig, offer: &Offer<'_>) -> Result<(), OwnershipError> {
        self.claims.expect(offer.session, config.uuid)?;
        self.board.begin_migration(status(JobId(offer.session), self.peer.clone(), offer.mode));
        self.board.enter(Phase::Incoming);
        Ok(())
    }

    fn hear_of_disks(&mut self, before: BTreeMap<String, DiskBefore>) {
        self.board.note_disks_before(before);
    }

    fn take(&mut self, machine: Machine) {
        // Who has heard from the source that the guest is here finds it here, and comes after it to its owner.
        self.board.post_machine(&machine);
        let _ = self.inbox.send(Message::Arrived(Box::new(machine)));
    }
}

fn status(job: JobId, peer: PeerAddress, mode: Mode) -> MigrationStatus {
    let mode = match mode {
        Mode::Live => MigrationMode::Live,
        Mode::Stop => MigrationMode::Stop,
    };
    begun(job, MigrationRole::Target, peer, mode, MigrationStep::Negotiating)
}

/// Posts progress once the migration is posted, which it is when its machine has been let in.
struct Onlooker {
    board: Board,
    watcher: Option<Watcher>,
}

impl Observer for Onlooker {
    fn on(&mut self, news: Progress) {
        if self.board.phase() == Phase::Incoming
            && let Some(status) = self.board.migration()
        {
            self.watcher.get_or_insert_with(|| Watcher::new(self.board.clone(), status.job)).on(news);
        }
    }
}

/// A host that has its guest already.
#[derive(Debug)]
struct Occupied;

impl TargetHost for Occupied {
    type Error = std::io::Error;
    type Memory = GuestPlaces;

    fn prepare(&mut self, _: &Offer<'_>, _: Option<OwnedFd>) -> Result<GuestPlaces, Refusal> {
        Err(Refusal::new("A guest runs in this Godwit already; start another `godwit receive`"))
    }

    fn regions(&self) -> Vec<Region> {
        Vec::new()
    }

    fn settle(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }

    fn restore(&mut self, _: &[u8]) -> Result<(), Self::Error> {
        Err(std::io::ErrorKind::AddrInUse.into())
    }

    fn run(&mut self) -> Result<(), Self::Error> {
        Err(std::io::ErrorKind::AddrInUse.into())
    }

    fn abandon(&mut self, _: &str) {}
}
