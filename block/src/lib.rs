//! The bytes of disks: where they are, and how they are read and written.
//!
//! A [`Backend`] is one disk: a raw file, an export of an NBD server, or a file over an export that comes to it by and by.
//! Who reads and writes it opens a [`Channel`], gives it requests, and is told when they are done; each queue of a guest's
//! disk has one, and so has each client of the [`nbd`] server. The crate knows neither guests nor migration: memory comes as
//! [`Buffers`], wherever it is mapped.

pub mod backend;
pub mod blocking;
#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
#[cfg(test)]
mod faulty;
pub mod file;
pub mod layered;
pub mod lent;
pub mod logged;
pub mod memory;
pub mod nbd;

pub use backend::{
    Access, Answer, Backend, Channel, Completion, Durability, Extent, ExtentKind, Geometry, Operation, SECTOR, Unmap,
};
pub use blocking::Blocking;
pub use file::{DiskError, FileBackend};
pub use layered::LayeredBackend;
pub use lent::LentBackend;
pub use logged::{LOG_PAGE, LoggedBackend, WriteLog};
pub use memory::{Buffers, Piece, Scratch};
pub use nbd::{Export, Listener, NbdBackend, NbdError, NbdOptions, NbdServer, NbdUri, ServerOptions};
