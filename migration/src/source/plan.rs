//! How one migration is to go, and what of it is left to the engine.

use super::streams::Chooser;
use crate::codec::Codecs;
use crate::convergence::Goal;
use crate::link::Link;
use crate::policy::{self, Policy};
use crate::stream_count::{self, Known};
use crate::wire::Mode;
use std::num::{NonZeroU16, NonZeroU64};
use std::sync::Mutex;
use std::time::Duration;
use uuid::Uuid;

/// How the guest's memory is to get to the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryPolicy {
    /// It is passed where both ends are on one host, and else its content is sent.
    Auto,
    /// Its content is sent.
    Copy,
    /// It is passed, or the guest stays.
    Pass,
}

/// How one migration is to go.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// A name for this attempt that was never used before.
    pub session: Uuid,
    /// Whether the guest runs while its memory moves.
    pub mode: Mode,
    /// Whether both ends compare a digest of all memory before the guest is handed over. Costs downtime.
    pub verify: bool,
    /// How the guest's memory is to get to the target. Where it is passed, there are no rounds, no further streams and no
    /// codecs.
    pub memory: MemoryPolicy,
    /// When to pause the guest, in live mode.
    pub goal: Goal,
    /// How long it all may take until the guest is handed over; `None` for as long as it needs.
    pub timeout: Option<Duration>,
    /// How long to wait for an answer, or for a byte to move.
    pub patience: Duration,
    /// The most bytes a second over all streams together, to within a twentieth; `None` for as many as the link takes.
    pub bandwidth: Option<NonZeroU64>,
    /// Over how many streams pages go, at most [`MAX_STREAMS`](crate::wire::MAX_STREAMS); `None` for as many as
    /// the engine finds good.
    pub streams: Option<NonZeroU16>,
    /// How pages may be made smaller; `None` for as it turns out to be best by measurements.
    pub codecs: Option<Codecs>,
    /// Processors of this host.
    pub cpus: NonZeroU16,
    /// How many of them encoding may take on average, where the codecs are chosen by measurements; more than 0.
    pub cpu_budget: f64,
    /// The most memory for copies of pages that were sent, where the codecs need any, in bytes.
    pub delta_cache: usize,
}

impl Plan {
    /// A plan with usual values.
    #[must_use]
    pub fn new(session: Uuid, mode: Mode) -> Self {
        Self {
            session,
            mode,
            verify: false,
            memory: MemoryPolicy::Auto,
            goal: Goal::default(),
            timeout: None,
            patience: Duration::from_secs(30),
            bandwidth: None,
            streams: None,
            codecs: None,
            cpus: NonZeroU16::MIN,
            cpu_budget: 1.0,
            delta_cache: 64 << 20,
        }
    }

    /// How many streams there are to be.
    pub(super) fn stream_count(&self, link: &impl Link) -> NonZeroU16 {
        let Self { cpus, cpu_budget, .. } = *self;
        let known = || Known { cpus, cpu_budget, same_host: link.same_host(), round_trip: link.round_trip() };
        self.streams.unwrap_or_else(|| stream_count::stream_count(&known()))
    }

    /// Who chooses codecs.
    pub(super) fn chooser(&self, link: &impl Link, streams: NonZeroU16) -> Chooser {
        let terms = || policy::Terms {
            cpus: self.cpus.get().into(),
            budget: self.cpu_budget,
            streams: streams.get(),
            resends: self.mode == Mode::Live,
            same_host: link.same_host(),
        };
        self.codecs.map_or_else(|| Chooser::Policy(Box::new(Mutex::new(Policy::new(terms())))), Chooser::User)
    }
}
