//! A run of the verifier: starts the modes, ticks, obeys commands, reports.
//!
//! Called by `main` with the process's standard input and output, and by tests with pipes.

use std::io::{self, BufReader, Read, Write};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::clock::{self, ClockReport, Latest, Probe};
use crate::disk::{Disk, DiskReport};
use crate::kernel_log::{KernelLog, KernelLogReport};
use crate::memory::{Dirtier, MemoryReport, Rate};
use crate::net::Server;
use crate::options::Options;
use crate::pattern::{Page, Stream};
use crate::report::{Line, Report};
use crate::worker::Worker;

/// How long all modes together may take for a report: verifying a big disk of an emulated guest is slow.
const PATIENCE: Duration = Duration::from_secs(60);
/// Probes of other vCPUs than the first are there to compare clocks, not to find the shortest gap.
const SLOWER: u32 = 10;
const LONGEST_COMMAND: usize = 64;

/// The modes of a run.
#[derive(Debug)]
struct Modes {
    memory: Vec<Worker<MemoryReport>>,
    clock: Vec<Worker<ClockReport>>,
    disk: Option<Worker<DiskReport>>,
    net: Option<Server>,
    kernel_log: Option<Worker<KernelLogReport>>,
}

enum Command {
    Report,
    Quit,
    Unknown(String),
}

/// Runs to the end and gives the last report.
pub fn run<O: Write + Send + 'static>(
    options: &Options,
    input: impl Read + Send + 'static,
    output: O,
) -> Result<Report> {
    let modes = Modes::start(options)?;
    let output = Console(Arc::new(Mutex::new(output)));
    output.say(&Line::Ready { us: clock::monotonic_microseconds() })?;
    if let Some(period) = options.tick {
        let ticker = output.clone();
        thread::Builder::new().name("ticks".to_owned()).spawn(move || ticker.tick(period))?;
    }
    let (commands, read) = mpsc::channel();
    thread::Builder::new().name("commands".to_owned()).spawn(move || read_commands(input, &commands))?;
    obey(&modes, &read, options.end, &output)?;
    let report = modes.report();
    output.say(&Line::Report(Box::new(report.clone())))?;
    Ok(report)
}

/// Answers commands until one of them, or the time, ends the run.
fn obey<O: Write>(modes: &Modes, read: &Receiver<Command>, end: Option<Duration>, output: &Console<O>) -> Result<()> {
    let start = Instant::now();
    loop {
        let rest = end.map_or(Duration::MAX, |end| end.saturating_sub(start.elapsed()));
        match read.recv_timeout(rest) {
            Ok(Command::Report) => output.say(&Line::Report(Box::new(modes.report())))?,
            Ok(Command::Unknown(command)) => output.say(&Line::Unknown { command })?,
            Ok(Command::Quit) | Err(RecvTimeoutError::Timeout) => return Ok(()),
            // Nobody can ask for anything any more: the time ends the run, or the guest's end does.
            Err(RecvTimeoutError::Disconnected) => {
                thread::sleep(rest);
                return Ok(());
            }
        }
    }
}

impl Modes {
    fn start(options: &Options) -> Result<Self> {
        let latest = Latest::default();
        let clock = (0..clock::cpus()).map(|cpu| {
            let (latest, period) = (latest.clone(), options.clock * if cpu == 0 { 1 } else { SLOWER });
            Worker::start(format!("clock-{cpu}"), move || Probe::on_cpu(cpu, period, latest))
        });
        let disk = match &options.disk {
            Some(path) => {
                let disk = Disk::open(path, options.disk_size);
                let disk = disk.with_context(|| format!("Cannot use the disk {}", path.display()))?;
                Some(Worker::start("disk".to_owned(), move || disk)?)
            }
            None => None,
        };
        let kernel_log = match &options.kernel_log {
            Some(path) => {
                let log = KernelLog::open(path);
                let log = log.with_context(|| format!("Cannot read the kernel log {}", path.display()))?;
                Some(Worker::start("kernel-log".to_owned(), move || log)?)
            }
            None => None,
        };
        let serve = |port| Server::start(port).with_context(|| format!("Cannot listen on TCP port {port}"));
        Ok(Self {
            memory: start_memory(options)?,
            clock: clock.collect::<io::Result<_>>().context("Cannot start a thread")?,
            disk,
            net: options.port.map(serve).transpose()?,
            kernel_log,
        })
    }

    /// Asks every mode.
    fn report(&self) -> Report {
        let mut report = Report::default();
        let until = Instant::now() + PATIENCE;
        for worker in &self.memory {
            report.memory.merge(answer(worker, until, &mut report.silent).unwrap_or_default());
        }
        let mut probes = self.clock.iter();
        if let Some(first) = probes.next().and_then(|worker| answer(worker, until, &mut report.silent)) {
            report.clock = first;
        }
        for worker in probes {
            report.clock.merge(answer(worker, until, &mut report.silent).unwrap_or_default());
        }
        report.disk = self.disk.as_ref().and_then(|worker| answer(worker, until, &mut report.silent));
        report.dmesg = self.kernel_log.as_ref().and_then(|worker| answer(worker, until, &mut report.silent));
        report.net = self.net.as_ref().map(Server::report);
        report.judged()
    }
}

/// A mode's report; one that has none is named.
fn answer<R: Send + 'static>(worker: &Worker<R>, until: Instant, silent: &mut Vec<String>) -> Option<R> {
    let report = worker.report(until.saturating_duration_since(Instant::now()));
    if report.is_none() {
        silent.push(worker.name().to_owned());
    }
    report
}

fn start_memory(options: &Options) -> Result<Vec<Worker<MemoryReport>>> {
    let threads = options.threads;
    let share = |bytes: u64| {
        let pages = bytes / Page::BYTES as u64 / u64::from(threads);
        usize::try_from(pages).context("More pages than an address can name")
    };
    let (hot, cold) = (share(options.memory)?, share(options.cold)?);
    let rate = match options.rate {
        Rate::Unlimited => Rate::Unlimited,
        Rate::PagesPerSecond(all) => Rate::PagesPerSecond((all / threads).max(1)),
    };
    let start = |thread: u32| {
        let stream = Stream(u64::from(std::process::id()) << 32 | u64::from(thread));
        Worker::start(format!("memory-{thread}"), move || Dirtier::new(stream, hot, cold, rate))
    };
    (0..threads).map(start).collect::<io::Result<_>>().context("Cannot start a thread")
}

/// Where lines go, whole and one after the other.
#[derive(Debug)]
struct Console<O>(Arc<Mutex<O>>);

impl<O> Clone for Console<O> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<O: Write> Console<O> {
    fn say(&self, line: &Line) -> Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        let mut output = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        output.write_all(&text).and_then(|()| output.flush()).context("Cannot write to the console")
    }

    /// Ticks until the console is gone; the end of the process ends it otherwise.
    fn tick(&self, period: Duration) {
        for seq in 0.. {
            if self.say(&Line::Tick { seq, us: clock::monotonic_microseconds() }).is_err() {
                return;
            }
            thread::sleep(period);
        }
    }
}

/// Reads commands to the end of the input. A line may end in `\n` or, from a terminal, in `\r`.
fn read_commands(input: impl Read, commands: &Sender<Command>) {
    let mut line = Vec::new();
    for byte in BufReader::new(input).bytes().map_while(Result::ok) {
        if !matches!(byte, b'\n' | b'\r') {
            if line.len() < LONGEST_COMMAND {
                line.push(byte);
            }
            continue;
        }
        let command = match line.trim_ascii() {
            b"" => continue,
            b"report" => Command::Report,
            b"quit" => Command::Quit,
            other => Command::Unknown(String::from_utf8_lossy(other).into_owned()),
        };
        line.clear();
        if commands.send(command).is_err() {
            return;
        }
    }
}
