//! The root shell on a Debian's serial console, spoken to by commands and answers, and the guest's ticks on the same line.
//!
//! The shell is part of the guest: when that has moved, it is spoken to at the target's console. Ticks come only between
//! [`Shell::tick`] and [`Shell::move_to`]; each is a line of one character, because each character costs the guest an exit.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::console::Console;
use crate::silence;

/// How long an emulated guest may take for one command.
const ANSWER_WITHIN: Duration = Duration::from_secs(120);

/// How often a shell is asked that may not have begun to read yet.
const ASK_EVERY: Duration = Duration::from_secs(10);

const TICK: &str = ".";

/// Ticks for as long as it is let: bash waits without starting a program, by reading from a pipe that nobody writes to.
const TICKER: &str =
    "bash -c 'exec 9<> <(:); while :; do echo .; read -t 0.02 -u 9; done' &\nticker=$!; kill -STOP $ticker";

/// The shell, where the guest is now.
#[derive(Debug)]
pub(super) struct Shell {
    console: Console,
    asked: u32,
}

impl Shell {
    /// Waits until the guest has booted, and makes its shell one for programs.
    pub(super) fn log_in(mut console: Console, within: Duration) -> Result<Self> {
        let deadline = Instant::now() + within;
        console.expect("automatic login", within)?;
        let mut shell = Self { console, asked: 0 };
        // dash leaves the terminal alone; without echo and prompt all whole lines are answers.
        let manners = "exec sh\nstty -echo; PS1=; set +m";
        while let Err(error) = shell.ask_within(manners, ASK_EVERY) {
            ensure!(Instant::now() < deadline, "The guest's shell does not answer: {error:#}");
        }
        shell.ask(TICKER)?;
        Ok(shell)
    }

    /// Runs a command and gives what it printed; an error if it fails.
    pub(super) fn ask(&mut self, command: &str) -> Result<String> {
        self.ask_within(command, ANSWER_WITHIN)
    }

    fn ask_within(&mut self, command: &str, within: Duration) -> Result<String> {
        self.asked += 1;
        let (mark, mut printed) = (format!("answer {} ", self.asked), Vec::new());
        self.console.say(&format!("{command}\nprintf '\\n{mark}%s\\n' $?"))?;
        let status = self.console.find(&format!("The answer to {command:?}"), within, |line| {
            let status = line.text.strip_prefix(&mark).map(str::to_owned);
            if status.is_none() && !line.text.is_empty() && line.text != TICK {
                printed.push(line.text.clone());
            }
            status
        })?;
        let printed = printed.join("\n");
        ensure!(status == "0", "{command:?} failed in the guest ({status}): {printed}");
        Ok(printed)
    }

    /// Has the guest tick, and waits until it does.
    pub(super) fn tick(&mut self) -> Result<()> {
        self.ask("kill -CONT $ticker")?;
        self.console.find("a tick", ANSWER_WITHIN, |line| (line.text == TICK).then_some(()))
    }

    /// The guest has moved, and its source has ended: how long it did not tick in between. It does not tick any more then.
    pub(super) fn move_to(&mut self, console: Console) -> Result<Duration> {
        let mut source = std::mem::replace(&mut self.console, console);
        let downtime = silence::between(&mut source, &mut self.console)?;
        self.hush()?;
        Ok(downtime)
    }

    /// Ends the ticks.
    pub(super) fn hush(&mut self) -> Result<()> {
        self.ask("kill -STOP $ticker").map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::process::{Child, Command};

    use super::*;

    /// A console with a shell that logs itself in. bash takes a line at a time from what is no terminal, as a terminal gives.
    fn guest() -> (Child, Console) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let console = Console::connect(&path).unwrap();
        let (stream, _) = listener.accept().unwrap();
        let end = |stream: &UnixStream| OwnedFd::from(stream.try_clone().unwrap());
        let mut bash = Command::new("bash");
        bash.args(["-c", "echo 'guest login: root (automatic login)'; exec bash"]);
        let child = bash.stdin(end(&stream)).stdout(end(&stream)).stderr(end(&stream)).spawn().unwrap();
        (child, console)
    }

    #[test]
    fn answers_are_told_from_ticks() {
        let (mut child, console) = guest();
        let mut shell = Shell::log_in(console, Duration::from_secs(20)).unwrap();
        assert_eq!(shell.ask("echo one; echo two").unwrap(), "one\ntwo");
        let refusal = shell.ask("echo why; false").unwrap_err().to_string();
        assert!(refusal.contains("why") && refusal.contains("(1)"), "{refusal}");
        shell.tick().unwrap();
        assert_eq!(shell.ask("sleep 0.1; echo three").unwrap(), "three");
        shell.hush().unwrap();
        shell.ask("kill -KILL $ticker").unwrap();
        drop(shell);
        child.wait().unwrap();
    }
}
