//! What TCP is told about a connection that carries a guest.
//!
//! - **Buffers.** A stream is as fast as one round trip's worth of bytes can be under way, and Linux lets a socket's buffers
//!   grow up to a limit meant for many sockets (`tcp_wmem`, `tcp_rmem`; tcp(7)). Over a long way that is less than a fast link
//!   holds, so the source asks for more by the round trip that connecting took, and the target asks before anybody
//!   connects, since the window's scale is agreed upon then. Only a process with `CAP_NET_ADMIN` gets more; others have what
//!   the host's administrator allows, and `--streams`.
//! - **Not yet sent.** What waits in the buffer without being under way only makes the last pages of a guest late, so no more
//!   of it is let in than keeps the link busy (`TCP_NOTSENT_LOWAT`), however large the buffer is.
//! - **Small frames.** The hand-over is a conversation: each frame leaves at once (`TCP_NODELAY`).

#![expect(unsafe_code, reason = "the standard library does not have these socket options")]

use std::fs;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

/// The fastest link that buffers are made for, in bytes a second: 10 Gbit/s.
const FASTEST: u64 = 1_250_000_000;

/// The most that is asked for, in bytes. Twice what a link holds is needed: about half of a buffer is the kernel's own.
const MAX_BUFFER: u64 = 64 << 20;

/// What the target asks for, which does not know how far away sources are: 10 Gbit/s over 10 ms, 1 Gbit/s over 100 ms.
const TARGET_BUFFER: u64 = 32 << 20;

/// Bytes that may wait in the source's buffer: 1 ms of 10 Gbit/s.
const NOT_YET_SENT: u64 = 1 << 20;

/// Prepares the source's end of a connection. `congestion` is the name of the algorithm, the host's usual one if absent.
///
/// # Errors
/// The host's refusal, of the algorithm if that was named: `ENOENT` if it has none of that name, `EPERM` if not everybody
/// may use it.
pub(super) fn prepare_source(stream: &TcpStream, congestion: Option<&str>) -> io::Result<()> {
    let fd = stream.as_raw_fd();
    if let Some(name) = congestion {
        set(fd, libc::IPPROTO_TCP, libc::TCP_CONGESTION, name.as_bytes())?;
    }
    set(fd, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, &int(NOT_YET_SENT))?;
    let wanted = round_trip(fd).map_or(0, buffer_for);
    if wanted > grows_to("tcp_wmem") {
        enlarge(fd, libc::SO_SNDBUFFORCE, wanted);
    }
    Ok(())
}

/// Prepares the place where sources connect.
pub(super) fn prepare_target(listener: &TcpListener) {
    if TARGET_BUFFER > grows_to("tcp_rmem") {
        enlarge(listener.as_raw_fd(), libc::SO_RCVBUFFORCE, TARGET_BUFFER);
    }
}

/// The congestion control algorithms that this host has, as it lists them.
pub(super) fn congestion_controls() -> String {
    let list = fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control").unwrap_or_default();
    list.split_whitespace().collect::<Vec<_>>().join(", ")
}

/// The time a byte and its acknowledgement need, lately (`TCP_INFO`).
pub(super) fn round_trip(fd: RawFd) -> Option<Duration> {
    let mut info: libc::tcp_info = {
        // SAFETY: the structure is plain integers, for which zeros are values.
        unsafe { std::mem::zeroed() }
    };
    let mut length = libc::socklen_t::try_from(size_of_val(&info)).expect("the structure has 200 bytes or so");
    // SAFETY: the pointer is to a structure of the given length, which the kernel fills up to that.
    let answer =
        unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, (&raw mut info).cast(), &raw mut length) };
    (answer == 0 && info.tcpi_rtt > 0).then(|| Duration::from_micros(info.tcpi_rtt.into()))
}

/// Twice what the fastest link holds over a way of this length, in bytes.
fn buffer_for(round_trip: Duration) -> u64 {
    let micros = u64::try_from(round_trip.as_micros()).unwrap_or(u64::MAX);
    (micros.saturating_mul(2).saturating_mul(FASTEST / 1_000_000)).min(MAX_BUFFER)
}

/// Up to how many bytes Linux lets a buffer grow by itself.
fn grows_to(setting: &str) -> u64 {
    let limits = fs::read_to_string(format!("/proc/sys/net/ipv4/{setting}")).unwrap_or_default();
    limits.split_whitespace().nth(2).and_then(|limit| limit.parse().ok()).unwrap_or(0)
}

fn enlarge(fd: RawFd, option: libc::c_int, bytes: u64) {
    if let Err(error) = set(fd, libc::SOL_SOCKET, option, &int(bytes)) {
        tracing::debug!(%error, bytes, "a socket keeps the buffer that the host gives it");
    }
}

fn int(value: u64) -> [u8; 4] {
    i32::try_from(value).unwrap_or(i32::MAX).to_ne_bytes()
}

fn set(fd: RawFd, level: libc::c_int, option: libc::c_int, value: &[u8]) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the pointer is to `length` bytes, which the kernel only reads.
    match unsafe { libc::setsockopt(fd, level, option, value.as_ptr().cast(), length) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        prepare_target(&listener);
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    #[test]
    fn buffers_grow_with_the_way_up_to_a_bound() {
        assert_eq!(buffer_for(Duration::ZERO), 0);
        assert_eq!(buffer_for(Duration::from_millis(4)), 10_000_000);
        assert_eq!(buffer_for(Duration::from_millis(64)), MAX_BUFFER);
        assert_eq!(buffer_for(Duration::MAX), MAX_BUFFER);
        assert!(grows_to("tcp_wmem") >= 4096 && grows_to("no_such_setting") == 0);
    }

    #[test]
    fn an_algorithm_is_one_that_the_host_has() {
        let (near, _far) = pair();
        prepare_source(&near, None).unwrap();
        prepare_source(&near, Some("reno")).unwrap();
        for wrong in ["nosuch", "", "a name that is longer than any"] {
            let error = prepare_source(&near, Some(wrong)).unwrap_err();
            assert!(matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)), "{wrong}: {error}");
        }
        assert!(congestion_controls().contains("reno"), "every Linux has it");
    }

    #[test]
    fn connections_know_their_round_trip() {
        let (near, _far) = pair();
        assert!(round_trip(near.as_raw_fd()).unwrap() < Duration::from_secs(1));
        assert_eq!(round_trip(fs::File::open("/dev/null").unwrap().as_raw_fd()), None);
    }
}
