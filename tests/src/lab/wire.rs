//! The frames between a lab and its harness: written and read by both ends of one virtio-serial port.
//!
//! A frame is a 9-byte header (length of the body, kind, number of the command, little-endian) and a body: JSON for
//! `Start`, `Ready` and `Ended`, plain bytes for the streams. Any number of commands share the port; the harness chooses
//! their numbers and never uses one twice. Both ends come from one build, so there is no version.

use std::io::{self, Read, Write};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Longest body that either end sends or accepts.
const MAX_BODY: u32 = 1 << 20;

/// Name of the virtio-serial port.
pub const PORT: &str = "godwit.lab";

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// To the lab: start a command ([`Start`]).
    Start,
    /// To the lab: bytes for a command's standard input.
    Input,
    /// To the lab: a command's standard input is over.
    EndOfInput,
    /// To the lab: kill a command.
    Kill,
    /// To the lab: a command's terminal has a new size ([`WindowSize`]).
    Resize,
    /// To the lab: switch the machine off.
    PowerOff,
    /// From the lab: it is up ([`Ready`]).
    Ready,
    /// From the lab: bytes a command wrote to its standard output.
    Stdout,
    /// From the lab: bytes a command wrote to its standard error.
    Stderr,
    /// From the lab: a command is over ([`End`]).
    Ended,
}

const KINDS: [Kind; 10] = [
    Kind::Start,
    Kind::Input,
    Kind::EndOfInput,
    Kind::Kill,
    Kind::Resize,
    Kind::PowerOff,
    Kind::Ready,
    Kind::Stdout,
    Kind::Stderr,
    Kind::Ended,
];

/// One message.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it says.
    pub kind: Kind,
    /// The command it belongs to; 0 for the machine itself.
    pub command: u32,
    /// The rest, by kind.
    pub body: Vec<u8>,
}

impl Frame {
    /// A frame without a body.
    pub fn bare(kind: Kind, command: u32) -> Self {
        Self { kind, command, body: Vec::new() }
    }

    /// A frame with a JSON body.
    pub fn json(kind: Kind, command: u32, body: &impl Serialize) -> io::Result<Self> {
        Ok(Self { kind, command, body: serde_json::to_vec(body)? })
    }

    /// The JSON body of a frame.
    pub fn parse<T: DeserializeOwned>(&self) -> io::Result<T> {
        Ok(serde_json::from_slice(&self.body)?)
    }

    /// Writes the frame by one `write_all`, so that frames of several threads behind a lock do not mix.
    pub fn write(&self, port: &mut impl Write) -> io::Result<()> {
        let length = u32::try_from(self.body.len()).ok().filter(|length| *length <= MAX_BODY);
        let length = length.ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("A frame of {} bytes is too long", self.body.len()))
        })?;
        let kind = KINDS.iter().position(|kind| *kind == self.kind).and_then(|at| u8::try_from(at).ok());
        let kind = kind.expect("KINDS lists every kind and has fewer than 256 entries");
        let mut bytes = Vec::with_capacity(9 + self.body.len());
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.push(kind);
        bytes.extend_from_slice(&self.command.to_le_bytes());
        bytes.extend_from_slice(&self.body);
        port.write_all(&bytes)
    }

    /// Reads one frame; an end of the stream, even between frames, is an error.
    pub fn read(port: &mut impl Read) -> io::Result<Self> {
        let mut header = [0; 9];
        port.read_exact(&mut header)?;
        let [a, b, c, d, kind, w, x, y, z] = header;
        let length = u32::from_le_bytes([a, b, c, d]);
        let kind = KINDS.get(usize::from(kind)).copied();
        let (Some(kind), true) = (kind, length <= MAX_BODY) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("Not a frame of the lab: {header:02x?}")));
        };
        let mut body = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        port.read_exact(&mut body)?;
        Ok(Self { kind, command: u32::from_le_bytes([w, x, y, z]), body })
    }
}

/// What to start in the lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Start {
    /// Program and arguments; a name without a slash is looked up in the lab's `PATH`.
    pub argv: Vec<String>,
    /// Variables beside the lab's own.
    pub env: Vec<(String, String)>,
    /// Working directory.
    pub cwd: String,
    /// Killed when it runs longer.
    pub timeout: Duration,
    /// Run it on a terminal of this size: output and errors both come as output then.
    pub terminal: Option<WindowSize>,
}

/// Size of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// What the lab says when it is up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ready {
    /// Whether it has `/dev/kvm`.
    pub kvm: bool,
    /// What did not work on the way, in words.
    pub problems: Vec<String>,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// By itself, with this status.
    Exited(i32),
    /// By a signal.
    Signalled(i32),
    /// Killed because its time was up.
    TimedOut,
    /// It could not be started.
    NotStarted(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_survives_the_wire() {
        for kind in KINDS {
            let frame = Frame { kind, command: 7, body: b"abc".to_vec() };
            let mut bytes = Vec::new();
            frame.write(&mut bytes).unwrap();
            assert_eq!(Frame::read(&mut bytes.as_slice()).unwrap(), frame);
        }
    }

    #[test]
    fn garbage_and_lengths_beyond_the_limit_are_refused() {
        let too_long = [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0];
        let unknown_kind = [0, 0, 0, 0, 99, 0, 0, 0, 0];
        for header in [too_long, unknown_kind] {
            assert_eq!(Frame::read(&mut header.as_slice()).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        let frame = Frame { kind: Kind::Input, command: 1, body: vec![0; (1 << 20) + 1] };
        assert_eq!(frame.write(&mut Vec::new()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_torn_frame_is_an_error() {
        let mut bytes = Vec::new();
        Frame { kind: Kind::Stdout, command: 1, body: b"abc".to_vec() }.write(&mut bytes).unwrap();
        bytes.pop();
        assert_eq!(Frame::read(&mut bytes.as_slice()).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
