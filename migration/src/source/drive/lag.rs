//! A target that needs longer for pages than the link does.

use super::Drive;
use crate::channel::TICK;
use crate::link::{Link, LinkError};
use crate::source::SourceError;
use crate::wire::Frame;
use std::time::Duration;

/// So many pages are no long work for any target.
const FEW_PAGES: u64 = 256;

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
        let (begun, until) = (self.clock.now(), self.cut_at());
        let mut end = begun + self.plan.patience;
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
                end = self.clock.now() + self.plan.patience;
            }
            if self.clock.now() >= end {
                return Err(SourceError::Link(LinkError::TimedOut { limit: self.plan.patience }));
            }
        }
        let waited = self.clock.now() - begun;
        tracing::debug!(?waited, round, "the target has caught up");
        let round_trip = self.channel.link().round_trip().unwrap_or_default();
        self.target_keeps_up = waited <= round_trip + SHORT_WAIT;
        Ok(waited > SHORT_WAIT)
    }
}
