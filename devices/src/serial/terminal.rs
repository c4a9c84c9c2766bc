//! The user's terminal as a console: raw mode, the escape key, and the pump from the keyboard to the port.
//!
//! Invariant: the terminal is as it was once the [`RawMode`] is dropped, or the process exits in any way that runs its
//! exit handlers. A process that is killed by a signal calls [`restore_terminal`] itself.

#![expect(unsafe_code, reason = "termios and atexit have no safe wrapper here")]

use super::SerialInput;
use super::descriptor::is_readable;
use crate::worker::{Polls, Task, WorkerError};
use std::fmt;
use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Mutex, Once, PoisonError};

/// `Ctrl-a`, which begins a command to the console.
const ESCAPE: u8 = 0x01;
/// After the escape: leave.
const QUIT: u8 = b'x';

/// The terminal that is in raw mode, and how it was before. One process has one terminal.
static ORIGINAL: Mutex<Option<(OwnedFd, libc::termios)>> = Mutex::new(None);
static AT_EXIT: Once = Once::new();

/// Keeps the terminal in raw mode as long as it lives.
#[derive(Debug)]
pub(super) struct RawMode(());

impl RawMode {
    /// Puts `terminal` into raw mode; `None` if it is no terminal.
    ///
    /// Output is left as it is, so that log lines of this process still begin at the left.
    pub(super) fn enter(terminal: &File) -> io::Result<Option<Self>> {
        if !terminal.is_terminal() {
            return Ok(None);
        }
        let fd = terminal.as_fd().try_clone_to_owned()?;
        // SAFETY: termios is a plain C struct, for which zeros are a value.
        let mut before: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes one termios at the address, a local of that type; the descriptor is open.
        if unsafe { libc::tcgetattr(fd.as_raw_fd(), &raw mut before) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut raw = before;
        // SAFETY: cfmakeraw changes the fields of the one termios at the address, a local.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        raw.c_oflag = before.c_oflag;
        AT_EXIT.call_once(|| {
            // SAFETY: the handler is an extern "C" function that lives as long as the process and does not unwind.
            unsafe { libc::atexit(restore_at_exit) };
        });
        // SAFETY: the kernel reads one termios at the address, a local; the descriptor is open.
        if unsafe { libc::tcsetattr(fd.as_raw_fd(), libc::TCSANOW, &raw const raw) } != 0 {
            return Err(io::Error::last_os_error());
        }
        *ORIGINAL.lock().unwrap_or_else(PoisonError::into_inner) = Some((fd, before));
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore_terminal();
    }
}

/// Gives the terminal back as it was before raw mode, if it is in raw mode.
pub fn restore_terminal() {
    let original = ORIGINAL.try_lock().ok().and_then(|mut original| original.take());
    if let Some((fd, before)) = original {
        // SAFETY: the kernel reads one termios at the address, a local; the descriptor is owned and open.
        unsafe { libc::tcsetattr(fd.as_raw_fd(), libc::TCSANOW, &raw const before) };
    }
}

extern "C" fn restore_at_exit() {
    restore_terminal();
}

/// What the keys mean.
#[derive(Debug, Default)]
struct Keys {
    escaped: bool,
}

impl Keys {
    /// Appends to `guest` what the guest gets of `typed`; whether the user wants to leave.
    fn take(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> bool {
        for &key in typed {
            if !self.escaped && key == ESCAPE {
                self.escaped = true;
                continue;
            }
            match (std::mem::take(&mut self.escaped), key) {
                (true, QUIT) => return true,
                (true, ESCAPE) | (false, _) => guest.push(key),
                (true, other) => guest.extend([ESCAPE, other]),
            }
        }
        false
    }
}

const KEYBOARD: u32 = 0;
const DRAINED: u32 = 1;
/// Keys read at once: as many as the port's FIFO takes.
const READ: usize = 64;

/// Whether more keys can come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keyboard {
    Polled,
    /// A file, which cannot be polled and never blocks.
    File,
    Ended,
}

pub(super) struct TerminalPump {
    keyboard: File,
    state: Keyboard,
    port: SerialInput,
    keys: Keys,
    /// What the guest's FIFO had no room for.
    pending: Vec<u8>,
    quit: Box<dyn FnMut() + Send>,
}

impl TerminalPump {
    pub(super) fn new(keyboard: File, port: SerialInput, quit: Box<dyn FnMut() + Send>) -> Self {
        let keys = Keys::default();
        Self { keyboard, state: Keyboard::Polled, port, keys, pending: Vec::new(), quit }
    }

    fn pump(&mut self, polls: &mut Polls<'_, '_>) {
        loop {
            let taken = self.port.offer(&self.pending);
            self.pending.drain(..taken);
            let is_waiting = !self.pending.is_empty();
            if is_waiting || self.state == Keyboard::Ended || !is_readable(self.keyboard.as_fd()) {
                return;
            }
            let mut typed = [0; READ];
            let length = match self.keyboard.read(&mut typed) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Ok(length) => length,
                Err(error) => {
                    tracing::warn!(%error, "The console's input failed");
                    0
                }
            };
            if length == 0 {
                self.end(polls);
            } else if self.keys.take(&typed[..length], &mut self.pending) {
                (self.quit)();
            }
        }
    }

    fn end(&mut self, polls: &mut Polls<'_, '_>) {
        if self.state == Keyboard::Polled
            && let Err(error) = polls.remove(self.keyboard.as_raw_fd(), KEYBOARD)
        {
            tracing::debug!(%error, "The keyboard was not polled");
        }
        self.state = Keyboard::Ended;
    }
}

impl fmt::Debug for TerminalPump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TerminalPump").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Task for TerminalPump {
    fn begin(&mut self, polls: &mut Polls<'_, '_>) -> Result<(), WorkerError> {
        if polls.add(self.keyboard.as_raw_fd(), KEYBOARD).is_err() {
            self.state = Keyboard::File;
        }
        polls.add(self.port.drained().as_raw_fd(), DRAINED)?;
        self.pump(polls);
        Ok(())
    }

    fn ready(&mut self, token: u32, polls: &mut Polls<'_, '_>) {
        if token == DRAINED {
            // Empty if an earlier look has read it.
            let _ = self.port.drained().read();
        }
        self.pump(polls);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(parts: &[&[u8]]) -> (Vec<u8>, bool) {
        let (mut keys, mut guest, mut quits) = (Keys::default(), Vec::new(), false);
        for part in parts {
            quits |= keys.take(part, &mut guest);
        }
        (guest, quits)
    }

    #[test]
    fn escape_and_x_quits_wherever_the_reads_are_cut() {
        assert_eq!(typed(&[b"ls\x01x"]), (b"ls".to_vec(), true));
        assert_eq!(typed(&[b"ls\x01", b"x"]), (b"ls".to_vec(), true));
        assert_eq!(typed(&[b"lsx"]), (b"lsx".to_vec(), false));
    }

    #[test]
    fn escape_twice_is_one_escape_and_others_pass() {
        assert_eq!(typed(&[b"\x01\x01x"]), (b"\x01x".to_vec(), false));
        assert_eq!(typed(&[b"\x01", b"\x01"]), (b"\x01".to_vec(), false));
        assert_eq!(typed(&[b"\x01b"]), (b"\x01b".to_vec(), false));
    }

    fn settings(terminal: &impl AsRawFd) -> libc::termios {
        // SAFETY: as in RawMode::enter.
        let mut settings: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: as in RawMode::enter.
        assert_eq!(unsafe { libc::tcgetattr(terminal.as_raw_fd(), &raw mut settings) }, 0);
        settings
    }

    #[test]
    fn a_terminal_is_raw_and_then_as_before() {
        let controller = File::options().read(true).write(true).open("/dev/ptmx").unwrap();
        // SAFETY: both work on the open descriptor only.
        let number = unsafe {
            assert_eq!(libc::unlockpt(controller.as_raw_fd()), 0);
            let mut number: libc::c_uint = 0;
            assert_eq!(libc::ioctl(controller.as_raw_fd(), libc::TIOCGPTN, &raw mut number), 0);
            number
        };
        let terminal = File::options().read(true).write(true).open(format!("/dev/pts/{number}")).unwrap();
        let before = settings(&terminal);
        let guard = RawMode::enter(&terminal).unwrap().unwrap();
        let raw = settings(&terminal);
        assert_eq!(raw.c_lflag & (libc::ICANON | libc::ECHO | libc::ISIG), 0);
        assert_eq!(raw.c_oflag, before.c_oflag);
        drop(guard);
        let after = settings(&terminal);
        assert_eq!((after.c_lflag, after.c_iflag, after.c_cc), (before.c_lflag, before.c_iflag, before.c_cc));
    }

    #[test]
    fn what_is_no_terminal_is_left_alone() {
        assert!(RawMode::enter(&tempfile::tempfile().unwrap()).unwrap().is_none());
    }
}
