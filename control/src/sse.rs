//! Server-Sent Events: how [`Event`]s look on the wire, and how the client reads them back.
//!
//! Format: <https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream>. The server writes
//! `id`, `event` and one line of `data`; the JSON in `data` repeats both, so the reader needs nothing else.

use crate::event::Event;

/// The media type of the stream.
pub(crate) const CONTENT_TYPE: &str = "text/event-stream";

/// A comment, which readers skip; it shows both ends that the other one is there.
pub(crate) const HEARTBEAT: &str = ": heartbeat\n\n";

/// A line longer than this is not from a Godwit.
const LINE_MAX: usize = 1 << 20;

/// Appends `event` to `out`.
pub(crate) fn write(event: &Event, out: &mut Vec<u8>) -> Result<(), serde_json::Error> {
    out.extend_from_slice(format!("id: {}\nevent: {}\ndata: ", event.sequence, event.what.name()).as_bytes());
    // One line: serde_json escapes line feeds inside strings and writes none between tokens.
    serde_json::to_writer(&mut *out, event)?;
    out.extend_from_slice(b"\n\n");
    Ok(())
}

/// The peer sends a line without end.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("The stream has a line of more than {LINE_MAX} bytes")]
pub(crate) struct LongLine;

/// Takes the `data` of events out of a stream that arrives in pieces.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    bytes: Vec<u8>,
    data: Vec<u8>,
}

impl Reader {
    /// Takes in the next piece.
    pub(crate) fn push(&mut self, piece: &[u8]) -> Result<(), LongLine> {
        if self.bytes.len() + self.data.len() + piece.len() > LINE_MAX {
            return Err(LongLine);
        }
        self.bytes.extend_from_slice(piece);
        Ok(())
    }

    /// The `data` of the next whole event.
    pub(crate) fn next(&mut self) -> Option<Vec<u8>> {
        while let Some(end) = self.bytes.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.bytes.drain(..=end).collect();
            let line = line.trim_ascii_end();
            if let Some(data) = line.strip_prefix(b"data:") {
                self.data.extend_from_slice(data);
            } else if line.is_empty() && !self.data.is_empty() {
                return Some(std::mem::take(&mut self.data));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Happening;
    use proptest::prelude::*;

    fn event(cause: &str) -> Event {
        Event {
            sequence: 7,
            at_ms: 1,
            what: Happening::DeviceNeedsReset { device: "blk0".to_owned(), cause: cause.to_owned() },
        }
    }

    #[test]
    fn an_event_is_three_lines_and_an_empty_one() {
        let mut out = Vec::new();
        write(&event("two\nlines"), &mut out).unwrap();
        let expected = "id: 7\nevent: device_needs_reset\n\
             data: {\"sequence\":7,\"at_ms\":1,\"what\":{\"type\":\"device_needs_reset\",\"device\":\"blk0\",\
             \"cause\":\"two\\nlines\"}}\n\n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn comments_and_unknown_lines_are_skipped() {
        let mut reader = Reader::default();
        reader.push(b": hello\r\n\r\nretry: 5\nid: 1\n\ndata: {}\r\n\r\ndata:[]").unwrap();
        assert_eq!(reader.next().as_deref(), Some(b" {}".as_slice()));
        assert_eq!(reader.next(), None);
        reader.push(b"\n\n").unwrap();
        assert_eq!(reader.next().as_deref(), Some(b"[]".as_slice()));
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let mut reader = Reader::default();
        assert_eq!(reader.push(&vec![b'x'; LINE_MAX]), Ok(()));
        assert_eq!(reader.push(b"x"), Err(LongLine));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_however_it_is_cut(causes in prop::collection::vec(".*", 1..5), cut in 1..40_usize) {
            let mut stream = HEARTBEAT.as_bytes().to_vec();
            for cause in &causes {
                write(&event(cause), &mut stream).unwrap();
            }
            let (mut reader, mut read) = (Reader::default(), Vec::new());
            for piece in stream.chunks(cut) {
                reader.push(piece).unwrap();
                while let Some(data) = reader.next() {
                    read.push(serde_json::from_slice::<Event>(&data).unwrap());
                }
            }
            prop_assert_eq!(read, causes.iter().map(|cause| event(cause)).collect::<Vec<_>>());
        }
    }
}
