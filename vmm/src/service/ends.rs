//! How a process ends: as it should, or not at all as it was asked.

use crate::machine::MachineError;
use crate::migrate::address::AddressUseError;
use crate::migrate::ownership::OwnershipError;
use crate::seccomp::SeccompError;
use crate::vcpu::GuestEnd;
use control::{EndReason, PeerAddress};
use std::path::PathBuf;
use thiserror::Error;

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

impl Ended {
    /// What is told of the end to those who watch: nothing of a guest that lives elsewhere.
    pub(super) fn reason(&self) -> Option<(EndReason, String)> {
        let reason = match self {
            Self::MovedAway(_) => return None,
            Self::Quit(why) => return Some((EndReason::Killed, (*why).to_owned())),
            Self::Lost(why) => return Some((EndReason::Failed, (*why).to_owned())),
            Self::Guest(GuestEnd::PowerOff) => EndReason::PowerOff,
            Self::Guest(GuestEnd::Reboot) => EndReason::Reboot,
            Self::Guest(GuestEnd::TripleFault) => EndReason::TripleFault,
            Self::Guest(GuestEnd::Panic) => EndReason::Panic,
            Self::Guest(GuestEnd::KvmFailure(_)) => EndReason::Failed,
        };
        let Self::Guest(end) = self else { return None };
        Some((reason, end.to_string()))
    }
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
    #[error("Guest {guest} was given to {to}, or about to be. If it does not run there, remove {} and start it again", record.display())]
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
    /// There is no name for a record.
    #[error(transparent)]
    Randomness(#[from] control::NoRandomness),
    /// `receive --once` and the migration failed.
    #[error("No guest has arrived: {0}")]
    NotArrived(String),
}
