//! A client of QEMU's Machine Protocol: JSON lines over a Unix socket (QEMU, docs/interop/qmp-spec.rst).
//!
//! It blocks. Events that come between a command and its answer are kept until somebody waits for them.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// How long to wait between two attempts to connect.
const RETRY: Duration = Duration::from_millis(5);

/// An event: its name and its data.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Event {
    /// As in QEMU's documentation, in capitals.
    pub(super) name: String,
    /// What it tells; null where it tells nothing.
    pub(super) data: Value,
}

/// A connection that is ready for commands.
#[derive(Debug)]
pub(super) struct Qmp<R, W> {
    reader: R,
    writer: W,
    events: VecDeque<Event>,
}

impl Qmp<BufReader<UnixStream>, UnixStream> {
    /// Connects; an answer or an event that takes longer than `within` is an error.
    pub(super) fn connect(path: &Path, within: Duration) -> Result<Self> {
        let stream = connect(path, within).with_context(|| format!("No QEMU at {}", path.display()))?;
        stream.set_read_timeout(Some(within))?;
        Self::greet(BufReader::new(stream.try_clone()?), stream)
    }
}

/// Connects to a socket that is there, but perhaps not listened at yet.
fn connect(path: &Path, within: Duration) -> io::Result<UnixStream> {
    let deadline = Instant::now() + within;
    loop {
        match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && Instant::now() < deadline => sleep(RETRY),
            answer => return answer,
        }
    }
}

impl<R: BufRead, W: Write> Qmp<R, W> {
    fn greet(reader: R, writer: W) -> Result<Self> {
        let mut qmp = Self { reader, writer, events: VecDeque::new() };
        let greeting = qmp.line()?;
        if greeting.get("QMP").is_none() {
            bail!("This is not QEMU's greeting: {greeting}");
        }
        qmp.call("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Gives a command and waits for what it returns.
    pub(super) fn call(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        writeln!(self.writer, "{}", json!({ "execute": command, "arguments": arguments }))
            .with_context(|| format!("Cannot ask QEMU for {command}"))?;
        loop {
            let mut line = self.line().with_context(|| format!("QEMU does not answer {command}"))?;
            if let Some(answer) = line.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(error) = line.get("error") {
                bail!("QEMU refuses {command}: {}", error["desc"].as_str().unwrap_or_default());
            }
            self.keep(&mut line)?;
        }
    }

    /// The next event.
    pub(super) fn event(&mut self) -> Result<Event> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            let mut line = self.line().context("QEMU tells nothing more")?;
            self.keep(&mut line)?;
        }
    }

    fn keep(&mut self, line: &mut Value) -> Result<()> {
        let name = line["event"].as_str().with_context(|| format!("QEMU says {line}"))?.to_owned();
        self.events.push_back(Event { name, data: line["data"].take() });
        Ok(())
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("QEMU has closed the connection");
        }
        serde_json::from_str(&line).with_context(|| format!("{line:?} is not JSON"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREETING: &str = "{\"QMP\":{\"version\":{}}}\r\n{\"return\":{}}\r\n";

    fn speak(said: &str) -> Result<Qmp<&[u8], Vec<u8>>> {
        let text: &'static str = Box::leak(format!("{GREETING}{said}").into_boxed_str());
        Qmp::greet(text.as_bytes(), Vec::new())
    }

    #[test]
    fn events_between_question_and_answer_are_kept_in_order() {
        let mut qmp = speak(
            "{\"event\":\"STOP\",\"timestamp\":{}}\n{\"event\":\"MIGRATION\",\"data\":{\"status\":\"active\"}}\n\
             {\"return\":{\"status\":\"running\"}}\n{\"event\":\"RESUME\"}\n",
        )
        .unwrap();
        assert_eq!(qmp.call("query-status", &json!({})).unwrap()["status"], "running");
        let events: Vec<Event> = (0..3).map(|_| qmp.event().unwrap()).collect();
        assert_eq!(events[0], Event { name: "STOP".to_owned(), data: Value::Null });
        assert_eq!(events[1].data["status"], "active");
        assert_eq!(events[2].name, "RESUME");
        assert!(format!("{:#}", qmp.event().unwrap_err()).contains("closed the connection"));
        let asked = String::from_utf8(qmp.writer).unwrap();
        assert!(asked.starts_with("{\"arguments\":{},\"execute\":\"qmp_capabilities\"}\n"), "{asked}");
    }

    #[test]
    fn a_refusal_is_told_in_qemus_words() {
        let mut qmp = speak("{\"error\":{\"class\":\"GenericError\",\"desc\":\"No such parameter\"}}\n").unwrap();
        let refusal = qmp.call("migrate-set-parameters", &json!({ "x": 1 })).unwrap_err().to_string();
        assert_eq!(refusal, "QEMU refuses migrate-set-parameters: No such parameter");
    }

    #[test]
    fn something_else_is_no_qemu() {
        assert!(Qmp::greet(&b"{\"hello\":1}\n"[..], Vec::new()).unwrap_err().to_string().contains("greeting"));
        assert!(Qmp::greet(&b"SSH-2.0\n"[..], Vec::new()).unwrap_err().to_string().contains("not JSON"));
    }
}
