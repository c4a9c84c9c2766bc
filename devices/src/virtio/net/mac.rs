//! The address of a NIC: given by the operator, or made up once and then kept through every move.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::str::FromStr;
use thiserror::Error;

/// The first octet's bit that marks a group address (IEEE 802, 8.2.2).
const GROUP: u8 = 0x01;
/// The first octet's bit that marks an address as locally administered.
const LOCAL: u8 = 0x02;

/// A text that is no address for a NIC.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum MacError {
    /// Not six octets of two hexadecimal digits.
    #[error("{text:?} is not a MAC address: write six octets like 52:54:00:12:34:56")]
    Malformed {
        /// The text.
        text: String,
    },
    /// A group address or all zeros cannot be a NIC's own.
    #[error("{address} cannot be the address of a NIC: its first octet must be even and it must not be zero")]
    NotUnicast {
        /// The address.
        address: MacAddress,
    },
}

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// The address with these octets, if a NIC may have it as its own.
    ///
    /// # Errors
    /// [`MacError::NotUnicast`] for a group address and for zero.
    pub fn unicast(octets: [u8; 6]) -> Result<Self, MacError> {
        let address = Self(octets);
        if octets[0] & GROUP == 0 && octets != [0; 6] { Ok(address) } else { Err(MacError::NotUnicast { address }) }
    }

    /// A made-up, locally administered address.
    #[must_use]
    pub fn random() -> Self {
        // The keys of `RandomState` come from the kernel, so two guests on one wire do not meet.
        let [_, _, mut octets @ ..] = RandomState::new().hash_one("a NIC").to_be_bytes();
        octets[0] = octets[0] & !GROUP | LOCAL;
        Self(octets)
    }

    /// The six octets as they go over the wire.
    #[must_use]
    pub fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let malformed = || MacError::Malformed { text: text.to_owned() };
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()));
            *octet = u8::from_str_radix(part.ok_or_else(malformed)?, 16).map_err(|_| malformed())?;
        }
        if parts.next().is_some() { Err(malformed()) } else { Self::unicast(octets) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_goes_both_ways() {
        let mac: MacAddress = "52:54:00:aB:cd:ef".parse().unwrap();
        assert_eq!(mac.octets(), [0x52, 0x54, 0, 0xab, 0xcd, 0xef]);
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:ef");
    }

    #[test]
    fn bad_texts_are_refused() {
        for text in
            ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "52:54:00:12:34:5g", "5:254:00:12:34:56", "+1:54:0:1:2:3"]
        {
            assert_eq!(text.parse::<MacAddress>(), Err(MacError::Malformed { text: text.into() }));
        }
        for text in ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"] {
            assert!(matches!(text.parse::<MacAddress>(), Err(MacError::NotUnicast { .. })), "{text}");
        }
    }

    #[test]
    fn made_up_addresses_are_local_unicast_and_differ() {
        let (one, other) = (MacAddress::random(), MacAddress::random());
        assert_ne!(one, other);
        for mac in [one, other] {
            assert_eq!(mac.octets()[0] & (GROUP | LOCAL), LOCAL, "{mac}");
        }
    }
}
