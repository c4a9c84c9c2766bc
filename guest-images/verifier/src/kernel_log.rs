//! The kernel log mode: what Linux itself noticed.
//!
//! Reads `/dev/kmsg` (Linux Documentation/ABI/testing/dev-kmsg) from its beginning. What was there when the verifier
//! started is told apart from what came later: a guest may complain about its virtual hardware at boot, but not about
//! being moved.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::fault::Faults;
use crate::worker::Work;

const PERIOD: Duration = Duration::from_millis(200);
/// The longest record of the kernel (CONSOLE_EXT_LOG_MAX) with room to spare; a shorter buffer is answered by EINVAL.
const LONGEST_RECORD: usize = 16 << 10;

/// Words of which one in a message means trouble. Compared without regard to case.
const TROUBLE: &[&str] = &[
    "soft lockup",
    "hard lockup",
    "rcu: info:",
    "detected stall",
    "self-detected stall",
    "rcu_sched kthread",
    "rcu_preempt kthread",
    "marking clocksource",
    "marking tsc unstable",
    "clocksource watchdog",
    "time went backwards",
    "i/o error",
    "ext4-fs error",
    "ext4-fs warning",
    "blocked for more than",
    "netdev watchdog",
    "device needs reset",
    "is not a head!",
    "bug:",
    "warning: cpu",
    "oops:",
    "general protection",
    "kernel panic",
    "out of memory:",
];

/// What the kernel log mode found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelLogReport {
    /// Troubling messages since the verifier started.
    pub during: Faults,
    /// Troubling messages from before.
    pub before: Faults,
}

/// A reader of the kernel log.
#[derive(Debug)]
pub struct KernelLog {
    file: File,
    buffer: Vec<u8>,
    found: KernelLogReport,
}

impl KernelLog {
    /// Opens the log and reads what is in it already.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        let mut log = Self { file, buffer: vec![0; LONGEST_RECORD], found: KernelLogReport::default() };
        log.found.before = log.read_new();
        Ok(log)
    }

    /// Everything troubling since the reading before.
    fn read_new(&mut self) -> Faults {
        let mut faults = Faults::default();
        loop {
            match self.file.read(&mut self.buffer) {
                Ok(0) => return faults,
                Ok(bytes) => scan(&String::from_utf8_lossy(&self.buffer[..bytes]), &mut faults),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return faults,
                // Records were overwritten before they were read; the next read goes on behind them.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    faults.add(format!("the kernel log cannot be read: {error}"));
                    return faults;
                }
            }
        }
    }
}

impl Work for KernelLog {
    type Report = KernelLogReport;

    fn step(&mut self) -> Duration {
        let new = self.read_new();
        self.found.during.merge(new);
        PERIOD
    }

    fn report(&mut self) -> KernelLogReport {
        self.step();
        self.found.clone()
    }
}

/// Adds the troubling messages among the records in `text`.
fn scan(text: &str, faults: &mut Faults) {
    for line in text.lines() {
        if let Some(message) = message(line)
            && is_trouble(message)
        {
            faults.add(message);
        }
    }
}

/// The message of a record `PRIORITY,SEQUENCE,MICROSECONDS,FLAGS…;MESSAGE`. Lines that begin with a space belong to the
/// record before.
fn message(line: &str) -> Option<&str> {
    let (prefix, message) = line.split_once(';')?;
    let numbers = prefix.split(',').take(3).filter(|field| field.parse::<u64>().is_ok());
    (!line.starts_with(' ') && numbers.count() == 3).then_some(message)
}

/// Whether a message of the kernel, without its time, tells of trouble.
pub fn is_trouble(message: &str) -> bool {
    let message = message.to_ascii_lowercase();
    TROUBLE.iter().any(|words| message.contains(words))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn trouble_is_recognised() {
        for message in [
            "watchdog: BUG: soft lockup - CPU#1 stuck for 23s! [fio:311]",
            "rcu: INFO: rcu_preempt self-detected stall on CPU",
            "clocksource: timekeeping watchdog on CPU0: Marking clocksource 'tsc' as unstable because the skew is too large:",
            "I/O error, dev vda, sector 2048 op 0x1:(WRITE) flags 0x0",
            "Buffer I/O error on dev vda, logical block 1, lost async page write",
            "INFO: task jbd2/vda-8:120 blocked for more than 120 seconds.",
            "Oops: 0000 [#1] PREEMPT SMP NOPTI",
            "virtio_blk virtio0: output.0:id 5 is not a head!",
            "WARNING: CPU: 0 PID: 1 at kernel/time/timekeeping.c:1 x",
        ] {
            assert!(is_trouble(message), "{message}");
        }
    }

    #[test]
    fn everyday_messages_are_not_trouble() {
        for message in [
            "rcu: Preemptible hierarchical RCU implementation.",
            "clocksource: Switched to clocksource kvm-clock",
            "virtio_blk virtio1: [vda] 8388608 512-byte logical blocks (4.29 GB/4.00 GiB)",
            "EXT4-fs (vda): mounted filesystem with ordered data mode. Quota mode: none.",
            "random: crng init done",
            // The watchdog could not look because the machine was slow; what it finds when it looks is the line above.
            "clocksource: timekeeping watchdog on CPU0: kvm-clock wd-wd read-back delay of 114222ns",
            "tsc: Refined TSC clocksource calibration: 2599.999 MHz",
        ] {
            assert!(!is_trouble(message), "{message}");
        }
    }

    #[test]
    fn records_are_taken_apart() {
        assert_eq!(message("4,1234,99887766,-;BUG: x; y"), Some("BUG: x; y"));
        assert_eq!(message("4,1,2,-,caller=T1;x"), Some("x"));
        for other in [" SUBSYSTEM=block;BUG:", "no record", "a,b,c;x", ""] {
            assert_eq!(message(other), None);
        }
    }

    #[test]
    fn before_and_during_are_told_apart() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "4,1,10,-;BUG: at boot\n DEVICE=+x\n6,2,11,-;fine").unwrap();
        let mut log = KernelLog::open(file.path()).unwrap();
        assert!(log.report().during.none());
        writeln!(file, "6,3,12,-;still fine\n3,4,13,-;I/O error, dev vda").unwrap();
        log.step();
        let report = log.report();
        assert_eq!(report.before, Faults { count: 1, first: vec!["BUG: at boot".to_owned()] });
        assert_eq!(report.during, Faults { count: 1, first: vec!["I/O error, dev vda".to_owned()] });
    }

    #[test]
    fn a_log_that_cannot_be_read_is_a_fault() {
        KernelLog::open(Path::new("/nonexistent")).unwrap_err();
        // Reading a directory fails with EISDIR.
        let log = KernelLog::open(Path::new("/")).unwrap();
        assert_eq!(log.found.before.count, 1);
    }
}
