//! The README's blocks of commands, run as they stand there.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use control::{Client, Phase, Request};

use crate::godwit::Godwit;
use crate::scenario::{Context, Needs, Scenario};

const README: &str = include_str!("../../../README.md");

/// See its `about`.
pub(super) const MOVES: Scenario = Scenario {
    name: "readme-moves",
    about: "The README's commands boot a guest and move it",
    needs: Needs::LinuxGuests,
    timeout: Duration::from_secs(120),
    run: moves,
};

/// See its `about`.
pub(super) const DISKS: Scenario = Scenario {
    name: "readme-disks",
    about: "The README's commands serve a disk and boot a guest that has it",
    needs: Needs::LinuxGuests,
    timeout: Duration::from_secs(60),
    run: disks,
};

/// See its `about`.
pub(super) const DISK_BEFORE: Scenario = Scenario {
    name: "readme-disk-before",
    about: "The README's commands move a guest, and its disk with its memory",
    needs: Needs::LinuxGuests,
    timeout: Duration::from_secs(120),
    run: disk_before,
};

/// See its `about`.
pub(super) const DISK_AFTER: Scenario = Scenario {
    name: "readme-disk-after",
    about: "The README's commands move a guest, and its disk after it",
    needs: Needs::LinuxGuests,
    timeout: Duration::from_secs(120),
    run: disk_after,
};

/// See its `about`.
pub(super) const API: Scenario = Scenario {
    name: "readme-api",
    about: "The README's curl commands work",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(30),
    run: api,
};

/// See its `about`.
pub(super) const DIRTY_RATE: Scenario = Scenario {
    name: "readme-dirty-rate",
    about: "The README's command measures the dirty rate of a guest",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(30),
    run: dirty_rate,
};

/// See its `about`.
pub(super) const UPGRADE: Scenario = Scenario {
    name: "readme-upgrade",
    about: "The README's commands put another Godwit under a running guest",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(30),
    run: upgrade,
};

/// See its `about`.
pub(super) const GOALS: Scenario = Scenario {
    name: "readme-goals",
    about: "The README's command moves a guest that dirties its memory faster than it may go",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(120),
    run: goals,
};

fn moves(context: &Context) -> Result<()> {
    for image in ["vmlinux", "initramfs"] {
        symlink(context.images.join(image), context.work.join(image))?;
    }
    let output = run(context, &context.work, &block("readme-moves")?)?;
    ensure!(output.contains("live migration completed"), "The migration is not told:\n{output}");
    ensure!(output.contains(" is running"), "The status is not told:\n{output}");
    Ok(())
}

fn disks(context: &Context) -> Result<()> {
    for image in ["vmlinux", "initramfs"] {
        symlink(context.images.join(image), context.work.join(image))?;
    }
    let output = run(context, &context.work, &block("readme-disks")?)?;
    let place = format!("blk0  nbd+unix:///data?socket={}", context.work.join("nbd.sock").display());
    ensure!(output.contains("\ndata\n") && output.contains(&place), "The disk is not told:\n{output}");
    Ok(())
}

fn disk_before(context: &Context) -> Result<()> {
    disk_moves(context, "readme-disk-before", "right.img")?;
    ensure!(context.work.join("left.img.godwit-old").exists() && !context.work.join("right.img.godwit-old").exists());
    Ok(())
}

fn disk_after(context: &Context) -> Result<()> {
    disk_moves(context, "readme-disk-after", "there.img")
}

fn disk_moves(context: &Context, commands: &str, to: &str) -> Result<()> {
    for image in ["vmlinux", "initramfs"] {
        symlink(context.images.join(image), context.work.join(image))?;
    }
    let output = run(context, &context.work, &block(commands)?)?;
    let place = format!("\nblk0  {}", context.work.join(to).display());
    ensure!(output.contains("live migration completed") && output.contains(&place), "The disk is not told:\n{output}");
    Ok(())
}

fn api(context: &Context) -> Result<()> {
    let kernel = context.images.join("micro.elf").display().to_string();
    let godwit = Godwit::run(context, "guest", &["--kernel", &kernel, "--memory=64M"])?;
    symlink("api.sock", godwit.folder().join("a.sock"))?;
    let output = run(context, godwit.folder(), &block("readme-api")?)?;
    ensure!(output.contains("godwit_vcpus 1"), "The metrics are not told:\n{output}");
    godwit.finish(Duration::from_secs(10))?.expect(0, "ended by request")
}

fn upgrade(context: &Context) -> Result<()> {
    let kernel = context.images.join("micro.elf").display().to_string();
    let godwit = Godwit::run(context, "guest", &["--kernel", &kernel, "--memory=64M"])?;
    godwit.await_phase(Phase::Running)?;
    symlink("api.sock", godwit.folder().join("a.sock"))?;
    symlink(context.godwit.parent().context("godwit lies in a folder")?, godwit.folder().join("new"))?;
    let new = Client::new(godwit.folder().join("new.sock"));
    let output = run(context, godwit.folder(), &block("readme-upgrade")?)?;
    ensure!(output.contains("live migration completed: memory passed, "), "The migration is not told:\n{output}");
    ensure!(output.contains(" is running"), "The status is not told:\n{output}");
    godwit.finish(Duration::from_secs(10))?.expect(0, "The guest has moved to")?;
    new.call(&Request::Kill)?;
    Ok(())
}

fn dirty_rate(context: &Context) -> Result<()> {
    let kernel = context.images.join("micro.elf").display().to_string();
    let godwit = Godwit::run(context, "guest", &["--kernel", &kernel, "--memory=64M"])?;
    godwit.await_phase(Phase::Running)?;
    symlink("api.sock", godwit.folder().join("a.sock"))?;
    let output = run(context, godwit.folder(), &block("readme-dirty-rate")?)?;
    ensure!(output.contains("dirtied  ") && output.contains("cost  "), "The dirty rate is not told:\n{output}");
    godwit.end()
}

fn goals(context: &Context) -> Result<()> {
    let kernel = context.images.join("micro.elf").display().to_string();
    let words = "--cmdline=ws=16M rate=20000 tick=20";
    let godwit = Godwit::run(context, "guest", &["--kernel", &kernel, words, "--memory=64M"])?;
    let mut console = godwit.console()?;
    // It has been through its working set by then.
    (0..75).try_for_each(|_| console.expect("tick", Duration::from_secs(20)).map(drop))?;
    let folder = godwit.folder().to_owned();
    symlink("api.sock", folder.join("a.sock"))?;
    let target = Godwit::receive_at(context, "target", &format!("unix:{}", folder.join("in.sock").display()), &[])?;
    let output = run(context, &folder, &block("readme-goals")?)?;
    println!("{output}");
    ensure!(output.contains("goal met") && output.contains("  throttled  "), "It was not throttled:\n{output}");
    godwit.finish(Duration::from_secs(10))?.expect(0, "The guest has moved to")?;
    target.end()
}

/// The block of commands that says it is run by `scenario`.
pub(super) fn block(scenario: &str) -> Result<String> {
    let mark = format!("is run by the scenario {scenario}. -->\n```sh\n");
    let block = README.split_once(&mark).and_then(|(_, rest)| rest.split_once("```"));
    block.map(|(block, _)| block.to_owned()).context("The README lacks the block")
}

/// Runs commands in `folder`, and gives what they printed when the shell has ended. What it started in the background may
/// go on.
pub(super) fn run(context: &Context, folder: &Path, commands: &str) -> Result<String> {
    let programs = context.godwit.parent().context("godwit lies in a folder")?;
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap_or_default());
    // A pipe would stay open for as long as anything runs in the background.
    let words = folder.join("words");
    let output = File::create(&words)?;
    let status = Command::new("sh")
        .args(["-e", "-c", commands])
        .current_dir(folder)
        .env("PATH", path)
        .env("GODWIT_STATE_DIR", folder.join("state"))
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .status()
        .context("Cannot run sh")?;
    let words = fs::read_to_string(words)?;
    ensure!(status.success(), "The commands failed ({status}):\n{words}");
    Ok(words)
}
