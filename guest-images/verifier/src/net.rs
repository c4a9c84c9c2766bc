//! The network mode: a TCP connection into the guest that survives, with every byte in its place.
//!
//! The verifier serves: each connection carries the numbers 0, 1, 2… as 64-bit little-endian words, which the server
//! compares with its own count and sends back. The [`Client`] runs outside the guest and compares what comes back. So a
//! segment that is lost, doubled or mixed up is found on either side, whatever TCP's own sums say.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::fault::Faults;

/// Connections at a time; one more is closed at once.
const CONNECTIONS: u64 = 32;
const CONNECTION_STACK: usize = 64 << 10;
/// Between two tries to connect, which the kernel may refuse at once.
const CONNECT_EVERY: Duration = Duration::from_millis(100);
const WORD: usize = 8;
const BUFFER: usize = 4096;

/// What the network mode found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetReport {
    /// Connections since the start.
    pub connections: u64,
    /// Connections that are open.
    pub open: u64,
    /// Words that came in order and went back.
    pub words: u64,
    /// Words out of order, and broken connections.
    pub faults: Faults,
}

/// The serving side. Its threads end with the process.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    connections: AtomicU64,
    open: AtomicU64,
    words: AtomicU64,
    faults: Mutex<Faults>,
}

impl Server {
    /// Listens on all addresses; port 0 takes any free port.
    pub fn start(port: u16) -> io::Result<Self> {
        let listener = TcpListener::bind((IpAddr::V4(Ipv4Addr::UNSPECIFIED), port))?;
        let address = listener.local_addr()?;
        let counts = Arc::new(Counts::default());
        let shared = Arc::clone(&counts);
        thread::Builder::new().name("net-accept".to_owned()).spawn(move || accept(&listener, &shared))?;
        Ok(Self { address, counts })
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// What happened until now.
    pub fn report(&self) -> NetReport {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NetReport {
            connections: count(&self.counts.connections),
            open: count(&self.counts.open),
            words: count(&self.counts.words),
            faults: self.counts.faults.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }
}

impl Counts {
    fn fault(&self, fault: impl Into<String>) {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).add(fault);
    }
}

fn accept(listener: &TcpListener, counts: &Arc<Counts>) {
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                counts.fault(format!("accepting a connection: {error}"));
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if counts.open.load(Ordering::Relaxed) >= CONNECTIONS {
            continue;
        }
        let number = counts.connections.fetch_add(1, Ordering::Relaxed);
        counts.open.fetch_add(1, Ordering::Relaxed);
        let shared = Arc::clone(counts);
        let builder = thread::Builder::new().name(format!("net-{number}")).stack_size(CONNECTION_STACK);
        let started = builder.spawn(move || {
            if let Err(error) = echo(stream, &shared) {
                shared.fault(format!("connection {number}: {error}"));
            }
            shared.open.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(error) = started {
            counts.open.fetch_sub(1, Ordering::Relaxed);
            counts.fault(format!("connection {number} has no thread: {error}"));
        }
    }
}

/// Serves one connection to its end.
fn echo(mut stream: TcpStream, counts: &Counts) -> Result<(), SequenceError> {
    stream.set_nodelay(true)?;
    let mut sequence = Sequence::default();
    let mut buffer = [0; BUFFER];
    loop {
        let bytes = stream.read(&mut buffer)?;
        if bytes == 0 {
            return Ok(());
        }
        counts.words.fetch_add(sequence.take(&buffer[..bytes])?, Ordering::Relaxed);
        stream.write_all(&buffer[..bytes])?;
    }
}

/// A stream of words is broken.
#[derive(Debug, Error)]
pub enum SequenceError {
    /// A word is not the next one.
    #[error("word {expected} is {found}")]
    OutOfOrder {
        /// The number that had to come.
        expected: u64,
        /// What came.
        found: u64,
    },
    /// The connection ended or broke.
    #[error("the connection broke")]
    Connection(#[from] io::Error),
}

/// The words that came, across the borders of reads.
#[derive(Debug, Default)]
struct Sequence {
    next: u64,
    partial: Vec<u8>,
}

impl Sequence {
    /// Compares what came with what had to come, and counts the complete words.
    fn take(&mut self, bytes: &[u8]) -> Result<u64, SequenceError> {
        let before = self.next;
        self.partial.extend_from_slice(bytes);
        let mut words = self.partial.chunks_exact(WORD);
        for word in words.by_ref() {
            let found = u64::from_le_bytes(word.try_into().expect("chunks have the size of a word"));
            if found != self.next {
                return Err(SequenceError::OutOfOrder { expected: self.next, found });
            }
            self.next += 1;
        }
        self.partial = words.remainder().to_vec();
        Ok(self.next - before)
    }
}

/// The side outside the guest.
#[derive(Debug)]
pub struct Client {
    stream: TcpStream,
    sent: u64,
    echoed: Sequence,
    longest_wait: Duration,
}

impl Client {
    /// Connects; `patience` is how long a single answer may take, so the longest pause that is not a failure. A guest
    /// that is busy with its start may answer none of the three ARP requests that its host's kernel sends, a second
    /// apart, before it calls the guest unreachable (arp(7), `mcast_solicit`).
    pub fn connect(address: impl ToSocketAddrs, patience: Duration) -> io::Result<Self> {
        let start = Instant::now();
        let stream = loop {
            match TcpStream::connect(&address) {
                Err(error) if error.kind() == io::ErrorKind::HostUnreachable && start.elapsed() < patience => {
                    thread::sleep(CONNECT_EVERY);
                }
                connected => break connected?,
            }
        };
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(Self { stream, sent: 0, echoed: Sequence::default(), longest_wait: Duration::ZERO })
    }

    /// Sends the next `words` words (512 at most, so that neither side has to buffer) and waits for them to come back.
    pub fn exchange(&mut self, words: u64) -> Result<(), SequenceError> {
        let end = self.sent + words.min((BUFFER / WORD) as u64);
        let out: Vec<u8> = (self.sent..end).flat_map(u64::to_le_bytes).collect();
        let start = Instant::now();
        self.stream.write_all(&out)?;
        self.sent = end;
        let mut buffer = [0; BUFFER];
        while self.echoed.next < self.sent {
            let bytes = self.stream.read(&mut buffer)?;
            if bytes == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            self.echoed.take(&buffer[..bytes])?;
        }
        self.longest_wait = self.longest_wait.max(start.elapsed());
        Ok(())
    }

    /// Words that went there and back.
    pub fn words(&self) -> u64 {
        self.echoed.next
    }

    /// The longest exchange: the outage as this connection felt it.
    pub fn longest_wait(&self) -> Duration {
        self.longest_wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn connect(server: &Server) -> Client {
        Client::connect(("127.0.0.1", server.port()), PATIENCE).unwrap()
    }

    fn wait_for(what: impl Fn() -> bool) {
        let start = Instant::now();
        while !what() {
            assert!(start.elapsed() < PATIENCE, "it never came");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn words_go_there_and_back() {
        let server = Server::start(0).unwrap();
        let (mut one, mut other) = (connect(&server), connect(&server));
        for words in [1, 2, 500, 9999] {
            one.exchange(words).unwrap();
            other.exchange(1).unwrap();
        }
        assert_eq!((one.words(), other.words()), (1 + 2 + 500 + 512, 4));
        assert!(one.longest_wait() > Duration::ZERO);
        let report = server.report();
        assert_eq!((report.connections, report.open, report.words), (2, 2, 1019));
        assert!(report.faults.none());
        drop((one, other));
        wait_for(|| server.report().open == 0);
        assert!(server.report().faults.none());
    }

    #[test]
    fn a_lost_word_is_a_fault_on_both_sides() {
        let server = Server::start(0).unwrap();
        let mut client = connect(&server);
        client.exchange(3).unwrap();
        client.sent += 1;
        assert!(matches!(client.exchange(1), Err(SequenceError::Connection(_))));
        wait_for(|| server.report().open == 0);
        assert_eq!(server.report().faults.first, ["connection 0: word 3 is 4"]);
    }

    #[test]
    fn words_may_come_in_pieces() {
        let bytes: Vec<u8> = (0..4u64).flat_map(u64::to_le_bytes).collect();
        let mut sequence = Sequence::default();
        let words: Vec<u64> = bytes.chunks(5).map(|piece| sequence.take(piece).unwrap()).collect();
        assert_eq!(words.iter().sum::<u64>(), 4);
        let error = sequence.take(&3u64.to_le_bytes()).unwrap_err();
        assert_eq!(error.to_string(), "word 4 is 3");
    }

    #[test]
    fn too_many_connections_are_closed() {
        let server = Server::start(0).unwrap();
        let mut clients: Vec<Client> = (0..CONNECTIONS).map(|_| connect(&server)).collect();
        clients.iter_mut().for_each(|client| client.exchange(1).unwrap());
        assert!(connect(&server).exchange(1).is_err());
        assert_eq!(server.report().connections, CONNECTIONS);
    }

    #[test]
    fn a_taken_port_is_an_error() {
        let server = Server::start(0).unwrap();
        Server::start(server.port()).unwrap_err();
    }
}
