//! An export of an NBD server as a disk.
//!
//! Each channel is a connection of its own where the server says that its connections agree (`MULTI_CONN`); otherwise there
//! is one. A lost connection is made again by the back end's dialler; until then requests wait, or fail after a while if
//! that is what was asked for. Invariant: an answer that the caller has seen stays true. What was not answered when the
//! connection was lost is asked again, in its order.

mod channel;
mod connection;
mod dialler;
mod error;
mod haggling;
mod ledger;
mod reply;
#[cfg(test)]
mod tests;

pub use error::NbdError;

use self::channel::NbdChannel;
use self::dialler::{Connected, Dialler};
use self::haggling::{Agreement, Haggling, Terms};
use super::tls::TlsClient;
use super::transport::Transport;
use super::uri::{Address, NbdUri, Privacy};
use super::wire::transmission;
use crate::backend::{Access, Backend, Channel, Geometry, SECTOR};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// The most connections to one export: servers serve some tens of clients.
const MAX_CONNECTIONS: usize = 33;

/// The longest request in bytes that a server must take at least, so that none is cut into thousands.
const LEAST_MAXIMUM: u32 = 64 << 10;

/// How an export is used.
#[derive(Debug, Clone, Copy)]
pub struct NbdOptions {
    /// What may be done with it.
    pub access: Access,
    /// How long each step of connecting may take.
    pub connect_within: Duration,
    /// How long requests wait for a lost connection, or for an answer, before they fail; for ever if not said.
    pub fail_after: Option<Duration>,
    /// What a thread of the client does before anything else; its process's way to confine it.
    pub thread_start: fn(),
}

impl NbdOptions {
    /// The usual way: requests wait for a lost connection as long as it takes.
    #[must_use]
    pub fn new(access: Access) -> Self {
        Self { access, connect_within: Duration::from_secs(10), fail_after: None, thread_start: || {} }
    }
}

/// What all channels of an export share.
#[derive(Debug)]
struct Shared {
    uri: NbdUri,
    tls: Option<TlsClient>,
    options: NbdOptions,
    /// Whether writes are permitted now.
    writes: AtomicBool,
    open_channels: AtomicUsize,
    /// What was agreed on when the disk was opened; a new connection must offer as much.
    opened_with: OnceLock<Agreement>,
}

/// A channel's place among those that may be open; free again when it is dropped.
#[derive(Debug)]
struct Place(Arc<Shared>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.open_channels.fetch_sub(1, Ordering::AcqRel);
    }
}

/// An export as a disk.
#[derive(Debug)]
pub struct NbdBackend {
    shared: Arc<Shared>,
    dialler: Arc<Dialler>,
    agreed: Agreement,
    geometry: Geometry,
    first: Mutex<First>,
}

/// The connection that no channel has yet.
#[derive(Debug)]
enum First {
    None,
    /// The export was looked at, and is not held.
    Seen {
        transport: Transport,
        terms: Terms,
    },
    /// The export is held, and the next channel has it.
    Held(Connected),
}

impl NbdBackend {
    /// Connects and looks at the export, and holds it from then on.
    ///
    /// # Errors
    /// [`NbdError`] with the reason and, where there is one, the remedy.
    pub fn open(uri: &NbdUri, options: NbdOptions) -> Result<Self, NbdError> {
        Self::begin(uri, options, |shared| {
            shared.connect().map(|connected| (connected.agreement, First::Held(connected)))
        })
    }

    /// Connects and looks at an export that another end of a migration still holds. [`Backend::reacquire`] takes it; until then
    /// nothing is read or written.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_unlocked(uri: &NbdUri, options: NbdOptions) -> Result<Self, NbdError> {
        let disk = Self::begin(uri, options, Shared::look)?;
        disk.shared.writes.store(false, Ordering::Release);
        Ok(disk)
    }

    fn begin(
        uri: &NbdUri,
        options: NbdOptions,
        first: impl FnOnce(&Shared) -> Result<(Agreement, First), NbdError>,
    ) -> Result<Self, NbdError> {
        let shared = Arc::new(Shared {
            uri: uri.clone(),
            tls: tls_client(uri)?,
            options,
            writes: AtomicBool::new(options.access == Access::ReadWrite),
            open_channels: AtomicUsize::new(0),
            opened_with: OnceLock::new(),
        });
        let (found, first) = first(&shared)?;
        let agreed = *shared.opened_with.get_or_init(|| found);
        let channels = if agreed.has(transmission::MULTI_CONN) { MAX_CONNECTIONS } else { 1 };
        let geometry = Geometry { capacity: agreed.size, access: options.access, channels };
        let dialler = Arc::new(Dialler::start(Arc::clone(&shared)).map_err(|source| shared.broken(source))?);
        Ok(Self { shared, dialler, agreed, geometry, first: Mutex::new(first) })
    }

    fn first(&self) -> MutexGuard<'_, First> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The names of the exports that the server of `uri` tells of.
///
/// # Errors
/// [`NbdError`] if it cannot be asked or does not tell.
pub fn list_exports(uri: &NbdUri, within: Duration) -> Result<Vec<String>, NbdError> {
    let tls = tls_client(uri)?;
    let mut transport = connect(uri, within)?;
    Haggling::new(&mut transport, uri, within).list(tls.as_ref())
}

fn tls_client(uri: &NbdUri) -> Result<Option<TlsClient>, NbdError> {
    let Privacy::Tls { certificates, hostname } = &uri.privacy else { return Ok(None) };
    let host = match &uri.address {
        Address::Tcp { host, .. } => host.as_str(),
        Address::Unix(_) => "localhost",
    };
    Ok(Some(TlsClient::new(certificates, hostname.as_deref().unwrap_or(host))?))
}

fn connect(uri: &NbdUri, within: Duration) -> Result<Transport, NbdError> {
    let address = || uri.address.to_string();
    Transport::connect(&uri.address, within).map_err(|source| match source.kind() {
        io::ErrorKind::TimedOut => NbdError::Silent { address: address(), within },
        _ => NbdError::Unreachable { address: address(), source },
    })
}

impl Shared {
    /// A connection on which requests may be sent, to an export that is one for this disk.
    fn connect(&self) -> Result<Connected, NbdError> {
        let within = self.options.connect_within;
        let mut transport = connect(&self.uri, within)?;
        let mut haggling = Haggling::new(&mut transport, &self.uri, within);
        let terms = haggling.begin(self.tls.as_ref())?;
        let agreement = haggling.choose(terms)?;
        self.enter(transport, agreement)
    }

    /// What the export is like, by a connection on which it may be chosen later; or it is chosen, where the server tells
    /// nothing before.
    fn look(&self) -> Result<(Agreement, First), NbdError> {
        let within = self.options.connect_within;
        let mut transport = connect(&self.uri, within)?;
        let mut haggling = Haggling::new(&mut transport, &self.uri, within);
        let terms = haggling.begin(self.tls.as_ref())?;
        match haggling.look(terms)? {
            Some(agreement) => {
                self.check(&agreement)?;
                Ok((agreement, First::Seen { transport, terms }))
            }
            None => {
                let agreement = haggling.choose(terms)?;
                self.enter(transport, agreement).map(|connected| (agreement, First::Held(connected)))
            }
        }
    }

    /// Chooses the export on a connection by which it was looked at. Such a one may have been given up meanwhile.
    fn hold(&self, seen: Option<(Transport, Terms)>) -> Result<Connected, NbdError> {
        if let Some((mut transport, terms)) = seen {
            transport.negotiate_anew();
            match Haggling::new(&mut transport, &self.uri, self.options.connect_within).choose(terms) {
                Ok(agreement) => return self.enter(transport, agreement),
                Err(NbdError::Broken { .. } | NbdError::Silent { .. }) => {}
                Err(refusal) => return Err(refusal),
            }
        }
        self.connect()
    }

    fn enter(&self, transport: Transport, agreement: Agreement) -> Result<Connected, NbdError> {
        self.check(&agreement)?;
        transport.set_nonblocking().map_err(|source| self.broken(source))?;
        Ok(Connected { transport, agreement })
    }

    /// Whether an export is one for this disk.
    fn check(&self, agreement: &Agreement) -> Result<(), NbdError> {
        let (address, export) = (self.uri.address.to_string(), self.uri.export.clone());
        if agreement.size == 0 || !agreement.size.is_multiple_of(SECTOR) {
            return Err(NbdError::BadSize { address, export, length: agreement.size });
        }
        if self.options.access == Access::ReadWrite && agreement.has(transmission::READ_ONLY) {
            return Err(NbdError::ReadOnly { address, export });
        }
        let Agreement { minimum, maximum, .. } = *agreement;
        if u64::from(minimum) > SECTOR || maximum < LEAST_MAXIMUM {
            return Err(NbdError::BlockSizes { address, export, minimum, maximum });
        }
        let Some(before) = self.opened_with.get() else { return Ok(()) };
        if agreement.size != before.size {
            return Err(NbdError::Changed { address, export, was: before.size, length: agreement.size });
        }
        let lost = before.flags & !agreement.flags;
        if lost != 0 || agreement.maximum < before.maximum {
            return Err(NbdError::Lacks { address, export, lost });
        }
        Ok(())
    }

    fn broken(&self, source: io::Error) -> NbdError {
        NbdError::Broken { address: self.uri.address.to_string(), source }
    }

    fn permits_writes(&self) -> io::Result<()> {
        match (self.options.access, self.writes.load(Ordering::Acquire)) {
            (Access::ReadWrite, true) => Ok(()),
            (Access::ReadWrite, false) => Err(io::Error::other("The disk is not this guest's to write now")),
            (Access::ReadOnly, _) => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }
}

impl Backend for NbdBackend {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn channel(&self) -> io::Result<Box<dyn Channel>> {
        let open = &self.shared.open_channels;
        let limit = self.geometry.channels;
        let one_more = |count| (count < limit).then_some(count + 1);
        if open.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).is_err() {
            return Err(io::Error::other(format!("The export takes {limit} connections, and they are in use")));
        }
        let first = match std::mem::replace(&mut *self.first(), First::None) {
            First::Held(connected) => Some(connected),
            First::None | First::Seen { .. } => None,
        };
        let place = Place(Arc::clone(&self.shared));
        Ok(Box::new(NbdChannel::open(place, &self.dialler, self.agreed, first)?))
    }

    fn grow(&self, _: u64) -> io::Result<u64> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "The length of an export is its server's"))
    }

    fn is_held_by_channels(&self) -> bool {
        true
    }

    fn release(&self) {
        self.shared.writes.store(false, Ordering::Release);
        *self.first() = First::None;
    }

    /// Connects, if no channel does: that the server gives the export is known afterwards.
    fn reacquire(&self) -> io::Result<()> {
        let mut first = self.first();
        if self.shared.open_channels.load(Ordering::Acquire) == 0 {
            *first = match std::mem::replace(&mut *first, First::None) {
                First::Held(connected) => First::Held(connected),
                First::None => First::Held(self.shared.hold(None).map_err(io::Error::other)?),
                First::Seen { transport, terms } => {
                    First::Held(self.shared.hold(Some((transport, terms))).map_err(io::Error::other)?)
                }
            };
        }
        self.shared.writes.store(self.shared.options.access == Access::ReadWrite, Ordering::Release);
        Ok(())
    }
}
