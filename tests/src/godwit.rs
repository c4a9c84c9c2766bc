//! Godwit processes as scenarios use them: started with a folder for their sockets, watched, and ended.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use control::{
    Client, MemoryPolicy, MigrationMode, MigrationState, MigrationStatus, PeerAddress, Phase, Reply, Request,
    StartMigration, VmInfo,
};
use rustix::process::{Pid, Signal, kill_process};

use crate::console::Console;
use crate::scenario::Context;

/// How long a process may take to begin to serve.
const START_WITHIN: Duration = Duration::from_secs(20);

/// How long a process may take to end its guest.
const END_WITHIN: Duration = Duration::from_secs(30);

/// How often things are looked at that tell nothing by themselves.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// One `godwit run` or `godwit receive`, in a folder of its own below the scenario's. Killed when dropped.
#[derive(Debug)]
pub struct Godwit {
    child: Child,
    folder: PathBuf,
    address: PeerAddress,
}

/// What a process said at its end.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// What it wrote to standard error.
    pub words: String,
}

impl Ended {
    /// Checks the exit status and a part of what was said.
    pub fn expect(&self, code: i32, part: &str) -> Result<()> {
        ensure!(
            self.status.code() == Some(code) && self.words.contains(part),
            "Expected exit status {code} and {part:?}, got {} and:\n{}",
            self.status,
            self.words
        );
        Ok(())
    }
}

impl Godwit {
    /// Boots a guest whose console is at [`Self::console`].
    pub fn run(context: &Context, name: &str, options: &[&str]) -> Result<Self> {
        Self::start(context, name, &[&["run"], options].concat())
    }

    /// Waits for a guest at a Unix socket of its own, [`Self::address`].
    pub fn receive(context: &Context, name: &str, options: &[&str]) -> Result<Self> {
        let address = format!("unix:{}", context.work.join(name).join("in.sock").display());
        Self::receive_at(context, name, &address, options)
    }

    /// Waits for a guest at `address`; what came of a port of 0 is in [`Self::address`].
    pub fn receive_at(context: &Context, name: &str, address: &str, options: &[&str]) -> Result<Self> {
        let mut godwit = Self::start(context, name, &[&["receive", address], options].concat())?;
        godwit.await_phase(Phase::Receiving)?;
        godwit.address = godwit.told_address()?;
        Ok(godwit)
    }

    /// Where it says that it waits.
    fn told_address(&self) -> Result<PeerAddress> {
        let deadline = Instant::now() + START_WITHIN;
        loop {
            let words = self.words();
            // The end of the last line may still be on its way.
            let whole = words.rsplit_once('\n').map_or("", |(whole, _)| whole);
            if let Some((_, address)) = whole.lines().find_map(|line| line.split_once("waiting for a guest at ")) {
                return Ok(address.trim().parse()?);
            }
            ensure!(Instant::now() < deadline, "godwit does not say where it waits:\n{words}");
            sleep(LOOK_EVERY);
        }
    }

    /// Starts with options of one's own; API and console sockets are added.
    pub fn start(context: &Context, name: &str, arguments: &[&str]) -> Result<Self> {
        let folder = context.work.join(name);
        fs::create_dir_all(&folder)?;
        let path = |file: &str| folder.join(file).display().to_string();
        let errors = File::create(folder.join("stderr"))?;
        let mut command = Command::new(&context.godwit);
        command.args(arguments).args(["--api", &path("api.sock"), "--state-dir", &path("state"), "--test-requests"]);
        command.arg(format!("--serial=unix:{}", path("console.sock")));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        let child = command.process_group(0).spawn().context("Cannot start godwit")?;
        let address = PeerAddress::Unix(folder.join("in.sock"));
        let mut godwit = Self { child, folder, address };
        godwit.await_socket()?;
        Ok(godwit)
    }

    fn await_socket(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_WITHIN;
        while !self.folder.join("api.sock").exists() {
            if let Some(status) = self.child.try_wait()? {
                bail!("godwit ended at once ({status}):\n{}", self.words());
            }
            ensure!(Instant::now() < deadline, "godwit has no control socket after {START_WITHIN:?}");
            sleep(LOOK_EVERY);
        }
        Ok(())
    }

    /// The folder with its sockets.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A client of its control socket.
    pub fn client(&self) -> Client {
        Client::new(self.folder.join("api.sock"))
    }

    /// Its console.
    pub fn console(&self) -> Result<Console> {
        Console::connect(&self.folder.join("console.sock"))
    }

    /// Where it waits for guests.
    pub fn address(&self) -> PeerAddress {
        self.address.clone()
    }

    /// What it knows of its guest.
    pub fn vm(&self) -> Result<VmInfo> {
        match self.client().call(&Request::ShowVm)? {
            Reply::Vm(vm) => Ok(vm),
            other => bail!("Unexpected reply: {other:?}"),
        }
    }

    /// Its last migration.
    pub fn migration(&self) -> Result<Option<MigrationStatus>> {
        match self.client().call(&Request::ShowMigration)? {
            Reply::Migration(last) => Ok(last.migration),
            other => bail!("Unexpected reply: {other:?}"),
        }
    }

    /// How the migration ended that brought its guest. The last word of it may still be on its way from the source.
    pub fn arrival(&self) -> Result<MigrationStatus> {
        let deadline = Instant::now() + START_WITHIN;
        loop {
            let status = self.migration()?.context("The target has no account of the migration")?;
            if status.state != MigrationState::Active {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "The target's account is still {status:?}:\n{}", self.words());
            sleep(LOOK_EVERY);
        }
    }

    /// Waits until it is in `phase`.
    pub fn await_phase(&self, phase: Phase) -> Result<()> {
        let deadline = Instant::now() + START_WITHIN;
        loop {
            // A socket file is there a moment before anybody listens to it.
            let now = self.vm().map(|vm| vm.phase);
            if matches!(now, Ok(now) if now == phase) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "Not {phase} but {now:?} after {START_WITHIN:?}:\n{}", self.words());
            sleep(LOOK_EVERY);
        }
    }

    /// Waits until its guest runs here again after a migration that failed, and gives the account of that, which is told of
    /// right after the guest.
    pub fn await_stay(&self) -> Result<MigrationStatus> {
        self.await_phase(Phase::Running)?;
        let deadline = Instant::now() + START_WITHIN;
        loop {
            let status = self.migration()?.context("There is no account of the migration")?;
            if status.state != MigrationState::Active {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "The migration has not ended, but the guest runs: {status:?}");
            sleep(LOOK_EVERY);
        }
    }

    /// Starts to move its guest, whose memory is copied, as between two hosts.
    pub fn start_migration(&self, to: &Self, mode: MigrationMode) -> Result<()> {
        self.client().call(&Request::StartMigration(copying(to, mode))).map(drop).map_err(Into::into)
    }

    /// Moves its guest, whose memory is copied, and waits until it runs at the target and this process has ended. Gives
    /// the target's account.
    pub fn migrate(self, to: &Self, mode: MigrationMode, within: Duration) -> Result<MigrationStatus> {
        self.migrate_as(copying(to, mode), to, within)
    }

    /// The same, by any order that leads to `to`.
    pub fn migrate_as(self, order: StartMigration, to: &Self, within: Duration) -> Result<MigrationStatus> {
        self.client().call(&Request::StartMigration(order))?;
        self.finish(within)?.expect(0, "The guest has moved to")?;
        let phase = to.vm()?.phase;
        ensure!(phase == Phase::Running, "The source has ended, but the target is {phase}");
        let status = to.arrival()?;
        ensure!(status.state == MigrationState::Completed, "The target's account is {status:?}");
        Ok(status)
    }

    /// Waits for its end.
    pub fn finish(mut self, within: Duration) -> Result<Ended> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Ended { status, words: self.words() });
            }
            ensure!(
                Instant::now() < deadline,
                "godwit has not ended after {within:?}; its migration is {:?}; it said:\n{}",
                self.migration(),
                self.words()
            );
            sleep(LOOK_EVERY);
        }
    }

    /// What it wrote to standard error so far.
    pub fn words(&self) -> String {
        fs::read_to_string(self.folder.join("stderr")).unwrap_or_default()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw).context("A process has a number")?;
        kill_process(pid, signal).context("Cannot signal godwit")
    }

    /// Asks it to end its guest, and itself.
    pub fn end(self) -> Result<()> {
        self.client().call(&Request::Kill)?;
        self.finish(END_WITHIN)?.expect(0, "godwit: The guest was ended by request")
    }

    /// Ends it at once, as by a power cut.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Godwit {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// An order to copy a guest to `to`, though it may be at a Unix socket.
pub fn copying(to: &Godwit, mode: MigrationMode) -> StartMigration {
    StartMigration { mode, memory: MemoryPolicy::Copy, ..StartMigration::new(to.address()) }
}

/// Runs `godwit` with arguments to its end, for commands that end by themselves.
pub fn call(context: &Context, arguments: &[&str]) -> Result<(Ended, String)> {
    let output =
        Command::new(&context.godwit).args(arguments).stdin(Stdio::null()).output().context("Cannot start godwit")?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok((Ended { status: output.status, words: text(output.stderr) }, text(output.stdout)))
}
