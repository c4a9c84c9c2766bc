//! Disks, measured: by requests, without a guest, and as they come after one.

pub mod relocation;
pub mod requests;
mod ring;
