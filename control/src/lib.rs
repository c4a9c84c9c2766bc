//! The control API of a running Godwit: what can be asked ([`Request`]), what is answered ([`Reply`]), what happens
//! by itself ([`Event`]), and the HTTP server and client that carry them over a Unix socket.
//!
//! The VMM implements [`Handler`] and starts a [`Server`]; the command line and the tests use [`Client`]. HTTP is a
//! thin skin: [`routes::ROUTES`] is the one table of paths, and `openapi.json` describes the same paths for others. The
//! crate knows neither KVM nor migrations: the VMM converts its reports into the types here.

mod address;
mod client;
mod cpu_budget;
mod dirty_rate;
mod error;
mod event;
mod identity;
mod metrics;
mod migration;
mod millis;
mod openapi;
mod phase;
mod reply;
mod request;
pub mod routes;
mod server;
mod socket;
mod sse;
mod transfer;
mod with_disks;

pub use address::{AddressError, PeerAddress};
pub use client::{After, Client, ClientError, EventStream};
pub use cpu_budget::{CpuBudget, CpuBudgetError};
pub use dirty_rate::{
    DirtyRate, LastDirtyRate, MeasureDirtyRate, MeasurementCost, MeasurementState, MeasurementStatus, MemorySample,
};
pub use error::{ApiError, Code, ErrorBody};
pub use event::{EndReason, Event, Events, Happening};
pub use identity::{NoRandomness, random_uuid};
pub use metrics::{Family, Label, MetricKind, MetricName, Metrics, Sample, Value};
pub use migration::{
    CodecReason, CpuTimes, GuestCost, JobId, LastMigration, MigrationMode, MigrationRole, MigrationState,
    MigrationStatus, MigrationStep, Progress, RoundCodecs, RoundInfo, RoundKinds, StepInfo, SwitchReason, TargetPart,
};
pub use millis::Millis;
pub use openapi::OPENAPI;
pub use phase::{Phase, Refusal, TestRequests, admit};
pub use reply::{
    BalloonInfo, DirtyTrackerKind, DiskBefore, DiskCounters, DiskInfo, DiskList, JobStarted, NicBackend, NicCounters,
    NicInfo, NicList, Pulsed, Reply, VmInfo,
};
pub use request::{OnStall, Owner, Pulse, Request, ResizeDisk, ResolveMigration, SetBalloon, StartMigration, Stop};
pub use server::{Handler, Limits, Server, ServerError, ServerOptions};
pub use socket::{ControlSocket, SOCKET_PATH_MAX, SocketError};
pub use transfer::{CodecChoice, Codecs, CodecsError, MemoryPolicy, MemoryTransfer, Packing, Streams, StreamsError};
pub use uuid::Uuid;
pub use with_disks::{DiskPolicy, WithDisks, WithDisksError};

/// The version of the API, part of every path but `/metrics`.
pub const API_VERSION: &str = "v1";
