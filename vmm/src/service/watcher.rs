//! What the migration engine tells an onlooker, posted on the board and published as events.

use super::board::Board;
use crate::layout::PAGE_SIZE;
use control::{
    Happening, JobId, MigrationMode, MigrationRole, MigrationState, MigrationStatus, MigrationStep, PeerAddress,
    Progress, RoundInfo,
};
use migration::{Moved, Observer, Phase, Report, RoundReport};
use std::time::{Duration, Instant};

/// The least time between two events of progress.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Posts one migration's progress.
#[derive(Debug)]
pub(crate) struct Watcher {
    board: Board,
    job: JobId,
    started: Instant,
    published: Option<Instant>,
    /// Zero pages of the rounds that are over.
    zero_pages: u64,
    /// Pages of the rounds that are over.
    pages: u64,
}

impl Watcher {
    pub(crate) fn new(board: Board, job: JobId) -> Self {
        Self { board, job, started: Instant::now(), published: None, zero_pages: 0, pages: 0 }
    }

    fn post(&mut self, note: impl FnOnce(&mut Progress)) {
        let total = self.started.elapsed();
        let mut posted = None;
        self.board.note_migration(|status| {
            note(&mut status.progress);
            status.total_ms = total.into();
            posted = Some(status.progress.clone());
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
        self.board.note_migration(|status| status.rounds.push(kept));
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
    let RoundReport { round, pages, zero_pages, bytes, ms, dirty_at_end } = *round;
    RoundInfo { round, pages, zero_pages, bytes, duration_ms: millis(ms), dirty_pages: dirty_at_end }
}

impl Observer for Watcher {
    fn on(&mut self, news: migration::Progress) {
        match news {
            migration::Progress::Entered(phase) => {
                let step = match phase {
                    Phase::Offering => MigrationStep::Negotiating,
                    Phase::Rounds => MigrationStep::Precopy,
                    Phase::Pausing | Phase::LastPages | Phase::Restoring => MigrationStep::Stopped,
                    Phase::HandingOver => MigrationStep::HandOver,
                };
                self.post(|progress| progress.step = step);
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
        state: MigrationState::Active,
        progress: Progress {
            step,
            round: 0,
            pages_sent: 0,
            zero_pages: 0,
            bytes_sent: 0,
            remaining_bytes: 0,
            bytes_per_second: 0,
            predicted_downtime_ms: None,
        },
        rounds: Vec::new(),
        downtime_ms: None,
        total_ms: Duration::ZERO.into(),
        error: None,
    }
}

/// Posts the end of a migration that moved the guest, with the engine's report.
pub(crate) fn post_report(board: &Board, report: &Report) {
    tracing::info!(report = serde_json::to_string(report).unwrap_or_default(), "migrated");
    board.note_migration(|status| {
        status.state = MigrationState::Completed;
        status.rounds = report.rounds.iter().map(round_info).collect();
        status.downtime_ms = report.downtime_ms.map(millis);
        status.total_ms = millis(report.total_ms);
        status.progress.step = MigrationStep::Ended;
        status.progress.bytes_sent = report.bytes;
        status.progress.remaining_bytes = 0;
        status.progress.predicted_downtime_ms = report.predicted_downtime_ms.map(millis);
    });
    board.end_migration();
}

/// Posts the end of a migration that did not move the guest.
pub(crate) fn post_failure(board: &Board, state: MigrationState, error: String) {
    board.note_migration(|status| {
        status.state = state;
        status.progress.step = MigrationStep::Ended;
        status.error = Some(error);
    });
    board.end_migration();
}
