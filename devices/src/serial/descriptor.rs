//! Waiting for a descriptor that must not be switched to nonblocking, because others (the user's shell) share it.

#![expect(unsafe_code, reason = "poll has no safe wrapper here")]

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

/// How long output may wait for a reader before it is dropped. A vCPU waits with it.
const PATIENCE: Duration = Duration::from_millis(250);

/// Whether a read would return at once: there is input, or its end, or an error.
pub(super) fn is_readable(fd: BorrowedFd<'_>) -> bool {
    is_ready(fd, libc::POLLIN, Duration::ZERO)
}

fn is_ready(fd: BorrowedFd<'_>, events: libc::c_short, within: Duration) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    let milliseconds = libc::c_int::try_from(within.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: the kernel reads and writes one pollfd at the address, which is a local of that type; the descriptor is
    // borrowed, so it is open.
    unsafe { libc::poll(&raw mut poll, 1, milliseconds) == 1 }
}

/// Writes to a descriptor that may block, but waits for it only so long, and after one such wait no more until it takes
/// something again.
#[derive(Debug)]
pub(super) struct PatientWriter<F> {
    file: F,
    is_stuck: bool,
}

impl<F: AsFd + Write> PatientWriter<F> {
    pub(super) fn new(file: F) -> Self {
        Self { file, is_stuck: false }
    }
}

impl<F: AsFd + Write> Write for PatientWriter<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let patience = if self.is_stuck { Duration::ZERO } else { PATIENCE };
        self.is_stuck = !is_ready(self.file.as_fd(), libc::POLLOUT, patience);
        if self.is_stuck {
            return Err(io::Error::new(io::ErrorKind::WouldBlock, "the reader has stopped reading"));
        }
        // One byte always fits where there is room.
        self.file.write(bytes.get(..1).unwrap_or_default())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    #[test]
    fn a_stuck_reader_costs_one_wait_and_then_only_bytes() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut writer = PatientWriter::new(near);
        let mut taken = 0;
        while writer.write_all(b"x").is_ok() {
            taken += 1;
        }
        let started = Instant::now();
        for _ in 0..1000 {
            assert_eq!(writer.write_all(b"y").unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
        assert!(started.elapsed() < PATIENCE * 4, "it does not wait for each byte");
        let mut all = vec![0; taken];
        far.read_exact(&mut all).unwrap();
        assert!(all.iter().all(|byte| *byte == b'x'));
        writer.write_all(b"z").unwrap();
    }

    #[test]
    fn readable_is_known_without_reading() {
        let (near, mut far) = UnixStream::pair().unwrap();
        assert!(!is_readable(near.as_fd()));
        far.write_all(b"x").unwrap();
        assert!(is_readable(near.as_fd()));
        drop(far);
        assert!(is_readable(near.as_fd()));
    }
}
