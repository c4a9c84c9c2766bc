//! Commands in a lab: described, run to their end, or started and followed.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::channel::{Channel, Event};
use super::wire::{End, Frame, Kind, Start, WindowSize};

/// How long a command may take unless it says otherwise.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// How much longer than the agent the harness waits; the agent is the one to kill, and says so.
const PATIENCE: Duration = Duration::from_secs(15);

/// Output kept per stream and command.
const MAX_OUTPUT: usize = 64 << 20;

/// Longest piece of input in one frame.
const INPUT_PIECE: usize = 64 << 10;

/// A command that is still to be started.
#[derive(Debug)]
pub struct LabCommand {
    channel: Arc<Channel>,
    start: Start,
    input: Vec<u8>,
}

impl LabCommand {
    pub(super) fn new(channel: Arc<Channel>, argv: Vec<String>) -> Self {
        let start = Start { argv, env: Vec::new(), cwd: "/".to_owned(), timeout: COMMAND_TIMEOUT, terminal: None };
        Self { channel, start, input: Vec::new() }
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.start.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sets its working directory; `/` without it.
    pub fn cwd(mut self, folder: &str) -> Self {
        folder.clone_into(&mut self.start.cwd);
        self
    }

    /// Sets the time after which it is killed; [`COMMAND_TIMEOUT`] without it.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.start.timeout = timeout;
        self
    }

    /// Gives it a terminal of this size instead of pipes.
    pub fn terminal(mut self, size: WindowSize) -> Self {
        self.start.terminal = Some(size);
        self
    }

    /// Gives [`LabCommand::run`] bytes for its standard input.
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = bytes.into();
        self
    }

    /// Runs it to its end. That it failed is for the caller to judge: see [`Output::checked`].
    pub fn run(mut self) -> Result<Output> {
        let input = std::mem::take(&mut self.input);
        let running = self.spawn()?;
        running.input.write(&input)?;
        running.input.end()?;
        running.wait()
    }

    /// Starts it and leaves its input open.
    pub fn spawn(self) -> Result<Running> {
        let Self { channel, start, input: _ } = self;
        let (number, events) = channel.register()?;
        channel.send(&Frame::json(Kind::Start, number, &start)?)?;
        let deadline = Instant::now() + start.timeout + PATIENCE;
        let input = Input { channel, number };
        Ok(Running { input, events, ended: false, argv: start.argv, deadline })
    }
}

/// Where a started command reads from.
#[derive(Debug, Clone)]
pub struct Input {
    channel: Arc<Channel>,
    number: u32,
}

impl Input {
    /// Sends bytes.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        for piece in bytes.chunks(INPUT_PIECE) {
            self.channel.send(&Frame { kind: Kind::Input, command: self.number, body: piece.to_vec() })?;
        }
        Ok(())
    }

    /// Says that no more will come.
    pub fn end(&self) -> Result<()> {
        self.channel.send(&Frame::bare(Kind::EndOfInput, self.number))
    }

    /// Tells the command's terminal a new size.
    pub fn resize(&self, size: WindowSize) -> Result<()> {
        self.channel.send(&Frame::json(Kind::Resize, self.number, &size)?)
    }
}

/// A command that was started. Dropping it before its end kills it.
#[derive(Debug)]
pub struct Running {
    input: Input,
    events: Receiver<Event>,
    ended: bool,
    argv: Vec<String>,
    deadline: Instant,
}

impl Running {
    /// A handle on its input, for another thread.
    pub fn input(&self) -> Input {
        self.input.clone()
    }

    /// Kills it; its end still arrives as an event.
    pub fn kill(&self) -> Result<()> {
        self.input.channel.send(&Frame::bare(Kind::Kill, self.input.number))
    }

    /// Its next event, or `None` when nothing happened for `wait`. After [`Event::Ended`] there is none.
    pub fn event(&mut self, wait: Duration) -> Result<Option<Event>> {
        ensure!(!self.ended, "Command {:?} has ended", self.argv);
        match self.events.recv_timeout(wait) {
            Ok(event) => {
                self.ended = matches!(event, Event::Ended(_));
                Ok(Some(event))
            }
            Err(RecvTimeoutError::Timeout) if Instant::now() > self.deadline => {
                bail!("The lab's agent neither ended {:?} nor killed it in time", self.argv)
            }
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                self.ended = true;
                bail!("The lab went away while {:?} ran", self.argv)
            }
        }
    }

    /// Waits for its end and collects what it writes until then.
    pub fn wait(mut self) -> Result<Output> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match self.event(Duration::from_secs(1))? {
                Some(Event::Stdout(bytes)) => keep(&mut stdout, &bytes).context("standard output")?,
                Some(Event::Stderr(bytes)) => keep(&mut stderr, &bytes).context("standard error")?,
                Some(Event::Ended(end)) => {
                    return Ok(Output { argv: std::mem::take(&mut self.argv), end, stdout, stderr });
                }
                None => {}
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            // Where this fails the whole machine has gone.
            drop(self.kill());
        }
    }
}

fn keep(kept: &mut Vec<u8>, bytes: &[u8]) -> Result<()> {
    ensure!(kept.len() + bytes.len() <= MAX_OUTPUT, "A command in the lab wrote more than {MAX_OUTPUT} bytes");
    kept.extend_from_slice(bytes);
    Ok(())
}

/// A command that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    argv: Vec<String>,
    /// How it ended.
    pub end: End,
    /// All it wrote to its standard output.
    pub stdout: Vec<u8>,
    /// All it wrote to its standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Whether it ended by itself with status 0.
    pub fn success(&self) -> bool {
        self.end == End::Exited(0)
    }

    /// Its standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Itself, or an error that shows its end and what it wrote.
    pub fn checked(self) -> Result<Self> {
        ensure!(self.success(), "{self}");
        Ok(self)
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Command {:?} in the lab ", self.argv)?;
        match &self.end {
            End::Exited(status) => write!(f, "ended with status {status}")?,
            End::Signalled(signal) => write!(f, "was ended by signal {signal}")?,
            End::TimedOut => write!(f, "was killed because its time was up")?,
            End::NotStarted(reason) => write!(f, "was not started: {reason}")?,
        }
        for (name, bytes) in [("output", &self.stdout), ("errors", &self.stderr)] {
            let text = String::from_utf8_lossy(bytes);
            let lines: Vec<&str> = text.lines().collect();
            let tail = &lines[lines.len().saturating_sub(40)..];
            if !tail.is_empty() {
                write!(f, "\n{name}:\n  {}", tail.join("\n  "))?;
            }
        }
        Ok(())
    }
}
