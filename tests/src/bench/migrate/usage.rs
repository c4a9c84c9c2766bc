//! What two processes take while a guest moves from one to the other: processor time and memory, looked at from outside.
//!
//! The time of vCPU threads is left out: the micro guest works all the time, which says nothing of who moves it. What a
//! process needs to end is left out where it has ended before the last look.

use std::collections::BTreeMap;
use std::fs;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Result, anyhow};

/// How often to look: rarely enough to cost a percent of a processor at most.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What both processes took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Usage {
    /// Processor seconds of both together, without vCPUs.
    pub(super) cpu_s: f64,
    /// The most memory that either of them had resident beside memory files, which guest memory is, in MiB.
    pub(super) memory_mib: f64,
}

/// A thread that looks.
#[derive(Debug)]
pub(super) struct Watch {
    stop: Sender<()>,
    thread: JoinHandle<[Seen; 2]>,
}

impl Watch {
    /// Begins to look at two processes.
    pub(super) fn begin(pids: [u32; 2]) -> Result<Self> {
        let (stop, stopped) = channel();
        let mut seen = pids.map(Seen::begin);
        let look = move || {
            while stopped.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
                seen.iter_mut().for_each(Seen::look);
            }
            seen.iter_mut().for_each(Seen::look);
            seen
        };
        Ok(Self { stop, thread: thread::Builder::new().name("usage".to_owned()).spawn(look)? })
    }

    /// Ends the looking.
    pub(super) fn end(self) -> Result<Usage> {
        drop(self.stop);
        let seen = self.thread.join().map_err(|_| anyhow!("The thread that watches processes has panicked"))?;
        let ticks: u64 = seen.iter().map(Seen::ticks).sum();
        let kib = seen.iter().map(|seen| seen.most_kib).max().unwrap_or(0);
        #[expect(clippy::cast_precision_loss, reason = "2^53 ticks are longer than any bench")]
        let (cpu_s, memory_mib) = (ticks as f64 / rustix::param::clock_ticks_per_second() as f64, kib as f64 / 1024.0);
        Ok(Usage { cpu_s, memory_mib })
    }
}

/// What was seen of one process; times are in clock ticks.
#[derive(Debug)]
struct Seen {
    pid: u32,
    first: Ticks,
    last: Ticks,
    most_kib: u64,
}

/// Processor time at some moment.
#[derive(Debug, Clone, Default)]
struct Ticks {
    process: u64,
    /// By thread. One that has ended stays, because the process still counts it.
    vcpus: BTreeMap<u32, u64>,
}

impl Seen {
    fn begin(pid: u32) -> Self {
        let mut seen = Self { pid, first: Ticks::default(), last: Ticks::default(), most_kib: 0 };
        seen.look();
        seen.first = seen.last.clone();
        seen
    }

    /// What cannot be read belongs to a process that has ended; what was seen before stays.
    fn look(&mut self) {
        let own = format!("/proc/{}", self.pid);
        let Some(process) = fs::read_to_string(format!("{own}/stat")).ok().and_then(|stat| Stat::parse(&stat)) else {
            return;
        };
        let kib = fs::read_to_string(format!("{own}/status")).map_or(0, |status| own_kib(&status));
        self.most_kib = self.most_kib.max(kib);
        self.last.vcpus.extend(vcpus(self.pid).map(|thread| (thread.id, thread.ticks)));
        self.last.process = process.ticks;
    }

    fn ticks(&self) -> u64 {
        let vcpus = |ticks: &Ticks| ticks.vcpus.values().sum::<u64>();
        let passed = self.last.process.saturating_sub(self.first.process);
        passed.saturating_sub(vcpus(&self.last).saturating_sub(vcpus(&self.first)))
    }
}

/// The threads of a VMM that are vCPUs.
pub(super) fn vcpu_threads(pid: u32) -> Vec<u32> {
    vcpus(pid).map(|thread| thread.id).collect()
}

fn vcpus(pid: u32) -> impl Iterator<Item = Stat> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let stat = |thread: fs::DirEntry| Stat::parse(&fs::read_to_string(thread.path().join("stat")).ok()?);
    threads.filter_map(stat).filter(Stat::is_vcpu)
}

/// The beginning of `/proc/PID/stat`, of a process or a thread.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    id: u32,
    name: String,
    /// In user mode, which guests count as, and in the kernel.
    ticks: u64,
}

impl Stat {
    /// Number, name in parentheses (which may hold anything), and fields 14 and 15 (proc(5)).
    fn parse(stat: &str) -> Option<Self> {
        let (id, rest) = stat.split_once(" (")?;
        let (name, rest) = rest.rsplit_once(") ")?;
        // The state, which follows, is field 3.
        let mut times = rest.split(' ').skip(14 - 3);
        let (user, system): (u64, u64) = (times.next()?.parse().ok()?, times.next()?.parse().ok()?);
        Some(Self { id: id.parse().ok()?, name: name.to_owned(), ticks: user + system })
    }

    /// By the names that Godwit gives them, and QEMU with `debug-threads=on`.
    fn is_vcpu(&self) -> bool {
        self.name.starts_with("vcpu") || self.name.ends_with("/KVM")
    }
}

/// Resident memory that is neither a memory file nor another piece of tmpfs (proc(5), `/proc/PID/status`).
fn own_kib(status: &str) -> u64 {
    let kib = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name))?;
        value.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    };
    ["RssAnon:", "RssFile:"].into_iter().filter_map(kib).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_and_threads_are_read() {
        let stat = "7 (CPU 0/KVM) S 1 7 7 0 -1 4 10 0 0 0 25 17 0 0 20 0 3 0 99 1 2";
        let parsed = Stat::parse(stat).unwrap();
        assert_eq!(parsed, Stat { id: 7, name: "CPU 0/KVM".to_owned(), ticks: 42 });
        assert!(parsed.is_vcpu() && Stat { name: "vcpu3".to_owned(), ..parsed }.is_vcpu());
        assert_eq!(Stat::parse("7 (x) S 1"), None);
        assert_eq!(own_kib("RssAnon:\t     100 kB\nRssFile:\t 11 kB\nRssShmem:\t 1048576 kB\n"), 111);
    }

    #[test]
    fn vcpus_do_not_count() {
        let ticks = |process, vcpu| Ticks { process, vcpus: BTreeMap::from([(8, vcpu)]) };
        let seen = Seen { pid: 7, first: ticks(100, 60), last: ticks(150, 95), most_kib: 0 };
        assert_eq!(seen.ticks(), 15);
        let target = Seen { pid: 7, first: Ticks::default(), last: ticks(20, 15), most_kib: 0 };
        assert_eq!(target.ticks(), 5);
    }

    #[test]
    fn this_process_is_seen() {
        let own = std::process::id();
        let usage = Watch::begin([own, own]).unwrap().end().unwrap();
        assert!(usage.memory_mib > 0.1 && usage.cpu_s >= 0.0, "{usage:?}");
    }
}
