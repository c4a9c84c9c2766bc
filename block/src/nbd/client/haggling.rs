//! The client's part of the handshake: from a new connection to an export that may be read and written.
//!
//! ```text
//! greeting -> flags -> [STARTTLS] -> EXTENDED_HEADERS or STRUCTURED_REPLY -> SET_META_CONTEXT -> GO -> Agreement
//!                                                                         GO unknown: EXPORT_NAME -> Agreement
//!                                                                         export unknown: LIST -> NoExport
//! ```

use super::super::tls::TlsClient;
use super::super::transport::Transport;
use super::super::uri::NbdUri;
use super::super::wire::{
    ALLOCATION, BlockSizes, Dialect, ExportInfo, FIXED_NEWSTYLE, Greeting, MAX_NAME, MAX_PAYLOAD, NBD_MAGIC, NO_ZEROES,
    OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionHeader, OptionReply, info, option, reply,
};
use super::error::NbdError;
use std::io::{self, Read, Write};
use std::time::Duration;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// The most replies to one option, and the longest of them in bytes. A server has a few exports, and says a little of each.
const MAX_REPLIES: usize = 4096;
const MAX_REPLY: usize = 2 * MAX_NAME + 64;
/// Zeros after the answer to `EXPORT_NAME`, of servers that cannot leave them out.
const RESERVED: usize = 124;

/// What client and server have agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Agreement {
    /// Length of the export in bytes.
    pub(super) size: u64,
    /// Its transmission flags.
    pub(super) flags: u16,
    pub(super) dialect: Dialect,
    /// The number of the `base:allocation` context, where the server has it.
    pub(super) allocation: Option<u32>,
    /// The shortest request in bytes.
    pub(super) minimum: u32,
    /// The longest payload in bytes.
    pub(super) maximum: u32,
}

impl Agreement {
    /// Whether the export has this transmission flag.
    pub(super) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// What was said before an export is chosen.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    dialect: Dialect,
    allocation: Option<u32>,
    has_zeroes: bool,
}

/// One conversation.
pub(super) struct Haggling<'a> {
    transport: &'a mut Transport,
    uri: &'a NbdUri,
    within: Duration,
}

/// A reply to an option that is none of the data asked for.
enum Last {
    Acknowledged,
    Error { kind: u32, message: String },
}

impl<'a> Haggling<'a> {
    /// A conversation about the export of `uri` on a new connection, each of whose steps takes at most `within`.
    pub(super) fn new(transport: &'a mut Transport, uri: &'a NbdUri, within: Duration) -> Self {
        Self { transport, uri, within }
    }

    /// Says all that comes before the choice of an export, by TLS if a client of TLS is given.
    pub(super) fn begin(&mut self, tls: Option<&TlsClient>) -> Result<Terms, NbdError> {
        let has_zeroes = self.greet()?;
        if let Some(tls) = tls {
            self.start_tls(tls)?;
        }
        let dialect = self.dialect()?;
        let allocation = if dialect == Dialect::Simple { None } else { self.allocation()? };
        Ok(Terms { dialect, allocation, has_zeroes })
    }

    /// What would be agreed on, without choosing the export; `None` if the server does not tell.
    pub(super) fn look(&mut self, terms: Terms) -> Result<Option<Agreement>, NbdError> {
        self.ask_about(option::INFO, terms)
    }

    /// Chooses the export.
    pub(super) fn choose(mut self, terms: Terms) -> Result<Agreement, NbdError> {
        if let Some(agreement) = self.ask_about(option::GO, terms)? {
            return Ok(agreement);
        }
        let export = self.by_name(terms.has_zeroes)?;
        self.agreement(terms, export, None)
    }

    /// The names of the server's exports, by TLS if a client of TLS is given.
    pub(super) fn list(mut self, tls: Option<&TlsClient>) -> Result<Vec<String>, NbdError> {
        self.greet()?;
        if let Some(tls) = tls {
            self.start_tls(tls)?;
        }
        let names = self.exports()?;
        self.send_option(option::ABORT, &[])?;
        Ok(names)
    }

    /// Whether the server appends zeros where it should not have to.
    fn greet(&mut self) -> Result<bool, NbdError> {
        let not_nbd = |why: &str| NbdError::NotNbd { address: self.uri.address.to_string(), why: why.to_owned() };
        let (no_magic, old, not_fixed) = (
            not_nbd("it does not greet as one"),
            not_nbd("it greets as servers before 2010 did"),
            not_nbd("it offers only the first newstyle"),
        );
        let mut greeting = Greeting::new_zeroed();
        self.receive(greeting.as_mut_bytes())?;
        match (greeting.magic.get(), greeting.option_magic.get()) {
            (NBD_MAGIC, OPTION_MAGIC) => {}
            (NBD_MAGIC, _) => return Err(old),
            _ => return Err(no_magic),
        }
        let flags = greeting.flags.get();
        if flags & FIXED_NEWSTYLE == 0 {
            return Err(not_fixed);
        }
        let answer = u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES));
        self.send(&answer.to_be_bytes())?;
        Ok(flags & NO_ZEROES == 0)
    }

    fn start_tls(&mut self, tls: &TlsClient) -> Result<(), NbdError> {
        self.send_option(option::START_TLS, &[])?;
        match self.last_reply(option::START_TLS)? {
            Last::Acknowledged => {}
            Last::Error { message, .. } => return Err(self.refused("TLS", message)),
        }
        let connection = tls.begin().map_err(|error| self.broken(io::Error::other(error)))?;
        self.transport.start_tls(connection).map_err(|error| self.broken(error))
    }

    fn dialect(&mut self) -> Result<Dialect, NbdError> {
        for (option, dialect) in
            [(option::EXTENDED_HEADERS, Dialect::Extended), (option::STRUCTURED_REPLY, Dialect::Structured)]
        {
            self.send_option(option, &[])?;
            match self.last_reply(option)? {
                Last::Acknowledged => return Ok(dialect),
                Last::Error { kind: reply::TLS_REQUIRED, .. } => {
                    return Err(NbdError::TlsWanted { address: self.uri.address.to_string() });
                }
                // It does not know the option, or not in this company.
                Last::Error { .. } => {}
            }
        }
        Ok(Dialect::Simple)
    }

    /// Asks for the one context that is of use.
    fn allocation(&mut self) -> Result<Option<u32>, NbdError> {
        let mut data = self.named();
        data.extend(1_u32.to_be_bytes());
        data.extend(length(ALLOCATION.len()));
        data.extend(ALLOCATION.bytes());
        self.send_option(option::SET_META_CONTEXT, &data)?;
        let mut allocation = None;
        let last = self.replies(option::SET_META_CONTEXT, reply::META_CONTEXT, |data| {
            let (id, name) = data.split_first_chunk::<4>().ok_or("a metadata context without a number")?;
            if name == ALLOCATION.as_bytes() {
                allocation = Some(u32::from_be_bytes(*id));
            }
            Ok(())
        })?;
        // Without it all is taken for data. That the export is missing is said once more.
        Ok(allocation.filter(|_| matches!(last, Last::Acknowledged)))
    }

    /// Asks about the export, and chooses it if `option` is `GO`. `None` if the server does not know the option.
    fn ask_about(&mut self, option: u32, terms: Terms) -> Result<Option<Agreement>, NbdError> {
        let mut data = self.named();
        data.extend(1_u16.to_be_bytes());
        data.extend(info::BLOCK_SIZE.to_be_bytes());
        self.send_option(option, &data)?;
        let (mut export, mut sizes) = (None, None);
        let last = self.replies(option, reply::INFO, |data| {
            let (kind, data) = data.split_first_chunk::<2>().ok_or("information without a kind")?;
            match u16::from_be_bytes(*kind) {
                info::EXPORT => {
                    export = Some(ExportInfo::read_from_bytes(data).map_err(|_| "information of another length")?);
                }
                info::BLOCK_SIZE => {
                    sizes = Some(BlockSizes::read_from_bytes(data).map_err(|_| "block sizes of another length")?);
                }
                _ => {}
            }
            Ok(())
        })?;
        match last {
            Last::Acknowledged => {}
            Last::Error { kind: reply::UNSUPPORTED, .. } => return Ok(None),
            Last::Error { kind: reply::UNKNOWN, .. } => return Err(self.no_export()),
            Last::Error { kind: reply::TLS_REQUIRED, .. } => {
                return Err(NbdError::TlsWanted { address: self.uri.address.to_string() });
            }
            Last::Error { message, .. } => return Err(self.refused("the export", message)),
        }
        let export = export.ok_or_else(|| self.violation("it agrees without telling the size"))?;
        self.agreement(terms, export, sizes).map(Some)
    }

    fn agreement(&self, terms: Terms, export: ExportInfo, sizes: Option<BlockSizes>) -> Result<Agreement, NbdError> {
        let Terms { dialect, allocation, has_zeroes: _ } = terms;
        let ExportInfo { size, flags } = export;
        // Who does not tell takes any request (proto.md, "Block sizes").
        let (minimum, maximum) =
            sizes.map_or((1, MAX_PAYLOAD), |sizes| (sizes.minimum.get(), sizes.maximum.get().min(MAX_PAYLOAD)));
        if !minimum.is_power_of_two() || minimum > maximum {
            return Err(self.violation(&format!("it takes requests of {minimum} to {maximum} bytes")));
        }
        Ok(Agreement { size: size.get(), flags: flags.get(), dialect, allocation, minimum, maximum })
    }

    /// What servers without `GO` take. They hang up if they do not have the export.
    fn by_name(&mut self, has_zeroes: bool) -> Result<ExportInfo, NbdError> {
        let export = self.uri.export.clone();
        self.send_option(option::EXPORT_NAME, export.as_bytes())?;
        let mut info = ExportInfo::new_zeroed();
        self.receive(info.as_mut_bytes()).map_err(|error| match error {
            NbdError::Broken { source, .. } if source.kind() == io::ErrorKind::UnexpectedEof => self.no_export(),
            other => other,
        })?;
        if has_zeroes {
            self.receive(&mut [0; RESERVED])?;
        }
        Ok(info)
    }

    fn no_export(&mut self) -> NbdError {
        let exports = self.exports().unwrap_or_default();
        NbdError::NoExport { address: self.uri.address.to_string(), export: self.uri.export.clone(), exports }
    }

    fn exports(&mut self) -> Result<Vec<String>, NbdError> {
        self.send_option(option::LIST, &[])?;
        let mut names = Vec::new();
        let last = self.replies(option::LIST, reply::SERVER, |data| {
            let (length, rest) = data.split_first_chunk::<4>().ok_or("an export without a name")?;
            let length = u32::from_be_bytes(*length) as usize;
            let name = rest.get(..length).ok_or("an export's name that is longer than its message")?;
            names.push(String::from_utf8_lossy(name).into_owned());
            Ok(())
        })?;
        match last {
            Last::Acknowledged => Ok(names),
            Last::Error { message, .. } => Err(self.refused("a list of its exports", message)),
        }
    }

    /// The export's name as options begin with it.
    fn named(&self) -> Vec<u8> {
        let name = self.uri.export.as_bytes();
        [&length(name.len())[..], name].concat()
    }

    fn last_reply(&mut self, option: u32) -> Result<Last, NbdError> {
        self.replies(option, u32::MAX, |_| Ok(()))
    }

    /// Reads replies to `option` until the last, and gives the data of those of `kind` to `each`.
    fn replies(
        &mut self,
        option: u32,
        kind: u32,
        mut each: impl FnMut(&[u8]) -> Result<(), &'static str>,
    ) -> Result<Last, NbdError> {
        for _ in 0..MAX_REPLIES {
            let mut header = OptionReply::new_zeroed();
            self.receive(header.as_mut_bytes())?;
            let length = header.length.get() as usize;
            if header.magic.get() != OPTION_REPLY_MAGIC || header.option.get() != option || length > MAX_REPLY {
                return Err(self.violation("it answers an option by something else"));
            }
            let mut data = vec![0; length];
            self.receive(&mut data)?;
            match header.kind.get() {
                reply::ACK => return Ok(Last::Acknowledged),
                error if error & reply::ERROR != 0 => {
                    return Ok(Last::Error { kind: error, message: message(error, &data) });
                }
                other if other == kind => each(&data).map_err(|how| self.violation(&format!("it sends {how}")))?,
                // Nothing that was asked for.
                _ => {}
            }
        }
        Err(self.violation("it answers an option without end"))
    }

    fn send_option(&mut self, option: u32, data: &[u8]) -> Result<(), NbdError> {
        let length = u32::try_from(data.len()).expect("options are a few KiB long");
        let header = OptionHeader { magic: OPTION_MAGIC.into(), option: option.into(), length: length.into() };
        self.send(&[header.as_bytes(), data].concat())
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), NbdError> {
        let sent = self.transport.write_all(bytes).and_then(|()| self.transport.flush());
        sent.map_err(|error| self.broken(error))
    }

    fn receive(&mut self, bytes: &mut [u8]) -> Result<(), NbdError> {
        let received = self.transport.read_exact(bytes);
        received.map_err(|error| self.broken(error))
    }

    fn broken(&self, source: io::Error) -> NbdError {
        let address = self.uri.address.to_string();
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => NbdError::Silent { address, within: self.within },
            _ => NbdError::Broken { address, source },
        }
    }

    fn refused(&self, what: &'static str, why: String) -> NbdError {
        NbdError::Refused { address: self.uri.address.to_string(), what, why }
    }

    fn violation(&self, how: &str) -> NbdError {
        NbdError::Violation { address: self.uri.address.to_string(), how: how.to_owned() }
    }
}

fn length(bytes: usize) -> [u8; 4] {
    u32::try_from(bytes).expect("names are 4096 bytes long at most").to_be_bytes()
}

/// What a server says of an error, or what its number says.
fn message(kind: u32, data: &[u8]) -> String {
    let told = String::from_utf8_lossy(data).trim().to_owned();
    if !told.is_empty() {
        return told;
    }
    let by_number = match kind {
        reply::UNSUPPORTED => "it does not know that",
        reply::POLICY => "it may not",
        reply::INVALID => "it holds the request for malformed",
        reply::TLS_REQUIRED => "it wants TLS first",
        reply::UNKNOWN => "it does not have it",
        reply::SHUTDOWN => "it is about to end",
        reply::TOO_BIG => "the request is too long for it",
        _ => return format!("error {:#x}", kind & !reply::ERROR),
    };
    by_number.to_owned()
}
