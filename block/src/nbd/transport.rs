//! The bytes of one connection, plain or by TLS.
//!
//! Negotiation uses it as a blocking stream with a time limit on each call ([`Read`], [`Write`]). The transmission phase then
//! makes it nonblocking and moves many pieces with one call, straight from and to the memory of requests where there is no
//! TLS in between.

#![expect(unsafe_code, reason = "readv and sendmsg reach the memory of requests by pointers")]

use super::uri::Address;
use crate::memory::{Buffers, Piece};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustls::Connection;
use socket2::{Domain, SockAddr, SockRef, Socket, TcpKeepalive, Type};
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

/// The most pieces of one call (`UIO_MAXIOV` in linux/uio.h).
const MAX_PIECES: usize = 1024;
/// How long all of a negotiation may take: a peer that sends byte by byte keeps nobody.
const NEGOTIATED_WITHIN: Duration = Duration::from_secs(60);
/// How much may be encrypted that the socket has not taken yet, in bytes.
const TLS_AHEAD: usize = 1 << 20;
/// The longest plain text of a TLS record in bytes (RFC 8446, 5.1).
const RECORD: usize = 16 << 10;

/// A dead peer is noticed after about this long: so long without an answer, then probes.
const QUIET: Duration = Duration::from_secs(10);
const PROBE_EVERY: Duration = Duration::from_secs(3);
const PROBES: u32 = 4;

/// A part of what is sent.
#[derive(Debug, Clone, Copy)]
pub(super) enum Part<'a> {
    Bytes(&'a [u8]),
    /// The memory from this position on.
    Memory(&'a Buffers, usize),
}

#[derive(Debug)]
pub(super) struct Transport {
    socket: Socket,
    tls: Option<Box<Connection>>,
    /// When negotiating is over.
    negotiated_by: Instant,
}

impl Transport {
    /// Connects, and limits each read and write to `within` as long as the transport blocks.
    pub(super) fn connect(address: &Address, within: Duration) -> io::Result<Self> {
        let deadline = Instant::now() + within;
        let socket = match address {
            Address::Unix(path) => {
                let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
                // A server that takes nobody in has a queue, and this waits for a place in it.
                socket.set_write_timeout(Some(within))?;
                socket.connect(&SockAddr::unix(path)?)?;
                socket
            }
            Address::Tcp { host, port } => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "The name has no address");
                let mut connected = None;
                for resolved in (host.as_str(), *port).to_socket_addrs()? {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        last = io::ErrorKind::TimedOut.into();
                        break;
                    }
                    match TcpStream::connect_timeout(&resolved, left) {
                        Ok(stream) => {
                            connected = Some(Socket::from(stream));
                            break;
                        }
                        Err(error) => last = error,
                    }
                }
                connected.ok_or(last)?
            }
        };
        Self::over(socket, within)
    }

    /// A transport over a connected socket, with the same limit.
    pub(super) fn over(socket: Socket, within: Duration) -> io::Result<Self> {
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(within))?;
        socket.set_write_timeout(Some(within))?;
        if socket.local_addr()?.domain() != Domain::UNIX {
            socket.set_tcp_nodelay(true)?;
            let probes = TcpKeepalive::new().with_time(QUIET).with_interval(PROBE_EVERY).with_retries(PROBES);
            socket.set_tcp_keepalive(&probes)?;
            // Data that are not acknowledged keep probes from being sent, and would be sent again for a quarter of an hour.
            SockRef::from(&socket).set_tcp_user_timeout(Some(QUIET + PROBE_EVERY * PROBES))?;
        }
        Ok(Self { socket, tls: None, negotiated_by: Instant::now() + NEGOTIATED_WITHIN })
    }

    /// Goes on with TLS: shakes hands. Only while the transport blocks.
    pub(super) fn start_tls(&mut self, connection: Connection) -> io::Result<()> {
        let mut connection = Box::new(connection);
        connection.set_buffer_limit(Some(TLS_AHEAD));
        let mut limited = Limited { socket: &self.socket, until: self.negotiated_by };
        while connection.is_handshaking() {
            connection.complete_io(&mut limited)?;
        }
        // What the last flight answers.
        while connection.wants_write() {
            connection.write_tls(&mut limited)?;
        }
        self.tls = Some(connection);
        Ok(())
    }

    /// Begins to negotiate, perhaps once more.
    pub(super) fn negotiate_anew(&mut self) {
        self.negotiated_by = Instant::now() + NEGOTIATED_WITHIN;
    }

    pub(super) fn has_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Ends blocking. [`Read`] and [`Write`] are not to be used from then on.
    pub(super) fn set_nonblocking(&self) -> io::Result<()> {
        self.socket.set_nonblocking(true)
    }

    /// Receives into `bytes`. 0 is the end.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing yet.
    pub(super) fn receive(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else { return self.socket.read(bytes) };
        loop {
            match tls.reader().read(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Ended without saying so: there may have been more.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                outcome => return outcome,
            }
            if tls.read_tls(&mut self.socket)? == 0 {
                return Ok(0);
            }
            tls.process_new_packets().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
    }

    /// Receives into `memory` from `start` on, at most `length` bytes, and what comes beyond that into `beyond`. 0 is the
    /// end.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing yet.
    pub(super) fn receive_to(
        &mut self,
        memory: &Buffers,
        start: usize,
        length: usize,
        beyond: &mut [u8],
    ) -> io::Result<usize> {
        if self.tls.is_some() {
            let wanted = length.min(beyond.len());
            let received = self.receive(&mut beyond[..wanted])?;
            memory.write(start, &beyond[..received]);
            return Ok(received);
        }
        let mut pieces = memory.range(start, length);
        pieces.truncate(MAX_PIECES - 1);
        let whole = pieces.iter().map(Piece::length).sum::<usize>() == length;
        if whole && let Some(start) = NonNull::new(beyond.as_mut_ptr()) {
            pieces.push(Piece::new(start, beyond.len()));
        }
        let count = libc::c_int::try_from(pieces.len()).expect("1024 at most");
        // SAFETY: the pieces but for the last are of buffers, mapped and writable as long as those live, and no reference
        // of Rust points to them; the last is of a slice that is borrowed mutably. All outlive the call. The descriptor is
        // open as long as `self` is borrowed.
        let received = unsafe { libc::readv(self.socket.as_raw_fd(), pieces.as_ptr().cast(), count) };
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }

    /// Sends of `parts`, in order, what is taken; how many bytes that were.
    ///
    /// # Errors
    /// `WouldBlock` if nothing is taken now.
    pub(super) fn send(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        match &mut self.tls {
            None => self.send_plain(parts),
            Some(_) => self.send_encrypted(parts),
        }
    }

    fn send_plain(&self, parts: &[Part<'_>]) -> io::Result<usize> {
        let mut pieces = Vec::with_capacity(2 * parts.len());
        for part in parts {
            match *part {
                Part::Bytes(bytes) => {
                    let start = NonNull::new(bytes.as_ptr().cast_mut()).expect("a slice is somewhere");
                    pieces.push(Piece::new(start, bytes.len()));
                }
                Part::Memory(memory, start) => pieces.extend(memory.range(start, usize::MAX)),
            }
        }
        pieces.truncate(MAX_PIECES);
        // SAFETY: msghdr is a plain C struct, for which zeros are a value.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = pieces.as_mut_ptr().cast();
        message.msg_iovlen = pieces.len();
        // SAFETY: the kernel reads the pieces: those of slices are borrowed, those of buffers mapped as long as the buffers
        // live, and both outlive the call. The descriptor is open as long as `self` is borrowed.
        let sent = unsafe { libc::sendmsg(self.socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    fn send_encrypted(&mut self, parts: &[Part<'_>]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else { return Ok(0) };
        let (mut taken, mut record) = (0, [0; RECORD]);
        'parts: for part in parts {
            let mut position = 0;
            loop {
                let plain = match *part {
                    Part::Bytes(bytes) => &bytes[position..],
                    Part::Memory(memory, start) => {
                        let length = memory.read(start + position, &mut record);
                        &record[..length]
                    }
                };
                if plain.is_empty() {
                    break;
                }
                let written = tls.writer().write(plain)?;
                (taken, position) = (taken + written, position + written);
                if written == 0 {
                    break 'parts;
                }
            }
        }
        match self.send_records() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ if taken == 0 => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(taken),
        }
    }

    /// Sends what is encrypted already.
    fn send_records(&mut self) -> io::Result<()> {
        let Some(tls) = &mut self.tls else { return Ok(()) };
        while tls.wants_write() {
            tls.write_tls(&mut self.socket)?;
        }
        Ok(())
    }

    /// Sends what is left of earlier calls; whether nothing is.
    pub(super) fn flush_records(&mut self) -> io::Result<bool> {
        match self.send_records() {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether the peer sends nothing more: what it has sent may still be received.
    pub(super) fn is_left(&self) -> bool {
        has_left(&self.socket)
    }

    /// Breaks off: what was sent and has not left this host does not leave it any more.
    pub(super) fn break_off(&self) {
        // On a Unix socket it says nothing, and all has arrived.
        let _ = self.socket.set_linger(Some(Duration::ZERO));
    }

    /// Says farewell, as far as the socket takes it at once.
    pub(super) fn close(&mut self, farewell: &[u8]) {
        // Whoever does not hear it hears the connection end.
        let _ = self.send(&[Part::Bytes(farewell)]);
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
            let _ = self.send_records();
        }
    }
}

/// Whether the peer of a socket sends nothing more.
pub(super) fn has_left(socket: &Socket) -> bool {
    let mut polled = [PollFd::new(socket, PollFlags::RDHUP)];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
}

impl AsFd for Transport {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A socket that is read no longer than until some moment.
struct Limited<'a> {
    socket: &'a Socket,
    until: Instant,
}

impl Limited<'_> {
    fn check(&self) -> io::Result<()> {
        if Instant::now() < self.until { Ok(()) } else { Err(io::ErrorKind::TimedOut.into()) }
    }
}

impl Read for Limited<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.check()?;
        let mut socket = self.socket;
        socket.read(bytes)
    }
}

impl Write for Limited<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut socket = self.socket;
        socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Transport {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        Limited { socket: &self.socket, until: self.negotiated_by }.check()?;
        self.receive(bytes)
    }
}

impl Write for Transport {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.send(&[Part::Bytes(bytes)])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send_records()
    }
}
