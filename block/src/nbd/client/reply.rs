//! What a server says in the transmission phase, one message after the other.
//!
//! Messages are understood without knowing what was asked. Data of reads are not part of them: they follow. Whether an answer
//! fits its request is judged by the channel.

use super::super::inbox::{CAPACITY, Inbox};
use super::super::wire::{
    Descriptor, Dialect, EXTENDED_REPLY_MAGIC, ExtendedDescriptor, ExtendedReply, SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC, SimpleReply, StructuredReply, chunk, extent_kind,
};
use crate::backend::Extent;
use zerocopy::FromBytes;
use zerocopy::big_endian::U32;

/// The longest payload that is looked at whole: with its header it fits the inbox.
const MAX_WHOLE: u64 = CAPACITY as u64 - 64;

/// A message of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Heard {
    /// The request that it is about.
    pub(super) cookie: u64,
    /// Whether it is the last about that.
    pub(super) is_last: bool,
    pub(super) what: What,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum What {
    /// A success without structure. If it answers a read, all data of that follow.
    Simple,
    /// So many bytes from an offset on, which follow.
    Data { offset: u64, length: u64 },
    /// Zeros.
    Hole { offset: u64, length: u64 },
    /// What is known of a range in a metadata context.
    Extents { context: u32, extents: Vec<Extent> },
    /// A failure.
    Error { number: u32, message: String },
    /// Nothing more.
    Nothing,
}

/// A chunk's header, long or short.
struct Header {
    kind: u16,
    flags: u16,
    cookie: u64,
    /// Of the payload, in bytes.
    length: u64,
    /// Of the header itself, in bytes.
    own_length: usize,
}

/// The next message in `inbox`, as soon as all of it is there.
///
/// # Errors
/// How the server breaks the rules.
pub(super) fn next(inbox: &mut Inbox, dialect: Dialect) -> Result<Option<Heard>, String> {
    let Some(magic) = inbox.peek::<U32>().map(U32::get) else { return Ok(None) };
    let header = match (magic, dialect) {
        (SIMPLE_REPLY_MAGIC, Dialect::Simple | Dialect::Structured) => return Ok(simple(inbox)),
        (STRUCTURED_REPLY_MAGIC, Dialect::Structured) => inbox.peek::<StructuredReply>().map(|header| Header {
            kind: header.kind.get(),
            flags: header.flags.get(),
            cookie: header.cookie.get(),
            length: header.length.get().into(),
            own_length: size_of::<StructuredReply>(),
        }),
        (EXTENDED_REPLY_MAGIC, Dialect::Extended) => inbox.peek::<ExtendedReply>().map(|header| Header {
            kind: header.kind.get(),
            flags: header.flags.get(),
            cookie: header.cookie.get(),
            length: header.length.get(),
            own_length: size_of::<ExtendedReply>(),
        }),
        _ => return Err(format!("a message begins with {magic:#010x}")),
    };
    header.map_or(Ok(None), |header| chunk_after(inbox, &header))
}

fn simple(inbox: &mut Inbox) -> Option<Heard> {
    let reply = inbox.peek::<SimpleReply>()?;
    inbox.consume(size_of::<SimpleReply>());
    let what = match reply.error.get() {
        0 => What::Simple,
        number => What::Error { number, message: String::new() },
    };
    Some(Heard { cookie: reply.cookie.get(), is_last: true, what })
}

fn chunk_after(inbox: &mut Inbox, header: &Header) -> Result<Option<Heard>, String> {
    let &Header { kind, flags, cookie, length, own_length } = header;
    // Of data only their place is part of the message.
    let part = match kind {
        chunk::DATA => length.min(8),
        _ => length,
    };
    if part > MAX_WHOLE {
        return Err(format!("a message of kind {kind} is {length} bytes long"));
    }
    let part = usize::try_from(part).expect("it fits the inbox");
    let Some(payload) = inbox.bytes().get(own_length..own_length + part) else { return Ok(None) };
    let what = understand(kind, length, payload)?;
    inbox.consume(own_length + part);
    Ok(Some(Heard { cookie, is_last: flags & chunk::DONE != 0, what }))
}

fn understand(kind: u16, length: u64, payload: &[u8]) -> Result<What, String> {
    let too_short = || format!("a message of kind {kind} has only {length} bytes");
    match kind {
        chunk::NONE if length == 0 => Ok(What::Nothing),
        chunk::DATA if length > 8 => {
            let (offset, _) = payload.split_first_chunk::<8>().ok_or_else(too_short)?;
            Ok(What::Data { offset: u64::from_be_bytes(*offset), length: length - 8 })
        }
        chunk::HOLE if length == 12 => {
            let (offset, rest) = payload.split_first_chunk::<8>().ok_or_else(too_short)?;
            let (hole, _) = rest.split_first_chunk::<4>().ok_or_else(too_short)?;
            Ok(What::Hole { offset: u64::from_be_bytes(*offset), length: u32::from_be_bytes(*hole).into() })
        }
        chunk::BLOCK_STATUS => {
            let (context, rest) = payload.split_first_chunk::<4>().ok_or_else(too_short)?;
            let list = <[Descriptor]>::ref_from_bytes(rest).map_err(|_| too_short())?;
            let extent = |one: &Descriptor| Extent {
                length: one.length.get().into(),
                kind: extent_kind(one.flags.get().into()),
            };
            Ok(What::Extents { context: u32::from_be_bytes(*context), extents: list.iter().map(extent).collect() })
        }
        chunk::BLOCK_STATUS_EXTENDED => {
            let (context, rest) = payload.split_first_chunk::<4>().ok_or_else(too_short)?;
            // The number of descriptors is told twice.
            let (count, rest) = rest.split_first_chunk::<4>().ok_or_else(too_short)?;
            let list = <[ExtendedDescriptor]>::ref_from_bytes(rest).map_err(|_| too_short())?;
            if list.len() != u32::from_be_bytes(*count) as usize {
                return Err("a block status has another number of extents than it says".to_owned());
            }
            let extent =
                |one: &ExtendedDescriptor| Extent { length: one.length.get(), kind: extent_kind(one.flags.get()) };
            Ok(What::Extents { context: u32::from_be_bytes(*context), extents: list.iter().map(extent).collect() })
        }
        error if error & chunk::IS_ERROR != 0 => {
            let (number, rest) = payload.split_first_chunk::<4>().ok_or_else(too_short)?;
            let (told, rest) = rest.split_first_chunk::<2>().ok_or_else(too_short)?;
            let message = rest.get(..u16::from_be_bytes(*told).into()).ok_or_else(too_short)?;
            let number = u32::from_be_bytes(*number);
            Ok(What::Error { number, message: String::from_utf8_lossy(message).into_owned() })
        }
        _ => Err(format!("a message of kind {kind} with {length} bytes is none")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::ExtentKind;
    use proptest::prelude::*;

    fn hear(dialect: Dialect, bytes: &[u8]) -> Result<Option<Heard>, String> {
        let mut inbox = Inbox::holding(bytes);
        let heard = next(&mut inbox, dialect);
        if let Ok(None) = heard {
            assert_eq!(inbox.bytes(), bytes, "what is not understood yet stays");
        }
        heard
    }

    fn structured(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap();
        [
            &STRUCTURED_REPLY_MAGIC.to_be_bytes()[..],
            &flags.to_be_bytes(),
            &kind.to_be_bytes(),
            &7_u64.to_be_bytes(),
            &length.to_be_bytes(),
            payload,
        ]
        .concat()
    }

    fn extended(kind: u16, payload: &[u8]) -> Vec<u8> {
        let length = payload.len() as u64;
        [
            &EXTENDED_REPLY_MAGIC.to_be_bytes()[..],
            &1_u16.to_be_bytes(),
            &kind.to_be_bytes(),
            &7_u64.to_be_bytes(),
            &0_u64.to_be_bytes(),
            &length.to_be_bytes(),
            payload,
        ]
        .concat()
    }

    #[test]
    fn simple_replies() {
        let reply =
            |error: u32| [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &error.to_be_bytes(), &9_u64.to_be_bytes()].concat();
        let heard = |what| Ok(Some(Heard { cookie: 9, is_last: true, what }));
        assert_eq!(hear(Dialect::Simple, &reply(0)), heard(What::Simple));
        assert_eq!(hear(Dialect::Structured, &reply(28)), heard(What::Error { number: 28, message: String::new() }));
        assert_eq!(hear(Dialect::Simple, &reply(0)[..15]), Ok(None));
        assert!(hear(Dialect::Extended, &reply(0)).unwrap_err().contains("0x67446698"));
    }

    #[test]
    fn chunks() {
        let heard = |is_last, what| Ok(Some(Heard { cookie: 7, is_last, what }));
        let data = [&4096_u64.to_be_bytes()[..], &[1; 100]].concat();
        for cut in 0..28 {
            assert_eq!(hear(Dialect::Structured, &structured(chunk::DATA, 0, &data)[..cut]), Ok(None), "{cut}");
        }
        let what = What::Data { offset: 4096, length: 100 };
        assert_eq!(hear(Dialect::Structured, &structured(chunk::DATA, 0, &data)[..28]), heard(false, what));
        let hole = [&512_u64.to_be_bytes()[..], &1024_u32.to_be_bytes()].concat();
        let what = What::Hole { offset: 512, length: 1024 };
        assert_eq!(hear(Dialect::Structured, &structured(chunk::HOLE, 1, &hole)), heard(true, what));
        assert_eq!(hear(Dialect::Structured, &structured(chunk::NONE, 1, &[])), heard(true, What::Nothing));
        let error = [&5_u32.to_be_bytes()[..], &4_u16.to_be_bytes(), b"lost and more"].concat();
        let what = What::Error { number: 5, message: "lost".into() };
        assert_eq!(hear(Dialect::Structured, &structured(chunk::ERROR + 1, 1, &error)), heard(true, what));
    }

    #[test]
    fn extents_short_and_long() {
        let extents =
            vec![Extent { length: 4096, kind: ExtentKind::Data }, Extent { length: 8192, kind: ExtentKind::Hole }];
        let short: Vec<u8> = [5_u32, 4096, 0, 8192, 3].iter().flat_map(|word| word.to_be_bytes()).collect();
        let what = What::Extents { context: 5, extents: extents.clone() };
        let heard = hear(Dialect::Structured, &structured(chunk::BLOCK_STATUS, 1, &short));
        assert_eq!(heard, Ok(Some(Heard { cookie: 7, is_last: true, what: what.clone() })));
        let words = |count: u64| {
            let list = [5 << 32 | count, 4096, 0, 8192, 3];
            list.iter().flat_map(|word: &u64| word.to_be_bytes()).collect::<Vec<u8>>()
        };
        let heard = hear(Dialect::Extended, &extended(chunk::BLOCK_STATUS_EXTENDED, &words(2)));
        assert_eq!(heard, Ok(Some(Heard { cookie: 7, is_last: true, what })));
        let wrong = hear(Dialect::Extended, &extended(chunk::BLOCK_STATUS_EXTENDED, &words(3)));
        assert!(wrong.unwrap_err().contains("another number of extents"));
    }

    #[test]
    fn what_is_no_message_is_named() {
        let wrong = |bytes: &[u8]| hear(Dialect::Structured, bytes).unwrap_err();
        assert!(wrong(b"HTTP/1.1 400 Bad Request").contains("0x48545450"));
        assert!(wrong(&structured(3, 0, &[])).contains("kind 3"));
        assert!(wrong(&structured(chunk::NONE, 1, &[0])).contains("kind 0"));
        assert!(wrong(&structured(chunk::DATA, 1, &[0; 8])).contains("kind 1"));
        assert!(wrong(&structured(chunk::HOLE, 1, &[0; 11])).contains("kind 2"));
        assert!(wrong(&structured(chunk::BLOCK_STATUS, 1, &[0; 13])).contains("only 13 bytes"));
        assert!(wrong(&structured(chunk::ERROR, 1, &[0, 0, 0, 5, 0, 9])).contains("only 6 bytes"));
        let mut long = structured(chunk::BLOCK_STATUS, 1, &[]);
        long[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(wrong(&long).contains("4294967295 bytes long"));
    }

    proptest! {
        /// Whatever comes, it is understood, waited for, or refused.
        #[test]
        fn anything_is_survived(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            magic in prop::sample::select(vec![SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, EXTENDED_REPLY_MAGIC]),
            dialect in prop::sample::select(vec![Dialect::Simple, Dialect::Structured, Dialect::Extended]),
        ) {
            let _ = hear(dialect, &[&magic.to_be_bytes()[..], &bytes].concat());
        }
    }
}
