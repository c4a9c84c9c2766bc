//! Disks that are still coming when something happens to their guest, to where they come from, or to where they come to.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use block::NbdUri;
use block::nbd::uri::Address;
use control::{MigrationMode, Phase, Pulse, Request};

use super::disks::{await_whole, disk_of, micro, with_disks};
use super::nbd::{Serving, serve_slowly};
use crate::godwit::{Godwit, call};
use crate::scenario::{Context, Needs, Scenario};

/// See its `about`.
pub(super) const LENDER: Scenario = Scenario {
    name: "disk-lender-lost",
    about: "The source dies while a disk comes, and is served again by hand; then the target dies, and boots on what it has",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(90),
    run: lender,
};

/// See its `about`.
pub(super) const RESET: Scenario = Scenario {
    name: "disk-reset",
    about: "A guest is reset and pulsed while its disk comes, and the disk comes all the same; its old places are forgotten",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(90),
    run: reset,
};

const SOON: Duration = Duration::from_secs(30);
const LENGTH: u64 = 512 << 20;
const STRETCH: usize = 1 << 20;

/// The bytes from `at` on: each word tells where it is.
fn stretch(at: u64) -> Vec<u8> {
    (0..STRETCH as u64 / 8).flat_map(|word| (at + 8 * word + 1).to_le_bytes()).collect()
}

fn starts(length: u64) -> impl Iterator<Item = u64> {
    (0..length).step_by(STRETCH)
}

/// Makes an image of data from its beginning to its end.
fn image(path: &Path, length: u64) -> Result<()> {
    let file = fs::File::create(path)?;
    starts(length).try_for_each(|at| Ok(file.write_all_at(&stretch(at), at)?))
}

/// Checks that all of an image has come.
fn check(path: &Path, length: u64) -> Result<()> {
    let (file, mut found) = (fs::File::open(path)?, vec![0; STRETCH]);
    ensure!(file.metadata()?.len() == length, "It is {} bytes long", file.metadata()?.len());
    for at in starts(length) {
        file.read_exact_at(&mut found, at)?;
        ensure!(found == stretch(at), "The MiB at {at} is another");
    }
    Ok(())
}

/// What is missing of a disk; an error if nothing is.
fn missing(godwit: &Godwit) -> Result<u64> {
    disk_of(godwit)?.missing_bytes.context("All of it is here already: this machine is too fast for the scenario")
}

/// Kills a process, and takes away what it cannot any more.
fn kill(godwit: Godwit) -> Result<()> {
    let folder = godwit.folder().to_owned();
    godwit.kill()?;
    Ok(fs::remove_dir_all(folder)?)
}

fn lender(context: &Context) -> Result<()> {
    let path = |name: &str| context.work.join(name);
    image(&path("here.img"), LENGTH)?;
    let source = micro(context, "source", &format!("id=data,path={}", path("here.img").display()))?;
    let place = format!("id=data,path={}", path("there.img").display());
    let target = Godwit::receive_at(context, "target", "tcp://127.0.0.1:0", &["--disk", &place])?;
    source.client().call(&Request::StartMigration(with_disks(&target, MigrationMode::Live)))?;
    target.await_phase(Phase::Running)?;
    kill(source)?;
    let (left, place) = (missing(&target)?, disk_of(&target)?.place);
    println!("{left} bytes are missing at {place}");

    let (_, base) = place.split_once(" over ").with_context(|| format!("It is at {place}"))?;
    let uri: NbdUri = base.parse()?;
    let Address::Tcp { host, port } = &uri.address else { bail!("It comes from {}", uri.address) };
    let listen = format!("--listen=tcp://{host}:{port}");
    let image = format!("{}={}", uri.export, path("here.img").display());
    let server = Serving::start(context, &[&image, &listen], 1)?;
    let begun = std::time::Instant::now();
    while disk_of(&target)?.missing_bytes.is_some_and(|missing| missing == left) {
        ensure!(begun.elapsed() < SOON, "Nothing comes from the server that was started by hand");
    }
    kill(target)?;
    let kernel = context.images.join("micro.elf").display().to_string();
    let alone = format!("path={}", path("there.img").display());
    ensure!(path("there.img.map").exists(), "All of it had come: this machine is too fast for the scenario");

    let (refused, _) = call(context, &["run", "--kernel", &kernel, "--disk", &alone])?;
    refused.expect(1, "is not all here")?;
    let again = micro(context, "again", &format!("id=data,path={},base={base}", path("there.img").display()))?;
    let disk = await_whole(&again, SOON)?;
    ensure!(disk.place == path("there.img").display().to_string(), "It is at {}", disk.place);
    again.end()?;
    server.end()?;
    check(&path("there.img"), LENGTH)
}

fn reset(context: &Context) -> Result<()> {
    const LENGTH: u64 = 24 << 20;
    let path = |name: &str| context.work.join(name).display().to_string();
    image(&context.work.join("far.img"), LENGTH)?;
    // 5 MB/s.
    let server = serve_slowly(&context.work, &path("far.img"), "40M")?;
    let export = server.uri("")?;
    let source = micro(context, "source", &format!("id=data,remote={export},local@b={}", path("near.img")))?;
    let target = Godwit::receive(context, "target", &["--host-name", "b"])?;
    source.migrate_as(with_disks(&target, MigrationMode::Live), &target, SOON)?;
    println!("{} bytes are missing", missing(&target)?);
    target.client().call(&Request::Reset)?;
    target.await_phase(Phase::Running)?;
    println!("{} bytes are missing after a reset", missing(&target)?);
    target.client().call(&Request::Pulse(Pulse { times: std::num::NonZeroU32::MIN }))?;
    println!("{} bytes are missing after a pulse", missing(&target)?);
    await_whole(&target, SOON)?;
    target.client().call(&Request::Reset)?;

    // What it has written is here alone, and what it had been before is no place of it any more.
    let next = Godwit::receive(context, "next", &["--host-name", "c"])?;
    target.migrate(&next, MigrationMode::Live, SOON)?;
    ensure!(disk_of(&next)?.place == path("near.img"), "It is at {}", disk_of(&next)?.place);
    next.end()?;
    drop(server);
    check(&context.work.join("near.img"), LENGTH)
}
