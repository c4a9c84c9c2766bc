//! The server by bytes: what clients may say, what they may not, and that one who misbehaves harms no other.

use super::super::testing::until;
use super::super::uri::Address;
use super::super::wire::{
    ALLOCATION, EXTENDED_REPLY_MAGIC, NBD_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC, chunk, command, info, option, reply,
};
use super::*;
use crate::file::{FileBackend, FileOptions};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use tempfile::TempDir;

const LENGTH: u64 = 1 << 20;

struct Rig {
    folder: TempDir,
    server: NbdServer,
}

impl Rig {
    fn new() -> Self {
        Self::with(ServerOptions::default(), Access::ReadWrite)
    }

    fn with(options: ServerOptions, access: Access) -> Self {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("disk.raw");
        std::fs::write(&path, vec![7; usize::try_from(LENGTH).unwrap()]).unwrap();
        let backend = Arc::new(FileBackend::open_unlocked(&path, FileOptions::new(Access::ReadWrite)).unwrap());
        let export = |name: &str| Export {
            name: name.to_owned(),
            description: "A disk".to_owned(),
            backend: Arc::clone(&backend) as Arc<dyn Backend>,
            access,
        };
        let listener = Listener::bind(&Address::Unix(folder.path().join("s"))).unwrap();
        let server = NbdServer::start(vec![listener], vec![export("data"), export("")], options).unwrap();
        Self { folder, server }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    /// A client that has answered the greeting.
    fn client(&self) -> Client {
        let mut client = Client(UnixStream::connect(self.socket()).unwrap());
        client.0.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let greeting: [u8; 18] = client.take();
        assert_eq!(greeting, *[&NBD_MAGIC.to_be_bytes()[..], &OPTION_MAGIC.to_be_bytes(), &[0, 3]].concat());
        client.put(&3_u32.to_be_bytes());
        client
    }

    /// A client that reads and writes.
    fn user(&self) -> Client {
        let mut client = self.client();
        client.go("data");
        client
    }
}

struct Client(UnixStream);

impl Client {
    fn put(&mut self, bytes: &[u8]) {
        // The server may have hung up already.
        let _ = self.0.write_all(bytes);
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn take_u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take())
    }

    fn has_hung_up(&mut self) -> bool {
        self.0.read(&mut [0]).is_ok_and(|count| count == 0)
    }

    fn option(&mut self, option: u32, data: &[u8]) {
        let length = u32::try_from(data.len()).unwrap();
        self.put(&[&OPTION_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &length.to_be_bytes(), data].concat());
    }

    /// The next reply: its kind and data.
    fn reply(&mut self, option: u32) -> (u32, Vec<u8>) {
        assert_eq!(u64::from_be_bytes(self.take()), OPTION_REPLY_MAGIC);
        assert_eq!(self.take_u32(), option);
        let kind = self.take_u32();
        let mut data = vec![0; self.take_u32() as usize];
        self.0.read_exact(&mut data).unwrap();
        (kind, data)
    }

    fn ask(&mut self, option: u32, data: &[u8]) -> (u32, Vec<u8>) {
        self.option(option, data);
        self.reply(option)
    }

    fn go(&mut self, name: &str) {
        self.option(option::GO, &[&name_of(name)[..], &[0, 0]].concat());
        let (kind, data) = self.reply(option::GO);
        assert_eq!((kind, &data[..10]), (reply::INFO, &[&[0, 0][..], &LENGTH.to_be_bytes()].concat()[..]));
        let (kind, data) = self.reply(option::GO);
        assert_eq!((kind, &data[..2]), (reply::INFO, &info::BLOCK_SIZE.to_be_bytes()[..]));
        assert_eq!(self.reply(option::GO).0, reply::ACK);
    }

    fn request(&mut self, command: u16, flags: u16, offset: u64, length: u32) {
        let header = [
            &REQUEST_MAGIC.to_be_bytes()[..],
            &flags.to_be_bytes(),
            &command.to_be_bytes(),
            &9_u64.to_be_bytes(),
            &offset.to_be_bytes(),
            &length.to_be_bytes(),
        ];
        self.put(&header.concat());
    }

    /// The error number of a simple reply.
    fn simple(&mut self) -> i32 {
        assert_eq!(self.take_u32(), SIMPLE_REPLY_MAGIC);
        let error = self.take_u32();
        assert_eq!(u64::from_be_bytes(self.take()), 9);
        i32::try_from(error).unwrap()
    }

    /// Kind and payload of the only chunk of a structured reply.
    fn chunk(&mut self) -> (u16, Vec<u8>) {
        assert_eq!(self.take_u32(), STRUCTURED_REPLY_MAGIC);
        assert_eq!(u16::from_be_bytes(self.take()), chunk::DONE);
        let kind = u16::from_be_bytes(self.take());
        assert_eq!(u64::from_be_bytes(self.take()), 9);
        let mut payload = vec![0; self.take_u32() as usize];
        self.0.read_exact(&mut payload).unwrap();
        (kind, payload)
    }
}

fn name_of(name: &str) -> Vec<u8> {
    [&u32::try_from(name.len()).unwrap().to_be_bytes()[..], name.as_bytes()].concat()
}

#[test]
fn clients_look_around() {
    let rig = Rig::new();
    let mut client = rig.client();
    let exports: Vec<_> =
        std::iter::once(client.ask(option::LIST, &[])).chain((0..2).map(|_| client.reply(option::LIST))).collect();
    let listed = |name: &str| (reply::SERVER, [&name_of(name)[..], b"A disk"].concat());
    assert_eq!(exports, [listed("data"), listed(""), (reply::ACK, Vec::new())]);

    let kind = |client: &mut Client, option, data: &[u8]| client.ask(option, data).0;
    assert_eq!(kind(&mut client, option::LIST, &[0]), reply::INVALID);
    assert_eq!(kind(&mut client, 4, &[1, 2, 3]), reply::UNSUPPORTED);
    assert_eq!(kind(&mut client, option::START_TLS, &[]), reply::POLICY);
    assert_eq!(kind(&mut client, option::INFO, &[&name_of("date")[..], &[0, 0]].concat()), reply::UNKNOWN);
    assert_eq!(kind(&mut client, option::INFO, &[&name_of("data")[..], &[0, 1]].concat()), reply::INVALID);
    assert_eq!(kind(&mut client, option::GO, &[0, 0, 0, 9, b'd']), reply::INVALID);
    let contexts = |queries: &[&str]| {
        let count = u32::try_from(queries.len()).unwrap().to_be_bytes();
        let queries: Vec<u8> = queries.iter().flat_map(|query| name_of(query)).collect();
        [&name_of("data")[..], &count, &queries].concat()
    };
    assert_eq!(kind(&mut client, option::SET_META_CONTEXT, &contexts(&[ALLOCATION])), reply::INVALID);
    assert_eq!(kind(&mut client, option::STRUCTURED_REPLY, &[]), reply::ACK);
    for queries in [&[][..], &["base:"], &[ALLOCATION], &["qemu:", ALLOCATION]] {
        let (kind, data) = client.ask(option::LIST_META_CONTEXT, &contexts(queries));
        assert_eq!((kind, &data[4..]), (reply::META_CONTEXT, ALLOCATION.as_bytes()), "{queries:?}");
        assert_eq!(client.reply(option::LIST_META_CONTEXT).0, reply::ACK);
    }
    assert_eq!(kind(&mut client, option::SET_META_CONTEXT, &contexts(&["base:"])), reply::ACK);
    assert_eq!(kind(&mut client, option::SET_META_CONTEXT, &[0, 0, 0, 0, 0, 0, 0, 9]), reply::INVALID);
    assert_eq!(kind(&mut client, option::ABORT, &[]), reply::ACK);
    assert!(client.has_hung_up());
}

#[test]
fn old_clients_choose_by_name() {
    let rig = Rig::new();
    let mut client = rig.client();
    client.option(option::EXPORT_NAME, b"");
    assert_eq!(u64::from_be_bytes(client.take()), LENGTH);
    let _flags: [u8; 2] = client.take();
    client.request(command::READ, 0, 0, 512);
    assert_eq!(client.simple(), 0);
    assert_eq!(client.take::<512>(), [7; 512]);
    let mut lost = rig.client();
    lost.option(option::EXPORT_NAME, b"date");
    assert!(lost.has_hung_up());
}

#[test]
fn requests_that_cannot_be_are_refused_and_the_client_stays() {
    let rig = Rig::new();
    let mut client = rig.user();
    let mut refused = |command, flags, offset, length: u32, number| {
        client.request(command, flags, offset, length);
        if command == command::WRITE {
            client.put(&vec![0; length as usize]);
        }
        assert_eq!(client.simple(), number, "{command} {flags} {offset} {length}");
    };
    for (offset, length) in [(LENGTH, 512), (LENGTH - 512, 1024), (u64::MAX - 511, 1024), (1 << 63, 512)] {
        refused(command::READ, 0, offset, length, libc::EINVAL);
        refused(command::WRITE, 0, offset, length, libc::ENOSPC);
        refused(command::TRIM, 0, offset, length, libc::ENOSPC);
        refused(command::WRITE_ZEROES, 0, offset, length, libc::ENOSPC);
    }
    for (offset, length) in [(0, 0), (1, 512), (0, 511)] {
        refused(command::READ, 0, offset, length, libc::EINVAL);
        refused(command::WRITE, 0, offset, length, libc::EINVAL);
    }
    refused(command::READ, 1 << 9, 0, 512, libc::EINVAL);
    refused(command::BLOCK_STATUS, 0, 0, 512, libc::EINVAL);
    refused(99, 0, 0, 512, libc::EINVAL);
    refused(command::FLUSH, 0, 0, 0, 0);
    refused(command::WRITE, command::FUA, 0, 512, 0);
    refused(command::TRIM, command::FUA, 0, 4096, 0);
    refused(command::WRITE_ZEROES, command::NO_HOLE | command::FUA, 4096, 4096, 0);
    assert_eq!(std::fs::read(rig.folder.path().join("disk.raw")).unwrap()[..8192], [0; 8192]);
}

#[test]
fn a_read_only_export_is_not_written() {
    let rig = Rig::with(ServerOptions::default(), Access::ReadOnly);
    let mut client = rig.user();
    for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
        client.request(command, 0, 0, 512);
        if command == command::WRITE {
            client.put(&[0; 512]);
        }
        assert_eq!(client.simple(), libc::EPERM);
    }
    client.request(command::READ, 0, 0, 512);
    assert_eq!((client.simple(), client.take::<512>()), (0, [7; 512]));
}

#[test]
fn structure_tells_more() {
    let rig = Rig::new();
    let mut client = rig.client();
    assert_eq!(client.ask(option::STRUCTURED_REPLY, &[]).0, reply::ACK);
    let contexts = [&name_of("data")[..], &[0, 0, 0, 1], &name_of(ALLOCATION)].concat();
    assert_eq!(
        client.ask(option::SET_META_CONTEXT, &contexts),
        (reply::META_CONTEXT, [&[0, 0, 0, 1], ALLOCATION.as_bytes()].concat())
    );
    assert_eq!(client.reply(option::SET_META_CONTEXT).0, reply::ACK);
    client.go("data");
    client.request(command::WRITE_ZEROES, 0, 64 << 10, 64 << 10);
    assert_eq!(client.simple(), 0);
    client.request(command::READ, 0, 64 << 10, 4096);
    let hole = [&(64_u64 << 10).to_be_bytes()[..], &4096_u32.to_be_bytes()].concat();
    assert_eq!(client.chunk(), (chunk::HOLE, hole));
    client.request(command::READ, command::DONT_FRAGMENT, 64 << 10, 512);
    let (kind, data) = client.chunk();
    assert_eq!((kind, &data[8..]), (chunk::DATA, &[0; 512][..]));
    client.request(command::BLOCK_STATUS, 0, 0, 256 << 10);
    let words = [1_u32, 64 << 10, 0, 64 << 10, 3, 128 << 10, 0].map(u32::to_be_bytes).concat();
    assert_eq!(client.chunk(), (chunk::BLOCK_STATUS, words));
    client.request(command::BLOCK_STATUS, command::ONE_EXTENT, 0, 256 << 10);
    assert_eq!(client.chunk(), (chunk::BLOCK_STATUS, [1_u32, 64 << 10, 0].map(u32::to_be_bytes).concat()));
    client.request(command::READ, 0, LENGTH, 512);
    let (kind, error) = client.chunk();
    assert_eq!((kind, &error[..4]), (chunk::ERROR, &[0, 0, 0, 22][..]));
    assert!(String::from_utf8_lossy(&error[6..]).contains("Invalid argument"));
}

#[test]
fn extended_headers_answer_in_kind() {
    let rig = Rig::new();
    let mut client = rig.client();
    assert_eq!(client.ask(option::EXTENDED_HEADERS, &[]).0, reply::ACK);
    assert_eq!(client.ask(option::STRUCTURED_REPLY, &[]).0, reply::INVALID, "it has them already");
    client.go("data");
    let header = [
        &super::super::wire::EXTENDED_REQUEST_MAGIC.to_be_bytes()[..],
        &command::PAYLOAD_LENGTH.to_be_bytes(),
        &command::WRITE.to_be_bytes(),
        &9_u64.to_be_bytes(),
        &512_u64.to_be_bytes(),
        &512_u64.to_be_bytes(),
    ];
    client.put(&[header.concat(), vec![5; 512]].concat());
    let reply: [u8; 32] = client.take();
    let expected = [
        &EXTENDED_REPLY_MAGIC.to_be_bytes()[..],
        &chunk::DONE.to_be_bytes(),
        &chunk::NONE.to_be_bytes(),
        &9_u64.to_be_bytes(),
        &512_u64.to_be_bytes(),
        &0_u64.to_be_bytes(),
    ];
    assert_eq!(reply, *expected.concat());
    assert_eq!(std::fs::read(rig.folder.path().join("disk.raw")).unwrap()[512..1024], [5; 512]);
}

#[test]
fn who_breaks_the_protocol_is_hung_up_on_and_the_others_are_not() {
    let rig = Rig::new();
    let mut good = rig.user();
    let breaks: [fn(&mut Client); 5] = [
        |client| client.put(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        |client| client.option(option::LIST, &vec![0; 1 << 20]),
        |client| {
            client.go("data");
            client.put(&[0xff; 64]);
        },
        |client| {
            client.go("data");
            client.request(command::WRITE, 0, 0, u32::MAX);
        },
        |client| {
            for _ in 0..300 {
                client.option(99, &[]);
            }
            while client.0.read(&mut [0; 4096]).is_ok_and(|count| count > 0) {}
        },
    ];
    for (number, bad) in breaks.into_iter().enumerate() {
        let mut client = rig.client();
        bad(&mut client);
        until(&format!("{number} is hung up on"), || client.0.read(&mut [0; 4096]).map_or(true, |count| count == 0));
    }
    let mut stranger = Client(UnixStream::connect(rig.socket()).unwrap());
    let _: [u8; 18] = stranger.take();
    stranger.put(&0xff_u32.to_be_bytes());
    assert!(stranger.has_hung_up(), "unknown flags");
    good.request(command::READ, 0, 0, 512);
    assert_eq!((good.simple(), good.take::<512>()), (0, [7; 512]));
    until("the others are gone", || rig.server.clients() == 1);
}

#[test]
fn clients_are_as_many_as_there_may_be() {
    let rig = Rig::with(ServerOptions { clients: 2, ..ServerOptions::default() }, Access::ReadWrite);
    let [first, _second] = [rig.user(), rig.user()];
    let mut third = Client(UnixStream::connect(rig.socket()).unwrap());
    assert!(third.has_hung_up());
    drop(first);
    until("there is room again", || rig.server.clients() == 1);
    rig.user();
}

#[test]
fn a_server_that_does_not_list_is_asked_by_name() {
    let rig = Rig::with(ServerOptions { lists: false, ..ServerOptions::default() }, Access::ReadWrite);
    let uri: crate::NbdUri = format!("nbd+unix:///data?socket={}", rig.socket().display()).parse().unwrap();
    let within = Duration::from_secs(10);
    let told = crate::nbd::client::list_exports(&uri, within).unwrap_err().to_string();
    assert!(told.contains("not told of here"), "{told}");
    crate::NbdBackend::open(&uri, crate::NbdOptions::new(Access::ReadOnly)).unwrap();
}

#[test]
fn a_client_that_does_not_listen_holds_little() {
    let rig = Rig::new();
    let mut deaf = rig.user();
    deaf.0.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    // 64 GiB of answers, if the server made them.
    for _ in 0..(1 << 16) {
        let header =
            [&REQUEST_MAGIC.to_be_bytes()[..], &[0; 4], &9_u64.to_be_bytes(), &[0; 8], &(1_u32 << 20).to_be_bytes()];
        if deaf.0.write_all(&header.concat()).is_err() {
            break;
        }
    }
    // Refusals take memory, too: 67 million of them.
    let mut rude = rig.user();
    rude.0.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    for _ in 0..(1 << 16) {
        let header = [&REQUEST_MAGIC.to_be_bytes()[..], &[0, 0, 0, 99], &9_u64.to_be_bytes(), &[0; 12]].concat();
        if rude.0.write_all(&header.repeat(1024)).is_err() {
            break;
        }
    }
    drop(rude);
    let mut other = rig.user();
    other.request(command::READ, 0, 0, 512);
    assert_eq!((other.simple(), other.take::<512>()), (0, [7; 512]));
    drop(deaf);
    until("it is gone", || rig.server.clients() == 1);
}

#[test]
fn more_requests_than_may_be_open_are_answered_all() {
    let rig = Rig::new();
    let mut client = rig.user();
    // They come with one packet, and hardly take the disk any time.
    let header = [&REQUEST_MAGIC.to_be_bytes()[..], &[0, 0, 0, 3], &9_u64.to_be_bytes(), &[0; 12]].concat();
    client.put(&header.repeat(2000));
    for _ in 0..2000 {
        assert_eq!(client.simple(), 0);
    }
}

#[test]
fn a_server_that_ends_answers_first() {
    let rig = Rig::new();
    let mut client = rig.user();
    client.request(command::WRITE, command::FUA, 0, 1 << 20);
    client.put(&vec![8; 1 << 20]);
    until("the request has begun", || std::fs::read(rig.folder.path().join("disk.raw")).unwrap()[0] == 8);
    let Rig { folder, server } = rig;
    drop(server);
    assert_eq!(client.simple(), 0);
    assert!(client.has_hung_up());
    assert!(!folder.path().join("s").exists());
}

/// Neither who says nothing nor who fetches nothing keeps the server from ending.
#[test]
fn a_server_that_ends_waits_for_nobody() {
    let rig = Rig::new();
    let (mut silent, mut deaf) = (rig.client(), rig.user());
    for _ in 0..100 {
        deaf.request(command::READ, 0, 0, 1 << 20);
    }
    until("both are in", || rig.server.clients() == 2);
    let Rig { folder: _folder, server } = rig;
    let begun = Instant::now();
    drop(server);
    assert!(begun.elapsed() < Duration::from_secs(8), "less than a step of a handshake may take");
    assert!(silent.has_hung_up());
}

/// A client that has broken off may ask for the same once more on another connection.
#[test]
fn what_a_client_that_has_left_had_asked_for_never_comes_after_what_it_asks_for_then() {
    let rig = Rig::new();
    for round in 0..20 {
        let mut old = rig.user();
        for _ in 0..60 {
            old.request(command::WRITE, 0, 0, 1 << 16);
            old.put(&[1; 1 << 16]);
        }
        drop(old);
        let mut new = rig.user();
        new.request(command::WRITE, 0, 0, 512);
        new.put(&[2; 512]);
        assert_eq!(new.simple(), 0);
        until("the old one is gone", || rig.server.clients() == 1);
        assert_eq!(std::fs::read(rig.folder.path().join("disk.raw")).unwrap()[..512], [2; 512], "round {round}");
    }
}

#[test]
fn the_disk_is_locked_while_it_has_clients() {
    let rig = Rig::new();
    let open = || FileBackend::open(&rig.folder.path().join("disk.raw"), FileOptions::new(Access::ReadWrite));
    let guest = open().unwrap();
    let mut client = rig.client();
    let go = |client: &mut Client| client.ask(option::GO, &[&name_of("data")[..], &[0, 0]].concat());
    let (kind, why) = go(&mut client);
    assert_eq!(kind, reply::POLICY);
    assert!(String::from_utf8_lossy(&why).contains("locked by another writer"));
    assert_eq!(client.ask(option::INFO, &[&name_of("data")[..], &[0, 0]].concat()).0, reply::INFO);
    drop((guest, client));
    let [first, mut second] = [rig.user(), rig.user()];
    assert!(open().is_err());
    drop(first);
    until("one has gone", || rig.server.clients() == 1);
    assert!(open().is_err(), "the other still writes");
    second.request(command::DISCONNECT, 0, 0, 0);
    assert!(second.has_hung_up());
    open().unwrap();
}

#[test]
fn places_that_are_taken_are_named() {
    let rig = Rig::new();
    let bind = |path: PathBuf| Listener::bind(&Address::Unix(path)).unwrap_err().to_string();
    assert!(bind(rig.socket()).contains("Something listens at"));
    assert!(bind(rig.folder.path().join("disk.raw")).contains("is no socket"));
    assert!(bind(rig.folder.path().join("no/such/folder")).contains("Could not listen at"));
    let stale = rig.folder.path().join("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    assert!(stale.exists());
    Listener::bind(&Address::Unix(stale.clone())).unwrap();
    assert!(!stale.exists(), "it goes with its listener");
    let tcp = Listener::bind(&Address::Tcp { host: "127.0.0.1".into(), port: 0 }).unwrap();
    let again = Listener::bind(tcp.address()).unwrap_err().to_string();
    assert!(again.contains(&tcp.address().to_string()) && again.contains("already"), "{again}");
}
