//! A target that needs longer for pages than the link does.

use super::Drive;
use crate::channel::TICK;
use crate::link::{Link, LinkError};
use crate::region::PAGE_SIZE;
use crate::source::SourceError;
use crate::wire::Frame;
use std::time::Duration;

/// So many pages are no long work for any target.
const FEW_PAGES: u64 = 256;

/// What the slowest disks read, in bytes a second.
const SLOW_DISK: u64 = 20 << 20;

/// In this time the guest writes so little that another round is not worth it.
const SHORT_WAIT: Duration = Duration::from_millis(5);

impl<L: Link> Drive<'_, L> {
    /// Whether the target is so far behind with the pages of round `round`, the last one, that the guest would have to wait
    /// for it. Waits until it is not, but no longer than a deadline allows.
    ///
    /// What goes over the link in a moment may take the target long: a reference to a page is a few bytes, and a page to
    /// copy. A target that has answered as fast as the link lets it is not asked again right after that.
    pub(in crate::source) fn target_lags(&mut self, round: u32) -> Result<bool, SourceError> {
        if std::mem::take(&mut self.target_keeps_up) {
            return Ok(false);
        }
        let late = self.account.rounds.iter().filter(|done| done.round > self.installed);
        if late.map(|round| round.pages - round.zero_pages).sum::<u64>() <= FEW_PAGES {
            return Ok(false);
        }
        let begun = self.clock.now();
        if !self.await_installed(round, self.cut_at(), self.plan.patience)? {
            return Ok(false);
        }
        let waited = self.clock.now() - begun;
        tracing::debug!(?waited, round, "the target has caught up");
        let round_trip = self.channel.link().round_trip().unwrap_or_default();
        self.target_keeps_up = waited <= round_trip + SHORT_WAIT;
        Ok(waited > SHORT_WAIT)
    }

    /// Where the target has old copies of disks, waits until it has said what they lack, which is in the ledger then. `false`
    /// if it has none.
    pub(in crate::source) fn hear_what_lacks(&mut self) -> Result<bool, SourceError> {
        if !self.streams.has_old() {
            return Ok(false);
        }
        // Digests are few bytes on the link, and much to read.
        let read = Duration::from_secs(self.streams.sent.pages().kept * PAGE_SIZE as u64 / SLOW_DISK);
        self.await_installed(1, None, self.plan.patience + read)
    }

    /// Waits until the target has installed a round, but no longer than `until`; whether it has.
    fn await_installed(
        &mut self,
        round: u32,
        until: Option<Duration>,
        patience: Duration,
    ) -> Result<bool, SourceError> {
        let mut end = self.clock.now() + patience;
        let mut installed = self.installed;
        while self.installed < round {
            if until.is_some_and(|until| self.clock.now() >= until) {
                return Ok(false);
            }
            self.check()?;
            if self.installed < round && !self.channel.link().wait(TICK).map_err(SourceError::Link)? {
                self.send(&Frame::Heartbeat)?;
            }
            if std::mem::replace(&mut installed, self.installed) != self.installed {
                end = self.clock.now() + patience;
            }
            if self.clock.now() >= end {
                return Err(SourceError::Link(LinkError::TimedOut { limit: patience }));
            }
        }
        Ok(true)
    }
}
