//! The server's part of the handshake: a client says what it can, looks around, and chooses an export.

use super::super::transport::Transport;
use super::super::wire::{
    ALLOCATION, BlockSizes, Dialect, ExportInfo, FIXED_NEWSTYLE, Greeting, MAX_NAME, MAX_PAYLOAD, NBD_MAGIC, NO_ZEROES,
    OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionHeader, OptionReply, info, option, reply, transmission,
};
use super::{Export, Exported, Hold, ServerOptions};
use crate::backend::{Access, SECTOR};
use std::io::{self, Read, Write};
use zerocopy::{FromZeros, IntoBytes};

/// The most options of one client, and the longest in bytes.
const MAX_OPTIONS: usize = 256;
const MAX_OPTION: usize = 2 * MAX_NAME + 256;
/// What a transfer is best a multiple of, in bytes.
const PREFERRED: u32 = 64 << 10;

/// The number of the metadata context `base:allocation`.
pub(super) const ALLOCATION_ID: u32 = 1;

/// What a client has chosen.
#[derive(Debug)]
pub(super) struct Chosen<'a> {
    pub(super) export: &'a Export,
    _hold: Hold<'a>,
    pub(super) dialect: Dialect,
    /// Whether it wants to hear of `base:allocation`.
    pub(super) allocation: bool,
    /// Length of the export in bytes, as the client was told.
    pub(super) capacity: u64,
}

pub(super) struct Haggling<'a, 'b> {
    transport: &'b mut Transport,
    exports: &'a [Exported],
    options: &'b ServerOptions,
    dialect: Dialect,
    /// The export for which `base:allocation` was chosen.
    allocation_of: Option<String>,
    no_zeroes: bool,
}

/// How a conversation goes on after an option.
enum Turn<'a> {
    Next,
    Left,
    Chosen(&'a Export, Hold<'a>),
}

impl<'a, 'b> Haggling<'a, 'b> {
    pub(super) fn new(transport: &'b mut Transport, exports: &'a [Exported], options: &'b ServerOptions) -> Self {
        Self { transport, exports, options, dialect: Dialect::Simple, allocation_of: None, no_zeroes: false }
    }

    /// Talks with the client until it has chosen, or has left.
    ///
    /// # Errors
    /// The client breaks off, or the protocol, or talks for too long.
    pub(super) fn agree(mut self) -> io::Result<Option<Chosen<'a>>> {
        let greeting = Greeting {
            magic: NBD_MAGIC.into(),
            option_magic: OPTION_MAGIC.into(),
            flags: (FIXED_NEWSTYLE | NO_ZEROES).into(),
        };
        self.transport.write_all(greeting.as_bytes())?;
        let mut flags = [0; 4];
        self.transport.read_exact(&mut flags)?;
        let flags = u32::from_be_bytes(flags);
        if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return Err(wrong("it sets unknown flags"));
        }
        self.no_zeroes = flags & u32::from(NO_ZEROES) != 0;
        for _ in 0..MAX_OPTIONS {
            match self.turn()? {
                Turn::Next => {}
                Turn::Left => return Ok(None),
                Turn::Chosen(export, hold) => {
                    let allocation = self.allocation_of.as_ref() == Some(&export.name);
                    let capacity = export.backend.geometry().capacity;
                    return Ok(Some(Chosen { export, _hold: hold, dialect: self.dialect, allocation, capacity }));
                }
            }
        }
        Err(wrong("it asks without end"))
    }

    fn turn(&mut self) -> io::Result<Turn<'a>> {
        let mut header = OptionHeader::new_zeroed();
        self.transport.read_exact(header.as_mut_bytes())?;
        let (option, length) = (header.option.get(), header.length.get() as usize);
        if header.magic.get() != OPTION_MAGIC || length > MAX_OPTION {
            return Err(wrong("its option is none, or too long"));
        }
        let mut data = vec![0; length];
        self.transport.read_exact(&mut data)?;
        if self.options.tls.is_some()
            && !self.transport.has_tls()
            && !matches!(option, option::START_TLS | option::ABORT)
        {
            if option == option::EXPORT_NAME {
                return Err(wrong("it wants an export without TLS"));
            }
            return self.refuse(option, reply::TLS_REQUIRED, "All is encrypted here");
        }
        match option {
            option::EXPORT_NAME => self.by_name(&data),
            option::ABORT => {
                // It may have gone already.
                let _ = self.reply(option, reply::ACK, &[]);
                Ok(Turn::Left)
            }
            option::LIST if !self.options.lists => self.refuse(option, reply::POLICY, "Exports are not told of here"),
            option::LIST if data.is_empty() => self.list(),
            option::START_TLS if data.is_empty() => self.start_tls(),
            option::INFO | option::GO => self.inform(option, &data),
            option::STRUCTURED_REPLY if data.is_empty() && self.dialect != Dialect::Extended => {
                self.change_to(option, Dialect::Structured)
            }
            option::EXTENDED_HEADERS if data.is_empty() => self.change_to(option, Dialect::Extended),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(option, &data),
            option::LIST | option::START_TLS | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS => {
                self.refuse(option, reply::INVALID, "The option has no data, and is not asked for here")
            }
            _ => self.refuse(option, reply::UNSUPPORTED, "The option is not known"),
        }
    }

    fn change_to(&mut self, option: u32, dialect: Dialect) -> io::Result<Turn<'a>> {
        if !self.options.speaks(dialect) {
            return self.refuse(option, reply::UNSUPPORTED, "The option is not known");
        }
        self.dialect = dialect;
        self.acknowledge(option)
    }

    fn find(&self, name: &[u8]) -> Option<&'a Exported> {
        self.exports.iter().find(|exported| exported.export.name.as_bytes() == name)
    }

    fn by_name(&mut self, name: &[u8]) -> io::Result<Turn<'a>> {
        // The option has no reply by which this could be said.
        let exported = self.find(name).ok_or_else(|| wrong("it wants an export that is not there"))?;
        let (export, hold) = (&exported.export, exported.hold()?);
        self.transport.write_all(export_info(export, self.dialect).as_bytes())?;
        if !self.no_zeroes {
            self.transport.write_all(&[0; 124])?;
        }
        self.transport.flush()?;
        Ok(Turn::Chosen(export, hold))
    }

    fn list(&mut self) -> io::Result<Turn<'a>> {
        for Exported { export, .. } in self.exports {
            let name = export.name.as_bytes();
            let data = [&length(name.len())[..], name, export.description.as_bytes()].concat();
            self.reply(option::LIST, reply::SERVER, &data)?;
        }
        self.acknowledge(option::LIST)
    }

    fn start_tls(&mut self) -> io::Result<Turn<'a>> {
        let Some(tls) = &self.options.tls else {
            return self.refuse(option::START_TLS, reply::POLICY, "Nothing is encrypted here");
        };
        if self.transport.has_tls() {
            return self.refuse(option::START_TLS, reply::INVALID, "All is encrypted already");
        }
        self.acknowledge(option::START_TLS)?;
        let connection = tls.begin().map_err(io::Error::other)?;
        self.transport.start_tls(connection)?;
        // What was said in the open does not count.
        (self.dialect, self.allocation_of) = (Dialect::Simple, None);
        Ok(Turn::Next)
    }

    fn inform(&mut self, option: u32, data: &[u8]) -> io::Result<Turn<'a>> {
        let Some((name, rest)) = named(data) else {
            return self.refuse(option, reply::INVALID, "The option's data are cut");
        };
        let well_formed = rest
            .split_first_chunk::<2>()
            .is_some_and(|(count, kinds)| kinds.len() == 2 * usize::from(u16::from_be_bytes(*count)));
        if !well_formed {
            return self.refuse(option, reply::INVALID, "The option's data are cut");
        }
        let Some(exported) = self.find(name) else {
            return self.refuse(option, reply::UNKNOWN, "There is no such export");
        };
        let export = &exported.export;
        let hold = match (option == option::GO).then(|| exported.hold()).transpose() {
            Ok(hold) => hold,
            Err(locked) => return self.refuse(option, reply::POLICY, &locked.to_string()),
        };
        let tell = |kind: u16, data: &[u8]| [&kind.to_be_bytes()[..], data].concat();
        let about = tell(info::EXPORT, export_info(export, self.dialect).as_bytes());
        self.reply(option, reply::INFO, &about)?;
        let sizes = BlockSizes {
            minimum: u32::try_from(SECTOR).expect("a sector is short").into(),
            preferred: PREFERRED.into(),
            maximum: MAX_PAYLOAD.into(),
        };
        self.reply(option, reply::INFO, &tell(info::BLOCK_SIZE, sizes.as_bytes()))?;
        self.acknowledge(option)?;
        Ok(hold.map_or(Turn::Next, |hold| Turn::Chosen(export, hold)))
    }

    fn contexts(&mut self, option: u32, data: &[u8]) -> io::Result<Turn<'a>> {
        if self.dialect == Dialect::Simple {
            return self.refuse(option, reply::INVALID, "Replies have to be structured first");
        }
        let Some((name, queries)) = named(data).and_then(|(name, rest)| Some((name, queries(rest)?))) else {
            return self.refuse(option, reply::INVALID, "The option's data are cut");
        };
        let Some(Exported { export, .. }) = self.find(name) else {
            return self.refuse(option, reply::UNKNOWN, "There is no such export");
        };
        let sets = option == option::SET_META_CONTEXT;
        let exact = queries.iter().any(|query| *query == ALLOCATION.as_bytes());
        let listed = !sets && (queries.is_empty() || queries.iter().any(|query| *query == b"base:"));
        if sets {
            self.allocation_of = exact.then(|| export.name.clone());
        }
        if exact || listed {
            let id = if sets { ALLOCATION_ID } else { 0 };
            self.reply(option, reply::META_CONTEXT, &[&id.to_be_bytes()[..], ALLOCATION.as_bytes()].concat())?;
        }
        self.acknowledge(option)
    }

    fn acknowledge(&mut self, option: u32) -> io::Result<Turn<'a>> {
        self.reply(option, reply::ACK, &[])?;
        Ok(Turn::Next)
    }

    fn refuse(&mut self, option: u32, kind: u32, why: &str) -> io::Result<Turn<'a>> {
        self.reply(option, kind, why.as_bytes())?;
        Ok(Turn::Next)
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let header = OptionReply {
            magic: OPTION_REPLY_MAGIC.into(),
            option: option.into(),
            kind: kind.into(),
            length: u32::from_be_bytes(length(data.len())).into(),
        };
        self.transport.write_all(&[header.as_bytes(), data].concat())?;
        self.transport.flush()
    }
}

/// What may be done with an export: what both the disk and the server's owner permit.
pub(super) fn access(export: &Export) -> Access {
    match (export.access, export.backend.geometry().access) {
        (Access::ReadWrite, Access::ReadWrite) => Access::ReadWrite,
        _ => Access::ReadOnly,
    }
}

fn export_info(export: &Export, dialect: Dialect) -> ExportInfo {
    let mut flags = transmission::HAS_FLAGS | transmission::FLUSH | transmission::FUA | transmission::MULTI_CONN;
    flags |= match access(export) {
        Access::ReadOnly => transmission::READ_ONLY,
        Access::ReadWrite => transmission::TRIM | transmission::WRITE_ZEROES,
    };
    if dialect != Dialect::Simple {
        flags |= transmission::DONT_FRAGMENT;
    }
    ExportInfo { size: export.backend.geometry().capacity.into(), flags: flags.into() }
}

/// The name at the beginning of an option's data, and what comes after it.
fn named(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = data.split_first_chunk::<4>()?;
    let length = u32::from_be_bytes(*length) as usize;
    (length <= MAX_NAME).then(|| rest.split_at_checked(length)).flatten()
}

/// The queries of an option about metadata contexts.
fn queries(data: &[u8]) -> Option<Vec<&[u8]>> {
    let (count, mut rest) = data.split_first_chunk::<4>()?;
    let mut queries = Vec::new();
    for _ in 0..u32::from_be_bytes(*count) {
        let (query, after) = named(rest)?;
        queries.push(query);
        rest = after;
    }
    rest.is_empty().then_some(queries)
}

fn length(bytes: usize) -> [u8; 4] {
    u32::try_from(bytes).expect("options are a few KiB long").to_be_bytes()
}

fn wrong(how: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("The client breaks the protocol: {how}"))
}
