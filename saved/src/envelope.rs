//! The envelope: sections by name, encoded and decoded with every length bounded.

use crate::Saved;
use std::collections::BTreeMap;
use thiserror::Error;

const MAGIC: &[u8; 8] = b"GWSTATE1";

/// The longest section id or kind, in bytes.
pub const MAX_NAME: usize = 64;
/// The longest body of one section, in bytes. The largest real one, 32 vCPUs' XSAVE areas apart, is a few KiB.
pub const MAX_BODY: usize = 1 << 20;
/// The most sections in one state: 32 vCPUs, the chips and every device leave room.
pub const MAX_SECTIONS: usize = 256;

/// Why a saved state could not be written or read.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SavedError {
    /// The bytes do not begin with this format's magic.
    #[error("The saved state does not begin with its magic bytes")]
    NotSavedState,
    /// The bytes end inside a field.
    #[error("The saved state ends early, at byte {at}")]
    Truncated {
        /// Offset of the field that is incomplete, in bytes.
        at: usize,
    },
    /// Bytes follow the last section.
    #[error("The saved state has {extra} bytes after its last section")]
    TrailingBytes {
        /// How many bytes are left over.
        extra: usize,
    },
    /// A length is over its maximum.
    #[error("{what} of {found} in the saved state is over the maximum of {max}")]
    TooLong {
        /// Which length.
        what: &'static str,
        /// The value found.
        found: usize,
        /// The largest value accepted.
        max: usize,
    },
    /// A name is not UTF-8.
    #[error("A section name in the saved state is not UTF-8")]
    NameNotText,
    /// Two sections have one id.
    #[error("Section {id:?} is in the saved state twice")]
    Duplicate {
        /// The id.
        id: String,
    },
    /// A section that the guest's configuration asks for is not there.
    #[error("Section {id:?} is missing from the saved state")]
    Missing {
        /// The id.
        id: String,
    },
    /// A section has another kind or version than the one asked for.
    #[error("Section {id:?} is {found_kind} version {found_version}, not {kind} version {version}")]
    WrongKind {
        /// The id.
        id: String,
        /// The kind found.
        found_kind: String,
        /// The version found.
        found_version: u16,
        /// The kind asked for.
        kind: &'static str,
        /// The version asked for.
        version: u16,
    },
    /// A body does not decode as its type.
    #[error("Section {id:?} does not decode as {kind} version {version}")]
    BadBody {
        /// The id.
        id: String,
        /// The kind asked for.
        kind: &'static str,
        /// The version asked for.
        version: u16,
    },
    /// Nobody took some sections: the guest's configuration does not have these devices.
    #[error("Nothing here restores the sections {}", ids.join(", "))]
    LeftOver {
        /// Their ids.
        ids: Vec<String>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Section {
    kind: String,
    version: u16,
    body: Vec<u8>,
}

/// The sections of one guest, by id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SavedState {
    sections: BTreeMap<String, Section>,
}

impl SavedState {
    /// A state without sections.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the section `id`.
    ///
    /// # Errors
    /// [`SavedError::Duplicate`] if `id` is there already, [`SavedError::TooLong`] if the id or body is over its maximum.
    pub fn put<T: Saved>(&mut self, id: &str, value: &T) -> Result<(), SavedError> {
        within("A section name", id.len(), MAX_NAME)?;
        let body = postcard::to_allocvec(value).map_err(|_| SavedError::BadBody {
            id: id.to_owned(),
            kind: T::KIND,
            version: T::VERSION,
        })?;
        within("A section body", body.len(), MAX_BODY)?;
        self.insert(id.to_owned(), Section { kind: T::KIND.to_owned(), version: T::VERSION, body })
    }

    /// Takes the section `id` out and decodes it.
    ///
    /// # Errors
    /// [`SavedError::Missing`], [`SavedError::WrongKind`] or [`SavedError::BadBody`].
    pub fn take<T: Saved>(&mut self, id: &str) -> Result<T, SavedError> {
        let section = self.sections.remove(id).ok_or_else(|| SavedError::Missing { id: id.to_owned() })?;
        if section.kind != T::KIND || section.version != T::VERSION {
            return Err(SavedError::WrongKind {
                id: id.to_owned(),
                found_kind: section.kind,
                found_version: section.version,
                kind: T::KIND,
                version: T::VERSION,
            });
        }
        match postcard::take_from_bytes(&section.body) {
            Ok((value, [])) => Ok(value),
            _ => Err(SavedError::BadBody { id: id.to_owned(), kind: T::KIND, version: T::VERSION }),
        }
    }

    /// Ends the reading: every section must have been taken.
    ///
    /// # Errors
    /// [`SavedError::LeftOver`] with the ids that nobody took.
    pub fn finish(self) -> Result<(), SavedError> {
        if self.sections.is_empty() {
            Ok(())
        } else {
            Err(SavedError::LeftOver { ids: self.sections.into_keys().collect() })
        }
    }

    /// The state as bytes.
    ///
    /// # Panics
    /// Never: `put` and `decode` bound every length below its field's range.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        const BOUNDED: &str = "lengths are bounded on entry";
        let mut out = MAGIC.to_vec();
        out.extend(u32::try_from(self.sections.len()).expect(BOUNDED).to_le_bytes());
        for (id, Section { kind, version, body }) in &self.sections {
            for name in [id, kind] {
                out.extend(u16::try_from(name.len()).expect(BOUNDED).to_le_bytes());
                out.extend(name.as_bytes());
            }
            out.extend(version.to_le_bytes());
            out.extend(u32::try_from(body.len()).expect(BOUNDED).to_le_bytes());
            out.extend(body);
        }
        out
    }

    /// Reads what [`encode`](Self::encode) wrote. Bodies are decoded later, by [`take`](Self::take).
    ///
    /// # Errors
    /// Any malformation, by name; see [`SavedError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, SavedError> {
        let mut reader = Reader { bytes, at: 0 };
        if reader.take(MAGIC.len()).map_err(|_| SavedError::NotSavedState)? != MAGIC {
            return Err(SavedError::NotSavedState);
        }
        let count = reader.u32()?;
        within("The number of sections", count, MAX_SECTIONS)?;
        let mut state = Self::new();
        for _ in 0..count {
            let id = reader.name()?;
            let kind = reader.name()?;
            let version = reader.u16()?;
            let length = reader.u32()?;
            within("A section body", length, MAX_BODY)?;
            let body = reader.take(length)?.to_vec();
            state.insert(id, Section { kind, version, body })?;
        }
        match bytes.len() - reader.at {
            0 => Ok(state),
            extra => Err(SavedError::TrailingBytes { extra }),
        }
    }

    fn insert(&mut self, id: String, section: Section) -> Result<(), SavedError> {
        within("The number of sections", self.sections.len() + 1, MAX_SECTIONS)?;
        match self.sections.entry(id) {
            std::collections::btree_map::Entry::Vacant(place) => {
                place.insert(section);
                Ok(())
            }
            std::collections::btree_map::Entry::Occupied(place) => {
                Err(SavedError::Duplicate { id: place.key().clone() })
            }
        }
    }
}

fn within(what: &'static str, found: usize, max: usize) -> Result<(), SavedError> {
    if found <= max { Ok(()) } else { Err(SavedError::TooLong { what, found, max }) }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], SavedError> {
        let rest = &self.bytes[self.at..];
        let field = rest.get(..length).ok_or(SavedError::Truncated { at: self.at })?;
        self.at += length;
        Ok(field)
    }

    fn u16(&mut self) -> Result<u16, SavedError> {
        let field = self.take(2)?;
        Ok(u16::from_le_bytes([field[0], field[1]]))
    }

    fn u32(&mut self) -> Result<usize, SavedError> {
        let field = self.take(4)?;
        Ok(u32::from_le_bytes([field[0], field[1], field[2], field[3]]) as usize)
    }

    fn name(&mut self) -> Result<String, SavedError> {
        let length = usize::from(self.u16()?);
        within("A section name", length, MAX_NAME)?;
        String::from_utf8(self.take(length)?.to_vec()).map_err(|_| SavedError::NameNotText)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::{Deserialize, Serialize};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct LampSavedV1 {
        on: bool,
        brightness: u16,
    }
    impl Saved for LampSavedV1 {
        const KIND: &'static str = "lamp";
        const VERSION: u16 = 1;
    }
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct LampSavedV2 {
        on: bool,
    }
    impl Saved for LampSavedV2 {
        const KIND: &'static str = "lamp";
        const VERSION: u16 = 2;
    }

    fn lamps() -> SavedState {
        let mut state = SavedState::new();
        state.put("lamp0", &LampSavedV1 { on: true, brightness: 300 }).unwrap();
        state.put("lamp1", &LampSavedV1 { on: false, brightness: 1 }).unwrap();
        state
    }

    /// The bytes of the first released version: a change here is a break of the format.
    #[test]
    fn golden_bytes() {
        let mut state = SavedState::new();
        state.put("lamp0", &LampSavedV1 { on: true, brightness: 300 }).unwrap();
        assert_eq!(state.encode(), b"GWSTATE1\x01\0\0\0\x05\0lamp0\x04\0lamp\x01\0\x03\0\0\0\x01\xac\x02");
    }

    #[test]
    fn what_was_put_is_taken() {
        let mut back = SavedState::decode(&lamps().encode()).unwrap();
        assert_eq!(back.take::<LampSavedV1>("lamp1").unwrap(), LampSavedV1 { on: false, brightness: 1 });
        assert_eq!(back.take::<LampSavedV1>("lamp0").unwrap(), LampSavedV1 { on: true, brightness: 300 });
        back.finish().unwrap();
    }

    #[test]
    fn missing_foreign_and_left_over_sections_are_errors() {
        let mut back = lamps();
        assert_eq!(back.take::<LampSavedV1>("lamp2"), Err(SavedError::Missing { id: "lamp2".into() }));
        assert!(matches!(back.take::<LampSavedV2>("lamp0"), Err(SavedError::WrongKind { found_version: 1, .. })));
        assert_eq!(back.finish(), Err(SavedError::LeftOver { ids: vec!["lamp1".into()] }));
        assert!(matches!(lamps().put("lamp0", &LampSavedV2 { on: true }), Err(SavedError::Duplicate { .. })));
    }

    #[test]
    fn every_cut_and_every_flip_is_survived() {
        let whole = lamps().encode();
        for length in 0..whole.len() {
            assert!(SavedState::decode(&whole[..length]).is_err(), "cut at {length}");
        }
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << bit;
                if let Ok(mut state) = SavedState::decode(&bytes) {
                    let _ = state.take::<LampSavedV1>("lamp0");
                }
            }
        }
        let mut longer = whole;
        longer.push(0);
        assert_eq!(SavedState::decode(&longer), Err(SavedError::TrailingBytes { extra: 1 }));
    }

    #[test]
    fn lengths_are_bounded() {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(u32::MAX.to_le_bytes());
        assert!(matches!(SavedState::decode(&bytes), Err(SavedError::TooLong { .. })));
        let name = "x".repeat(MAX_NAME + 1);
        assert!(matches!(lamps().put(&name, &LampSavedV2 { on: true }), Err(SavedError::TooLong { .. })));
    }
}
