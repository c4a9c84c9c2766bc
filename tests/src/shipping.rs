//! Brings scenarios to where they can run: starts the binary `scenarios` on this host, or ships it with `godwit` and the
//! guest images into a lab and starts it there.
//!
//! Called by `xtask test`. Lines of the scenarios go to standard output as they come.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use crate::lab::wire::End;
use crate::lab::{CONSOLE_LINES, Event, Lab};
use crate::place::{Choice, Place, kvm_works};
use crate::scenario::{Needs, Scenario, select};
use crate::scenarios::ALL;
use crate::tally::Tally;

/// What a run takes beside the scenarios' own times: cleaning up after each.
const SLACK: Duration = Duration::from_secs(30);

/// Paths in the lab.
const LAB_SCENARIOS: &str = "/lab/scenarios";
const LAB_GODWIT: &str = "/lab/godwit";
const LAB_IMAGES: &str = "/lab/images";
const LAB_DISKS: &str = "/lab/disks";

/// What to run and with what.
#[derive(Debug)]
pub struct Plan {
    /// The folder with the binaries `scenarios`, `godwit` and `lab-agent`.
    pub binaries: PathBuf,
    /// The folder with the guest images that scenarios use; copied into the lab as a whole.
    pub images: PathBuf,
    /// Makes the `debian` image, or finds it, when a chosen scenario uses it: the folder
    /// [`DISKS`](crate::scenario::DISKS) beside `images`, with `debian.img` and `ssh-key`.
    pub debian: fn() -> Result<PathBuf>,
    /// Parts of names; all scenarios without any.
    pub filters: Vec<String>,
    /// Where Linux guests run.
    pub choice: Choice,
    /// Memory of a lab.
    pub lab_memory_mib: u32,
}

impl Plan {
    /// Runs the chosen scenarios where each can run. An error is a failure of the harness, not of a scenario.
    pub fn run(&self) -> Result<Tally> {
        let host_has_kvm = kvm_works().is_ok();
        let chosen = select(ALL, &self.filters);
        let with_debian = chosen.iter().any(|scenario| scenario.needs == Needs::Debian);
        let debian = with_debian.then(self.debian).transpose()?;
        let (host, lab): (Vec<_>, Vec<_>) = chosen.into_iter().partition(|scenario| match scenario.needs {
            Needs::Host => true,
            Needs::Kvm => host_has_kvm,
            Needs::LinuxGuests | Needs::Debian => self.choice.place == Place::Host,
            Needs::Lab => false,
        });
        // The lab leaves half a processor of two to this host. A second lab would not be worth it: two emulators wait for
        // each other's processors more than they gain.
        thread::scope(|scope| {
            let in_lab = (!lab.is_empty()).then(|| {
                eprintln!("{} in a lab; {}", scenarios(lab.len()), self.choice);
                scope.spawn(|| self.run_in_lab(&lab, debian.as_deref()))
            });
            let mut tally = Tally::default();
            if !host.is_empty() {
                eprintln!("{} on this host", scenarios(host.len()));
                tally += self.run_on_host(&host)?;
            }
            if let Some(in_lab) = in_lab {
                tally += in_lab.join().map_err(|_| anyhow!("The thread of the lab panicked"))??;
            }
            Ok(tally)
        })
    }

    fn run_on_host(&self, scenarios: &[&Scenario]) -> Result<Tally> {
        let binary = self.binaries.join("scenarios");
        let mut command = Command::new("setpriv");
        // If this process is killed, the scenarios must not go on alone.
        command.args(["--pdeathsig", "KILL"]).arg(&binary);
        command.args(arguments(&self.binaries.join("godwit"), &self.images, scenarios)?);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("Cannot start {}", binary.display()))?;
        let output = child.stdout.take().context("Standard output is a pipe")?;
        let mut closing = Closing::default();
        // Each scenario has its own limit there, so this loop ends.
        for line in BufReader::new(output).lines() {
            closing.line(&line?);
        }
        let status = child.wait()?;
        closing.tally.with_context(|| format!("The scenarios ended without a closing line ({status})"))
    }

    fn run_in_lab(&self, scenarios: &[&Scenario], debian: Option<&Path>) -> Result<Tally> {
        let limit = scenarios.iter().map(|scenario| scenario.timeout + SLACK).sum::<Duration>();
        let mut lab = Lab::builder()
            .memory_mib(self.lab_memory_mib)
            .lifetime(limit + SLACK * 4)
            .file(self.binaries.join("scenarios"), LAB_SCENARIOS)
            .file(self.binaries.join("godwit"), LAB_GODWIT)
            .file(&self.images, LAB_IMAGES);
        if let Some(debian) = debian {
            lab = lab
                .disk(debian.join("debian.img"), &format!("{LAB_DISKS}/debian.img"))
                .file(debian.join("ssh-key"), &format!("{LAB_DISKS}/ssh-key"))
                .program("/usr/bin/ssh")
                .program("/usr/sbin/e2fsck")
                // A copy of the disk.
                .free_mib(2048);
        }
        let lab = lab.boot()?;
        eprintln!("The lab runs by {}; it was up after {:.1} s", lab.accelerator(), lab.boot_time().as_secs_f32());
        lab.problems().iter().for_each(|problem| eprintln!("The lab says: {problem}"));
        self.follow(&lab, scenarios, limit)
            .with_context(|| format!("Last lines of the lab's console:\n{}", lab.console_tail(CONSOLE_LINES)))
    }

    fn follow(&self, lab: &Lab, scenarios: &[&Scenario], limit: Duration) -> Result<Tally> {
        let mut argv = vec![LAB_SCENARIOS.to_owned()];
        argv.extend(arguments(Path::new(LAB_GODWIT), Path::new(LAB_IMAGES), scenarios)?);
        let mut running = lab.command(&argv).timeout(limit).spawn()?;
        running.input().end()?;
        let mut closing = Closing::default();
        loop {
            match running.event(Duration::from_secs(1))? {
                Some(Event::Stdout(bytes)) => closing.bytes(&bytes),
                Some(Event::Stderr(bytes)) => std::io::stderr().write_all(&bytes)?,
                Some(Event::Ended(End::Exited(_))) => break,
                Some(Event::Ended(end)) => bail!("The scenarios in the lab ended like this: {end:?}"),
                None => {}
            }
        }
        let tally = closing.tally.context("The scenarios in the lab ended without a closing line")?;
        if tally.failed > 0 {
            eprintln!("Last lines of the lab's console:\n{}", lab.console_tail(CONSOLE_LINES));
        }
        Ok(tally)
    }
}

fn scenarios(count: usize) -> String {
    format!("{count} {}", if count == 1 { "scenario" } else { "scenarios" })
}

fn arguments(godwit: &Path, images: &Path, scenarios: &[&Scenario]) -> Result<Vec<String>> {
    let text = |path: &Path| path.to_str().map(str::to_owned).with_context(|| format!("{path:?} is not UTF-8"));
    let mut arguments = vec!["run".to_owned(), "--exact".to_owned()];
    arguments.extend(["--godwit".to_owned(), text(godwit)?, "--images".to_owned(), text(images)?]);
    arguments.extend(scenarios.iter().map(|scenario| scenario.name.to_owned()));
    Ok(arguments)
}

/// Passes lines on to standard output and keeps the closing one to itself: the whole run has its own.
#[derive(Debug, Default)]
struct Closing {
    begun: Vec<u8>,
    tally: Option<Tally>,
}

impl Closing {
    fn bytes(&mut self, bytes: &[u8]) {
        self.begun.extend_from_slice(bytes);
        while let Some(end) = self.begun.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.begun.drain(..=end).collect();
            self.line(String::from_utf8_lossy(&line).trim_end());
        }
    }

    fn line(&mut self, line: &str) {
        match Tally::from_closing_line(line) {
            Some(tally) => self.tally = Some(tally),
            None => println!("{line}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closing_line_is_found_across_pieces() {
        let mut closing = Closing::default();
        closing.bytes(b"ok    x\n3 pas");
        assert_eq!(closing.tally, None);
        closing.bytes(b"sed, 1 failed\n");
        assert_eq!(closing.tally, Some(Tally { passed: 3, failed: 1 }));
    }
}
