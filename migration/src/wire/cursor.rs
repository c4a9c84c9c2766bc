//! Reading a body field by field.

use super::{FrameError, Kind};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

/// What is left of a body.
pub(super) struct Cursor<'a> {
    kind: Kind,
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(super) fn new(kind: Kind, body: &'a [u8]) -> Self {
        Self { kind, rest: body }
    }

    /// The next fixed field.
    pub(super) fn field<T: FromBytes + Immutable + KnownLayout + Unaligned>(&mut self) -> Result<&'a T, FrameError> {
        let (field, rest) = T::ref_from_prefix(self.rest).map_err(|_| FrameError::Truncated { kind: self.kind })?;
        self.rest = rest;
        Ok(field)
    }

    /// The next `length` bytes.
    pub(super) fn bytes(&mut self, length: usize) -> Result<&'a [u8], FrameError> {
        let (bytes, rest) = self.rest.split_at_checked(length).ok_or(FrameError::Truncated { kind: self.kind })?;
        self.rest = rest;
        Ok(bytes)
    }

    /// The next `length` bytes as text.
    pub(super) fn text(&mut self, length: usize) -> Result<&'a str, FrameError> {
        std::str::from_utf8(self.bytes(length)?).map_err(|_| FrameError::NotText { kind: self.kind })
    }

    /// How many bytes are left.
    pub(super) fn left(&self) -> usize {
        self.rest.len()
    }

    /// Nothing may be left.
    pub(super) fn end(self) -> Result<(), FrameError> {
        match self.rest.len() {
            0 => Ok(()),
            extra => Err(FrameError::TrailingBytes { kind: self.kind, extra }),
        }
    }
}
