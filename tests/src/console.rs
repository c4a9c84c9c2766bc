//! A guest's console over its Unix socket: lines with the time of their arrival, and what the host writes.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How many of the last lines are shown when an expected one does not come.
const SHOWN_LINES: usize = 40;

/// A line of a guest and when it came.
#[derive(Debug, Clone)]
pub struct Line {
    /// When its end arrived.
    pub at: Instant,
    /// The line, without its end.
    pub text: String,
}

/// A connection to a console.
#[derive(Debug)]
pub struct Console {
    stream: UnixStream,
    lines: Receiver<Line>,
    seen: Vec<String>,
}

impl Console {
    /// Connects to the console at `path`.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).with_context(|| format!("No console at {}", path.display()))?;
        let mut reader = BufReader::new(stream.try_clone()?);
        let (found, lines) = channel();
        thread::Builder::new().name("console".to_owned()).spawn(move || {
            let mut bytes = Vec::new();
            // A line that is still unfinished when the console closes goes on somewhere else, if the guest has moved.
            while matches!(reader.read_until(b'\n', &mut bytes), Ok(1..)) && bytes.ends_with(b"\n") {
                let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
                if found.send(Line { at: Instant::now(), text }).is_err() {
                    return;
                }
                bytes.clear();
            }
        })?;
        Ok(Self { stream, lines, seen: Vec::new() })
    }

    /// Writes a line.
    pub fn say(&mut self, line: &str) -> Result<()> {
        Ok(self.stream.write_all(format!("{line}\n").as_bytes())?)
    }

    /// The next line for which `find` finds something, within `within`.
    pub fn find<T>(&mut self, what: &str, within: Duration, mut find: impl FnMut(&Line) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + within;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.seen.push(line.text.clone());
                    if let Some(found) = find(&line) {
                        return Ok(found);
                    }
                }
                Err(end) => {
                    let why = match end {
                        RecvTimeoutError::Timeout => format!("not within {within:?}"),
                        RecvTimeoutError::Disconnected => "the console was closed".to_owned(),
                    };
                    bail!("{what} did not come: {why}. The console's last lines:\n{}", self.tail());
                }
            }
        }
    }

    /// Waits for a line that contains `part`.
    pub fn expect(&mut self, part: &str, within: Duration) -> Result<Line> {
        self.find(&format!("{part:?}"), within, |line| line.text.contains(part).then(|| line.clone()))
    }

    /// The last lines that were looked at.
    pub fn tail(&self) -> String {
        self.seen[self.seen.len().saturating_sub(SHOWN_LINES)..].join("\n")
    }

    /// The lines that have come and were not looked at.
    pub fn pending(&mut self) -> Vec<Line> {
        let lines: Vec<_> = self.lines.try_iter().collect();
        self.seen.extend(lines.iter().map(|line| line.text.clone()));
        lines
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // Wakes the reading thread; a console that is gone needs no wake-up.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}
