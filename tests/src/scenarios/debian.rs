//! A whole Debian system, with systemd, on a disk of its own, moved while it is under load.

use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use control::{
    Client, LastMigration, MigrationMode, MigrationState, NicBackend, NicList, Reply, Request, StartMigration,
};
use verifier::kernel_log::is_trouble;

use super::readme;
use crate::godwit::Godwit;
use crate::scenario::{Context, Needs, Scenario};
use crate::traveller::host_tsc_parameter;

/// See its `about`.
pub(super) const DEBIAN: Scenario = Scenario {
    name: "debian-under-load",
    about: "The README's commands boot Debian to its login prompt, load it by ssh and move it; nine more moves harm nothing",
    needs: Needs::Debian,
    timeout: Duration::from_secs(900),
    run: debian,
};

/// The README moves it once.
const FURTHER_MOVES: usize = 9;

/// How long an emulated guest may take for one command.
pub(super) const ANSWER_WITHIN: Duration = Duration::from_secs(120);

const MOVE_WITHIN: Duration = Duration::from_secs(120);

/// The guest's address in the README's commands.
const GUEST: &str = "10.79.0.2";

fn debian(context: &Context) -> Result<()> {
    link_images(context)?;
    let start = Instant::now();
    let _network = Network;
    let commands = readme::block("debian-under-load")?;
    readme::run(context, &context.work, &with_host_tsc(&commands)).context("The README's commands")?;
    println!("booted, loaded and moved by the README's commands in {:.0} s", start.elapsed().as_secs_f32());
    // It belongs to the README's shell, which is gone: the runner ends it if this function fails.
    let arrived = Client::new(context.work.join("b.sock"));
    let mut godwit: Option<Godwit> = None;
    for stop in 0..FURTHER_MOVES {
        let (tap, disk) = (format!("id=net0,tap=gw{}", stop % 2), context.work.join("debian.img"));
        let disk = format!("id=blk0,path={}", disk.display());
        let target = Godwit::receive(context, &format!("stop{stop}"), &["--net", &tap, "--disk", &disk])?;
        let mode = if stop % 2 == 0 { MigrationMode::Stop } else { MigrationMode::Live };
        let source = godwit.as_ref().map_or_else(|| arrived.clone(), Godwit::client);
        source.call(&Request::StartMigration(StartMigration { mode, ..StartMigration::new(target.address()) }))?;
        await_arrival(&source, &target.client())?;
        if let Some(source) = godwit.replace(target) {
            source.finish(MOVE_WITHIN)?.expect(0, "The guest has moved to")?;
        }
        godwit.as_ref().map_or(Ok(()), has_fast_nic)?;
        answers().with_context(|| format!("after the {mode:?} move to stop {stop}"))?;
        println!("stop {stop}: {mode:?} after {:.0} s", start.elapsed().as_secs_f32());
    }
    let log = on_guest(context, "systemctl show load -P ActiveEnterTimestampMonotonic && dmesg")?;
    let trouble = trouble(&log)?;
    ensure!(trouble.is_empty(), "The guest's kernel complains:\n{}", trouble.join("\n"));
    // stress-ng verifies what it wrote: a page that is not as it was ends the unit with a failure.
    on_guest(context, "systemctl is-active load && systemctl stop load && ! systemctl is-failed load")?;
    let godwit = godwit.context("It was moved")?;
    godwit.client().call(&Request::Stop(control::Stop::default()))?;
    godwit.finish(ANSWER_WITHIN)?.expect(0, "The guest powered off")
}

/// The README's files under the names that it gives them. The disk is a device of the lab whose writes are thrown away,
/// or a copy.
pub(super) fn link_images(context: &Context) -> Result<()> {
    for image in ["vmlinux", "initramfs"] {
        symlink(context.images.join(image), context.work.join(image))?;
    }
    let (disk, own) = (context.disk("debian.img"), context.work.join("debian.img"));
    if fs::metadata(&disk).context("The Debian disk is not there")?.file_type().is_block_device() {
        symlink(disk, own)?;
    } else {
        let status = Command::new("cp").args(["--sparse=always", "-L"]).args([&disk, &own]).status()?;
        ensure!(status.success(), "Cannot copy {}", disk.display());
    }
    let key = context.work.join("ssh-key");
    fs::copy(context.disk("ssh-key"), &key).context("The ssh key is not there")?;
    // ssh takes no key that others may read.
    Ok(fs::set_permissions(key, fs::Permissions::from_mode(0o600))?)
}

/// The commands with what the guest must know of this host's TSC.
fn with_host_tsc(commands: &str) -> String {
    commands.replace("console=ttyS0", format!("console=ttyS0 {}", host_tsc_parameter()).trim_end())
}

/// Waits until the guest has arrived, or the source says why it does not go.
pub(super) fn await_arrival(source: &Client, target: &Client) -> Result<()> {
    let deadline = Instant::now() + MOVE_WITHIN;
    loop {
        if let Reply::Migration(LastMigration { migration: Some(arrival) }) = target.call(&Request::ShowMigration)?
            && arrival.state == MigrationState::Completed
        {
            return Ok(());
        }
        // A source whose guest has gone does not answer any more.
        if let Ok(Reply::Migration(LastMigration { migration: Some(departure) })) = source.call(&Request::ShowMigration)
        {
            ensure!(departure.error.is_none(), "The guest did not go: {departure:?}");
        }
        ensure!(Instant::now() < deadline, "The guest has not arrived after {MOVE_WITHIN:?}");
        sleep(Duration::from_millis(20));
    }
}

/// Checks that this host's kernel carries the guest's packets, if it can.
fn has_fast_nic(godwit: &Godwit) -> Result<()> {
    let Reply::Nics(NicList { nics }) = godwit.client().call(&Request::ListNics)? else { bail!("Not a list of NICs") };
    let can = Path::new("/dev/vhost-net").exists();
    let expected = if can { NicBackend::VhostNet } else { NicBackend::Tap };
    ensure!(nics.len() == 1 && nics[0].backend == expected, "Its NIC is to be carried by {expected:?}: {nics:?}");
    Ok(())
}

/// Waits for the guest's answer to a ping, at an address where the bridge knew it behind another tap.
pub(super) fn answers() -> Result<()> {
    let seconds = ANSWER_WITHIN.as_secs().to_string();
    let status = Command::new("ping").args(["-c", "1", "-w", &seconds, GUEST]).stdout(Stdio::null()).status()?;
    ensure!(status.success(), "The guest does not answer a ping within {seconds} s");
    Ok(())
}

/// The kernel's troubling messages since a moment, which the first line of `log` gives in microseconds since the guest's
/// start. The other lines are those of dmesg(1): `[   12.345678] message`.
fn trouble(log: &str) -> Result<Vec<&str>> {
    let (since, lines) = log.split_once('\n').context("The guest's log is empty")?;
    let since = since.parse::<f64>().with_context(|| format!("{since:?} is not a time"))? / 1e6;
    let told = lines.lines().filter_map(|line| {
        let (time, message) = line.strip_prefix('[')?.split_once("] ")?;
        Some((line, time.trim().parse::<f64>().ok()?, message))
    });
    Ok(told.filter(|(_, time, message)| *time >= since && is_trouble(message)).map(|(line, ..)| line).collect())
}

/// Runs a command in the guest, by ssh, and gives what it printed.
pub(super) fn on_guest(context: &Context, command: &str) -> Result<String> {
    let errors = context.work.join("ssh.log");
    let mut ssh = Command::new("timeout");
    ssh.arg(ANSWER_WITHIN.as_secs().to_string()).args(["ssh", "-i"]).arg(context.work.join("ssh-key"));
    ssh.args(["-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]);
    ssh.args([&format!("root@{GUEST}"), command]).stdin(Stdio::null()).stderr(File::create(&errors)?);
    let output = ssh.output().context("Cannot run ssh")?;
    let words = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "{command:?} failed in the guest ({}):\n{words}{}",
        output.status,
        fs::read_to_string(&errors)?
    );
    Ok(words)
}

/// The bridge and the taps that the README makes; they go when the scenario is over.
pub(super) struct Network;

impl Drop for Network {
    fn drop(&mut self) {
        for device in ["gw0", "gw1", "gwbr"] {
            // What was not made cannot be deleted, and is not there either.
            let _ = Command::new("/usr/sbin/ip").args(["link", "delete", device]).stderr(Stdio::null()).status();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_trouble_since_the_load_began_counts() {
        let log = "61000000\n\
                   [    1.500000] WARNING: CPU: 0 PID: 1 at arch/x86/x.c:1\n\
                   [   61.000001] virtio_net virtio1 eth0: link up\n\
                   [   70.250000] I/O error, dev vda, sector 8\n \
                   no time\n";
        assert_eq!(trouble(log).unwrap(), ["[   70.250000] I/O error, dev vda, sector 8"]);
        trouble("").unwrap_err();
        trouble("never\n").unwrap_err();
    }
}
