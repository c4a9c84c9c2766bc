//! The link between two ends of a migration: an ordered, reliable stream of bytes, as the engine wants it.
//!
//! `vmm` implements it over sockets; tests implement it in memory, with faults. The engine hands guest pages over as
//! [`VolatileSlice`]s, so that an implementation can move them between guest memory and the kernel without a copy.

use crate::bell::Bell;
use std::io;
use std::time::Duration;
use thiserror::Error;
use vm_memory::VolatileSlice;

/// One end of a connection to the other end of a migration.
///
/// Every call handles short reads and writes itself: it moves all bytes or fails. A read of 0 bytes from the operating
/// system is [`LinkError::Closed`], never "nothing yet". After an error the link is only good for being dropped, except
/// that what the peer had sent before may still be received.
pub trait Link: Send + 'static {
    /// What can end this connection from another thread.
    type Cutter: Cutter;

    /// What stands for guest memory on its way to another process of the same host, such as a file descriptor.
    type Handle;

    /// A handle to end the connection while another thread may be waiting on it.
    ///
    /// # Errors
    /// If the host has no room for one.
    fn cutter(&self) -> io::Result<Self::Cutter>;

    /// Sends `head` and then the bytes of each of `payload`, in order, as if they were one buffer. There are at most
    /// [`MAX_RECORDS`](crate::wire::MAX_RECORDS) slices, which fits one gathering write of Linux (`IOV_MAX`).
    ///
    /// # Errors
    /// [`LinkError`]; any part of the bytes may have been sent then.
    fn send(&mut self, head: &[u8], payload: &[VolatileSlice<'_>]) -> Result<(), LinkError>;

    /// Receives exactly as many bytes as `buffer` has.
    ///
    /// # Errors
    /// [`LinkError`]; what `buffer` holds then is of no use.
    fn receive(&mut self, buffer: &mut [u8]) -> Result<(), LinkError>;

    /// Receives exactly as many bytes as `slices` have together, into them, in order.
    ///
    /// # Errors
    /// [`LinkError`]; the slices may be written in part then.
    fn receive_pages(&mut self, slices: &[VolatileSlice<'_>]) -> Result<(), LinkError>;

    /// Whether a handle can go over this connection. Where something between the ends does not pass it on, it is lost
    /// nevertheless.
    fn carries_handles(&self) -> bool;

    /// Sends one byte with `handle` beside it. Only where [`carries_handles`](Self::carries_handles) says so.
    ///
    /// # Errors
    /// [`LinkError`].
    fn send_handle(&mut self, handle: &Self::Handle) -> Result<(), LinkError>;

    /// Receives one byte, and the handle beside it; `None` if there is not exactly one.
    ///
    /// # Errors
    /// [`LinkError`].
    fn receive_handle(&mut self) -> Result<Option<Self::Handle>, LinkError>;

    /// Waits until [`receive`](Self::receive) would find a byte or the end, for at most `limit`, which may be zero;
    /// `false` if it found neither. Takes no byte out.
    ///
    /// # Errors
    /// [`LinkError::Io`] if waiting itself fails.
    fn wait(&mut self, limit: Duration) -> Result<bool, LinkError>;

    /// Sets how long a send or receive may go without moving a single byte before it is [`LinkError::TimedOut`].
    /// Called often, so it should cost nothing.
    fn set_patience(&mut self, limit: Duration);

    /// The time a byte and its answer need, if the link knows it.
    fn round_trip(&self) -> Option<Duration>;

    /// Whether both ends are on this host, as far as the link knows: its bytes go no further than memory then.
    fn same_host(&self) -> bool;

    /// Bytes that were sent but that the peer has not received as far as this end knows; 0 if it does not know.
    fn in_flight(&self) -> u64;

    /// Waits until `bell` has rung more often than `seen` times, for at most `limit`, while nothing is wanted of the link.
    fn idle(&mut self, bell: &Bell, seen: u64, limit: Duration) {
        bell.wait(seen, limit);
    }
}

/// Ends a connection under the feet of whoever waits on it.
pub trait Cutter: Send {
    /// Every send and receive fails from now on, also those under way. Nothing happens where it has ended already.
    fn cut(&self);
}

/// Why a link did not do what was asked.
#[derive(Debug, Error)]
pub enum LinkError {
    /// The peer ended the connection.
    #[error("The other end closed the connection")]
    Closed,
    /// Nothing moved for as long as patience lasts.
    #[error("The other end was silent for {} s", limit.as_secs_f64())]
    TimedOut {
        /// How long was waited.
        limit: Duration,
    },
    /// The connection broke.
    #[error("The connection broke")]
    Io(#[from] io::Error),
}
