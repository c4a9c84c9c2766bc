//! A server of disks: what `godwit disk serve` is, and what lends a guest's disk to the host that the guest has gone to.
//!
//! One thread listens, and one serves each client. Clients are strangers: what they may make the server keep is limited in
//! number, length and time. Stopping lets each client's requests be answered first, but waits for no client.

mod haggling;
mod listener;
mod replies;
mod session;
mod spare;
#[cfg(test)]
mod tests;

pub use listener::{ListenError, Listener};

use self::haggling::Haggling;
use self::session::Session;
use super::tls::TlsServer;
use super::transport::{self, Transport};
use super::wire::Dialect;
use crate::backend::{Access, Backend};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use slab::Slab;
use socket2::Socket;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long each step of a client's handshake may take.
const STEP_WITHIN: Duration = Duration::from_secs(10);
/// How long nobody is let in after that has failed.
const AFTER_FAILURE: Duration = Duration::from_millis(10);
/// How long a client may take to fetch its last answers when the server ends.
const FAREWELL: Duration = Duration::from_millis(500);

/// A disk that clients may use.
#[derive(Debug)]
pub struct Export {
    /// What clients ask for it by. The empty name is the default.
    pub name: String,
    /// What people are told of it.
    pub description: String,
    /// The disk.
    pub backend: Arc<dyn Backend>,
    /// What clients may do with it, if the disk itself permits it.
    pub access: Access,
}

/// How a server works.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// What the server shows its clients; without it nothing is encrypted, with it all is.
    pub tls: Option<TlsServer>,
    /// The most clients at a time.
    pub clients: usize,
    /// Whether clients are told which exports there are. Where not, a name that nobody guesses is a key.
    pub lists: bool,
    /// What a thread of the server does before anything else; its process's way to confine it.
    pub thread_start: fn(),
    /// The best language that it speaks.
    #[cfg(test)]
    pub(super) best: Dialect,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            tls: None,
            clients: 64,
            lists: true,
            thread_start: || {},
            #[cfg(test)]
            best: Dialect::Extended,
        }
    }
}

impl ServerOptions {
    /// Whether clients may choose a language.
    #[cfg_attr(not(test), expect(clippy::unused_self, reason = "tests have servers that know less"))]
    fn speaks(&self, dialect: Dialect) -> bool {
        #[cfg(test)]
        return dialect <= self.best;
        #[cfg(not(test))]
        return dialect <= Dialect::Extended;
    }
}

/// An export, and how many clients hold its disk's lock together.
///
/// The lock is the server's only while there are clients: so a guest that was one of them can take it at the disk's own host
/// when it has moved there.
#[derive(Debug)]
struct Exported {
    export: Export,
    holders: Mutex<usize>,
}

impl Exported {
    /// The lock for one more client.
    fn hold(&self) -> io::Result<Hold<'_>> {
        let mut holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        if *holders == 0 {
            self.export.backend.reacquire()?;
        }
        *holders += 1;
        Ok(Hold(self))
    }
}

/// A client's part of a disk's lock.
#[derive(Debug)]
struct Hold<'a>(&'a Exported);

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let mut holders = self.0.holders.lock().unwrap_or_else(PoisonError::into_inner);
        *holders -= 1;
        if *holders == 0 {
            self.0.export.backend.release();
        }
    }
}

/// What the threads of a server share.
#[derive(Debug)]
struct Served {
    exports: Vec<Exported>,
    options: ServerOptions,
    clients: AtomicUsize,
    /// The sockets of all clients, to turn them out.
    sockets: Mutex<Slab<Client>>,
    /// Readable from the moment on at which the server ends.
    ends: OwnedFd,
    sessions: Mutex<Vec<JoinHandle<()>>>,
}

/// A client's socket, beside that of its thread.
#[derive(Debug)]
struct Client {
    socket: Socket,
    /// Whether it still shakes hands.
    is_new: bool,
}

impl Client {
    fn turn_out(&self) {
        // It may have gone already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl Served {
    fn sockets(&self) -> MutexGuard<'_, Slab<Client>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for what the disks still do for clients that have broken off. One of them may be the client `other` than this
    /// once more: what it asks for now must not be overtaken by what it had asked for before.
    fn await_those_who_left(&self, other: usize) {
        let until = Instant::now() + STEP_WITHIN;
        let has_left = |(key, client): (usize, &Client)| key != other && transport::has_left(&client.socket);
        while Instant::now() < until && self.sockets().iter().any(has_left) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn sessions(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ends(&self) -> BorrowedFd<'_> {
        self.ends.as_fd()
    }
}

/// A running server. It ends when it is dropped.
#[derive(Debug)]
pub struct NbdServer {
    served: Arc<Served>,
    thread: Option<JoinHandle<()>>,
}

impl NbdServer {
    /// Serves `exports`, whose locks nobody holds yet, to whoever comes to `listeners`.
    ///
    /// # Errors
    /// The host's refusal of a descriptor or a thread.
    pub fn start(listeners: Vec<Listener>, exports: Vec<Export>, options: ServerOptions) -> io::Result<Self> {
        let exported = |export| Exported { export, holders: Mutex::new(0) };
        let served = Arc::new(Served {
            exports: exports.into_iter().map(exported).collect(),
            options,
            clients: AtomicUsize::new(0),
            sockets: Mutex::default(),
            ends: eventfd(0, EventfdFlags::CLOEXEC)?,
            sessions: Mutex::default(),
        });
        let shared = Arc::clone(&served);
        let thread = std::thread::Builder::new().name("nbd-listen".to_owned()).spawn(move || {
            (shared.options.thread_start)();
            if let Err(error) = listen(&shared, &listeners) {
                tracing::error!(%error, "The NBD server takes no more clients");
            }
        })?;
        Ok(Self { served, thread: Some(thread) })
    }

    /// How many clients there are.
    #[must_use]
    pub fn clients(&self) -> usize {
        self.served.clients.load(Ordering::Relaxed)
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        // It is never read, so all who poll it hear of it. The only refusal is a counter at its end.
        let _ = rustix::io::write(&self.served.ends, &1_u64.to_ne_bytes());
        let join = |thread: JoinHandle<()>| {
            if thread.join().is_err() {
                tracing::error!("A thread of the NBD server had panicked");
            }
        };
        // No client comes in from here on.
        self.thread.take().into_iter().for_each(join);
        self.served.sockets().iter().filter(|(_, client)| client.is_new).for_each(|(_, client)| client.turn_out());
        let until = Instant::now() + FAREWELL;
        while Instant::now() < until && self.served.sessions().iter().any(|session| !session.is_finished()) {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.served.sockets().iter().for_each(|(_, client)| client.turn_out());
        std::iter::from_fn(|| self.served.sessions().pop()).for_each(join);
    }
}

/// Takes clients in until the server ends.
fn listen(served: &Arc<Served>, listeners: &[Listener]) -> io::Result<()> {
    loop {
        let mut polled: Vec<_> = std::iter::once(served.ends())
            .chain(listeners.iter().map(AsFd::as_fd))
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        match poll(&mut polled, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
        if ready[0] {
            return Ok(());
        }
        for listener in listeners.iter().zip(&ready[1..]).filter(|(_, ready)| **ready).map(|(listener, _)| listener) {
            match listener.accept() {
                Ok(socket) => admit(served, socket),
                // It has gone again, or the host is short of something: the others are served on.
                Err(error) => {
                    tracing::debug!(%error, "A client did not come in");
                    std::thread::sleep(AFTER_FAILURE);
                }
            }
        }
        served.sessions().retain(|session| !session.is_finished());
    }
}

/// A client's place; free again when it is dropped.
struct Place {
    served: Arc<Served>,
    /// Which of the sockets is its.
    client: usize,
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.served.sockets().try_remove(self.client));
        self.served.clients.fetch_sub(1, Ordering::AcqRel);
    }
}

fn admit(served: &Arc<Served>, socket: Socket) {
    let limit = served.options.clients;
    let one_more = |clients| (clients < limit).then_some(clients + 1);
    if served.clients.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).is_err() {
        tracing::warn!(limit, "An NBD client is turned away: there are as many as there may be");
        return;
    }
    let client = match socket.try_clone() {
        Ok(socket) => served.sockets().insert(Client { socket, is_new: true }),
        Err(error) => {
            served.clients.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!(%error, "An NBD client is turned away: there is no descriptor for it");
            return;
        }
    };
    let place = Place { served: Arc::clone(served), client };
    let spawned = std::thread::Builder::new().name("nbd-client".to_owned()).spawn(move || {
        (place.served.options.thread_start)();
        match serve(&place, socket) {
            Ok(()) => tracing::debug!("An NBD client has gone"),
            Err(error) => tracing::info!(%error, "An NBD client is gone"),
        }
    });
    match spawned {
        Ok(session) => served.sessions().push(session),
        Err(error) => tracing::warn!(%error, "An NBD client is turned away: there is no thread for it"),
    }
}

fn serve(Place { served, client }: &Place, socket: Socket) -> io::Result<()> {
    let mut transport = Transport::over(socket, STEP_WITHIN)?;
    let Some(chosen) = Haggling::new(&mut transport, &served.exports, &served.options).agree()? else {
        return Ok(());
    };
    transport.set_nonblocking()?;
    served.sockets().get_mut(*client).into_iter().for_each(|client| client.is_new = false);
    served.await_those_who_left(*client);
    let session = Session::begin(&chosen)?;
    // The client hears that it is served to the end when the lock is free again.
    let ended = session.run(&mut transport, served.ends());
    drop(chosen);
    ended
}
