//! Names that nobody else has: of guests, of migrations, of records.
//!
//! Made of the host's random bytes, which can be missing: in a sandbox that forbids the system call, or early at boot.

use std::io;
use thiserror::Error;
use uuid::{Builder, Uuid};

/// The host gives no random bytes.
#[derive(Debug, Error)]
#[error("The host gives no random bytes for a new name; allow the system call getrandom")]
pub struct NoRandomness(#[source] io::Error);

/// A UUID of version 4.
///
/// # Errors
/// [`NoRandomness`] where [`Uuid::new_v4`] would panic.
pub fn random_uuid() -> Result<Uuid, NoRandomness> {
    from_source(|bytes| getrandom::fill(bytes).map_err(io::Error::from))
}

fn from_source(fill: impl FnOnce(&mut [u8]) -> io::Result<()>) -> Result<Uuid, NoRandomness> {
    let mut bytes = [0; 16];
    fill(&mut bytes).map_err(NoRandomness)?;
    Ok(Builder::from_random_bytes(bytes).into_uuid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_differ_and_are_of_version_4() {
        let (one, other) = (random_uuid().unwrap(), random_uuid().unwrap());
        assert!(one != other && one.get_version_num() == 4);
    }

    #[test]
    fn a_host_without_randomness_is_an_error() {
        let error = from_source(|_| Err(io::Error::from_raw_os_error(1))).unwrap_err();
        assert!(error.to_string().contains("allow the system call getrandom"), "{error}");
    }
}
