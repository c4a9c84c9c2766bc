//! The server and the client against each other, over a real socket, with a handler that plays a VM.

use super::*;
use crate::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream as Connection;
use std::process::Command;
use std::sync::{Condvar, Mutex};
use std::time::Instant;
use tempfile::TempDir;

/// Targets of the balloon that make the played VM do something special.
const NO_BALLOON: u64 = 404;
const FAILS: u64 = 500;
const PANICS: u64 = 666;
const WRONG_REPLY: u64 = 667;
const HANGS: u64 = 668;

#[derive(Debug)]
struct PlayedVm {
    phase: Mutex<Phase>,
    hanging: Mutex<bool>,
    let_go: Condvar,
}

impl PlayedVm {
    fn vm_info(&self) -> VmInfo {
        VmInfo {
            id: Uuid::nil(),
            name: "played".into(),
            phase: self.phase(),
            vcpus: 2,
            memory_bytes: 128 << 20,
            pid: std::process::id(),
            started_at_ms: 1,
            uptime_ms: Millis::default(),
            disks: vec!["blk0".into()],
            nics: Vec::new(),
            dirty_tracker: DirtyTrackerKind::Log,
            api_version: API_VERSION.into(),
            godwit_version: "0".into(),
        }
    }

    fn set_balloon(&self, target: u64) -> Result<Reply, ApiError> {
        match target {
            NO_BALLOON => Err(ApiError::NoSuchDevice { device: "balloon".into() }),
            FAILS => Err(ApiError::failed(&io::Error::other("the wind fell"))),
            PANICS => panic!("asked to"),
            WRONG_REPLY => Ok(Reply::Vm(self.vm_info())),
            HANGS => {
                let hanging = self.hanging.lock().unwrap();
                drop(self.let_go.wait_while(hanging, |hanging| *hanging).unwrap());
                Ok(Reply::Done)
            }
            _ => Ok(Reply::Done),
        }
    }
}

fn job() -> JobId {
    JobId(Uuid::from_u128(7))
}

impl Handler for PlayedVm {
    fn handle(&self, request: Request) -> Result<Reply, ApiError> {
        Ok(match request {
            Request::ShowVm => Reply::Vm(self.vm_info()),
            Request::Pause => {
                *self.phase.lock().unwrap() = Phase::Paused;
                Reply::Done
            }
            Request::Resume
            | Request::Stop(_)
            | Request::Kill
            | Request::Reset
            | Request::PowerButton
            | Request::ResizeDisk(_)
            | Request::CancelMigration
            | Request::ResolveMigration(_) => Reply::Done,
            Request::ShowBalloon => {
                let statistics = BTreeMap::from([("free_memory".into(), 1)]);
                Reply::Balloon(BalloonInfo { target_bytes: 1, actual_bytes: 2, statistics })
            }
            Request::SetBalloon(SetBalloon { target_bytes }) => return self.set_balloon(target_bytes),
            Request::ListDisks => Reply::Disks(DiskList { disks: Vec::new() }),
            Request::ListNics => Reply::Nics(NicList { nics: Vec::new() }),
            Request::StartMigration(_) | Request::MeasureDirtyRate(_) => Reply::Started(JobStarted { job: job() }),
            Request::ShowMigration => Reply::Migration(LastMigration { migration: None }),
            Request::ShowDirtyRate => Reply::DirtyRate(LastDirtyRate { measurement: None }),
            Request::Pulse(Pulse { times }) => {
                Reply::Pulsed(Pulsed { times: times.get(), state_bytes: 1, longest_ms: Millis::default() })
            }
        })
    }

    fn phase(&self) -> Phase {
        *self.phase.lock().unwrap()
    }

    fn metrics(&self) -> Metrics {
        let mut metrics = Metrics::default();
        metrics.push(MetricName::new("godwit_up"), MetricKind::Gauge, "Always 1", crate::Value::Integer(1));
        metrics
    }
}

/// A served VM; its socket goes with it.
struct Stage {
    vm: Arc<PlayedVm>,
    events: Events,
    server: Option<Server>,
    directory: TempDir,
}

fn failed(cause: &str) -> Happening {
    Happening::DeviceNeedsReset { device: "blk0".to_owned(), cause: cause.to_owned() }
}

impl Stage {
    fn with(limits: Limits) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = ControlSocket::bind(&directory.path().join("api.sock")).unwrap();
        let phase = Mutex::new(Phase::Running);
        let vm = Arc::new(PlayedVm { phase, hanging: Mutex::new(true), let_go: Condvar::new() });
        let events = Events::default();
        let options = ServerOptions { test_requests: TestRequests::Admitted, limits, ..ServerOptions::default() };
        let server = Server::start(socket, Arc::clone(&vm) as Arc<dyn Handler>, events.clone(), options).unwrap();
        Self { vm, events, server: Some(server), directory }
    }

    fn new() -> Self {
        Self::with(Limits::default())
    }

    fn path(&self) -> std::path::PathBuf {
        self.directory.path().join("api.sock")
    }

    fn client(&self) -> Client {
        Client::new(self.path())
    }

    fn connect(&self) -> Connection {
        let connection = Connection::connect(self.path()).unwrap();
        connection.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        connection
    }

    fn set_phase(&self, phase: Phase) {
        *self.vm.phase.lock().unwrap() = phase;
    }

    fn let_go(&self) {
        *self.vm.hanging.lock().unwrap() = false;
        self.vm.let_go.notify_all();
    }

    fn publish(&self, cause: &str) {
        self.events.publish(failed(cause));
    }

    /// Sends a request as text, and gives the status, the head and the body of the answer.
    fn raw(&self, request: &str) -> (u16, String, String) {
        let mut connection = self.connect();
        connection.write_all(request.as_bytes()).unwrap();
        answer_of(connection)
    }

    fn ask(&self, line: &str, headers: &str, body: &str) -> (u16, Value) {
        let head = format!("{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}");
        let (status, _, body) = self.raw(&format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()));
        (status, serde_json::from_str(&body).unwrap_or(Value::Null))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.let_go();
    }
}

fn answer_of(mut connection: Connection) -> (u16, String, String) {
    let mut answer = Vec::new();
    // A server that closes before it has read everything resets the connection after its answer.
    let _ = connection.read_to_end(&mut answer);
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    (status, head.to_owned(), body.to_owned())
}

fn set_balloon(target_bytes: u64) -> Request {
    Request::SetBalloon(SetBalloon { target_bytes })
}

/// The status and code of a refused call.
fn refused(result: Result<Reply, ClientError>) -> (u16, Code) {
    match result {
        Err(ClientError::Refused { status, body }) => (status, body.code),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn every_request_gets_its_reply() {
    let stage = Stage::new();
    for request in request::samples() {
        stage.set_phase(match request {
            Request::CancelMigration => Phase::Migrating,
            Request::ResolveMigration(_) => Phase::InDoubt,
            _ => Phase::Running,
        });
        let expected = stage.vm.handle(request.clone()).unwrap();
        stage.set_phase(if request == Request::Pause { Phase::Running } else { stage.vm.phase() });
        assert_eq!(stage.client().call(&request).unwrap(), expected, "{request:?}");
    }
    assert_eq!(stage.client().metrics().unwrap(), "# HELP godwit_up Always 1\n# TYPE godwit_up gauge\ngodwit_up 1\n");
    let (status, document) = stage.ask("GET /v1/openapi.json", "", "");
    assert_eq!((status, document), (200, serde_json::from_str(OPENAPI).unwrap()));
}

#[test]
fn statuses_and_media_types_are_those_of_the_table() {
    let stage = Stage::new();
    let post = |path: &str, body: &str| {
        let head = format!("POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}", body.len());
        stage.raw(&format!("{head}\r\n\r\n{body}"))
    };
    let (status, head, body) = post("/v1/vm/reset", "");
    assert_eq!((status, body.as_str()), (204, ""));
    assert!(!head.contains("content-type"));
    let (status, head, body) = post("/v1/migration", r#"{"to":"tcp://h:1"}"#);
    assert_eq!((status, body), (202, format!(r#"{{"job":"{}"}}"#, job())));
    assert!(head.contains("content-type: application/json"));
    let (status, head, _) = stage.raw("GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(status == 200 && head.contains("content-type: text/plain; version=0.0.4"), "{head}");
    assert_eq!(post("/v1/vm/stop", "").0, 204);
    assert_eq!(post("/v1/vm/stop", r#"{"force_after_s":5}"#).0, 204);
}

#[test]
fn wrong_requests_are_told_what_is_wrong() {
    let stage = Stage::new();
    for (line, body, status, code, part) in [
        ("PUT /v1/balloon", "{", 400, "malformed_json", "EOF while parsing"),
        ("PUT /v1/balloon", "\u{0}\u{1}", 400, "malformed_json", "line 1 column 1"),
        ("PUT /v1/balloon", r#"{"target_bytes":1}x"#, 400, "malformed_json", "trailing characters"),
        ("PUT /v1/balloon", "[[[[[[", 400, "malformed_json", "EOF"),
        ("PUT /v1/balloon", " [1]", 400, "invalid_body", "it is not an object"),
        ("PUT /v1/balloon", "", 400, "invalid_body", "it is missing"),
        ("PUT /v1/balloon", "[]", 400, "invalid_body", "it is not an object"),
        ("PUT /v1/balloon", r#"{"target":1}"#, 400, "invalid_body", "unknown field `target`, expected `target_bytes`"),
        ("PUT /v1/balloon", r#"{"target_bytes":-1}"#, 400, "invalid_body", "`-1`, expected u64"),
        ("POST /v1/migration", r#"{"to":"nowhere"}"#, 400, "invalid_body", r#""nowhere" has no known scheme"#),
        ("POST /v1/vm/stop", r#"{"force":true}"#, 400, "invalid_body", "unknown field `force`"),
        ("POST /v1/pulse", r#"{"times":0}"#, 400, "invalid_body", "expected a nonzero u32"),
        ("POST /v1/vm/pause", "{}", 400, "unexpected_body", "/v1/vm/pause takes no body"),
        ("GET /v1/vm", "x", 400, "unexpected_body", "/v1/vm takes no body"),
        ("GET /v1/vm?verbose=1", "", 400, "unexpected_query", "/v1/vm takes no query"),
        ("GET /v1/vms", "", 404, "no_such_path", "There is no /v1/vms"),
        ("GET /", "", 404, "no_such_path", "There is no /;"),
        ("POST /v1/vm", "", 405, "method_not_allowed", "/v1/vm does not take POST; it takes GET"),
        ("BREW /v1/balloon", "", 405, "method_not_allowed", "it takes GET, PUT"),
    ] {
        let (got, error) = stage.ask(line, "", body);
        assert_eq!((got, error["code"].as_str()), (status, Some(code)), "{line} {body:?}: {error}");
        assert!(error["message"].as_str().unwrap().contains(part), "{line} {body:?}: {error}");
        assert!(error.get("phase").is_none());
    }
    let (_, head, _) = stage.raw("DELETE /v1/vm HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert!(head.contains("\r\nallow: GET\r\n"), "{head}");
    assert_eq!(stage.raw("nonsense\r\n\r\n").0, 400);
    assert!(stage.client().call(&Request::ShowVm).is_ok());
}

#[test]
fn a_request_in_the_wrong_phase_gets_409_with_the_phase() {
    let stage = Stage::new();
    for phase in Phase::ALL {
        stage.set_phase(phase);
        for request in request::samples() {
            if phase == Phase::Running && request == Request::Pause || admit(phase, &request).is_ok() {
                continue;
            }
            match stage.client().call(&request) {
                Err(ClientError::Refused { status: 409, body }) => {
                    assert_eq!((body.code, body.phase), (Code::WrongPhase, Some(phase)));
                }
                other => panic!("{request:?} in {phase}: {other:?}"),
            }
        }
    }
}

#[test]
fn a_pulse_needs_a_vm_for_tests() {
    let directory = tempfile::tempdir().unwrap();
    let socket = ControlSocket::bind(&directory.path().join("s")).unwrap();
    let vm = PlayedVm { phase: Mutex::new(Phase::Running), hanging: Mutex::default(), let_go: Condvar::new() };
    let server = Server::start(socket, Arc::new(vm), Events::default(), ServerOptions::default()).unwrap();
    let pulse = Request::Pulse(Pulse { times: std::num::NonZeroU32::MIN });
    assert_eq!(refused(Client::new(server.path()).call(&pulse)), (409, Code::TestRequestsRefused));
}

#[test]
fn failures_of_the_handler_reach_the_client() {
    let stage = Stage::new();
    let client = stage.client();
    assert_eq!(refused(client.call(&set_balloon(NO_BALLOON))), (404, Code::NoSuchDevice));
    assert_eq!(client.call(&set_balloon(FAILS)).unwrap_err().to_string(), "the wind fell");
    let error = client.call(&set_balloon(PANICS)).unwrap_err().to_string();
    assert_eq!(error, "Godwit has a bug: the request made it panic; see its log");
    assert_eq!(refused(client.call(&set_balloon(WRONG_REPLY))), (500, Code::Failed));
    assert_eq!(client.call(&set_balloon(1)).unwrap(), Reply::Done);
}

#[test]
fn a_large_body_is_refused_and_the_largest_is_not() {
    let stage = Stage::new();
    let limit = Limits::default().body_bytes;
    let body = |bytes: usize| {
        let json = r#"{"target_bytes":1}"#;
        " ".repeat(bytes - json.len()) + json
    };
    assert_eq!(stage.ask("PUT /v1/balloon", "", &body(limit)).0, 204);
    let (status, error) = stage.ask("PUT /v1/balloon", "", &body(limit + 1));
    assert_eq!((status, &error["message"]), (413, &json!("The body is larger than 65536 bytes")));
    // Promised, not sent: nobody waits for it.
    let (status, _, _) = stage.raw("PUT /v1/balloon HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n");
    assert_eq!(status, 413);
    // Not promised, but sent.
    let chunk = format!("{:x}\r\n{}\r\n", 40_000, "x".repeat(40_000));
    let head = "PUT /v1/balloon HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    let (status, _, _) = stage.raw(&format!("{head}{chunk}{chunk}0\r\n\r\n"));
    assert_eq!(status, 413);
    let (status, _, _) = stage.raw(&format!("{head}zz\r\n"));
    assert_eq!(status, 400);
}

#[test]
fn a_large_head_is_refused() {
    let stage = Stage::new();
    let head = format!("GET /v1/vm HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "x".repeat(64 << 10));
    assert_eq!(stage.raw(&head).0, 431);
    let head = format!("GET /v1/vm HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(HEADERS_MAX + 1));
    assert_eq!(stage.raw(&head).0, 431);
}

#[test]
fn many_clients_wait_for_their_turn() {
    let stage = Stage::with(Limits { connections: 4, workers: 2, ..Limits::default() });
    std::thread::scope(|scope| {
        for _ in 0..60 {
            scope.spawn(|| assert!(stage.client().call(&Request::ShowVm).is_ok()));
        }
    });
}

#[test]
fn a_connection_carries_one_request_after_the_other() {
    let stage = Stage::new();
    let mut connection = stage.connect();
    let request = "POST /v1/vm/reset HTTP/1.1\r\nHost: x\r\n\r\n";
    connection.write_all(format!("{request}{request}").as_bytes()).unwrap();
    connection.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answers = String::new();
    connection.read_to_string(&mut answers).unwrap();
    assert_eq!(answers.matches("204 No Content").count(), 2);
    assert!(answers.ends_with("godwit_up 1\n"));
}

#[test]
fn slow_clients_are_cut_off_and_disturb_nobody() {
    let short = Duration::from_millis(200);
    let stage = Stage::with(Limits { connections: 8, head_within: short, body_within: short, ..Limits::default() });
    let slow_heads: Vec<_> = (0..8)
        .map(|_| {
            let mut connection = stage.connect();
            connection.write_all(b"GET /v1/vm HT").unwrap();
            connection
        })
        .collect();
    // All places are taken until the slow ones lose theirs.
    assert!(stage.client().call(&Request::ShowVm).is_ok());
    for connection in slow_heads {
        assert!(matches!(answer_of(connection).0, 0 | 408));
    }
    let (status, _, body) = stage.raw("PUT /v1/balloon HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{");
    assert_eq!(status, 408, "{body}");
}

#[test]
fn a_handler_that_hangs_times_out_and_the_rest_goes_on() {
    let short = Duration::from_millis(300);
    let stage = Stage::with(Limits { workers: 2, answer_within: short, ..Limits::default() });
    let client = stage.client();
    assert_eq!(refused(client.call(&set_balloon(HANGS))), (504, Code::TimedOut));
    assert!(client.call(&Request::ShowVm).is_ok());
    assert_eq!(refused(client.call(&set_balloon(HANGS))), (504, Code::TimedOut));
    // Both workers hang now.
    assert_eq!(refused(client.call(&Request::ShowVm)), (503, Code::Busy));
    assert_eq!(stage.ask("GET /v1/openapi.json", "", "").0, 200);
    stage.let_go();
    assert!(client.call(&Request::ShowVm).is_ok());
}

#[test]
fn events_arrive_in_order_from_where_the_client_is() {
    let stage = Stage::new();
    stage.publish("before");
    let fresh = stage.client().events(After::Now).unwrap();
    let all = stage.client().events(After::Sequence(0)).unwrap();
    for number in 2..=100 {
        stage.publish(&format!("event {number}"));
    }
    let fresh: Vec<_> = fresh.take(99).map(Result::unwrap).collect();
    assert!(fresh.iter().map(|event| event.sequence).eq(2..=100));
    assert_eq!(fresh[98].what, failed("event 100"));
    assert!(all.take(100).map(|event| event.unwrap().sequence).eq(1..=100));
    let late = stage.client().events(After::Sequence(97)).unwrap();
    assert!(late.take(3).map(|event| event.unwrap().sequence).eq(98..=100));
}

#[test]
fn the_stream_is_plain_server_sent_events_with_heartbeats() {
    let stage = Stage::with(Limits { heartbeat: Duration::from_millis(50), ..Limits::default() });
    let mut connection = stage.connect();
    connection.write_all(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut text = String::new();
    let mut read_until = |part: &str| {
        while !text.contains(part) {
            let mut piece = [0; 512];
            let length = connection.read(&mut piece).unwrap();
            assert!(length > 0, "the stream ended: {text}");
            text.push_str(std::str::from_utf8(&piece[..length]).unwrap());
        }
    };
    read_until("content-type: text/event-stream\r\n");
    read_until(": heartbeat\n\n");
    stage.publish("the cable");
    read_until("id: 1\nevent: device_needs_reset\ndata: {\"sequence\":1,");
    read_until("\"cause\":\"the cable\"}}\n\n");
}

#[test]
fn a_gap_before_the_first_event_is_told() {
    let stage = Stage::new();
    for _ in 0..300 {
        stage.publish("much");
    }
    let events: Vec<_> =
        stage.client().events(After::Sequence(4)).unwrap().take(257).map(|event| event.unwrap()).collect();
    assert_eq!((events[0].sequence, &events[0].what), (44, &Happening::Lagged { missed: 40 }));
    assert_eq!((events[1].sequence, events[256].sequence), (45, 300));
}

#[test]
fn a_slow_subscriber_is_told_and_dropped() {
    let stage = Stage::new();
    let mut stream = stage.client().events(After::Now).unwrap();
    let long = "x".repeat(8 << 10);
    for _ in 0..1000 {
        stage.publish(&long);
    }
    let (mut received, mut lagged) = (0, None);
    for event in &mut stream {
        let event = event.unwrap();
        assert_eq!(lagged, None, "the stream ends after the gap");
        match event.what {
            Happening::Lagged { missed } => {
                assert_eq!(event.sequence, received + missed);
                lagged = Some(event.sequence);
            }
            _ => assert_eq!(event.sequence, received + 1),
        }
        received = event.sequence;
    }
    // It can go on where the backlog begins, and learns what was lost meanwhile.
    let lagged = lagged.expect("it was too slow");
    let rest = stage.client().events(After::Sequence(lagged)).unwrap();
    let rest: Vec<_> = rest.map(|event| event.unwrap().sequence).take_while(|sequence| *sequence < 1000).collect();
    assert!(rest.ends_with(&(745..1000).collect::<Vec<_>>()), "{rest:?}");
    assert!(rest.len() == 255 || rest[0] == 744, "{rest:?}");
}

#[test]
fn a_subscriber_that_does_not_read_loses_its_seat() {
    let limits = Limits { subscribers: 1, read_within: Duration::from_millis(200), ..Limits::default() };
    let stage = Stage::with(limits);
    let mut deaf = stage.connect();
    deaf.write_all(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut first = [0];
    deaf.read_exact(&mut first).unwrap();
    let turned_away = stage.client().events(After::Now).map(|_| Reply::Done);
    assert_eq!(refused(turned_away), (503, Code::Busy));
    let long = "x".repeat(16 << 10);
    let deadline = Instant::now() + Duration::from_secs(20);
    while stage.client().events(After::Now).is_err() {
        assert!(Instant::now() < deadline, "the seat is never free");
        stage.publish(&long);
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_subscriber_that_leaves_frees_its_seat() {
    let stage = Stage::with(Limits { subscribers: 1, ..Limits::default() });
    drop(stage.client().events(After::Now).unwrap());
    let deadline = Instant::now() + Duration::from_secs(10);
    while stage.client().events(After::Now).is_err() {
        assert!(Instant::now() < deadline, "the seat is never free");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_wrong_number_of_an_event_is_refused() {
    let stage = Stage::new();
    let (status, error) = stage.ask("GET /v1/events", "Last-Event-ID: soon\r\n", "");
    assert_eq!((status, error["code"].as_str()), (400, Some("invalid_value")));
    assert!(error["message"].as_str().unwrap().contains(r#""soon" is not the number of an event"#), "{error}");
}

#[test]
fn at_the_end_the_last_events_arrive_and_the_socket_goes() {
    let mut stage = Stage::new();
    let stream = stage.client().events(After::Now).unwrap();
    let idle = stage.connect();
    let what = Happening::GuestEnded { reason: EndReason::PowerOff, message: "The guest powered off".into() };
    stage.events.publish(what.clone());
    let begun = Instant::now();
    stage.server = None;
    assert!(begun.elapsed() < Duration::from_secs(5));
    let events: Vec<_> = stream.map(Result::unwrap).collect();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].what, what);
    assert_eq!(answer_of(idle).0, 0);
    assert!(!stage.path().exists());
    let error = stage.client().call(&Request::ShowVm).unwrap_err();
    assert!(error.to_string().ends_with("there is no such socket"), "{error}");
}

#[test]
fn a_handler_that_hangs_does_not_hold_up_the_end() {
    let mut stage = Stage::with(Limits { end_within: Duration::from_millis(100), ..Limits::default() });
    let client = stage.client();
    let asked = std::thread::spawn(move || client.call(&set_balloon(HANGS)));
    while stage.client().call(&Request::ShowVm).is_err() {}
    std::thread::sleep(Duration::from_millis(100));
    let begun = Instant::now();
    stage.server = None;
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert!(matches!(asked.join().unwrap(), Err(ClientError::Closed { .. })));
}

#[test]
fn the_threads_have_names() {
    let stage = Stage::new();
    let client = stage.client();
    let asked = std::thread::spawn(move || client.call(&set_balloon(HANGS)));
    let name_of = |task: io::Result<std::fs::DirEntry>| std::fs::read_to_string(task.unwrap().path().join("comm")).ok();
    let names = || -> Vec<String> { std::fs::read_dir("/proc/self/task").unwrap().filter_map(name_of).collect() };
    let deadline = Instant::now() + Duration::from_secs(20);
    while !["godwit-api\n", "godwit-api-req\n"].iter().all(|name| names().iter().any(|found| found == name)) {
        assert!(Instant::now() < deadline, "{:?}", names());
        std::thread::sleep(Duration::from_millis(5));
    }
    stage.let_go();
    assert_eq!(asked.join().unwrap().unwrap(), Reply::Done);
}

/// Runs curl on the stage's socket, as the README tells people to, and gives its standard output.
fn curl(stage: &Stage, arguments: &[&str]) -> String {
    let output = Command::new("curl")
        .args(["--silent", "--show-error", "--max-time", "20", "--unix-socket"])
        .arg(stage.path())
        .args(arguments)
        .output()
        .expect("this test needs curl: apt-get install curl");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn curl_can_do_everything() {
    let stage = Stage::new();
    let vm: Value = serde_json::from_str(&curl(&stage, &["http://godwit/v1/vm"])).unwrap();
    assert_eq!(vm["phase"], "running");
    let status = ["--write-out", "%{http_code}"];
    assert_eq!(curl(&stage, &[&status[..], &["--request", "POST", "http://godwit/v1/vm/pause"]].concat()), "204");
    let target = ["--request", "PUT", "--data", r#"{"target_bytes":1048576}"#, "http://godwit/v1/balloon"];
    assert_eq!(curl(&stage, &[&status[..], &target].concat()), "204");
    let refused = curl(&stage, &[&status[..], &["--request", "DELETE", "http://godwit/v1/migration"]].concat());
    assert!(refused.contains(r#""phase":"paused"}409"#), "{refused}");
    let body = "x".repeat(200 << 10);
    let large = ["--request", "PUT", "--data", &body[..100 << 10], "http://godwit/v1/balloon"];
    assert!(curl(&stage, &[&status[..], &large].concat()).ends_with("}413"));
    assert!(curl(&stage, &["http://godwit/metrics"]).contains("\ngodwit_up 1\n"));
    stage.publish("one");
    let events = std::thread::scope(|scope| {
        let arguments = ["--no-buffer", "--header", "Last-Event-ID: 0", "http://godwit/v1/events"];
        let mut child = Command::new("curl")
            .args(["--silent", "--max-time", "20", "--unix-socket"])
            .arg(stage.path())
            .args(arguments)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let reader = scope.spawn({
            let mut out = child.stdout.take().unwrap();
            move || {
                let mut text = vec![0; 20];
                out.read_exact(&mut text).unwrap();
                text
            }
        });
        let text = reader.join().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        text
    });
    assert!(events.starts_with(b"id: 1\nevent: device_"));
}
