//! For tests: a server that keeps to a script, and certificates.

use super::wire::{
    ALLOCATION, BlockSizes, ExportInfo, Greeting, NBD_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionHeader,
    OptionReply, REQUEST_MAGIC, RequestHeader, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, SimpleReply,
    StructuredReply, chunk, command, info, option, reply, transmission,
};
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use zerocopy::{FromZeros, IntoBytes};

const WITHIN: Duration = Duration::from_secs(20);

/// A request as a scripted server sees it.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) command: u16,
    pub(super) flags: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) length: u32,
    pub(super) data: Vec<u8>,
}

/// What a scripted server does on one connection.
pub(super) struct Script {
    /// What it sends instead of a greeting.
    pub(super) greeting: Option<Vec<u8>>,
    pub(super) size: u64,
    pub(super) flags: u16,
    pub(super) minimum: u32,
    pub(super) deeds: Box<dyn FnOnce(&mut Client) + Send>,
}

impl Default for Script {
    fn default() -> Self {
        Self::then(|client| client.wait_for_farewell())
    }
}

impl Script {
    /// It greets and agrees as servers do, and then does this.
    pub(super) fn then(deeds: impl FnOnce(&mut Client) + Send + 'static) -> Self {
        let flags = transmission::HAS_FLAGS | transmission::FLUSH | transmission::FUA | transmission::WRITE_ZEROES;
        Self { greeting: None, size: 1 << 20, flags, minimum: 1, deeds: Box::new(deeds) }
    }
}

/// A server that keeps to scripts, one for each connection in turn.
pub(super) struct Fake {
    thread: JoinHandle<()>,
    socket: PathBuf,
}

impl Fake {
    pub(super) fn start(socket: &Path, scripts: Vec<Script>) -> Self {
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket).unwrap();
        let thread = std::thread::spawn(move || {
            for script in scripts {
                let (stream, _) = listener.accept().unwrap();
                stream.set_read_timeout(Some(WITHIN)).unwrap();
                let mut client = Client(stream);
                if let Some(greeting) = &script.greeting {
                    client.send(greeting);
                    client.wait_for_farewell();
                } else if client.agree(&script).is_ok() {
                    (script.deeds)(&mut client);
                }
            }
        });
        Self { thread, socket: socket.to_owned() }
    }

    /// Waits until all scripts were played.
    pub(super) fn finish(self) {
        self.thread.join().unwrap();
        std::fs::remove_file(&self.socket).unwrap();
    }
}

/// The scripted server's end of a connection.
pub(super) struct Client(UnixStream);

impl Client {
    fn receive<T: FromZeros + IntoBytes + zerocopy::FromBytes>(&mut self) -> io::Result<T> {
        let mut header = T::new_zeroed();
        self.0.read_exact(header.as_mut_bytes())?;
        Ok(header)
    }

    fn agree(&mut self, script: &Script) -> io::Result<()> {
        self.send(Greeting { magic: NBD_MAGIC.into(), option_magic: OPTION_MAGIC.into(), flags: 3.into() }.as_bytes());
        self.0.read_exact(&mut [0; 4])?;
        loop {
            let header: OptionHeader = self.receive()?;
            let mut data = vec![0; header.length.get() as usize];
            self.0.read_exact(&mut data)?;
            let option = header.option.get();
            match option {
                option::STRUCTURED_REPLY => self.reply(option, reply::ACK, &[]),
                option::SET_META_CONTEXT => {
                    self.reply(
                        option,
                        reply::META_CONTEXT,
                        &[&1_u32.to_be_bytes()[..], ALLOCATION.as_bytes()].concat(),
                    );
                    self.reply(option, reply::ACK, &[]);
                }
                option::GO => {
                    let about = ExportInfo { size: script.size.into(), flags: script.flags.into() };
                    self.reply(option, reply::INFO, &[&info::EXPORT.to_be_bytes()[..], about.as_bytes()].concat());
                    let sizes = BlockSizes {
                        minimum: script.minimum.into(),
                        preferred: 4096.into(),
                        maximum: (32 << 20).into(),
                    };
                    self.reply(option, reply::INFO, &[&info::BLOCK_SIZE.to_be_bytes()[..], sizes.as_bytes()].concat());
                    self.reply(option, reply::ACK, &[]);
                    return Ok(());
                }
                _ => self.reply(option, reply::UNSUPPORTED, &[]),
            }
        }
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) {
        let length = u32::try_from(data.len()).unwrap();
        let magic = OPTION_REPLY_MAGIC.into();
        let header = OptionReply { magic, option: option.into(), kind: kind.into(), length: length.into() };
        self.send(&[header.as_bytes(), data].concat());
    }

    /// The client may have gone.
    pub(super) fn send(&mut self, bytes: &[u8]) {
        let _ = self.0.write_all(bytes);
    }

    /// The next request, with its data.
    pub(super) fn request(&mut self) -> Request {
        self.try_request().expect("the client asks")
    }

    fn try_request(&mut self) -> io::Result<Request> {
        let header: RequestHeader = self.receive()?;
        assert_eq!(header.magic.get(), REQUEST_MAGIC);
        let (command, length) = (header.command.get(), header.length.get());
        let mut data = vec![0; if command == command::WRITE { length as usize } else { 0 }];
        self.0.read_exact(&mut data)?;
        let (flags, cookie, offset) = (header.flags.get(), header.cookie.get(), header.offset.get());
        Ok(Request { command, flags, cookie, offset, length, data })
    }

    /// A success: for a read, with zeros.
    pub(super) fn answer(&mut self, request: &Request) {
        match request.command {
            command::READ => self.data(request.cookie, request.offset, &vec![0; request.length as usize], 1),
            _ => self.simple(request.cookie, 0),
        }
    }

    pub(super) fn fail(&mut self, request: &Request, number: i32) {
        self.error(request.cookie, number, "");
    }

    pub(super) fn simple(&mut self, cookie: u64, error: u32) {
        self.send(
            SimpleReply { magic: SIMPLE_REPLY_MAGIC.into(), error: error.into(), cookie: cookie.into() }.as_bytes(),
        );
    }

    pub(super) fn error(&mut self, cookie: u64, number: i32, message: &str) {
        let length = u16::try_from(message.len()).unwrap();
        let payload = [&number.unsigned_abs().to_be_bytes()[..], &length.to_be_bytes(), message.as_bytes()].concat();
        self.chunk(cookie, chunk::ERROR, 1, &payload);
    }

    pub(super) fn data(&mut self, cookie: u64, offset: u64, bytes: &[u8], flags: u16) {
        self.chunk(cookie, chunk::DATA, flags, &[&offset.to_be_bytes()[..], bytes].concat());
    }

    pub(super) fn hole(&mut self, cookie: u64, offset: u64, length: u32, flags: u16) {
        self.chunk(cookie, chunk::HOLE, flags, &[&offset.to_be_bytes()[..], &length.to_be_bytes()].concat());
    }

    pub(super) fn chunk(&mut self, cookie: u64, kind: u16, flags: u16, payload: &[u8]) {
        self.chunk_of(cookie, kind, flags, u32::try_from(payload.len()).unwrap(), payload);
    }

    /// A chunk that says it is `length` bytes long, and may be lying.
    pub(super) fn chunk_of(&mut self, cookie: u64, kind: u16, flags: u16, length: u32, payload: &[u8]) {
        let (magic, flags, kind) = (STRUCTURED_REPLY_MAGIC.into(), flags.into(), kind.into());
        let header = StructuredReply { magic, flags, kind, cookie: cookie.into(), length: length.into() };
        self.send(&[header.as_bytes(), payload].concat());
    }

    /// Answers whatever comes until the client leaves.
    pub(super) fn answer_at_leisure(&mut self) {
        while let Ok(request) = self.try_request() {
            if request.command == command::DISCONNECT {
                return;
            }
            self.answer(&request);
        }
    }

    /// Reads on until the client leaves.
    pub(super) fn wait_for_farewell(&mut self) {
        while self.0.read(&mut [0; 4096]).is_ok_and(|count| count > 0) {}
    }
}

/// Waits until `holds`, or fails the test.
pub(super) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + WITHIN;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A folder with an authority of its own, and a server's and a client's certificate by it.
pub(super) fn certificates(folder: &Path) {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    let authority_key = KeyPair::generate().unwrap();
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let certificate = authority.self_signed(&authority_key).unwrap();
    std::fs::write(folder.join("ca-cert.pem"), certificate.pem()).unwrap();
    let issuer = Issuer::new(authority, authority_key);
    for party in ["server", "client"] {
        let key = KeyPair::generate().unwrap();
        let signed = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
        std::fs::write(folder.join(format!("{party}-cert.pem")), signed.pem()).unwrap();
        std::fs::write(folder.join(format!("{party}-key.pem")), key.serialize_pem()).unwrap();
    }
}
