//! The client against things that are no Godwit; `server/tests.rs` has it against the server.

use super::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use tempfile::TempDir;

/// A listener that answers each of its clients with `answer` and hangs up.
fn impostor(answer: &'static str) -> (TempDir, Client) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection = connection.unwrap();
            let mut request = [0; 1024];
            let _ = connection.read(&mut request).unwrap();
            connection.write_all(answer.as_bytes()).unwrap();
        }
    });
    (directory, Client::new(path))
}

fn error_of(client: &Client) -> String {
    client.call(&Request::ShowVm).unwrap_err().to_string()
}

#[test]
fn nobody_there_is_said_plainly() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let client = Client::new(&path);
    assert_eq!(error_of(&client), format!("No Godwit listens at {}: there is no such socket", path.display()));
    drop(UnixListener::bind(&path).unwrap());
    assert!(error_of(&client).ends_with("the process that made the socket has ended"));
    assert!(matches!(client.events(After::Now), Err(ClientError::NobodyListens { .. })));
    assert!(error_of(&Client::new("/run/".to_owned() + &"p".repeat(108))).contains("at most 107"));
    assert!(matches!(Client::new(directory.path()).call(&Request::ShowVm), Err(ClientError::NotASocket { .. })));
    // Root may connect to everything, so the refusal itself cannot be provoked everywhere.
    let not_permitted = client.no_connection(ErrorKind::PermissionDenied.into());
    assert!(not_permitted.to_string().starts_with("No permission to talk to the Godwit at"));
    let other = client.no_connection(io::Error::other("the tide"));
    assert!(other.to_string().ends_with("cannot be reached") && other.source().is_some());
}

#[test]
fn an_impostor_is_found_out() {
    for (answer, part) in [
        ("", "closed the connection before it answered"),
        ("SSH-2.0-OpenSSH\r\n\r\n", "closed the connection before it answered"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{", "closed the connection before it answered"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "does not answer like a Godwit: missing field `id`"),
        ("HTTP/1.1 502 Bad Gateway\r\nContent-Length: 2\r\n\r\n{}", "Godwit: status 502 Bad Gateway"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n", "closed the connection"),
    ] {
        let (_directory, client) = impostor(answer);
        let error = error_of(&client);
        assert!(error.contains(part), "{answer:?}: {error}");
    }
}

#[test]
fn a_silent_one_is_not_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let _listener = UnixListener::bind(&path).unwrap();
    let client = Client::new(&path).with_timeout(Duration::from_millis(50));
    assert!(matches!(client.call(&Request::Pause), Err(ClientError::TimedOut { .. })));
    assert!(matches!(client.metrics(), Err(ClientError::TimedOut { .. })));
    assert!(matches!(client.events(After::Now), Err(ClientError::TimedOut { .. })));
}

#[test]
fn a_stream_ends_after_its_first_error() {
    let (_directory, client) = impostor(
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n\
         data: {\"sequence\":1,\"at_ms\":0,\"what\":{\"type\":\"lagged\",\"missed\":1}}\n\ndata: nonsense\n\n",
    );
    let mut stream = client.events(After::Sequence(0)).unwrap();
    assert_eq!(stream.next().unwrap().unwrap().sequence, 1);
    assert!(matches!(stream.next(), Some(Err(ClientError::NotUnderstood { .. }))));
    assert!(stream.next().is_none());
}
