//! The report of one migration, from either end, in a form that is stable for machines: `serde` gives the JSON.
//!
//! Both ends have the same report. Only the source sees a migration from its beginning to its end, so the times are its
//! clock's; the target adds its part of the downtime, which travels to the source in `Running`, and takes the rest from
//! the source's `Report`. Where that was lost, the target's report has what the target saw itself, and no downtime.

use crate::convergence::SwitchReason;
use crate::counts::PageCounts;
use crate::policy::Chosen;
use crate::progress::Phase;
use crate::throttling::GuestCost;
use crate::wire::{Mode, Running, Transfer};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use uuid::Uuid;

/// Which end wrote a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The guest left.
    Source,
    /// The guest came.
    Target,
}

/// How this end knows that the guest is at the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// The hand-over went as planned.
    HandedOver,
    /// The target's answer was lost, and it confirmed later.
    ConfirmedLater,
    /// The operator said so.
    Settled,
}

/// One pass over dirty pages. The last one, with the guest paused, counts too.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RoundReport {
    /// From 1.
    pub round: u32,
    /// Pages that the round brought up to date, zero pages included.
    pub pages: u64,
    /// Those of them that were zero, so that no content was sent.
    pub zero_pages: u64,
    /// All of them by the way they went, and those that did not have to go.
    pub kinds: PageCounts,
    /// Bytes that went over the link.
    pub bytes: u64,
    /// How long the round took.
    pub ms: f64,
    /// Pages to send at the end of the round: written in it, or not come to before it was cut short. The target does not know
    /// by itself, and says 0.
    pub dirty_at_end: u64,
    /// The codecs that most of its pages went by, and why. The target does not know by itself.
    pub chosen: Option<Chosen>,
}

/// How long one phase took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PhaseReport {
    /// The phase.
    pub phase: Phase,
    /// How long it took.
    pub ms: f64,
}

/// The target's part of the downtime, by the target's clock. The rest is the source's, and the link's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TargetPart {
    /// From the seal until all was compared and restored, and what only one host may hold was taken.
    pub restore_ms: f64,
    /// From `Go` until the claim to the guest was durable and the guest ran.
    pub start_ms: f64,
}

impl From<Running> for TargetPart {
    fn from(Running { restore, start, cpu: _ }: Running) -> Self {
        Self { restore_ms: ms(restore), start_ms: ms(start) }
    }
}

/// Processor time of the engine's threads, user and system: of the kernel's work on packets only what it does for them
/// there and then, and nothing of the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CpuReport {
    /// At the source, up to this report. The target does not know by itself.
    pub source_ms: Option<f64>,
    /// At the target, up to `Go`. The source does not know it if `Running` never came.
    pub target_ms: Option<f64>,
}

/// What is known of a migration that moved the guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Which end this is.
    pub role: Role,
    /// The migration session, the same at both ends.
    pub session: Uuid,
    /// The guest.
    pub vm: Uuid,
    /// Whether the guest ran while its memory moved.
    pub mode: Mode,
    /// Whether its memory was sent, or passed.
    pub transfer: Transfer,
    /// Over how many connections pages went.
    pub streams: u16,
    /// How this end knows the result.
    pub ending: Ending,
    /// The passes over memory. None if it was passed.
    pub rounds: Vec<RoundReport>,
    /// Bytes that went over the link, of frames of every kind up to `Running`.
    pub bytes: u64,
    /// From the first frame until `Running`.
    pub total_ms: f64,
    /// How long nobody ran the guest, by the source's clock: from the order to pause until `Running` came back, so that
    /// it is too long by the way of that frame. Unknown if it never came.
    pub downtime_ms: Option<f64>,
    /// The target's part of it. The source does not know it if `Running` never came.
    pub target_part: Option<TargetPart>,
    /// The downtime that was predicted when the source decided to pause.
    pub predicted_downtime_ms: Option<f64>,
    /// The total that was predicted after the first round; only in live mode, and only if there were rounds.
    pub predicted_total_ms: Option<f64>,
    /// Why the source stopped sending rounds; only in live mode, and only if there were any.
    pub switched: Option<SwitchReason>,
    /// The round after which it was first seen that more rounds do not bring the downtime goal nearer, if any.
    pub stalled_in_round: Option<u32>,
    /// What the rounds took from the guest; only in live mode.
    pub guest_cost: Option<GuestCost>,
    /// What it took of both hosts' processors.
    pub cpu: CpuReport,
    /// `Some(true)` if both ends compared a digest of all memory, `None` if that was not asked for. A comparison that
    /// fails ends the migration, so that there is no report.
    pub verified: Option<bool>,
    /// Bytes a second over the rounds.
    pub bytes_per_second: f64,
    /// How long each phase took, in order, as the source went through them.
    pub phases: Vec<PhaseReport>,
}

impl Report {
    /// Whether the guest was paused although the downtime goal was not predicted to hold.
    #[must_use]
    pub fn forced(&self) -> bool {
        self.switched.is_some_and(|reason| reason != SwitchReason::GoalMet)
    }

    /// The report that the source sends of this session, if it is one.
    pub(crate) fn of_source(json: &[u8], session: Uuid) -> Option<Self> {
        let read = serde_json::from_slice::<Self>(json);
        let report = read.inspect_err(|error| tracing::warn!(%error, "the source's report cannot be read")).ok()?;
        (report.session == session).then_some(report)
    }

    /// This report of the target's, with what the source says of the same migration. What the target knows by itself it
    /// does not take from anybody.
    pub(crate) fn joined(self, source: Self) -> Self {
        let Self { role, session, vm, mode, transfer, streams, ending, verified, target_part, cpu, .. } = self;
        let cpu = CpuReport { source_ms: source.cpu.source_ms, ..cpu };
        Self { role, session, vm, mode, transfer, streams, ending, verified, target_part, cpu, ..source }
    }

    /// The throughput over `rounds`.
    pub(crate) fn throughput(rounds: &[RoundReport]) -> f64 {
        let (bytes, ms) = rounds.iter().fold((0, 0.0), |(bytes, ms), round| (bytes + round.bytes, ms + round.ms));
        per_second(bytes, ms)
    }
}

/// Milliseconds of a duration.
pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Bytes a second, 0 where no time has passed.
#[expect(clippy::cast_precision_loss, reason = "53 bits of bytes are precise enough for a rate")]
pub(crate) fn per_second(bytes: u64, ms: f64) -> f64 {
    if ms > 0.0 { bytes as f64 * 1000.0 / ms } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Codecs;
    use crate::codec::block::{Packing, ZstdLevel};
    use crate::policy::Why;

    /// The JSON of a report, which scripts read: a change of what is there is a break.
    const GOLDEN: &str = r#"{
  "role": "source",
  "session": "00000000-0000-0000-0000-000000000001",
  "vm": "00000000-0000-0000-0000-000000000002",
  "mode": "live",
  "transfer": "copied",
  "streams": 2,
  "ending": "handed_over",
  "rounds": [
    {
      "round": 1,
      "pages": 10,
      "zero_pages": 4,
      "kinds": {
        "raw": 6,
        "zero": 4,
        "plain": 0,
        "rle": 0,
        "delta": 0,
        "copy": 0,
        "kept": 0,
        "same": 0
      },
      "bytes": 24612,
      "ms": 1.5,
      "dirty_at_end": 2,
      "chosen": {
        "codecs": {
          "zero": true,
          "rle": true,
          "delta": false,
          "dedup": false,
          "packing": {
            "zstd": 1
          }
        },
        "why": "slow_link",
        "link_bytes_per_second": 117000000.0
      }
    }
  ],
  "bytes": 24700,
  "total_ms": 2.5,
  "downtime_ms": 0.5,
  "target_part": {
    "restore_ms": 0.25,
    "start_ms": 0.125
  },
  "predicted_downtime_ms": 0.25,
  "predicted_total_ms": 2.25,
  "switched": "stalled",
  "stalled_in_round": 1,
  "guest_cost": {
    "log_ms": 0.5,
    "longest_log_ms": 0.25,
    "throttled_ms": 1.0,
    "throttled_share": 0.5,
    "most_share": 0.75
  },
  "cpu": {
    "source_ms": 1.5,
    "target_ms": 1.25
  },
  "verified": null,
  "bytes_per_second": 16408000.0,
  "phases": [
    {
      "phase": "offering",
      "ms": 0.125
    }
  ]
}"#;

    #[test]
    fn golden_json() {
        let kinds = PageCounts { raw: 6, zero: 4, ..PageCounts::default() };
        let bytes = 24_612;
        let codecs = Codecs { rle: true, packing: Packing::Zstd(ZstdLevel::MIN), ..Codecs::ZERO };
        let chosen = Some(Chosen { codecs, why: Why::SlowLink, link_bytes_per_second: Some(117e6) });
        let round = RoundReport { round: 1, pages: 10, zero_pages: 4, kinds, bytes, ms: 1.5, dirty_at_end: 2, chosen };
        let rounds = vec![round];
        let report = Report {
            role: Role::Source,
            session: Uuid::from_u128(1),
            vm: Uuid::from_u128(2),
            mode: Mode::Live,
            transfer: Transfer::Copied,
            streams: 2,
            ending: Ending::HandedOver,
            bytes: 24_700,
            total_ms: 2.5,
            downtime_ms: Some(0.5),
            target_part: Some(
                Running { restore: Duration::from_micros(250), start: Duration::from_micros(125), cpu: Duration::ZERO }
                    .into(),
            ),
            predicted_downtime_ms: Some(0.25),
            predicted_total_ms: Some(2.25),
            switched: Some(SwitchReason::Stalled),
            stalled_in_round: Some(1),
            guest_cost: Some(GuestCost {
                log_ms: 0.5,
                longest_log_ms: 0.25,
                throttled_ms: 1.0,
                throttled_share: 0.5,
                most_share: 0.75,
            }),
            cpu: CpuReport { source_ms: Some(1.5), target_ms: Some(1.25) },
            verified: None,
            bytes_per_second: Report::throughput(&rounds),
            rounds,
            phases: vec![PhaseReport { phase: Phase::Offering, ms: 0.125 }],
        };
        assert_eq!(serde_json::to_string_pretty(&report).unwrap(), GOLDEN);
        assert_eq!(serde_json::from_str::<Report>(GOLDEN).unwrap(), report);
    }

    #[test]
    fn a_peers_report_is_taken_if_it_is_one_of_this_session() {
        let session = Uuid::from_u128(1);
        assert!(Report::of_source(GOLDEN.as_bytes(), session).is_some());
        assert_eq!(Report::of_source(GOLDEN.as_bytes(), Uuid::from_u128(2)), None);
        for nonsense in ["", "{}", "[1]", "\u{fffd}", &"[".repeat(10_000), &GOLDEN.replace("2.5", "1e999")] {
            assert_eq!(Report::of_source(nonsense.as_bytes(), session), None);
        }
    }

    #[test]
    fn only_a_goal_that_was_not_met_is_forced() {
        let mut report: Report = serde_json::from_str(GOLDEN).unwrap();
        for (switched, forced) in [
            (None, false),
            (Some(SwitchReason::GoalMet), false),
            (Some(SwitchReason::RoundLimit), true),
            (Some(SwitchReason::Stalled), true),
            (Some(SwitchReason::Deadline), true),
        ] {
            report.switched = switched;
            assert_eq!(report.forced(), forced, "{switched:?}");
        }
    }

    #[test]
    fn no_time_gives_no_rate() {
        assert!(Report::throughput(&[]).abs() < f64::EPSILON);
    }
}
