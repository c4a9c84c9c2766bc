//! Saved state of one guest: a list of sections, each an envelope `{id, kind, version, length}` around an encoded body.
//!
//! Devices and the architecture code fill a [`SavedState`] while the guest stands still; the engine carries its bytes;
//! the other end decodes them and takes each section out again. This crate is the only place that knows the encoding.
//! The bytes come from a peer or a file, so decoding never panics, never allocates more than its input is long, and a
//! section that is unknown, missing, of another version or left over is an error, not a default.
//!
//! ```text
//! magic "GWSTATE1" (8)  count (u32)  then per section, all little endian:
//!   id length (u16)  id   kind length (u16)  kind   version (u16)  body length (u32)  body (postcard)
//! ```

mod envelope;

pub use envelope::{MAX_BODY, MAX_NAME, MAX_SECTIONS, SavedError, SavedState};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A frozen wire type of one released version.
///
/// Such a type is plain, public and untrusted: whoever restores from it validates every field. A change of fields is a
/// new type (`…SavedV2`) with a conversion from the old one, never an edit.
pub trait Saved: Serialize + DeserializeOwned {
    /// What the section describes, such as `virtio-blk`.
    const KIND: &'static str;
    /// The version of this type's fields, from 1.
    const VERSION: u16;
}
