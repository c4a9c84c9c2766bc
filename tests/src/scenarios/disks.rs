//! Disks that come to a host after their guest.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use control::{DiskInfo, DiskPolicy, MigrationMode, MigrationState, Phase, Reply, Request, StartMigration, WithDisks};

use super::nbd::Serving;
use crate::godwit::{Godwit, call, copying};
use crate::scenario::{Context, Needs, Scenario};
use crate::traveller::Traveller;

/// See its `about`.
pub(super) const AFTER: Scenario = Scenario {
    name: "disk-after",
    about: "Linux moves three times, live and stopped, and its disk after it: nothing it wrote is lost, and all of it comes",
    needs: Needs::LinuxGuests,
    timeout: Duration::from_secs(240),
    run: after,
};

/// See its `about`.
pub(super) const COMES: Scenario = Scenario {
    name: "disk-comes",
    about: "A disk comes after its guest by TCP and by Unix socket, from a file and from an export, and its source ends then",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(60),
    run: comes,
};

/// See its `about`.
pub(super) const BEFORE: Scenario = Scenario {
    name: "disk-before",
    about: "A disk moves with the memory of its guest, from a file and from an export, holes stay holes, and it comes back",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(60),
    run: before,
};

/// See its `about`.
pub(super) const MIRRORED: Scenario = Scenario {
    name: "disk-mirrored",
    about: "Linux writes to its disk while that moves with it, live and stopped, away and back: nothing it wrote is lost",
    needs: Needs::LinuxGuests,
    timeout: Duration::from_secs(240),
    run: mirrored,
};

/// See its `about`.
pub(super) const STAYS: Scenario = Scenario {
    name: "disk-stays",
    about: "A disk that cannot come after its guest keeps that at the source, as it was, and leaves nothing at the target",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(60),
    run: stays,
};

/// See its `about`.
pub(super) const PLACES: Scenario = Scenario {
    name: "disk-places",
    about: "A disk with several places is read from the export far from it, from the file at its host, and far again",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(60),
    run: places,
};

const SOON: Duration = Duration::from_secs(20);
const LENGTH: usize = 32 << 20;
/// What the verifier writes to.
const VERIFIED: usize = 4 << 20;

/// Makes an image of bytes that tell where they are, with a hole in the middle; its bytes.
fn image(path: &Path) -> Result<Vec<u8>> {
    let words =
        (0..LENGTH / 8).flat_map(|at| if at >> 19 == 4 { [0; 8] } else { (at as u64 ^ 0x9e37_79b9).to_le_bytes() });
    let bytes: Vec<u8> = words.collect();
    fs::write(path, &bytes)?;
    Ok(bytes)
}

/// A guest that needs no disk, and its disk, at a host of this name.
pub(super) fn micro(context: &Context, name: &str, disk: &str) -> Result<Godwit> {
    let kernel = context.images.join("micro.elf").display().to_string();
    let machine = ["--kernel", &kernel, "--memory=64M", "--disk", disk, "--host-name", name];
    let guest = Godwit::run(context, name, &machine)?;
    guest.await_phase(Phase::Running)?;
    Ok(guest)
}

/// An order to move a guest, and its disks after it.
pub(super) fn with_disks(to: &Godwit, mode: MigrationMode) -> StartMigration {
    StartMigration { with_disks: WithDisks::All(DiskPolicy::After), ..copying(to, mode) }
}

pub(super) fn disk_of(godwit: &Godwit) -> Result<DiskInfo> {
    match godwit.client().call(&Request::ListDisks)? {
        Reply::Disks(list) => list.disks.into_iter().next().context("It has no disk"),
        other => bail!("Unexpected reply: {other:?}"),
    }
}

/// Waits until all of a disk is where its guest is.
pub(crate) fn await_whole(godwit: &Godwit, within: Duration) -> Result<DiskInfo> {
    let deadline = Instant::now() + within;
    loop {
        let disk = disk_of(godwit)?;
        if disk.missing_bytes.is_none() {
            return Ok(disk);
        }
        ensure!(Instant::now() < deadline, "It is not here yet: {disk:?}\n{}", godwit.words());
        sleep(Duration::from_millis(20));
    }
}

fn comes(context: &Context) -> Result<()> {
    let path = |name: &str| context.work.join(name).display().to_string();
    let bytes = image(&context.work.join("disk.img"))?;
    let source = micro(context, "first", &format!("id=data,path={}", path("disk.img")))?;
    let by_tcp = Godwit::receive_at(
        context,
        "tcp",
        "tcp://127.0.0.1:0",
        &["--disk", &format!("id=data,path={}", path("tcp.img"))],
    )?;
    let status = source.migrate_as(with_disks(&by_tcp, MigrationMode::Live), &by_tcp, SOON)?;
    println!("by TCP: {} in all, downtime {:?}", status.total_ms, status.downtime_ms);
    arrived(context, &by_tcp, "tcp.img", &bytes)?;

    let by_unix = Godwit::receive(context, "unix", &["--disk", &format!("id=data,path={}", path("unix.img"))])?;
    by_tcp.migrate_as(with_disks(&by_unix, MigrationMode::Stop), &by_unix, SOON)?;
    arrived(context, &by_unix, "unix.img", &bytes)?;
    ensure!(fs::read_dir(context.work.join("tcp/state"))?.next().is_none(), "Something is left at the second place");
    by_unix.end()?;

    let (socket, served) = (path("nbd.sock"), format!("data={}", path("disk.img")));
    let listen = format!("--listen=unix:{socket}");
    let server = Serving::start(context, &[&served, &listen], 1)?;
    let far = micro(context, "far", &format!("id=data,nbd=nbd+unix:///data?socket={socket}"))?;
    let near = Godwit::receive(context, "near", &["--disk", &format!("id=data,path={}", path("near.img"))])?;
    far.migrate_as(with_disks(&near, MigrationMode::Live), &near, SOON)?;
    arrived(context, &near, "near.img", &bytes)?;
    near.end()?;
    server.end()
}

/// An order to move a guest, and its disks with its memory.
fn mirroring(to: &Godwit, mode: MigrationMode) -> StartMigration {
    StartMigration { with_disks: WithDisks::All(DiskPolicy::Before), ..copying(to, mode) }
}

fn before(context: &Context) -> Result<()> {
    let path = |name: &str| context.work.join(name).display().to_string();
    let at = |name: &str| format!("id=data,path={}", path(name));
    let bytes = image(&context.work.join("a.img"))?;
    let moved = |godwit: &Godwit, name: &str| -> Result<()> {
        let disk = disk_of(godwit)?;
        ensure!(disk.place == path(name) && disk.missing_bytes.is_none(), "It is at {}", disk.place);
        ensure!(fs::read(path(name))? == bytes, "Its bytes are others");
        ensure!(!Path::new(&path(&format!("{name}.godwit-old"))).exists(), "The disk that is used is said to be old");
        Ok(())
    };
    let first = micro(context, "a", &at("a.img"))?;
    let second = Godwit::receive_at(context, "b", "tcp://127.0.0.1:0", &["--disk", &at("b.img")])?;
    let status = first.migrate_as(mirroring(&second, MigrationMode::Live), &second, SOON)?;
    println!("there: {} in all, downtime {:?}", status.total_ms, status.downtime_ms);
    moved(&second, "b.img")?;
    let space = fs::metadata(path("b.img"))?.blocks() * 512;
    ensure!(space < bytes.len() as u64, "Holes have become data: {space} bytes are taken");

    // What was left behind is no disk any more, but a start for the way back.
    let kernel = context.images.join("micro.elf").display().to_string();
    let (refused, _) = call(context, &["run", "--kernel", &kernel, "--disk", &at("a.img")])?;
    refused.expect(1, "a.img is an old copy of a disk: The disk may have moved with its guest to tcp://")?;
    let back = Godwit::receive(context, "back", &["--disk", &at("a.img")])?;
    let status = second.migrate_as(mirroring(&back, MigrationMode::Stop), &back, SOON)?;
    println!("back: {} in all, downtime {:?}", status.total_ms, status.downtime_ms);
    moved(&back, "a.img")?;
    back.end()?;

    let (socket, served) = (path("nbd.sock"), format!("data={}", path("a.img")));
    let server = Serving::start(context, &[&served, &format!("--listen=unix:{socket}")], 1)?;
    let far = micro(context, "far", &format!("id=data,nbd=nbd+unix:///data?socket={socket},queues=2"))?;
    let near = Godwit::receive(context, "near", &["--disk", &at("near.img")])?;
    far.migrate_as(mirroring(&near, MigrationMode::Live), &near, SOON)?;
    moved(&near, "near.img")?;
    server.end()?;

    let refuses = |target: Godwit, part: &str| -> Result<()> {
        near.client().call(&Request::StartMigration(mirroring(&target, MigrationMode::Live)))?;
        let status = near.await_stay()?;
        let error = status.error.unwrap_or_default();
        println!("{error}");
        ensure!(status.state == MigrationState::Failed && error.contains(part), "{:?}: {error}", status.state);
        moved(&near, "near.img")?;
        target.end()
    };
    fs::write(path("taken.img"), [0; 512])?;
    let taken = Godwit::receive(context, "taken", &["--disk", &at("taken.img")])?;
    refuses(taken, "taken.img is there already, and nothing says that it is an old copy of disk")?;
    ensure!(fs::read(path("taken.img"))? == [0; 512], "The file in the way was changed");
    // The guest there was another one.
    let foreign = Godwit::receive(context, "foreign", &["--disk", &at("b.img")])?;
    refuses(foreign, "nothing says that it is an old copy of disk")?;
    let nowhere = Godwit::receive(context, "nowhere", &["--disk", &at("no/such/folder/disk.img")])?;
    refuses(nowhere, "no/such/folder/disk.img")?;
    near.end()
}

fn mirrored(context: &Context) -> Result<()> {
    let name = |stop: u32| context.work.join(format!("disk{stop}.img"));
    let bytes = image(&name(0))?;
    let verifier = "--memory 4M --rate 500 --threads 2 --disk /dev/vda --disk-size 4M --tick-ms 50";
    let disk = format!("path={},queues=2", name(0).display());
    let mut traveller = Traveller::set_out(context, &["--memory=160M", "--disk", &disk, "--vcpus=2"], "", verifier)?;
    // To a new place, back to the first, and away once more, where an old copy lies by then.
    for (stop, mode) in [(1, MigrationMode::Live), (0, MigrationMode::Live), (1, MigrationMode::Stop)] {
        let place = format!("id=blk0,path={}", name(stop).display());
        let moved = traveller.travel_by(context, |target| mirroring(target, mode), &["--disk", &place])?;
        println!("{mode:?}: total {}, downtime {:?}", moved.status.total_ms, moved.status.downtime_ms);
        traveller.prove()?;
        let image = fs::read(name(stop))?;
        ensure!(image[VERIFIED..] == bytes[VERIFIED..], "What the guest did not write is not what it was");
    }
    traveller.arrive()
}

fn places(context: &Context) -> Result<()> {
    let path = |name: &str| context.work.join(name).display().to_string();
    image(&context.work.join("disk.img"))?;
    let (socket, file, served) = (path("nbd.sock"), path("disk.img"), format!("data={}", path("disk.img")));
    let server = Serving::start(context, &[&served, &format!("--listen=unix:{socket}")], 1)?;
    let far = format!("nbd+unix:///data?socket={socket}");
    let mut guest = micro(context, "a", &format!("id=data,remote={far},local@b={file},local@c={file}.gone"))?;
    ensure!(disk_of(&guest)?.place == far, "It is at {}", disk_of(&guest)?.place);
    for (stop, (host, place)) in [("b", &file), ("c", &far), ("b", &file), ("a", &far)].into_iter().enumerate() {
        let target = Godwit::receive(context, &format!("stop{stop}"), &["--host-name", host])?;
        guest.migrate(&target, MigrationMode::Live, SOON)?;
        ensure!(disk_of(&target)?.place == *place, "At {host} it is at {}", disk_of(&target)?.place);
        guest = target;
    }
    guest.end()?;
    server.end()
}

/// Checks that all of a disk has come.
fn arrived(context: &Context, godwit: &Godwit, name: &str, bytes: &[u8]) -> Result<()> {
    let (disk, image) = (await_whole(godwit, SOON)?, context.work.join(name));
    ensure!(disk.place == image.display().to_string(), "It is at {}", disk.place);
    ensure!(!context.work.join(format!("{name}.map")).exists(), "The map is still there");
    ensure!(fs::read(&image)? == bytes, "Its bytes are others");
    Ok(())
}

fn stays(context: &Context) -> Result<()> {
    let path = |name: &str| context.work.join(name).display().to_string();
    image(&context.work.join("disk.img"))?;
    let source = micro(context, "source", &format!("id=data,path={}", path("disk.img")))?;
    let refused = |target: &Godwit, part: &str| -> Result<()> {
        source.client().call(&Request::StartMigration(with_disks(target, MigrationMode::Live)))?;
        let status = source.await_stay()?;
        let error = status.error.unwrap_or_default();
        println!("{error}");
        ensure!(status.state == MigrationState::Failed && error.contains(part), "{:?}: {error}", status.state);
        Ok(())
    };
    fs::write(context.work.join("taken.img"), [0; 512])?;
    let target = Godwit::receive(context, "taken", &["--disk", &format!("id=data,path={}", path("taken.img"))])?;
    refused(&target, "taken.img is there already, and nothing says that it is a part of this disk")?;
    ensure!(fs::read(context.work.join("taken.img"))? == [0; 512], "The file in the way was changed");
    target.end()?;

    let place = format!("id=data,path={}", path("no/such/folder/disk.img"));
    let target = Godwit::receive(context, "nowhere", &["--disk", &place])?;
    refused(&target, "no/such/folder/disk.img.map")?;
    target.end()?;

    let target = Godwit::receive(context, "far", &["--disk", "id=data,nbd=nbd://127.0.0.1:9/data"])?;
    refused(&target, r#"name one by `godwit receive --disk data=FILE`"#)?;
    target.end()?;

    fs::write(context.work.join("left.img.map"), [])?;
    let target = Godwit::receive(context, "left", &["--disk", &format!("id=data,path={}", path("left.img"))])?;
    refused(&target, "something is left of a move that has not ended: remove it and")?;
    target.end()?;

    // Its record cannot be kept when its disk was made already.
    let target = Godwit::receive(context, "late", &["--disk", &format!("id=data,path={}", path("late.img"))])?;
    fs::remove_dir_all(context.work.join("late/state"))?;
    fs::write(context.work.join("late/state"), [])?;
    refused(&target, "late/state")?;
    for name in ["late.img", "late.img.map", "taken.img.map"] {
        ensure!(!context.work.join(name).exists(), "{name} is left");
    }
    target.end()?;
    let order = StartMigration { with_disks: "date=after".parse()?, ..StartMigration::new("unix:/x".parse()?) };
    let error = source.client().call(&Request::StartMigration(order)).expect_err("there is no such disk");
    ensure!(error.to_string().contains(r#"there is no disk "date""#), "{error}");
    ensure!(disk_of(&source)?.missing_bytes.is_none(), "The disk is not all at the source any more");
    source.end()
}

fn after(context: &Context) -> Result<()> {
    let name = |stop: u32| context.work.join(format!("disk{stop}.img"));
    let bytes = image(&name(0))?;
    let verifier = "--memory 4M --rate 500 --threads 2 --disk /dev/vda --disk-size 4M --tick-ms 50";
    let disk = format!("path={},queues=2", name(0).display());
    let mut traveller = Traveller::set_out(context, &["--memory=160M", "--disk", &disk, "--vcpus=2"], "", verifier)?;
    for (stop, mode) in [(1, MigrationMode::Live), (2, MigrationMode::Stop), (3, MigrationMode::Live)] {
        let place = format!("id=blk0,path={}", name(stop).display());
        let moved = traveller.travel_by(context, |target| with_disks(target, mode), &["--disk", &place])?;
        println!("{mode:?}: total {}, downtime {:?}", moved.status.total_ms, moved.status.downtime_ms);
        await_whole(traveller.godwit(), SOON)?;
        traveller.prove()?;
        let image = fs::read(name(stop))?;
        ensure!(image[VERIFIED..] == bytes[VERIFIED..], "What the guest did not write is not what it was");
        fs::remove_file(name(stop - 1))?;
    }
    traveller.arrive()
}
