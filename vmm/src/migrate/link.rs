//! The [`Link`] of the migration engine over a TCP or Unix socket.
//!
//! The one place where guest pages meet a socket: the kernel gathers them from guest memory and scatters them into it, so
//! they are not copied in user space. The descriptor is blocking, every transfer asks not to block, and what would block
//! waits in `poll`, which is where patience is kept: it counts from the last byte that moved.

#![expect(unsafe_code, reason = "scatter and gather I/O on guest memory takes raw pointers")]

use super::handle::{self, Came};
use super::tcp;
use migration::{Cutter, Link, LinkError};
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vm_memory::VolatileSlice;

/// The most buffers that one gathering call of Linux takes (`UIO_MAXIOV`).
const MAX_BUFFERS: usize = 1024;

/// Patience until the engine sets its own.
const FIRST_PATIENCE: Duration = Duration::from_secs(10);

/// One connected stream socket.
#[derive(Debug)]
pub struct SocketLink {
    socket: OwnedFd,
    tcp: bool,
    same_host: bool,
    patience: Duration,
}

impl From<UnixStream> for SocketLink {
    fn from(stream: UnixStream) -> Self {
        Self { socket: stream.into(), tcp: false, same_host: true, patience: FIRST_PATIENCE }
    }
}

impl TryFrom<TcpStream> for SocketLink {
    type Error = io::Error;

    fn try_from(stream: TcpStream) -> io::Result<Self> {
        // The hand-over is a conversation of small frames: each must leave at once.
        stream.set_nodelay(true)?;
        // Who connects to an address of its own host does so from that address.
        let same_host = stream.local_addr()?.ip() == stream.peer_addr()?.ip();
        Ok(Self { socket: stream.into(), tcp: true, same_host, patience: FIRST_PATIENCE })
    }
}

/// What a transfer does with its buffers.
#[derive(Debug, Clone, Copy)]
enum Direction {
    Send,
    Receive,
}

impl SocketLink {
    /// Moves all bytes of `buffers`, which it uses up.
    ///
    /// # Safety
    /// Every buffer must be valid memory for the length of the call: for reads if `direction` is `Send`, else for
    /// writes.
    unsafe fn transfer(&self, direction: Direction, buffers: &mut [libc::iovec]) -> Result<(), LinkError> {
        let mut rest = skip(buffers, 0);
        while !rest.is_empty() {
            let mut message: libc::msghdr = {
                // SAFETY: all zeros is a message header without address, buffers and control data.
                unsafe { std::mem::zeroed() }
            };
            message.msg_iov = rest.as_mut_ptr();
            message.msg_iovlen = rest.len().min(MAX_BUFFERS);
            let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
            let fd = self.socket.as_raw_fd();
            let moved = match direction {
                // SAFETY: the header names buffers that the caller vouches for.
                Direction::Send => unsafe { libc::sendmsg(fd, &raw const message, flags) },
                // SAFETY: the header names buffers that the caller vouches for.
                Direction::Receive => unsafe { libc::recvmsg(fd, &raw mut message, flags) },
            };
            match usize::try_from(moved) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(moved) => rest = skip(rest, moved),
                Err(_) => self.after_error(direction, io::Error::last_os_error())?,
            }
        }
        Ok(())
    }

    /// Waits where the socket was not ready, and gives every other error back.
    fn after_error(&self, direction: Direction, error: io::Error) -> Result<(), LinkError> {
        match error.raw_os_error() {
            Some(libc::EINTR) => Ok(()),
            Some(libc::EAGAIN) => {
                let events = match direction {
                    Direction::Send => libc::POLLOUT,
                    Direction::Receive => libc::POLLIN,
                };
                match self.poll(events, self.patience)? {
                    true => Ok(()),
                    false => Err(LinkError::TimedOut { limit: self.patience }),
                }
            }
            Some(libc::ECONNRESET | libc::EPIPE) => Err(LinkError::Closed),
            _ => Err(LinkError::Io(error)),
        }
    }

    fn poll(&self, events: libc::c_short, limit: Duration) -> io::Result<bool> {
        Ok(poll([(self.socket.as_raw_fd(), events)], limit)?[0])
    }
}

/// Ends the connection of a link that another thread may be waiting on.
#[derive(Debug)]
pub struct SocketCutter {
    socket: OwnedFd,
}

impl Cutter for SocketCutter {
    fn cut(&self) {
        // SAFETY: shutdown works on the descriptor, which is open, and on no memory. It fails only where the connection
        // has ended already.
        unsafe { libc::shutdown(self.socket.as_raw_fd(), libc::SHUT_RDWR) };
    }
}

/// Waits until one of the descriptors has one of its events, for at most `limit`; which of them do.
pub(super) fn poll<const N: usize>(descriptors: [(RawFd, libc::c_short); N], limit: Duration) -> io::Result<[bool; N]> {
    let mut polled = descriptors.map(|(fd, events)| libc::pollfd { fd, events, revents: 0 });
    let end = Instant::now().checked_add(limit);
    loop {
        let left = end.map_or(limit, |end| end.saturating_duration_since(Instant::now()));
        // Rounded up, so that a wait of half a millisecond is not a busy loop.
        let ms = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        // SAFETY: an array of N descriptors that lives for the call.
        match unsafe { libc::poll(polled.as_mut_ptr(), N as libc::nfds_t, ms) } {
            answer if answer >= 0 => return Ok(polled.map(|descriptor| descriptor.revents != 0)),
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

/// What is left of `buffers` after `moved` bytes, without empty ones at its start.
fn skip(mut buffers: &mut [libc::iovec], mut moved: usize) -> &mut [libc::iovec] {
    while let Some(first) = buffers.first_mut() {
        if moved < first.iov_len {
            first.iov_base = first.iov_base.wrapping_byte_add(moved);
            first.iov_len -= moved;
            break;
        }
        moved -= first.iov_len;
        buffers = &mut buffers[1..];
    }
    buffers
}

fn buffer_of(slice: &VolatileSlice<'_>) -> libc::iovec {
    libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() }
}

impl Link for SocketLink {
    type Cutter = SocketCutter;
    type Handle = OwnedFd;

    fn cutter(&self) -> io::Result<SocketCutter> {
        Ok(SocketCutter { socket: self.socket.try_clone()? })
    }

    fn send(&mut self, head: &[u8], payload: &[VolatileSlice<'_>]) -> Result<(), LinkError> {
        let head = libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() };
        let mut buffers: Vec<_> = std::iter::once(head).chain(payload.iter().map(buffer_of)).collect();
        // SAFETY: the slices borrow their memory for as long as this call; sending only reads it.
        unsafe { self.transfer(Direction::Send, &mut buffers) }
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<(), LinkError> {
        let mut buffers = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }];
        // SAFETY: the buffer is borrowed mutably for as long as this call.
        unsafe { self.transfer(Direction::Receive, &mut buffers) }
    }

    fn receive_pages(&mut self, slices: &[VolatileSlice<'_>]) -> Result<(), LinkError> {
        let mut buffers: Vec<_> = slices.iter().map(buffer_of).collect();
        // SAFETY: volatile slices are writable guest memory, borrowed for as long as this call, and nobody has Rust
        // references into it.
        unsafe { self.transfer(Direction::Receive, &mut buffers) }
    }

    fn carries_handles(&self) -> bool {
        !self.tcp
    }

    fn send_handle(&mut self, handle: &OwnedFd) -> Result<(), LinkError> {
        loop {
            match handle::send(self.socket.as_fd(), handle.as_fd()) {
                Ok(()) => return Ok(()),
                Err(error) => self.after_error(Direction::Send, error)?,
            }
        }
    }

    fn receive_handle(&mut self) -> Result<Option<OwnedFd>, LinkError> {
        loop {
            match handle::receive(self.socket.as_fd()) {
                Ok(Came::File(file)) => return Ok(Some(file)),
                Ok(Came::NoFile) => return Ok(None),
                Ok(Came::End) => return Err(LinkError::Closed),
                Err(error) => self.after_error(Direction::Receive, error)?,
            }
        }
    }

    fn wait(&mut self, limit: Duration) -> Result<bool, LinkError> {
        Ok(self.poll(libc::POLLIN, limit)?)
    }

    fn set_patience(&mut self, limit: Duration) {
        self.patience = limit;
    }

    fn round_trip(&self) -> Option<Duration> {
        if self.tcp { tcp::round_trip(self.socket.as_raw_fd()) } else { None }
    }

    fn same_host(&self) -> bool {
        self.same_host
    }

    fn in_flight(&self) -> u64 {
        let mut bytes: libc::c_int = 0;
        // SAFETY: SIOCOUTQ (the same number as TIOCOUTQ; tcp(7), unix(7)) writes one int.
        let answer = unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
        if answer == 0 { u64::try_from(bytes).unwrap_or(0) } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn unix_pair() -> (SocketLink, SocketLink) {
        let (a, b) = UnixStream::pair().unwrap();
        (a.into(), b.into())
    }

    fn tcp_pair() -> (SocketLink, SocketLink) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (b, _) = listener.accept().unwrap();
        (a.try_into().unwrap(), b.try_into().unwrap())
    }

    fn slices(memory: &mut [u8], length: usize) -> Vec<VolatileSlice<'_>> {
        memory.chunks_mut(length).map(VolatileSlice::from).collect()
    }

    /// Far more than a socket buffers, in more pieces than one call takes: both ends see partial transfers.
    #[test]
    fn bytes_arrive_whole_and_in_order() {
        for (mut near, mut far) in [unix_pair(), tcp_pair()] {
            let mut sent: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
            let expected = sent.clone();
            let sender = std::thread::spawn(move || near.send(b"head", &slices(&mut sent, 1000)).map(|()| near));
            let mut head = [0; 4];
            far.receive(&mut head).unwrap();
            let mut received = vec![0; expected.len()];
            far.receive_pages(&slices(&mut received, 777)).unwrap();
            assert_eq!(&head, b"head");
            assert!(received == expected);
            drop(sender.join().unwrap().unwrap());
            assert!(matches!(far.receive(&mut head), Err(LinkError::Closed)));
        }
    }

    #[test]
    fn silence_and_a_full_pipe_end_patience() {
        let (mut near, mut far) = unix_pair();
        near.set_patience(Duration::from_millis(20));
        assert!(!near.wait(Duration::from_millis(1)).unwrap());
        assert!(matches!(near.receive(&mut [0]), Err(LinkError::TimedOut { .. })));
        assert!(matches!(near.send(&vec![0; 8 << 20], &[]), Err(LinkError::TimedOut { .. })));
        assert!(near.in_flight() > 0);
        assert!(far.wait(Duration::ZERO).unwrap());
    }

    #[test]
    fn a_vanished_peer_is_closed_not_a_signal() {
        for (mut near, far) in [unix_pair(), tcp_pair()] {
            drop(far);
            let mut last = Ok(());
            for _ in 0..100 {
                last = near.send(&[0; 4096], &[]);
                if last.is_err() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(matches!(last, Err(LinkError::Closed)), "{last:?}");
        }
    }

    #[test]
    fn empty_transfers_are_nothing() {
        let (mut near, mut far) = unix_pair();
        near.send(&[], &[]).unwrap();
        near.receive(&mut []).unwrap();
        near.send(&[], &slices(&mut [7; 3], 1)).unwrap();
        let mut three = [0; 3];
        far.receive(&mut three).unwrap();
        assert_eq!(three, [7; 3]);
    }

    #[test]
    fn unix_sockets_carry_handles() {
        let (mut near, mut far) = unix_pair();
        assert!(near.carries_handles() && !tcp_pair().0.carries_handles());
        far.set_patience(Duration::from_millis(20));
        assert!(matches!(far.receive_handle(), Err(LinkError::TimedOut { .. })));
        near.send_handle(&std::fs::File::open("/dev/zero").unwrap().into()).unwrap();
        assert!(far.receive_handle().unwrap().is_some());
        near.send(b"x", &[]).unwrap();
        assert!(far.receive_handle().unwrap().is_none());
        drop(near);
        assert!(matches!(far.receive_handle(), Err(LinkError::Closed)));
        let (mut near, mut far) = tcp_pair();
        near.send(b"x", &[]).unwrap();
        assert!(far.receive_handle().unwrap().is_none());
    }

    #[test]
    fn tcp_knows_its_round_trip() {
        let (near, _far) = tcp_pair();
        assert!(near.round_trip().unwrap() < Duration::from_secs(1));
        assert!(unix_pair().0.round_trip().is_none());
    }

    #[test]
    fn one_host_is_known_as_such() {
        assert!(unix_pair().0.same_host() && tcp_pair().0.same_host());
    }
}
