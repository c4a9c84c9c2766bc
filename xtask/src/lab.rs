//! `cargo xtask lab`: a nested lab as a user's tool, with hosts on a slow network if wanted.

use std::io::{Read, Write, stdin};
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use godwit_tests::lab::wire::{End, WindowSize};
use godwit_tests::lab::{CONSOLE_LINES, Event, Input, Lab, LabCommand, LabHost, Running};
use godwit_tests::network::{Link, Loss, Rate};

use crate::packages;
use crate::terminal::RawTerminal;
use crate::workspace::{binaries, build};

/// How often the size of the terminal is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// The lab and what to run in it.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Join this many hosts (a, b, …) by a network and run the command on host a; `host-b CMD` there runs on b.
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=9))]
    hosts: Option<u8>,
    /// Round-trip time between the hosts, like 16ms.
    #[arg(long, default_value = "0ms", value_parser = duration, requires = "hosts")]
    rtt: Duration,
    /// Speed of each direction, like 1gbit or 100mbit; unlimited without it.
    #[arg(long, requires = "hosts")]
    rate: Option<Rate>,
    /// Share of packets lost in each direction, like 0.1%.
    #[arg(long, default_value = "0%", requires = "hosts")]
    loss: Loss,
    /// Memory of the lab in MiB.
    #[arg(long, default_value_t = 2048)]
    memory: u32,
    /// Processors for what runs in the lab; an emulated one has one more, which nothing runs on.
    #[arg(long, default_value_t = 2)]
    cpus: u8,
    /// Bring a file or folder along, as HOST-PATH or HOST-PATH:LAB-PATH (without one: /lab/NAME).
    #[arg(long, value_name = "PATH[:PATH]", value_parser = brought_file)]
    file: Vec<(PathBuf, String)>,
    /// Attach a disk image without copying it, named as with --file; what the lab writes to it is thrown away.
    #[arg(long, value_name = "PATH[:PATH]", value_parser = brought_file)]
    disk: Vec<(PathBuf, String)>,
    /// Bring a program of this machine along with its libraries.
    #[arg(long, value_name = "PATH")]
    program: Vec<PathBuf>,
    /// End the command and the lab after this time, like 90s or 2h.
    #[arg(long, default_value = "1h", value_parser = duration)]
    timeout: Duration,
    /// The command; a shell without one. `godwit` is in the lab's path.
    #[arg(last = true)]
    command: Vec<String>,
}

/// Boots the lab, runs the command, and ends with its status.
pub(crate) fn lab(options: Options) -> Result<ExitCode> {
    packages::ensure(&packages::for_lab())?;
    build(&["--package", "godwit-tests", "--package", "vmm", "--bins"])?;
    let mut builder = Lab::builder().memory_mib(options.memory).cpus(options.cpus);
    builder =
        builder.lifetime(options.timeout + Duration::from_secs(120)).file(binaries()?.join("godwit"), "/lab/godwit");
    builder = options.file.iter().fold(builder, |builder, (from, to)| builder.file(from, to));
    builder = options.disk.iter().fold(builder, |builder, (from, to)| builder.disk(from, to));
    builder = options.program.iter().fold(builder, |builder, program| builder.program(program));
    eprintln!("Booting the lab");
    let lab = builder.boot()?;
    eprintln!("The lab runs by {}; it was up after {:.1} s", lab.accelerator(), lab.boot_time().as_secs_f32());
    lab.problems().iter().for_each(|problem| eprintln!("The lab says: {problem}"));
    let host = match options.hosts {
        Some(count) => {
            let link = Link { rtt: options.rtt, rate: options.rate, loss: options.loss };
            lab.hosts(usize::from(count), &link)?.into_iter().next()
        }
        None => None,
    };
    let argv = if options.command.is_empty() { vec!["/bin/bash".to_owned()] } else { options.command };
    let command = command(&lab, host.as_ref(), &argv).timeout(options.timeout);
    let end = follow(command).with_context(|| format!("The lab's last lines:\n{}", lab.console_tail(CONSOLE_LINES)))?;
    lab.power_off()?;
    status_of(&argv, end)
}

fn command(lab: &Lab, host: Option<&LabHost>, argv: &[String]) -> LabCommand {
    host.map_or_else(|| lab.command(argv), |host| host.command(argv))
}

/// Connects the command to this program's own streams until it ends.
fn follow(command: LabCommand) -> Result<End> {
    if RawTerminal::is_there() {
        let size = RawTerminal::size()?;
        let kind = std::env::var("TERM").unwrap_or_else(|_| "linux".to_owned());
        let running = command.terminal(size).env("TERM", &kind).spawn()?;
        let _raw = RawTerminal::enter()?;
        bridge(running, Some(size))
    } else {
        bridge(command.spawn()?, None)
    }
}

fn bridge(mut running: Running, mut size: Option<WindowSize>) -> Result<End> {
    let input = running.input();
    // Not joined: it hangs in a read until the person types again, and ends with this program.
    thread::Builder::new().name("lab-input".to_owned()).spawn(move || send_input(&input))?;
    loop {
        match running.event(LOOK)? {
            Some(Event::Stdout(bytes)) => write_all(std::io::stdout().lock(), &bytes)?,
            Some(Event::Stderr(bytes)) => write_all(std::io::stderr().lock(), &bytes)?,
            Some(Event::Ended(end)) => return Ok(end),
            None if size.is_some() => {
                let now = RawTerminal::size()?;
                if size.replace(now) != Some(now) {
                    running.input().resize(now)?;
                }
            }
            None => {}
        }
    }
}

/// Passes on what is typed or piped in, until that ends or the command is gone.
fn send_input(input: &Input) {
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = stdin().read(&mut buffer) {
        if input.write(&buffer[..length]).is_err() {
            return;
        }
    }
    // The command may be gone already, and with it whoever could care.
    drop(input.end());
}

fn write_all(mut stream: impl Write, bytes: &[u8]) -> Result<()> {
    stream.write_all(bytes)?;
    Ok(stream.flush()?)
}

/// The shells' convention: the command's own status, 128 and the signal's number, 124 for too late.
fn status_of(argv: &[String], end: End) -> Result<ExitCode> {
    let status = match end {
        End::Exited(status) => status,
        End::Signalled(signal) => 128 + signal,
        End::TimedOut => {
            eprintln!("The command was killed because its time was up");
            124
        }
        End::NotStarted(reason) => bail!("{argv:?} was not started in the lab: {reason}"),
    };
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)))
}

/// A whole number and a unit: `16ms`, `500us`, `90s`, `2h`.
fn duration(text: &str) -> Result<Duration> {
    let units = [("us", 1), ("ms", 1_000), ("s", 1_000_000), ("m", 60_000_000), ("h", 3_600_000_000)];
    let split = units.iter().find_map(|(unit, factor)| {
        let number = text.strip_suffix(unit)?;
        number.bytes().all(|byte| byte.is_ascii_digit()).then(|| number.parse::<u64>().ok()?.checked_mul(*factor))?
    });
    split
        .map(Duration::from_micros)
        .with_context(|| format!("{text:?} is not a time; write a whole number and us, ms, s, m or h, like 16ms"))
}

fn brought_file(text: &str) -> Result<(PathBuf, String)> {
    if let Some((from, to)) = text.split_once(':') {
        return Ok((from.into(), to.to_owned()));
    }
    let from = PathBuf::from(text);
    let name = from.file_name().and_then(|name| name.to_str());
    let to = format!("/lab/{}", name.with_context(|| format!("{text:?} names no file"))?);
    Ok((from, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_or_refused_by_name() {
        assert_eq!(duration("16ms").unwrap(), Duration::from_millis(16));
        assert_eq!(duration("500us").unwrap(), Duration::from_micros(500));
        assert_eq!(duration("2h").unwrap(), Duration::from_secs(7200));
        for text in ["", "ms", "16", "1.5s", "-1s", "99999999999999h"] {
            assert!(duration(text).unwrap_err().to_string().contains(&format!("{text:?}")), "{text}");
        }
    }

    #[test]
    fn a_brought_file_has_a_place_in_the_lab() {
        assert_eq!(brought_file("/a/b").unwrap(), ("/a/b".into(), "/lab/b".to_owned()));
        assert_eq!(brought_file("/a/b:/etc/c").unwrap(), ("/a/b".into(), "/etc/c".to_owned()));
        assert!(brought_file("/").is_err());
    }

    #[test]
    fn the_status_follows_the_shells() {
        let code = |end| format!("{:?}", status_of(&[], end).unwrap());
        assert_eq!(code(End::Exited(3)), format!("{:?}", ExitCode::from(3)));
        assert_eq!(code(End::Signalled(9)), format!("{:?}", ExitCode::from(137)));
        assert_eq!(code(End::TimedOut), format!("{:?}", ExitCode::from(124)));
        assert!(status_of(&[], End::NotStarted("why".to_owned())).unwrap_err().to_string().contains("why"));
    }
}
