//! A layered disk by the suite, over a base that is far, that fails, and that comes back; and through the end of its process.

use super::*;
use crate::backend::{Durability, Operation, Unmap};
use crate::blocking::Blocking;
use crate::conformance;
use crate::faulty::{Faults, FaultyBackend, reap_all};
use crate::lent::LentBackend;
use crate::memory::{Buffers, Scratch};
use crate::nbd::uri::Address;
use crate::{Export, Listener, NbdBackend, NbdOptions, NbdServer, ServerOptions};
use rustix::event::{PollFd, PollFlags, poll};
use std::sync::mpsc::channel;
use std::time::Duration;
use tempfile::TempDir;

const LENGTH: u64 = 40 * CLUSTER + 512 * 3;

struct Rig {
    folder: TempDir,
    base: Arc<FaultyBackend>,
    faults: Arc<Faults>,
}

fn pattern(offset: u64) -> u8 {
    u8::try_from(offset / 512 % 251 + 1).unwrap()
}

impl Rig {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("base.raw");
        let bytes: Vec<u8> = (0..LENGTH).map(pattern).collect();
        std::fs::write(&path, bytes).unwrap();
        let file = FileBackend::open(&path, FileOptions::new(Access::ReadOnly)).unwrap();
        let faults = Arc::new(Faults::default());
        let base = Arc::new(FaultyBackend::new(Arc::new(file), Arc::clone(&faults)));
        Self { folder, base, faults }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("local.raw")
    }

    fn open(&self) -> LayeredBackend {
        let base = Arc::clone(&self.base) as Arc<dyn Backend>;
        let options = FileOptions::new(Access::ReadWrite);
        let disk = LayeredBackend::open(&self.path(), Some([1; 16]), base, OnceWhole::Keep, options).unwrap();
        disk.reacquire().unwrap();
        disk.keep();
        disk
    }
}

fn read(disk: &LayeredBackend, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    Blocking::open(disk).unwrap().read(offset, &mut bytes).unwrap();
    bytes
}

/// Fetches all of a disk.
fn pull(disk: &LayeredBackend) {
    let (tell, told) = channel();
    let _puller = Puller::start(disk, || {}, move |pulled| tell.send(pulled).unwrap()).unwrap();
    assert_eq!(told.recv_timeout(Duration::from_secs(30)), Ok(Pulled::Whole));
    assert_eq!(told.recv_timeout(Duration::from_secs(30)), Ok(Pulled::Released));
}

#[test]
fn the_suite_while_clusters_come_and_when_they_are_there() {
    let rig = Rig::new();
    let disk = rig.open();
    conformance::holds(&disk);
    let disk = Rig::new();
    let disk = disk.open();
    let (tell, told) = channel();
    let _puller = Puller::start(&disk, || {}, move |pulled| tell.send(pulled).unwrap()).unwrap();
    conformance::holds(&disk);
    assert_eq!(told.recv_timeout(Duration::from_secs(30)), Ok(Pulled::Whole));
    conformance::holds(&disk);
}

#[test]
fn what_is_read_comes_once_and_what_is_written_never() {
    let rig = Rig::new();
    let disk = rig.open();
    assert_eq!(disk.missing().bytes(), LENGTH);
    assert_eq!(read(&disk, CLUSTER + 512, 512), [pattern(CLUSTER + 512); 512]);
    assert_eq!((disk.missing().bytes(), disk.fetched_bytes()), (LENGTH - CLUSTER, CLUSTER));
    read(&disk, CLUSTER, 1024);
    assert_eq!(disk.fetched_bytes(), CLUSTER, "it is here now");
    let mut one = Blocking::open(&disk).unwrap();
    one.write(2 * CLUSTER, &vec![9; usize::try_from(2 * CLUSTER).unwrap()], Durability::Cached).unwrap();
    one.write_zeroes(4 * CLUSTER, CLUSTER, Unmap::Allowed, Durability::Cached).unwrap();
    one.discard(5 * CLUSTER, CLUSTER).unwrap();
    assert_eq!(disk.fetched_bytes(), CLUSTER, "all of these clusters was written over");
    one.write(6 * CLUSTER + 512, &[8; 512], Durability::Cached).unwrap();
    assert_eq!(disk.fetched_bytes(), 2 * CLUSTER, "a part of this one was not");
    assert_eq!(read(&disk, 6 * CLUSTER, 512), [pattern(6 * CLUSTER); 512]);
    assert_eq!(read(&disk, 6 * CLUSTER + 512, 512), [8; 512]);
    assert_eq!(read(&disk, 3 * CLUSTER, 512), [9; 512]);
    assert_eq!(read(&disk, 4 * CLUSTER, 512), [0; 512]);
    let base = std::fs::read(rig.folder.path().join("base.raw")).unwrap();
    assert!(base.iter().zip(0..).all(|(byte, at)| *byte == pattern(at)), "the base is never written");
}

#[test]
fn a_pulled_disk_needs_its_base_no_more() {
    let rig = Rig::new();
    let disk = rig.open();
    Blocking::open(&disk).unwrap().write(CLUSTER + 512, &[7; 512], Durability::Cached).unwrap();
    pull(&disk);
    assert_eq!(disk.missing().bytes(), 0);
    drop(disk);
    assert!(!sidecar::path_of(&rig.path()).exists());
    let bytes = std::fs::read(rig.path()).unwrap();
    assert_eq!(bytes.len() as u64, LENGTH);
    for (byte, at) in bytes.iter().zip(0..) {
        let written = (CLUSTER + 512..CLUSTER + 1024).contains(&at);
        assert_eq!(*byte, if written { 7 } else { pattern(at) }, "{at}");
    }
}

#[test]
fn a_disk_grows_when_it_is_all_here() {
    let rig = Rig::new();
    let disk = rig.open();
    let told = disk.grow(2 * LENGTH).unwrap_err().to_string();
    assert!(told.contains("partly elsewhere"), "{told}");
    let mut one = Blocking::open(&disk).unwrap();
    pull(&disk);
    assert_eq!((disk.grow(2 * LENGTH).unwrap(), disk.geometry().capacity), (2 * LENGTH, 2 * LENGTH));
    one.write(2 * LENGTH - 512, &[6; 512], Durability::Cached).unwrap();
    one.flush().unwrap();
    assert_eq!(one.extents(0, 2 * LENGTH).unwrap().iter().map(|extent| extent.length).sum::<u64>(), 2 * LENGTH);
    assert_eq!(read(&disk, 2 * LENGTH - 512, 512), [6; 512]);
    assert!(one.read(2 * LENGTH, &mut [0; 512]).is_err());
}

#[test]
fn a_map_whose_file_is_gone_is_begun_anew() {
    let rig = Rig::new();
    let disk = rig.open();
    pull_some(&disk);
    drop(disk);
    std::fs::remove_file(rig.path()).unwrap();
    let disk = rig.open();
    assert_eq!(disk.missing().bytes(), LENGTH);
    let mut one = Blocking::open(&disk).unwrap();
    one.write(0, &[1; 512], Durability::Durable).unwrap();
    drop((one, disk));
    let disk = rig.open();
    assert_eq!(disk.missing().bytes(), LENGTH - CLUSTER, "what the old file had is not believed to be here");
    assert_eq!(read(&disk, 2 * CLUSTER, 512), [pattern(2 * CLUSTER); 512]);
}

/// Has some clusters come, and makes them durable.
fn pull_some(disk: &LayeredBackend) {
    let mut one = Blocking::open(disk).unwrap();
    one.read(CLUSTER, &mut vec![0; usize::try_from(3 * CLUSTER).unwrap()]).unwrap();
    one.flush().unwrap();
    assert_eq!(disk.missing().bytes(), LENGTH - 3 * CLUSTER);
}

/// The kernel tells of a lost write once: the next flush succeeds.
#[test]
fn what_a_flush_has_lost_is_never_said_to_be_here() {
    let rig = Rig::new();
    let disk = rig.open();
    let mut one = Blocking::open(&disk).unwrap();
    one.write(0, &[1; 512], Durability::Durable).unwrap();
    one.write(2 * CLUSTER, &[1; 512], Durability::Cached).unwrap();
    disk.shared.note_flush::<()>(Err(io::Error::other("no space"))).unwrap_err();
    let told = one.flush().unwrap_err().to_string();
    assert!(told.contains("has lost"), "{told}");
    let (tell, told) = channel();
    let puller = Puller::start(&disk, || {}, move |pulled| tell.send(pulled).unwrap()).unwrap();
    while disk.missing().bytes() > 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(puller);
    assert!(told.try_recv().is_err() && !disk.is_whole());
    drop((one, disk));
    assert_eq!(rig.open().missing().bytes(), LENGTH - CLUSTER);
}

#[test]
fn a_disk_that_is_too_long_takes_no_memory() {
    let rig = Rig::new();
    let base = Arc::new(Endless) as Arc<dyn Backend>;
    let options = FileOptions::new(Access::ReadWrite);
    let refused = LayeredBackend::open(&rig.path(), None, base, OnceWhole::Keep, options);
    assert!(matches!(refused, Err(LayeredError::TooLong { .. })));
    assert!(!is_partial(&rig.path()));
}

/// A disk of 2^62 bytes, as a server may say that it has one.
#[derive(Debug)]
struct Endless;

impl Backend for Endless {
    fn geometry(&self) -> Geometry {
        Geometry { capacity: 1 << 62, access: Access::ReadOnly, channels: 2 }
    }
    fn channel(&self) -> io::Result<Box<dyn Channel>> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn grow(&self, _: u64) -> io::Result<u64> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn is_held_by_channels(&self) -> bool {
        false
    }
    fn release(&self) {}
    fn reacquire(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Also one of what is on its way already; and one that the base has not answered when the disk is whole is answered here.
#[test]
fn a_short_read_is_answered_by_the_base_while_the_rest_comes() {
    let rig = Rig::new();
    let disk = rig.open();
    let (tell, told) = channel();
    rig.faults.hold_reads(true);
    let puller = Puller::start(&disk, || {}, move |pulled| tell.send(pulled).unwrap()).unwrap();
    let mut queue = disk.channel().unwrap();
    let scratch = Scratch::new(512);
    queue.submit(7, Operation::Read { offset: CLUSTER + 512, into: Buffers::of(&scratch) });
    queue.commit();
    let mut done = Vec::new();
    queue.reap(&mut done);
    assert!(done.is_empty() && disk.missing().bytes() == LENGTH);
    rig.faults.hold_reads(false);
    assert_eq!(told.recv_timeout(Duration::from_secs(30)), Ok(Pulled::Whole));
    let done = reap_all(&mut *queue);
    assert!(done.len() == 1 && done[0].tag == 7 && done[0].outcome.is_ok());
    drop(puller);
    assert_eq!(read(&disk, CLUSTER + 512, 512), [pattern(CLUSTER + 512); 512]);
    drop(queue);
    let mut scratch = scratch;
    assert_eq!(scratch.bytes().unwrap(), [pattern(CLUSTER + 512); 512]);
}

#[test]
fn a_base_that_fails_loses_nothing_and_is_tried_again() {
    let rig = Rig::new();
    let disk = rig.open();
    rig.faults.fail_reads(3);
    let mut one = Blocking::open(&disk).unwrap();
    assert!(one.read(0, &mut [0; 512]).is_err());
    assert!(one.write(512, &[1; 512], Durability::Cached).is_err(), "the rest of the cluster is not to be had");
    one.write(CLUSTER, &vec![2; usize::try_from(CLUSTER).unwrap()], Durability::Cached).unwrap();
    drop(one);
    pull(&disk);
    assert_eq!((read(&disk, 512, 512), read(&disk, CLUSTER, 512)), (vec![pattern(512); 512], vec![2; 512]));
}

#[test]
fn what_was_flushed_is_there_after_the_end_of_the_process() {
    let rig = Rig::new();
    let disk = rig.open();
    let mut one = Blocking::open(&disk).unwrap();
    one.write(512, &[1; 512], Durability::Cached).unwrap();
    one.flush().unwrap();
    one.write(2 * CLUSTER + 512, &[2; 512], Durability::Durable).unwrap();
    // Nothing says that this one is here when the process ends.
    one.write(4 * CLUSTER + 512, &[3; 512], Durability::Cached).unwrap();
    drop((one, disk));
    let disk = rig.open();
    assert_eq!(disk.missing().bytes(), LENGTH - 2 * CLUSTER);
    assert_eq!((read(&disk, 0, 512), read(&disk, 512, 512)), (vec![pattern(0); 512], vec![1; 512]));
    assert_eq!(read(&disk, 2 * CLUSTER + 512, 512), [2; 512]);
    assert_eq!(read(&disk, 4 * CLUSTER + 512, 512), [pattern(4 * CLUSTER + 512); 512]);
}

#[test]
fn channels_wait_for_each_other() {
    let rig = Rig::new();
    let disk = rig.open();
    rig.faults.hold_reads(true);
    let mut channels = [disk.channel().unwrap(), disk.channel().unwrap()];
    let scratch: Vec<_> = (0..2).map(|_| Scratch::new(1024)).collect();
    for (channel, scratch) in channels.iter_mut().zip(&scratch) {
        channel.submit(7, Operation::Read { offset: CLUSTER - 512, into: Buffers::of(scratch) });
        channel.commit();
        let mut done = Vec::new();
        channel.reap(&mut done);
        assert!(done.is_empty());
    }
    rig.faults.hold_reads(false);
    for channel in &mut channels {
        reap_all(&mut **channel).into_iter().for_each(|completion| drop(completion.outcome.unwrap()));
    }
    for mut scratch in scratch {
        let expected = [[pattern(CLUSTER - 512); 512], [pattern(CLUSTER); 512]].concat();
        assert_eq!(scratch.bytes().unwrap(), expected);
    }
    assert_eq!(disk.fetched_bytes(), 2 * CLUSTER, "each came once");
}

#[test]
fn a_channel_that_ends_gives_up_its_claims() {
    let rig = Rig::new();
    let disk = rig.open();
    rig.faults.hold_reads(true);
    let mut channel = disk.channel().unwrap();
    let scratch = Scratch::new(512);
    channel.submit(0, Operation::Read { offset: 0, into: Buffers::of(&scratch) });
    channel.commit();
    drop(channel);
    rig.faults.hold_reads(false);
    assert_eq!(read(&disk, 0, 512), [pattern(0); 512]);
}

#[test]
fn a_disk_that_nobody_kept_leaves_nothing_behind_and_one_that_was_there_stays() {
    let rig = Rig::new();
    let open = || {
        let base = Arc::clone(&rig.base) as Arc<dyn Backend>;
        let options = FileOptions::new(Access::ReadWrite);
        LayeredBackend::open(&rig.path(), Some([1; 16]), base, OnceWhole::Keep, options).unwrap()
    };
    let disk = open();
    assert!(rig.path().exists() && is_partial(&rig.path()));
    drop(disk);
    assert!(!rig.path().exists() && !is_partial(&rig.path()));
    drop(rig.open());
    drop(open());
    assert!(rig.path().exists() && is_partial(&rig.path()));
}

#[test]
fn a_lent_base_is_given_up_when_all_is_here_and_left_by_all() {
    let rig = Rig::new();
    let (freed, free) = channel();
    let lent: Arc<dyn Backend> =
        Arc::new(LentBackend::new(Arc::clone(&rig.base) as _, move || freed.send(()).unwrap()));
    let options = FileOptions::new(Access::ReadWrite);
    let disk = LayeredBackend::open(&rig.path(), Some([1; 16]), lent, OnceWhole::GiveUp, options).unwrap();
    disk.reacquire().unwrap();
    disk.keep();
    let mut idle = disk.channel().unwrap();
    assert!(!disk.is_whole());
    pull(&disk);
    free.try_recv().unwrap();
    assert!(disk.is_whole());
    poll(&mut [PollFd::from_borrowed_fd(idle.event(), PollFlags::IN)], None).unwrap();
    idle.reap(&mut Vec::new());
    assert_eq!(rig.faults.channels(), 0, "nobody is connected to it");
    assert_eq!(read(&disk, CLUSTER, 512), [pattern(CLUSTER); 512]);
}

#[test]
fn a_lent_disk_comes_over_nbd_and_its_server_is_left() {
    let rig = Rig::new();
    let (freed, free) = channel();
    let path = rig.folder.path().join("base.raw");
    let file = FileBackend::open_unlocked(&path, FileOptions::new(Access::ReadOnly)).unwrap();
    let lent = Arc::new(LentBackend::new(Arc::new(file), move || freed.send(()).unwrap()));
    let listener = Listener::bind(&Address::Unix(rig.folder.path().join("s"))).unwrap();
    let export = Export {
        name: "key/data".into(),
        description: String::new(),
        backend: Arc::clone(&lent) as _,
        access: Access::ReadWrite,
    };
    let server = NbdServer::start(vec![listener], vec![export], ServerOptions::default()).unwrap();
    let uri = format!("nbd+unix:///key/data?socket={}", rig.folder.path().join("s").display()).parse().unwrap();
    let base = Arc::new(NbdBackend::open_unlocked(&uri, NbdOptions::new(Access::ReadWrite)).unwrap());
    let options = FileOptions::new(Access::ReadWrite);
    let disk = LayeredBackend::open(&rig.path(), None, base, OnceWhole::GiveUp, options).unwrap();
    assert!(disk.is_held_by_channels());
    disk.keep();
    // The rig's own reader is in the writer's way.
    rig.base.release();
    let writer = FileBackend::open(&path, FileOptions::new(Access::ReadWrite)).unwrap();
    assert!(disk.reacquire().is_err(), "its owner has not released it");
    writer.release();
    disk.reacquire().unwrap();
    let mut queue = disk.channel().unwrap();
    assert_eq!(read(&disk, CLUSTER, 512), [pattern(CLUSTER); 512]);
    pull(&disk);
    free.try_recv().unwrap();
    queue.reap(&mut Vec::new());
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while server.clients() > 0 {
        assert!(std::time::Instant::now() < deadline, "{} clients are left", server.clients());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(writer.reacquire().is_err(), "it is lent");
    lent.end();
    writer.reacquire().unwrap();
    let bytes = std::fs::read(rig.folder.path().join("local.raw")).unwrap();
    assert!(bytes.iter().zip(0..).all(|(byte, at)| *byte == pattern(at)));
}

#[test]
fn what_is_in_the_way_is_named() {
    let rig = Rig::new();
    let open = |identity| {
        let base = Arc::clone(&rig.base) as Arc<dyn Backend>;
        let options = FileOptions::new(Access::ReadWrite);
        let opened = LayeredBackend::open(&rig.path(), identity, base, OnceWhole::Keep, options);
        opened.inspect(LayeredBackend::keep)
    };
    std::fs::write(rig.path(), [0; 512]).unwrap();
    assert!(open(Some([1; 16])).unwrap_err().to_string().contains("is there already"));
    std::fs::remove_file(rig.path()).unwrap();
    drop(open(Some([1; 16])).unwrap());
    drop(open(None).unwrap());
    assert!(open(Some([2; 16])).unwrap_err().to_string().contains("another identity"));
    std::fs::write(rig.path(), [0; 512]).unwrap();
    assert!(open(Some([1; 16])).unwrap_err().to_string().contains("is 512 bytes long, and the disk is"));
    let folder = rig.folder.path().join("no/such/folder/disk");
    let base = Arc::clone(&rig.base) as Arc<dyn Backend>;
    let options = FileOptions::new(Access::ReadWrite);
    assert!(matches!(
        LayeredBackend::open(&folder, Some([1; 16]), base, OnceWhole::Keep, options),
        Err(LayeredError::Sidecar(_))
    ));
}
