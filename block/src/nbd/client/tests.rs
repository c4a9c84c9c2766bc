//! The client by the suite, against the server of this crate in each language and with TLS; and against servers that break
//! off, fall silent, or break the rules.

use super::super::server::{Export, Listener, NbdServer, ServerOptions};
use super::super::testing::{self, Fake, Script};
use super::super::wire::{Dialect, chunk, command};
use super::*;
use crate::backend::{Durability, Extent, ExtentKind, Operation, Unmap};
use crate::blocking::Blocking;
use crate::conformance;
use crate::file::{FileBackend, FileOptions};
use std::path::Path;
use std::time::Instant;
use tempfile::TempDir;

const LENGTH: u64 = 1 << 20;

fn image(folder: &Path) -> FileBackend {
    let path = folder.join("disk.raw");
    std::fs::write(&path, vec![0x11; usize::try_from(LENGTH).unwrap()]).unwrap();
    FileBackend::open_unlocked(&path, FileOptions::new(Access::ReadWrite)).unwrap()
}

fn export(folder: &Path) -> Export {
    let backend = Arc::new(image(folder));
    Export { name: "data".into(), description: "A disk".into(), backend, access: Access::ReadWrite }
}

fn uri(text: &str) -> NbdUri {
    text.parse().unwrap()
}

fn unix(folder: &Path) -> String {
    format!("nbd+unix:///data?socket={}", folder.join("nbd.sock").display())
}

fn serve(folder: &Path, options: ServerOptions) -> NbdServer {
    let listener = Listener::bind(&uri(&unix(folder)).address).unwrap();
    NbdServer::start(vec![listener], vec![export(folder)], options).unwrap()
}

fn patient() -> NbdOptions {
    NbdOptions::new(Access::ReadWrite)
}

#[test]
fn the_suite_in_each_language() {
    for best in [Dialect::Simple, Dialect::Structured, Dialect::Extended] {
        let folder = TempDir::new().unwrap();
        let _server = serve(folder.path(), ServerOptions { best, ..ServerOptions::default() });
        let disk = NbdBackend::open(&uri(&unix(folder.path())), patient()).unwrap();
        assert_eq!(disk.agreed.dialect, best);
        assert_eq!(disk.agreed.allocation.is_some(), best != Dialect::Simple);
        conformance::holds(&disk);
    }
}

#[test]
fn the_suite_over_tcp_and_tls() {
    let folder = TempDir::new().unwrap();
    testing::certificates(folder.path());
    let tls = Some(crate::nbd::tls::TlsServer::new(folder.path()).unwrap());
    let listener = Listener::bind(&Address::Tcp { host: "127.0.0.1".into(), port: 0 }).unwrap();
    let Address::Tcp { port, .. } = *listener.address() else { panic!("it is where it was put") };
    let options = ServerOptions { tls, ..ServerOptions::default() };
    let _server = NbdServer::start(vec![listener], vec![export(folder.path())], options).unwrap();
    let secret =
        format!("nbds://127.0.0.1:{port}/data?tls-certificates={}&tls-hostname=localhost", folder.path().display());
    conformance::holds(&NbdBackend::open(&uri(&secret), patient()).unwrap());

    let open = |text: &str| NbdBackend::open(&uri(text), patient()).unwrap_err().to_string();
    assert!(open(&format!("nbd://127.0.0.1:{port}/data")).contains("write nbds://"));
    let misnamed = secret.replace("tls-hostname=localhost", "tls-hostname=elsewhere");
    assert!(open(&misnamed).contains("The connection to the NBD server"));
    let other = TempDir::new().unwrap();
    testing::certificates(other.path());
    let strange = secret.replace(&folder.path().display().to_string(), &other.path().display().to_string());
    assert!(open(&strange).contains("The connection to the NBD server"));
}

#[test]
fn what_is_sparse_is_told_of() {
    let folder = TempDir::new().unwrap();
    let _server = serve(folder.path(), ServerOptions::default());
    let disk = NbdBackend::open(&uri(&unix(folder.path())), patient()).unwrap();
    let mut one = Blocking::open(&disk).unwrap();
    one.write_zeroes(64 << 10, 64 << 10, Unmap::Allowed, Durability::Cached).unwrap();
    let extent = |length: u64, kind| Extent { length: length << 10, kind };
    let expected = [extent(64, ExtentKind::Data), extent(64, ExtentKind::Hole), extent(896, ExtentKind::Data)];
    assert_eq!(one.extents(0, LENGTH).unwrap(), expected);
}

#[test]
fn what_an_export_is_not_is_said_when_it_is_opened() {
    let folder = TempDir::new().unwrap();
    let text = unix(folder.path());
    let error = |text: &str, options| NbdBackend::open(&uri(text), options).unwrap_err().to_string();
    assert!(error(&text, patient()).contains("Could not reach the NBD server at"));
    let server = serve(folder.path(), ServerOptions::default());
    let missing = error(&text.replace("///data", "///date"), patient());
    assert!(missing.contains(r#"has no export "date"; it has "data""#), "{missing}");
    assert_eq!(list_exports(&uri(&text), Duration::from_secs(5)).unwrap(), ["data"]);
    drop(server);
    assert!(!folder.path().join("nbd.sock").exists(), "the socket goes with its server");

    let fake = |script| Fake::start(&folder.path().join("nbd.sock"), vec![script]);
    let with = |size, flags, minimum| {
        let _fake = fake(Script { size, flags, minimum, ..Script::default() });
        error(&text, patient())
    };
    assert!(with(LENGTH, 3, 1).contains("is read-only; attach the disk with readonly"));
    assert!(with(1000, 1, 1).contains("is 1000 bytes long"));
    assert!(with(0, 1, 1).contains("is 0 bytes long"));
    assert!(with(LENGTH, 1, 4096).contains("takes requests of 4096 to 33554432 bytes; a disk needs 512 to 65536"));
    assert!(with(LENGTH, 1, 3).contains("breaks the protocol"));
    let greets = |bytes: &[u8]| {
        let greeting = bytes.to_vec();
        let _fake = fake(Script { greeting: Some(greeting), ..Script::default() });
        error(&text, NbdOptions { connect_within: Duration::from_millis(300), ..patient() })
    };
    assert!(greets(b"SSH-2.0-OpenSSH_9.2p1 Debian").contains("does not greet as one"));
    assert!(greets(b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\x00\x00").contains("before 2010"));
    assert!(greets(b"NBDMAGICIHAVEOPT\x00\x00").contains("only the first newstyle"));
    assert!(greets(b"NBDMAGIC").contains("did not answer within 300ms"));
}

#[test]
fn a_lost_connection_is_made_again_and_what_was_not_answered_is_asked_again() {
    let folder = TempDir::new().unwrap();
    let socket = folder.path().join("nbd.sock");
    let first = Script::then(|client| {
        let [one, two, three] = [client.request(), client.request(), client.request()];
        assert_eq!([one.offset, two.offset, three.offset], [0, 512, 1024]);
        client.answer(&two);
        // Hangs up.
    });
    let second = Script::then(|client| {
        let [one, three] = [client.request(), client.request()];
        assert_eq!([one.offset, three.offset], [0, 1024], "what was answered is not sent again, the rest in its order");
        assert_eq!((one.data, three.data.clone()), (vec![1; 512], vec![3; 512]));
        client.fail(&three, libc::ESHUTDOWN);
        client.answer_at_leisure();
    });
    let third = Script::then(|client| {
        let requests = [client.request(), client.request()];
        assert_eq!(requests.each_ref().map(|request| request.offset), [0, 1024]);
        requests.iter().for_each(|request| client.answer(request));
        client.answer_at_leisure();
    });
    let fake = Fake::start(&socket, vec![first, second, third]);
    let disk = NbdBackend::open(&uri(&unix(folder.path())), patient()).unwrap();
    let mut channel = disk.channel().unwrap();
    for (tag, byte) in [(0, 1), (1, 2), (2, 3)] {
        let from = crate::Buffers::of(&crate::Scratch::copy_of(&[byte; 512]));
        channel.submit(tag, Operation::Write { offset: tag * 512, from, durability: Durability::Cached });
    }
    channel.commit();
    let done = crate::faulty::reap_all(&mut *channel);
    let mut tags: Vec<_> =
        done.into_iter().map(|completion| completion.outcome.map(|_| completion.tag).unwrap()).collect();
    tags.sort_unstable();
    assert_eq!(tags, [0, 1, 2]);
    drop(channel);
    fake.finish();
}

#[test]
fn who_must_not_wait_for_ever_is_told() {
    let folder = TempDir::new().unwrap();
    let silent = Script::then(|client| {
        client.request();
        client.wait_for_farewell();
    });
    let lively = Script::then(|client| client.answer_at_leisure());
    let fake = Fake::start(&folder.path().join("nbd.sock"), vec![silent, lively]);
    let within = Duration::from_millis(200);
    let options = NbdOptions { fail_after: Some(within), ..patient() };
    let disk = NbdBackend::open(&uri(&unix(folder.path())), options).unwrap();
    let mut one = Blocking::open(&disk).unwrap();
    let begun = Instant::now();
    let error = one.write(0, &[1; 512], Durability::Cached).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert!(begun.elapsed() >= within);
    // The next connection serves again.
    testing::until("it is connected again", || one.write(512, &[2; 512], Durability::Cached).is_ok());
    drop(one);
    fake.finish();
}

#[test]
fn a_disk_that_comes_back_as_another_is_not_used() {
    let folder = TempDir::new().unwrap();
    let leaves = Script::then(|client| drop(client.request()));
    let other = || Script { size: 2 * LENGTH, ..Script::default() };
    let lesser = || Script { flags: 1, ..Script::default() };
    let back = Script::then(|client| client.answer_at_leisure());
    let fake = Fake::start(&folder.path().join("nbd.sock"), vec![leaves, other(), lesser(), back]);
    let disk = NbdBackend::open(&uri(&unix(folder.path())), patient()).unwrap();
    Blocking::open(&disk).unwrap().write(0, &[1; 512], Durability::Cached).unwrap();
    drop(disk);
    fake.finish();
}

#[test]
fn a_server_that_breaks_the_rules_fails_the_disk_and_nothing_else() {
    type Misdeed = fn(&mut testing::Client, &testing::Request);
    let misdeeds: [(&str, Misdeed); 9] = [
        ("a message begins with 0x48545450", |client, _| client.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")),
        ("what it was not asked", |client, request| client.chunk(request.cookie + 1, chunk::NONE, 1, &[])),
        ("not sent all of it", |client, request| client.chunk(request.cookie, chunk::NONE, 1, &[])),
        ("without structure", |client, request| client.simple(request.cookie, 0)),
        ("not asked for", |client, request| client.data(request.cookie, 512, &[0; 1024], 1)),
        ("not asked for", |client, request| client.data(request.cookie, u64::MAX, &[0; 512], 1)),
        ("data of a read twice", |client, request| {
            client.data(request.cookie, 0, &[0; 512], 0);
            client.data(request.cookie, 0, &[0; 1024], 1);
        }),
        ("another kind", |client, request| {
            client.chunk(request.cookie, chunk::BLOCK_STATUS, 1, &[0, 0, 0, 1, 0, 0, 16, 0, 0, 0, 0, 0]);
        }),
        ("bytes long", |client, request| client.chunk_of(request.cookie, chunk::BLOCK_STATUS, 1, u32::MAX, &[])),
    ];
    for (complaint, misdeed) in misdeeds {
        let folder = TempDir::new().unwrap();
        let script = Script::then(move |client| {
            let request = client.request();
            assert_eq!((request.command, request.length), (command::READ, 1024));
            misdeed(client, &request);
            client.wait_for_farewell();
        });
        let fake = Fake::start(&folder.path().join("nbd.sock"), vec![script]);
        let disk = NbdBackend::open(&uri(&unix(folder.path())), patient()).unwrap();
        let mut one = Blocking::open(&disk).unwrap();
        let error = one.read(0, &mut [0; 1024]).unwrap_err().to_string();
        assert!(error.contains("breaks the protocol") && error.contains(complaint), "{complaint}: {error}");
        assert!(one.flush().is_err(), "it stays failed");
        drop(one);
        fake.finish();
    }
}

#[test]
fn reads_come_in_pieces_and_holes_and_errors_keep_their_number() {
    let folder = TempDir::new().unwrap();
    let script = Script::then(|client| {
        let request = client.request();
        client.data(request.cookie, 1024, &[3; 512], 0);
        client.hole(request.cookie, 512, 512, 0);
        client.data(request.cookie, 0, &[1; 512], 0);
        client.chunk(request.cookie, chunk::NONE, 1, &[]);
        let request = client.request();
        client.data(request.cookie, 0, &[1; 512], 0);
        client.error(request.cookie, libc::EIO, "The head has crashed");
        let request = client.request();
        client.fail(&request, libc::ENOSPC);
        client.answer_at_leisure();
    });
    let fake = Fake::start(&folder.path().join("nbd.sock"), vec![script]);
    let disk = NbdBackend::open(&uri(&unix(folder.path())), patient()).unwrap();
    let mut one = Blocking::open(&disk).unwrap();
    let mut bytes = [0xff; 1536];
    one.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, *[[1; 512], [0; 512], [3; 512]].concat());
    assert_eq!(one.read(0, &mut bytes).unwrap_err().raw_os_error(), Some(libc::EIO));
    let full = one.write(0, &[1; 512], Durability::Cached).unwrap_err();
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    one.flush().unwrap();
    drop(one);
    fake.finish();
}

#[test]
fn a_server_that_cannot_do_all_is_asked_for_what_it_can() {
    let folder = TempDir::new().unwrap();
    // It can flush, and nothing else.
    let script = Script {
        flags: 1 | 1 << 2,
        ..Script::then(|client| {
            let write = client.request();
            assert_eq!((write.command, write.flags, write.data.len()), (command::WRITE, 0, 512));
            client.answer(&write);
            let flush = client.request();
            assert_eq!(flush.command, command::FLUSH, "a write that is to last is followed by a flush");
            client.answer(&flush);
            let zeroes = client.request();
            assert_eq!((zeroes.command, zeroes.data.clone()), (command::WRITE, vec![0; 4096]));
            client.answer(&zeroes);
            client.wait_for_farewell();
        })
    };
    let fake = Fake::start(&folder.path().join("nbd.sock"), vec![script]);
    let disk = NbdBackend::open(&uri(&unix(folder.path())), patient()).unwrap();
    assert_eq!(disk.geometry().channels, 1, "its connections need not agree");
    let mut one = Blocking::open(&disk).unwrap();
    one.write(0, &[1; 512], Durability::Durable).unwrap();
    one.discard(0, 4096).unwrap();
    one.write_zeroes(0, 4096, Unmap::Forbidden, Durability::Cached).unwrap();
    drop(one);
    fake.finish();
}
