//! How a client is answered, in the language that it chose.

use super::super::outbox::Outbox;
use super::super::wire::{
    Descriptor, Dialect, EXTENDED_REPLY_MAGIC, ExtendedDescriptor, ExtendedReply, SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC, SimpleReply, StructuredReply, chunk, error_number, extent_flags,
};
use super::haggling::ALLOCATION_ID;
use crate::backend::Extent;
use crate::memory::Buffers;
use std::io;
use zerocopy::IntoBytes;

/// The request that is answered.
#[derive(Debug, Clone, Copy)]
pub(super) struct About {
    pub(super) dialect: Dialect,
    pub(super) cookie: u64,
    pub(super) offset: u64,
}

impl About {
    /// A success that has no data.
    pub(super) fn done(self, outbox: &mut Outbox) {
        match self.dialect {
            Dialect::Simple | Dialect::Structured => outbox.push(self.simple(0), None),
            Dialect::Extended => outbox.push(self.chunk(chunk::NONE, 0), None),
        }
    }

    /// A failure. Where the language has room for it, the client is told why.
    pub(super) fn failed(self, outbox: &mut Outbox, error: &io::Error) {
        let number = error_number(error);
        if self.dialect == Dialect::Simple {
            return outbox.push(self.simple(number), None);
        }
        let mut message = error.to_string();
        message.truncate(message.floor_char_boundary(256));
        let length = u16::try_from(message.len()).expect("256 bytes at most");
        let payload = [&number.to_be_bytes()[..], &length.to_be_bytes(), message.as_bytes()].concat();
        let head = [self.chunk(chunk::ERROR, payload.len() as u64), payload].concat();
        outbox.push(head, None);
    }

    /// The data of a read.
    pub(super) fn data(self, outbox: &mut Outbox, data: Buffers) {
        let head = match self.dialect {
            Dialect::Simple => self.simple(0),
            Dialect::Structured | Dialect::Extended => {
                let head = self.chunk(chunk::DATA, data.length() as u64 + 8);
                [head, self.offset.to_be_bytes().to_vec()].concat()
            }
        };
        outbox.push(head, Some(data));
    }

    /// That the data of a read are zeros; only where replies have structure.
    pub(super) fn hole(self, outbox: &mut Outbox, length: u32) {
        let mut head = self.chunk(chunk::HOLE, 12);
        head.extend(self.offset.to_be_bytes());
        head.extend(length.to_be_bytes());
        outbox.push(head, None);
    }

    /// What is known of a range.
    pub(super) fn extents(self, outbox: &mut Outbox, extents: &[Extent]) {
        let mut payload = ALLOCATION_ID.to_be_bytes().to_vec();
        let kind = if self.dialect == Dialect::Extended {
            payload.extend(u32::try_from(extents.len()).expect("some hundreds at most").to_be_bytes());
            for extent in extents {
                let flags = u64::from(extent_flags(*extent));
                payload.extend(ExtendedDescriptor { length: extent.length.into(), flags: flags.into() }.as_bytes());
            }
            chunk::BLOCK_STATUS_EXTENDED
        } else {
            for extent in extents {
                let length = u32::try_from(extent.length).expect("it lies within a request with a short header");
                payload.extend(Descriptor { length: length.into(), flags: extent_flags(*extent).into() }.as_bytes());
            }
            chunk::BLOCK_STATUS
        };
        let head = [self.chunk(kind, payload.len() as u64), payload].concat();
        outbox.push(head, None);
    }

    fn simple(self, error: u32) -> Vec<u8> {
        let reply = SimpleReply { magic: SIMPLE_REPLY_MAGIC.into(), error: error.into(), cookie: self.cookie.into() };
        reply.as_bytes().to_vec()
    }

    /// The header of the only chunk of a reply.
    fn chunk(self, kind: u16, length: u64) -> Vec<u8> {
        let (flags, kind, cookie) = (chunk::DONE.into(), kind.into(), self.cookie.into());
        if self.dialect == Dialect::Extended {
            let magic = EXTENDED_REPLY_MAGIC.into();
            let (offset, length) = (self.offset.into(), length.into());
            return ExtendedReply { magic, flags, kind, cookie, offset, length }.as_bytes().to_vec();
        }
        let length = u32::try_from(length).expect("payloads are at most 32 MiB and a little long").into();
        StructuredReply { magic: STRUCTURED_REPLY_MAGIC.into(), flags, kind, cookie, length }.as_bytes().to_vec()
    }
}
