//! One command in the lab: started, fed, watched, and killed when its time is up.
//!
//! Threads per command: one waits for the process, one per output stream sends what it writes, one feeds its input, and
//! one puts the end together. The end is sent after the streams are dry, or a short while after the process ended
//! where something it left behind still holds them.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::serve::Port;
use crate::lab::wire::{End, Frame, Kind, Start, WindowSize};

/// How long the output streams may stay open after the command itself has ended.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Where the lab looks for programs.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/lab";

/// A running command, as the server sees it.
#[derive(Debug)]
pub(super) struct Program {
    group: Pid,
    input: Sender<Vec<u8>>,
    terminal: Option<OwnedFd>,
    over: Arc<AtomicBool>,
}

/// A process just started, with its ends of the streams.
struct Started {
    child: Child,
    input: Box<dyn Write + Send>,
    outputs: Vec<(Kind, Box<dyn Read + Send>)>,
    terminal: Option<OwnedFd>,
}

impl Program {
    /// Starts a command; when that fails the harness is told and there is nothing to keep.
    pub(super) fn start(number: u32, start: &Start, port: &Port) -> Option<Self> {
        let launched = launch(start).and_then(|started| Self::watch(number, start.timeout, started, port.clone()));
        match launched {
            Ok(program) => Some(program),
            Err(error) => {
                tell_end(port, number, &End::NotStarted(format!("{error:#}")));
                None
            }
        }
    }

    fn watch(number: u32, timeout: Duration, started: Started, port: Port) -> Result<Self> {
        let Started { mut child, input, outputs, terminal } = started;
        let group = Pid::from_raw(i32::try_from(child.id())?).context("a child has a process number")?;
        let (input_sender, to_write) = mpsc::channel();
        spawn("input", move || feed(input, &to_write))?;
        let (dry_sender, dry) = mpsc::channel::<()>();
        for (kind, stream) in outputs {
            let (port, open) = (port.clone(), dry_sender.clone());
            spawn("output", move || {
                forward(number, kind, stream, &port);
                drop(open);
            })?;
        }
        drop(dry_sender);
        let (status_sender, status) = mpsc::channel();
        spawn("wait", move || {
            // The receiver waits for exactly this; if it is gone, nobody wants to know.
            drop(status_sender.send(child.wait()));
        })?;
        let over = Arc::new(AtomicBool::new(false));
        let ended = over.clone();
        spawn("end", move || {
            let end = await_end(group, timeout, &status);
            // Nothing is ever sent: the channel closes when both streams are dry.
            let _: Result<(), RecvTimeoutError> = dry.recv_timeout(LAST_WORDS);
            ended.store(true, Ordering::Release);
            tell_end(&port, number, &end);
        })?;
        Ok(Self { group, input: input_sender, terminal, over })
    }

    /// Hands bytes to the command's standard input; no bytes at all close it.
    pub(super) fn input(&self, bytes: Vec<u8>) {
        // A command that closed its input is not interested.
        drop(self.input.send(bytes));
    }

    /// Kills the command and what it started in its process group.
    pub(super) fn kill(&self) {
        kill_group(self.group);
    }

    /// Tells the command's terminal its new size.
    pub(super) fn resize(&self, size: WindowSize) {
        if let Some(terminal) = &self.terminal {
            set_size(terminal, size);
        }
    }

    /// Whether the command has ended.
    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new().name(name.to_owned()).spawn(body).context("start a thread")?;
    Ok(())
}

fn launch(start: &Start) -> Result<Started> {
    match start.terminal {
        Some(size) => launch_on_terminal(start, size),
        None => launch_on_pipes(start),
    }
}

fn command(argv: &[String], start: &Start) -> Result<Command> {
    let (program, arguments) = argv.split_first().context("there is no program in an empty command")?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().current_dir(&start.cwd);
    command.env("PATH", PATH).env("HOME", "/root").env("TERM", "linux");
    command.envs(start.env.iter().map(|(name, value)| (name, value)));
    Ok(command)
}

fn launch_on_pipes(start: &Start) -> Result<Started> {
    let mut command = command(&start.argv, start)?;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().with_context(|| format!("start {:?} in {:?}", start.argv, start.cwd))?;
    let input = child.stdin.take().context("standard input is a pipe")?;
    let stdout = child.stdout.take().context("standard output is a pipe")?;
    let stderr = child.stderr.take().context("standard error is a pipe")?;
    let outputs: Vec<(Kind, Box<dyn Read + Send>)> =
        vec![(Kind::Stdout, Box::new(stdout)), (Kind::Stderr, Box::new(stderr))];
    Ok(Started { child, input: Box::new(input), outputs, terminal: None })
}

fn launch_on_terminal(start: &Start, size: WindowSize) -> Result<Started> {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).context("open a terminal")?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    set_size(&ours, size);
    let theirs = ptsname(&ours, Vec::new())?.into_string().context("a terminal's name is ASCII")?;
    let theirs = File::options().read(true).write(true).open(theirs).context("open the terminal")?;
    // busybox makes the session and the controlling terminal, which std can do only by unsafe code.
    let mut argv: Vec<String> = ["/bin/busybox", "setsid", "-c"].map(str::to_owned).into();
    argv.extend_from_slice(&start.argv);
    let mut command = command(&argv, start)?;
    command.stdin(theirs.try_clone()?).stdout(theirs.try_clone()?).stderr(theirs);
    let child = command.spawn().with_context(|| format!("start {:?} in {:?}", start.argv, start.cwd))?;
    let input = File::from(ours.try_clone()?);
    let output = File::from(ours.try_clone()?);
    Ok(Started { child, input: Box::new(input), outputs: vec![(Kind::Stdout, Box::new(output))], terminal: Some(ours) })
}

fn set_size(terminal: &OwnedFd, size: WindowSize) {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    if let Err(error) = tcsetwinsize(terminal, size) {
        println!("The size of a terminal could not be set: {error}");
    }
}

/// Writes what the harness sends until it is over or the command closes its end.
fn feed(mut input: Box<dyn Write + Send>, to_write: &Receiver<Vec<u8>>) {
    for bytes in to_write {
        if bytes.is_empty() || input.write_all(&bytes).is_err() {
            return;
        }
    }
}

/// Sends what a command writes until its stream is dry; a terminal says so by an error.
fn forward(number: u32, kind: Kind, mut stream: Box<dyn Read + Send>, port: &Port) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        match stream.read(&mut buffer) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Ok(0) | Err(_) => return,
            Ok(length) => port.send(&Frame { kind, command: number, body: buffer[..length].to_vec() }),
        }
    }
}

/// Waits for the process, kills it when its time is up, and says which it was.
fn await_end(group: Pid, timeout: Duration, status: &Receiver<std::io::Result<ExitStatus>>) -> End {
    let start = Instant::now();
    let late = match status.recv_timeout(timeout) {
        Ok(status) => return end_of(status),
        Err(_) => start.elapsed() >= timeout,
    };
    kill_group(group);
    let end = status.recv().map_or_else(|error| End::NotStarted(error.to_string()), end_of);
    if late { End::TimedOut } else { end }
}

fn end_of(status: std::io::Result<ExitStatus>) -> End {
    match status {
        Err(error) => End::NotStarted(error.to_string()),
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => End::Exited(code),
            (None, signal) => End::Signalled(signal.unwrap_or_default()),
        },
    }
}

fn kill_group(group: Pid) {
    // The group may be gone already, which is what is wanted.
    let _: rustix::io::Result<()> = kill_process_group(group, Signal::KILL);
}

fn tell_end(port: &Port, number: u32, end: &End) {
    match Frame::json(Kind::Ended, number, end) {
        Ok(frame) => port.send(&frame),
        Err(error) => println!("The end of command {number} cannot be told: {error}"),
    }
}
