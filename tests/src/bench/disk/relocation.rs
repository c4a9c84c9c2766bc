//! How a disk goes along with its guest over 1 Gbit/s with a round trip of 16 ms, or the link that is asked for. With its memory:
//! how much of the link that uses. After it: what the move takes beside one of memory alone, how fast the rest comes, and how
//! long who reads what is not here yet waits meanwhile.
//!
//! The guest of the moves is a micro guest, which has the disk and does not use it. The reads are made without a guest, on the
//! disk's back end, by a thread at the target's end of the link, while another brings the rest and a third of what is done is
//! a write.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use block::file::FileOptions;
use block::layered::{OnceWhole, Puller};
use block::{Access, Backend as _, Blocking, Durability, LayeredBackend, NbdBackend, NbdOptions, NbdUri};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::Serialize;

use crate::bench::Summary;
use crate::bench::migrate::by_godwit::order;
use crate::bench::migrate::cell::Link;
use crate::bench::migrate::random::SplitMix;
use crate::bench::migrate::wire::{End, Wire};
use crate::godwit::Godwit;
use crate::scenario::Context;
use crate::scenarios::disks::await_whole;

/// Length of the disk in bytes, and how much of it is data.
const LENGTH: u64 = 2 << 30;
const DATA: u64 = LENGTH * 3 / 10;
/// How long data lie beside each other, and then nothing.
const STRETCH: u64 = 1 << 20;
/// Memory of the guest in MiB.
const MEMORY_MIB: u64 = 512;
/// Reads that are timed in a turn.
const READS: usize = 200;
/// How long all of the disk may take.
const COMES_WITHIN: Duration = Duration::from_secs(120);

/// What is needed.
#[derive(Debug)]
pub struct Programs {
    /// The `godwit` binary.
    pub godwit: PathBuf,
    /// The micro guest.
    pub kernel: PathBuf,
    /// What its memory is full of: random pages.
    pub content: PathBuf,
}

/// What was measured.
#[derive(Debug, Serialize)]
pub struct Relocation {
    /// The link.
    pub link: Link,
    /// A move of memory alone, in milliseconds.
    pub memory_ms: Summary,
    /// For how long its guest stood still then.
    pub memory_downtime_ms: Summary,
    /// A move with the disk before the guest, in milliseconds.
    pub before_ms: Summary,
    /// For how long the guest stood still then.
    pub before_downtime_ms: Summary,
    /// Bytes that went over the link then, in 10^6 a second.
    pub before_mb_s: Summary,
    /// The same with the disk after it: until the guest runs at the target.
    pub with_disk_ms: Summary,
    /// From then until all of the disk is there, in milliseconds.
    pub rest_ms: Summary,
    /// Bytes of data that came in that time, in 10^6 a second.
    pub rest_mb_s: Summary,
    /// What was waited for each read of a cluster that was not there, in milliseconds: all of them, of all turns.
    pub read_ms: Summary,
}

/// Measures over `link`, so many times, in `work`.
pub fn measure(programs: &Programs, link: Link, work: &Path, turns: usize) -> Result<Relocation> {
    let [mut memory, mut memory_downtime, mut with_disk, mut rest, mut rate, mut reads] = [const { Vec::new() }; 6];
    let [mut before, mut before_downtime, mut before_rate] = [const { Vec::new() }; 3];
    let image = work.join("disk.raw");
    write_image(&image)?;
    for turn in 0..turns {
        let folder = work.join(turn.to_string());
        fs::create_dir_all(&folder)?;
        let stage = Stage { programs, wire: Wire::lay(link)?, image: &image, folder: &folder };
        let alone = stage.move_alone()?;
        memory.push(alone.total_ms);
        memory_downtime.push(alone.downtime_ms);
        let mirrored = stage.move_before()?;
        before.push(mirrored.total_ms);
        before_downtime.push(mirrored.downtime_ms);
        #[expect(clippy::cast_precision_loss, reason = "a disk and memory are far below 2^53 bytes")]
        before_rate.push(mirrored.bytes as f64 / 1e3 / mirrored.total_ms);
        let (took, came) = stage.move_with_disk()?;
        with_disk.push(took);
        rest.push(came.as_secs_f64() * 1e3);
        #[expect(clippy::cast_precision_loss, reason = "a disk's length is far below 2^53")]
        rate.push(DATA as f64 / 1e6 / came.as_secs_f64());
        reads.extend(stage.read_while_it_comes()?);
    }
    let sum = |values| Summary::of(values).context("There was no turn");
    Ok(Relocation {
        link,
        memory_ms: sum(memory)?,
        memory_downtime_ms: sum(memory_downtime)?,
        before_ms: sum(before)?,
        before_downtime_ms: sum(before_downtime)?,
        before_mb_s: sum(before_rate)?,
        with_disk_ms: sum(with_disk)?,
        rest_ms: sum(rest)?,
        rest_mb_s: sum(rate)?,
        read_ms: sum(reads)?,
    })
}

/// A disk with data in stretches, and holes between them.
fn write_image(path: &Path) -> Result<()> {
    let file = File::create(path)?;
    file.set_len(LENGTH)?;
    // No two pages are the same, and none can be made smaller.
    let mut chance = SplitMix(1);
    for at in starts() {
        let bytes: Vec<u8> = (0..STRETCH / 8).flat_map(|_| chance.next().to_le_bytes()).collect();
        file.write_all_at(&bytes, at)?;
    }
    Ok(())
}

/// Where stretches of data begin.
fn starts() -> impl Iterator<Item = u64> {
    let stretches = DATA / STRETCH;
    (0..stretches).map(move |stretch| LENGTH / stretches * stretch / STRETCH * STRETCH)
}

/// A move, by the source's account.
struct Moved {
    total_ms: f64,
    downtime_ms: f64,
    bytes: u64,
}

struct Stage<'a> {
    programs: &'a Programs,
    wire: Wire,
    image: &'a Path,
    folder: &'a Path,
}

impl Stage<'_> {
    fn at(&self, end: End, name: &str) -> Result<Context> {
        let work = self.folder.to_owned();
        let context = Context { godwit: self.programs.godwit.clone(), images: PathBuf::new(), work };
        context.within(name, &format!("exec {}", self.wire.prefix(end).join(" ")))
    }

    /// Moves a fresh guest; what that took, where it was, and where it is.
    fn make_move(&self, name: &str, place: &Path, options: &[String]) -> Result<(Moved, Godwit, Godwit)> {
        let disk = |path: &Path| format!("id=data,path={}", path.display());
        let (kernel, content) =
            (self.programs.kernel.display().to_string(), self.programs.content.display().to_string());
        let (memory, here) = (format!("{MEMORY_MIB}M"), disk(self.image));
        let machine = ["--kernel", &kernel, "--memory", &memory, "--initramfs", &content, "--cmdline", "ws=0 tick=10"];
        let machine = [&machine[..], &["--disk", &here]].concat();
        let source = Godwit::run(&self.at(End::Source, "godwit-at-source")?, &format!("{name}-source"), &machine)?;
        let address = format!("tcp://{}:0", self.wire.target_address());
        let there = self.at(End::Target, "godwit-at-target")?;
        let target = Godwit::receive_at(&there, &format!("{name}-target"), &address, &["--disk", &disk(place)])?;
        // It has looked at its memory by then.
        sleep(Duration::from_secs(1));
        let asker =
            Context { godwit: self.programs.godwit.clone(), images: PathBuf::new(), work: self.folder.to_owned() };
        let status = order(&asker, &source, &target, options)?;
        // The same file is the disk of the next guest.
        let _ = fs::remove_file(self.image.with_extension("raw.godwit-old"));
        let ms = |time| Duration::from(time).as_secs_f64() * 1e3;
        let downtime = status.downtime_ms.context("The source does not tell of the downtime")?;
        let moved =
            Moved { total_ms: ms(status.total_ms), downtime_ms: ms(downtime), bytes: status.progress.bytes_sent };
        Ok((moved, source, target))
    }

    fn move_alone(&self) -> Result<Moved> {
        let (took, _source, target) = self.make_move("alone", self.image, &[])?;
        target.end()?;
        Ok(took)
    }

    fn move_before(&self) -> Result<Moved> {
        let place = self.folder.join("before.raw");
        let (took, _source, target) = self.make_move("before", &place, &["--with-disks=before".to_owned()])?;
        target.end()?;
        fs::remove_file(place)?;
        Ok(took)
    }

    /// How long the move took, and from then on the disk.
    fn move_with_disk(&self) -> Result<(f64, Duration)> {
        let place = self.folder.join("there.raw");
        let (took, _lender, target) =
            self.make_move("after", &place, &["--with-disks".to_owned(), "after".to_owned()])?;
        let begun = Instant::now();
        await_whole(&target, COMES_WITHIN)?;
        let came = begun.elapsed();
        target.end()?;
        fs::remove_file(place)?;
        Ok((took.total_ms, came))
    }

    /// What was waited for each read of what was not there, in milliseconds.
    fn read_while_it_comes(&self) -> Result<Vec<f64>> {
        let mut command = self.wire.command(End::Source, &self.programs.godwit.display().to_string());
        command.args(["disk", "serve", "--read-only", "--listen", &format!("tcp://{}:0", self.wire.source_address())]);
        command.arg(format!("data={}", self.image.display())).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut server = Server(command.spawn().context("Cannot start godwit")?);
        let mut line = String::new();
        BufReader::new(server.0.stdout.take().context("Its output is piped")?).read_line(&mut line)?;
        let uri: NbdUri = line.trim().parse().with_context(|| format!("{line:?} is no export"))?;
        let (namespace, local) = (self.wire.namespace(End::Target)?, self.folder.join("read.raw"));
        let reader = spawn(move || -> Result<Vec<f64>> {
            // This thread, and those that it starts, are at the target from here on.
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            let waited = read(&uri, &local);
            let _ = fs::remove_file(&local);
            waited
        });
        reader.join().map_err(|_| anyhow!("The reader has panicked"))?
    }
}

/// Reads and writes at random while the disk at `uri` comes to the file `local`.
fn read(uri: &NbdUri, local: &Path) -> Result<Vec<f64>> {
    let base = Arc::new(NbdBackend::open(uri, NbdOptions::new(Access::ReadOnly))?);
    let disk = LayeredBackend::open(local, None, base, OnceWhole::Keep, FileOptions::new(Access::ReadWrite))?;
    disk.reacquire()?;
    let (tell, told) = channel();
    let puller = Puller::start(
        &disk,
        || {},
        move |pulled| {
            // Who has read enough does not listen any more.
            let _ = tell.send(pulled);
        },
    )?;
    let (mut one, mut chance, mut waited) = (Blocking::open(&disk)?, SplitMix(7), Vec::new());
    let places: Vec<u64> = starts().collect();
    while waited.len() < READS && told.try_recv().is_err() {
        let stretch = places[usize::try_from(chance.next() % places.len() as u64)?];
        let at = stretch + chance.next() % (STRETCH / 4096) * 4096;
        if chance.next() % 3 == 0 {
            one.write(at, &[1; 4096], Durability::Cached)?;
            continue;
        }
        let (before, begun) = (disk.missing().bytes(), Instant::now());
        one.read(at, &mut [0; 4096])?;
        let took = begun.elapsed();
        // What was there already took no way.
        if disk.missing().bytes() < before && took > Duration::from_millis(1) {
            waited.push(took.as_secs_f64() * 1e3);
        }
    }
    drop(puller);
    ensure!(!waited.is_empty(), "All of it was there before anything was read");
    Ok(waited)
}

/// `godwit disk serve`, killed when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
