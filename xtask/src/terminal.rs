//! The terminal of the person who runs a command in a lab: in raw mode while it runs, so that every key reaches the
//! lab, and back in its old mode afterwards, whatever happens.

use std::io::{IsTerminal, stdin, stdout};

use anyhow::{Context, Result};
use godwit_tests::lab::wire::WindowSize;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// A terminal in raw mode; dropping it restores the old mode.
#[derive(Debug)]
pub(crate) struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Whether there is one: both input and output must be it.
    pub(crate) fn is_there() -> bool {
        stdin().is_terminal() && stdout().is_terminal()
    }

    /// Switches it to raw mode.
    pub(crate) fn enter() -> Result<Self> {
        let before = tcgetattr(stdin()).context("Cannot read the terminal's mode")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Flush, &raw).context("Cannot switch the terminal to raw mode")?;
        Ok(Self { before })
    }

    /// Its size.
    pub(crate) fn size() -> Result<WindowSize> {
        let size = tcgetwinsize(stdin()).context("Cannot read the terminal's size")?;
        Ok(WindowSize { rows: size.ws_row, columns: size.ws_col })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Err(error) = tcsetattr(stdin(), OptionalActions::Drain, &self.before) {
            eprintln!("The terminal's mode could not be restored ({error}); `reset` does it");
        }
    }
}
