//! What the migration engine tells an onlooker, posted on the board and published as events.

use super::board::Board;
use crate::layout::PAGE_SIZE;
use control::{
    CodecReason, Codecs, CpuTimes, GuestCost, Happening, JobId, MemoryTransfer, MigrationMode, MigrationRole,
    MigrationState, MigrationStatus, MigrationStep, PeerAddress, Progress, RoundCodecs, RoundInfo, RoundKinds,
    StepInfo, SwitchReason, TargetPart,
};
use migration::codec::block::Packing;
use migration::{Chosen, Moved, Observer, PageCounts, Phase, PhaseReport, Report, RoundReport, Transfer, Why};
use std::time::{Duration, Instant};

/// The least time between two events of progress.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Posts one migration's progress.
#[derive(Debug)]
pub(crate) struct Watcher {
    board: Board,
    job: JobId,
    published: Option<Instant>,
    /// Zero pages of the rounds that are over.
    zero_pages: u64,
    /// Pages of the rounds that are over.
    pages: u64,
}

impl Watcher {
    pub(crate) fn new(board: Board, job: JobId) -> Self {
        Self { board, job, published: None, zero_pages: 0, pages: 0 }
    }

    fn post(&mut self, note: impl FnOnce(&mut Progress)) {
        let posted = self.board.note_migration(self.job, |status| {
            note(&mut status.progress);
            status.progress.clone()
        });
        if let Some(progress) = posted
            && self.published.is_none_or(|published| published.elapsed() >= PROGRESS_EVERY)
        {
            self.published = Some(Instant::now());
            self.board.events().publish(Happening::MigrationProgress { job: self.job, progress });
        }
    }

    fn round_done(&mut self, round: RoundReport) {
        self.pages += round.pages;
        self.zero_pages += round.zero_pages;
        let (pages, zero_pages) = (self.pages, self.zero_pages);
        let info = round_info(&round);
        let kept = info.clone();
        self.board.note_migration(self.job, |status| status.rounds.push(kept));
        self.post(|progress| {
            progress.pages_sent = pages;
            progress.zero_pages = zero_pages;
            progress.remaining_bytes = round.dirty_at_end * PAGE_SIZE;
        });
        self.board.events().publish(Happening::RoundEnded { job: self.job, round: info });
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "rates are positive, and far below 2^64")]
fn rate(bytes_per_second: f64) -> u64 {
    bytes_per_second as u64
}

fn millis(ms: f64) -> control::Millis {
    Duration::try_from_secs_f64(ms / 1000.0).unwrap_or_default().into()
}

fn round_info(round: &RoundReport) -> RoundInfo {
    let RoundReport { round, pages, zero_pages, kinds, bytes, ms, dirty_at_end, chosen } = *round;
    let PageCounts { raw, zero, plain, rle, delta, copy, kept, same } = kinds;
    let kinds = RoundKinds { raw, zero, plain, rle, delta, copy, kept, same };
    let codec = chosen.as_ref().map(round_codecs);
    RoundInfo { round, pages, zero_pages, bytes, duration_ms: millis(ms), kinds, dirty_pages: dirty_at_end, codec }
}

fn round_codecs(chosen: &Chosen) -> RoundCodecs {
    let Chosen { codecs, why, link_bytes_per_second } = *chosen;
    let migration::Codecs { zero, rle, delta, dedup, packing } = codecs;
    let packing = match packing {
        Packing::Stored => control::Packing::Stored,
        Packing::Lz4 => control::Packing::Lz4,
        Packing::Zstd(level) => control::Packing::Zstd(level.number()),
    };
    let why = match why {
        Why::Asked => CodecReason::Asked,
        Why::Unmeasured => CodecReason::Unmeasured,
        Why::Trial => CodecReason::Trial,
        Why::FastLink => CodecReason::FastLink,
        Why::SlowLink => CodecReason::SlowLink,
        Why::ShortPages => CodecReason::ShortPages,
        Why::NothingGained => CodecReason::NothingGained,
        Why::Budget => CodecReason::Budget,
    };
    let codecs = Codecs { zero, rle, delta, dedup, packing };
    RoundCodecs { codecs, why, link_bytes_per_second: link_bytes_per_second.map(rate) }
}

fn step(phase: Phase) -> MigrationStep {
    match phase {
        Phase::Offering => MigrationStep::Negotiating,
        Phase::Rounds => MigrationStep::Precopy,
        Phase::Pausing => MigrationStep::Pausing,
        Phase::LastPages => MigrationStep::LastPages,
        Phase::Restoring => MigrationStep::Restoring,
        Phase::HandingOver => MigrationStep::HandOver,
    }
}

fn step_info(report: &PhaseReport) -> StepInfo {
    let PhaseReport { phase, ms } = *report;
    StepInfo { step: step(phase), duration_ms: millis(ms) }
}

fn switch_reason(reason: migration::SwitchReason) -> SwitchReason {
    match reason {
        migration::SwitchReason::GoalMet => SwitchReason::GoalMet,
        migration::SwitchReason::RoundLimit => SwitchReason::RoundLimit,
        migration::SwitchReason::Stalled => SwitchReason::Stalled,
        migration::SwitchReason::Deadline => SwitchReason::Deadline,
    }
}

fn memory_transfer(transfer: Transfer) -> MemoryTransfer {
    match transfer {
        Transfer::Copied => MemoryTransfer::Copied,
        Transfer::Passed => MemoryTransfer::Passed,
    }
}

fn target_part(part: migration::TargetPart) -> TargetPart {
    let migration::TargetPart { restore_ms, start_ms } = part;
    TargetPart { restore_ms: millis(restore_ms), start_ms: millis(start_ms) }
}

/// A share as a percentage, of which one that is not zero shows something.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 100")]
fn percent(share: f64) -> u8 {
    (share.clamp(0.0, 1.0) * 100.0).ceil() as u8
}

fn guest_cost(cost: migration::GuestCost) -> GuestCost {
    let migration::GuestCost { log_ms, longest_log_ms, throttled_ms, throttled_share, most_share } = cost;
    GuestCost {
        log_ms: millis(log_ms),
        longest_log_ms: millis(longest_log_ms),
        throttled_ms: millis(throttled_ms),
        throttled_percent: percent(throttled_share),
        most_percent: percent(most_share),
    }
}

fn cpu_times(cpu: migration::CpuReport) -> CpuTimes {
    let migration::CpuReport { source_ms, target_ms } = cpu;
    CpuTimes { source_ms: source_ms.map(millis), target_ms: target_ms.map(millis) }
}

impl Observer for Watcher {
    fn on(&mut self, news: migration::Progress) {
        match news {
            migration::Progress::Entered(phase) => {
                self.post(|progress| progress.step = step(phase));
            }
            migration::Progress::Moved(Moved { round, pages, of, bytes, bytes_per_second }) => {
                let sent = self.pages + pages;
                self.post(|progress| {
                    progress.round = round;
                    progress.pages_sent = sent;
                    progress.bytes_sent = bytes;
                    progress.remaining_bytes = of.saturating_sub(pages) * PAGE_SIZE;
                    progress.bytes_per_second = rate(bytes_per_second);
                });
            }
            migration::Progress::RoundDone(round) => self.round_done(round),
            migration::Progress::Throttled(share) => {
                let percent = Some(percent(share)).filter(|percent| *percent > 0);
                self.post(|progress| progress.throttled_percent = percent);
            }
        }
    }
}

/// What is posted of a migration that begins.
pub(crate) fn begun(
    job: JobId,
    role: MigrationRole,
    peer: PeerAddress,
    mode: MigrationMode,
    step: MigrationStep,
) -> MigrationStatus {
    MigrationStatus {
        job,
        role,
        peer,
        mode,
        memory: None,
        streams: None,
        state: MigrationState::Active,
        progress: Progress {
            step,
            round: 0,
            pages_sent: 0,
            zero_pages: 0,
            bytes_sent: 0,
            remaining_bytes: 0,
            bytes_per_second: 0,
            throttled_percent: None,
            predicted_downtime_ms: None,
        },
        rounds: Vec::new(),
        steps: Vec::new(),
        total_ms: Duration::ZERO.into(),
        downtime_ms: None,
        target_part: None,
        predicted_total_ms: None,
        switched: None,
        stalled_in_round: None,
        guest_cost: None,
        cpu: None,
        verified: None,
        error: None,
    }
}

/// Posts the end of a migration that moved the guest, with the engine's report.
pub(crate) fn post_report(board: &Board, report: &Report) {
    tracing::info!(report = serde_json::to_string(report).unwrap_or_default(), "migrated");
    board.end_migration(JobId(report.session), |status| complete(status, report));
}

/// Replaces all that was told under way by the report, so that both ends tell the same.
fn complete(status: &mut MigrationStatus, report: &Report) {
    let Report {
        role: _,
        session: _,
        vm: _,
        mode: _,
        transfer,
        streams,
        ending: _,
        rounds,
        bytes,
        total_ms,
        downtime_ms,
        target_part: part,
        predicted_downtime_ms,
        predicted_total_ms,
        switched,
        stalled_in_round,
        guest_cost: cost,
        cpu,
        verified,
        bytes_per_second,
        phases,
    } = report;
    status.state = MigrationState::Completed;
    status.memory = Some(memory_transfer(*transfer));
    status.streams = Some(*streams);
    status.progress = Progress {
        step: MigrationStep::Ended,
        round: rounds.last().map_or(0, |round| round.round),
        pages_sent: rounds.iter().map(|round| round.pages).sum(),
        zero_pages: rounds.iter().map(|round| round.zero_pages).sum(),
        bytes_sent: *bytes,
        remaining_bytes: 0,
        bytes_per_second: rate(*bytes_per_second),
        throttled_percent: None,
        predicted_downtime_ms: predicted_downtime_ms.map(millis),
    };
    status.rounds = rounds.iter().map(round_info).collect();
    status.steps = phases.iter().map(step_info).collect();
    status.total_ms = millis(*total_ms);
    status.downtime_ms = downtime_ms.map(millis);
    status.target_part = part.map(target_part);
    status.predicted_total_ms = predicted_total_ms.map(millis);
    status.switched = switched.map(switch_reason);
    status.stalled_in_round = *stalled_in_round;
    status.guest_cost = cost.map(guest_cost);
    status.cpu = Some(cpu_times(*cpu));
    status.verified = *verified;
    // Of a doubt that was settled since.
    status.error = None;
}

/// Posts the end of a migration that did not move the guest.
pub(crate) fn post_failure(board: &Board, job: JobId, state: MigrationState, error: String) {
    board.end_migration(job, |status| {
        status.state = state;
        status.progress.step = MigrationStep::Ended;
        status.error = Some(error);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use control::Events;
    use migration::{Ending, Mode, Role};
    use uuid::Uuid;

    fn board(role: MigrationRole) -> Board {
        let board = Board::new(control::Phase::Running, Events::default());
        let peer = PeerAddress::Unix("/in.sock".into());
        let job = JobId(Uuid::from_u128(1));
        board.begin_migration(begun(job, role, peer, MigrationMode::Live, MigrationStep::Connecting));
        board
    }

    fn report(role: Role) -> Report {
        let kinds = PageCounts { raw: 1, zero: 4, plain: 1, rle: 1, delta: 1, copy: 1, kept: 2, same: 3 };
        let codecs = migration::Codecs { rle: true, packing: Packing::Lz4, ..migration::Codecs::ZERO };
        let chosen = Some(Chosen { codecs, why: Why::SlowLink, link_bytes_per_second: Some(1e9) });
        let round =
            RoundReport { round: 1, pages: 9, zero_pages: 4, kinds, bytes: 20_500, ms: 1.5, dirty_at_end: 2, chosen };
        let kinds = PageCounts { raw: 2, ..PageCounts::default() };
        Report {
            role,
            session: Uuid::from_u128(1),
            vm: Uuid::from_u128(2),
            mode: Mode::Live,
            transfer: Transfer::Copied,
            streams: 4,
            ending: Ending::HandedOver,
            rounds: vec![
                round,
                RoundReport {
                    round: 2,
                    pages: 2,
                    zero_pages: 0,
                    kinds,
                    bytes: 8228,
                    ms: 0.5,
                    dirty_at_end: 0,
                    chosen: None,
                },
            ],
            bytes: 29_000,
            total_ms: 4.25,
            downtime_ms: Some(2.0),
            target_part: Some(migration::TargetPart { restore_ms: 0.75, start_ms: 0.25 }),
            predicted_downtime_ms: Some(1.75),
            predicted_total_ms: Some(4.5),
            switched: Some(migration::SwitchReason::GoalMet),
            stalled_in_round: Some(1),
            guest_cost: Some(migration::GuestCost {
                log_ms: 0.25,
                longest_log_ms: 0.125,
                throttled_ms: 1.5,
                throttled_share: 0.125,
                most_share: 0.2,
            }),
            cpu: migration::CpuReport { source_ms: Some(3.5), target_ms: Some(2.5) },
            verified: Some(true),
            bytes_per_second: 14_000_000.0,
            phases: vec![PhaseReport { phase: Phase::Pausing, ms: 0.125 }],
        }
    }

    #[test]
    fn both_ends_post_the_same_figures() {
        let source = board(MigrationRole::Source);
        post_report(&source, &report(Role::Source));
        let source = source.migration().unwrap();
        let target = board(MigrationRole::Target);
        // What it saw under way gives room to the report.
        Watcher::new(target.clone(), source.job).on(migration::Progress::RoundDone(report(Role::Target).rounds[0]));
        post_report(&target, &report(Role::Target));
        let target = target.migration().unwrap();
        assert_eq!(MigrationStatus { role: MigrationRole::Source, ..target }, source);
        assert_eq!((source.state, source.memory), (MigrationState::Completed, Some(MemoryTransfer::Copied)));
        assert_eq!((source.progress.round, source.progress.pages_sent, source.progress.zero_pages), (2, 11, 4));
        assert_eq!((source.progress.bytes_sent, source.progress.bytes_per_second), (29_000, 14_000_000));
        assert_eq!((source.total_ms, source.downtime_ms), (millis(4.25), Some(millis(2.0))));
        let part = TargetPart { restore_ms: millis(0.75), start_ms: millis(0.25) };
        assert_eq!((source.target_part, source.switched), (Some(part), Some(SwitchReason::GoalMet)));
        assert_eq!(source.steps, [StepInfo { step: MigrationStep::Pausing, duration_ms: millis(0.125) }]);
        assert_eq!(source.verified, Some(true));
        assert_eq!((source.predicted_total_ms, source.stalled_in_round), (Some(millis(4.5)), Some(1)));
        let cost = GuestCost {
            log_ms: millis(0.25),
            longest_log_ms: millis(0.125),
            throttled_ms: millis(1.5),
            throttled_percent: 13,
            most_percent: 20,
        };
        assert_eq!(source.guest_cost, Some(cost));
        let cpu = CpuTimes { source_ms: Some(millis(3.5)), target_ms: Some(millis(2.5)) };
        assert_eq!((source.streams, source.cpu), (Some(4), Some(cpu)));
        let kinds = RoundKinds { raw: 1, zero: 4, plain: 1, rle: 1, delta: 1, copy: 1, kept: 2, same: 3 };
        assert_eq!(source.rounds[0].kinds, kinds);
        let codec = source.rounds[0].codec.unwrap();
        assert_eq!((codec.codecs.to_string().as_str(), codec.why), ("rle,lz4", CodecReason::SlowLink));
        assert_eq!((codec.link_bytes_per_second, source.rounds[1].codec), (Some(1_000_000_000), None));
    }

    #[test]
    fn a_failure_tells_how_long_it_took() {
        let board = board(MigrationRole::Source);
        let job = board.migration().unwrap().job;
        std::thread::sleep(Duration::from_millis(2));
        post_failure(&board, job, MigrationState::Failed, "No Godwit can be reached".to_owned());
        let failed = board.migration().unwrap();
        assert!(failed.total_ms >= millis(2.0), "{failed:?}");
        assert_eq!((failed.state, failed.progress.step), (MigrationState::Failed, MigrationStep::Ended));
        assert_eq!((failed.error.as_deref(), failed.downtime_ms), (Some("No Godwit can be reached"), None));
        // A doubt that is settled for the target afterwards.
        post_report(&board, &Report { downtime_ms: None, target_part: None, ..report(Role::Source) });
        let settled = board.migration().unwrap();
        assert_eq!((settled.state, settled.error, settled.downtime_ms), (MigrationState::Completed, None, None));
    }

    #[test]
    fn a_late_report_leaves_the_next_migration_alone() {
        let board = board(MigrationRole::Target);
        let peer = PeerAddress::Unix("/next.sock".into());
        let job = JobId(Uuid::from_u128(3));
        let next = begun(job, MigrationRole::Source, peer, MigrationMode::Live, MigrationStep::Connecting);
        board.begin_migration(next.clone());
        post_report(&board, &report(Role::Target));
        assert_eq!(board.migration(), Some(next));
    }
}
