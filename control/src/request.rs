//! Everything that can be asked of a Godwit, one variant per question, and the bodies that the questions carry.
//!
//! Adding a request: a variant here, its line in [`admit`](crate::admit), its row in [`routes`](crate::routes) and in
//! `openapi.json`, and its arm in the handler; the compiler and the tests name the places that were forgotten. Bodies
//! refuse unknown fields: a typing error must not silently become a default.

use crate::address::PeerAddress;
use crate::cpu_budget::CpuBudget;
use crate::dirty_rate::MeasureDirtyRate;
use crate::migration::MigrationMode;
use crate::transfer::{CodecChoice, MemoryPolicy, Streams};
use crate::with_disks::WithDisks;
use serde::{Deserialize, Serialize};
use std::num::{NonZeroU32, NonZeroU64};
use std::time::Duration;

/// One request to a Godwit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// What is this VM and how is it?
    ShowVm,
    /// Stop the vCPUs and devices; the guest keeps its state. Pausing a paused guest changes nothing.
    Pause,
    /// Let the guest run on. Resuming a running guest changes nothing.
    Resume,
    /// Ask the guest to shut down; see [`Stop`].
    Stop(Stop),
    /// End the guest at once, as by pulling the plug.
    Kill,
    /// Reset the machine to its power-on state and boot it again.
    Reset,
    /// Press the ACPI power button, nothing more.
    PowerButton,
    /// What the balloon holds.
    ShowBalloon,
    /// Give the balloon another target.
    SetBalloon(SetBalloon),
    /// The disks.
    ListDisks,
    /// Make a disk longer while the guest runs.
    ResizeDisk(ResizeDisk),
    /// The network interfaces.
    ListNics,
    /// Move the guest to another Godwit. Answers at once with the job's id.
    StartMigration(StartMigration),
    /// How the current or last migration stands.
    ShowMigration,
    /// Cancel the migration; the guest stays at the source.
    CancelMigration,
    /// Settle a migration that is in doubt.
    ResolveMigration(ResolveMigration),
    /// Measure how fast the guest dirties its memory, and what is in it. Answers at once with the job's id.
    MeasureDirtyRate(MeasureDirtyRate),
    /// What the current or last measurement found.
    ShowDirtyRate,
    /// For tests: save, reset and restore the machine in place.
    Pulse(Pulse),
}

/// The body of a stop: press the power button, and perhaps pull the plug later.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stop {
    /// Ends the guest by force when it has not powered off after so many seconds. Without it, the guest has all the
    /// time it wants.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub force_after_s: Option<NonZeroU32>,
}

/// The body of a change of the balloon's target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetBalloon {
    /// How much memory the balloon should take from the guest.
    pub target_bytes: u64,
}

/// The body of a change of a disk's length.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeDisk {
    /// The disk.
    pub id: String,
    /// How long it should be: a multiple of 512, and no less than it is. A file is made as long; a block device must be so
    /// already.
    pub bytes: u64,
}

/// The body of the start of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartMigration {
    /// Where the receiving Godwit listens.
    pub to: PeerAddress,
    /// Whether the guest runs while its memory moves.
    #[serde(default = "StartMigration::default_mode")]
    pub mode: MigrationMode,
    /// The guest is stopped for the last round when this downtime is predicted to hold; see `on_stall`.
    #[serde(default = "StartMigration::default_max_downtime_ms")]
    pub max_downtime_ms: NonZeroU32,
    /// The last round comes after so many rounds at the latest.
    #[serde(default = "StartMigration::default_max_rounds")]
    pub max_rounds: NonZeroU32,
    /// When the guest should run at the target, in milliseconds from the start. As it nears, no more rounds are sent, and
    /// `on_stall` says what is done if the downtime goal does not hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<NonZeroU32>,
    /// What to do when the downtime goal cannot be reached.
    #[serde(default)]
    pub on_stall: OnStall,
    /// The most bytes a second over all connections together. Without it, as many as the link takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_bytes_per_second: Option<NonZeroU64>,
    /// The migration is given up, and the guest stays, when it has not handed over after so many seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<NonZeroU32>,
    /// Compares a digest of all memory at both ends before the hand-over. Lengthens the downtime.
    #[serde(default)]
    pub verify: bool,
    /// Whether memory is passed to the target, which takes a Unix socket between two processes of one host, or copied.
    /// Memory that is passed takes no rounds, so that what is said here of rounds, connections and codecs does not matter.
    #[serde(default)]
    pub memory: MemoryPolicy,
    /// Over how many connections memory goes.
    #[serde(default)]
    pub streams: Streams,
    /// The name of the TCP congestion control of the source's connections; the host's usual one if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub congestion: Option<String>,
    /// Which codecs make pages smaller.
    #[serde(default)]
    pub codec: CodecChoice,
    /// The processors that making pages smaller may take, on average, where measurements choose the codecs. All of this
    /// host's if it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_budget: Option<CpuBudget>,
    /// The most memory for copies of pages that were sent, which the codec `delta` compares with.
    #[serde(default = "StartMigration::default_delta_cache_bytes")]
    pub delta_cache_bytes: u64,
    /// Which disks go along with the guest.
    #[serde(default, skip_serializing_if = "WithDisks::is_none")]
    pub with_disks: WithDisks,
}

/// What to do with a guest whose downtime goal cannot be reached: it dirties memory faster than it can be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnStall {
    /// End the migration; the guest stays.
    Cancel,
    /// Take time from its vCPUs, in small steps up to 99 %, until the goal holds. Where not even that helps, or no time is
    /// left, it is stopped.
    Throttle,
    /// Stop it for longer than the goal, at a moment when little remains.
    #[default]
    Stop,
}

impl StartMigration {
    /// A migration to `to` with the defaults of the API.
    #[must_use]
    pub fn new(to: PeerAddress) -> Self {
        Self {
            to,
            mode: Self::default_mode(),
            max_downtime_ms: Self::default_max_downtime_ms(),
            max_rounds: Self::default_max_rounds(),
            deadline_ms: None,
            on_stall: OnStall::default(),
            bandwidth_bytes_per_second: None,
            timeout_s: None,
            verify: false,
            memory: MemoryPolicy::default(),
            streams: Streams::default(),
            congestion: None,
            codec: CodecChoice::default(),
            cpu_budget: None,
            delta_cache_bytes: Self::default_delta_cache_bytes(),
            with_disks: WithDisks::default(),
        }
    }

    /// The goal for the downtime.
    #[must_use]
    pub fn max_downtime(&self) -> Duration {
        Duration::from_millis(self.max_downtime_ms.get().into())
    }

    /// When the migration should be complete.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        self.deadline_ms.map(|ms| Duration::from_millis(ms.get().into()))
    }

    /// The limit for the whole migration.
    #[must_use]
    pub fn timeout(&self) -> Option<Duration> {
        self.timeout_s.map(|seconds| Duration::from_secs(seconds.get().into()))
    }

    const fn default_delta_cache_bytes() -> u64 {
        64 << 20
    }

    const fn default_mode() -> MigrationMode {
        MigrationMode::Live
    }

    const fn default_max_downtime_ms() -> NonZeroU32 {
        const { NonZeroU32::new(50).expect("50 is not 0") }
    }

    const fn default_max_rounds() -> NonZeroU32 {
        const { NonZeroU32::new(30).expect("30 is not 0") }
    }
}

/// Who owns the guest, in an operator's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owner {
    /// The guest stays where it was; the target must never run it.
    Source,
    /// The guest moved; the source must never run it.
    Target,
}

/// The body that settles a migration in doubt. The same word has to be given to both ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResolveMigration {
    /// Who owns the guest from now on.
    pub owner: Owner,
}

/// The body of a pulse.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pulse {
    /// How many times in a row.
    pub times: NonZeroU32,
}

/// One request of each kind, in the order of [`Request`].
#[cfg(test)]
pub(crate) fn samples() -> Vec<Request> {
    const ONE: NonZeroU32 = NonZeroU32::MIN;
    vec![
        Request::ShowVm,
        Request::Pause,
        Request::Resume,
        Request::Stop(Stop { force_after_s: Some(ONE) }),
        Request::Kill,
        Request::Reset,
        Request::PowerButton,
        Request::ShowBalloon,
        Request::SetBalloon(SetBalloon { target_bytes: 64 << 20 }),
        Request::ListDisks,
        Request::ResizeDisk(ResizeDisk { id: "blk0".into(), bytes: 1 << 30 }),
        Request::ListNics,
        Request::StartMigration(StartMigration::new(PeerAddress::Unix("/run/in.sock".into()))),
        Request::ShowMigration,
        Request::CancelMigration,
        Request::ResolveMigration(ResolveMigration { owner: Owner::Target }),
        Request::MeasureDirtyRate(MeasureDirtyRate { period_ms: 100 }),
        Request::ShowDirtyRate,
        Request::Pulse(Pulse { times: ONE }),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_of_a_migration() {
        let parsed: StartMigration = serde_json::from_str(r#"{"to":"unix:/run/in.sock"}"#).unwrap();
        assert_eq!(parsed, StartMigration::new("unix:/run/in.sock".parse().unwrap()));
        assert_eq!(parsed.max_downtime(), Duration::from_millis(50));
        assert_eq!((parsed.timeout(), parsed.deadline(), parsed.on_stall), (None, None, OnStall::Stop));
    }

    #[test]
    fn wrong_bodies_are_refused_with_the_field() {
        for (body, part) in [
            (r#"{"to":"unix:/x","max_round":3}"#, "unknown field `max_round`"),
            (r#"{"to":"host:1"}"#, "no known scheme"),
            (r#"{"mode":"live"}"#, "missing field `to`"),
            (r#"{"to":"unix:/x","mode":"quick"}"#, "unknown variant `quick`, expected `live` or `stop`"),
            (r#"{"to":"unix:/x","max_rounds":0}"#, "expected a nonzero u32"),
            (r#"{"to":"unix:/x","timeout_s":-1}"#, "-1"),
            (r#"{"to":"unix:/x","memory":"share"}"#, "unknown variant `share`, expected one of `auto`, `copy`, `pass`"),
            (r#"{"to":"unix:/x","deadline_ms":0}"#, "expected a nonzero u32"),
            (r#"{"to":"unix:/x","bandwidth_bytes_per_second":0}"#, "expected a nonzero u64"),
            (
                r#"{"to":"unix:/x","on_stall":"wait"}"#,
                "unknown variant `wait`, expected one of `cancel`, `throttle`, `stop`",
            ),
            (r#"{"to":"unix:/x","cpu_budget":0}"#, "\"0\" is no number of processors"),
            (r#"{"to":"unix:/x","cpu_budget":-0.5}"#, "\"-0.5\" is no number of processors"),
            (r#"{"to":"unix:/x","cpu_budget":"1"}"#, "expected f64"),
            (r#"{"to":"unix:/x","streams":0}"#, "0 streams: give it 1 to 64"),
            (r#"{"to":"unix:/x","streams":65}"#, "65 streams: give it 1 to 64"),
            (r#"{"to":"unix:/x","codec":"gzip"}"#, "there is no \"gzip\""),
            (r#"{"to":"unix:/x","with_disks":"later"}"#, "WithDisks"),
        ] {
            let error = serde_json::from_str::<StartMigration>(body).unwrap_err().to_string();
            assert!(error.contains(part), "{body}: {error}");
        }
        assert!(serde_json::from_str::<SetBalloon>(r#"{"target_bytes":1.5}"#).is_err());
        assert!(serde_json::from_str::<ResolveMigration>(r#"{"owner":"both"}"#).is_err());
        assert!(serde_json::from_str::<Pulse>(r#"{"times":0}"#).is_err());
    }
}
