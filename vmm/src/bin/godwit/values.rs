//! Values on the command line: sizes and times with a unit, ways of memory, and `key=value,…` lists.

use clap::ValueEnum;
use control::{MeasureDirtyRate, MemoryPolicy};
use std::collections::BTreeMap;
use std::num::{NonZeroU32, NonZeroU64};
use std::str::FromStr;

/// Reads a size such as `512M`, `2GiB` or `1048576`, in bytes. Units are powers of 1024: K, M, G, T.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let unit = unit.to_ascii_lowercase();
    let shift = match unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(&unit) {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(format!("{text:?} has an unknown unit; write for example 512M or 2G")),
    };
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is not a size; write for example 512M or 2G"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is more than 64 bits hold"))
}

/// Reads a rate such as `100M` or `1Gbit`, in bytes a second. Units of bytes are powers of 1024, of bits powers of 1000, as
/// links are named.
pub(crate) fn rate(text: &str) -> Result<NonZeroU64, String> {
    let bytes = match text.to_ascii_lowercase().strip_suffix("bit") {
        Some(bits) => bits_per_second(text, bits)? / 8,
        None => size(text).map_err(|error| format!("{error}, or 100Mbit"))?,
    };
    NonZeroU64::new(bytes).ok_or_else(|| format!("{text:?} lets nothing go; leave the option out for no limit"))
}

fn bits_per_second(text: &str, bits: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a rate; write for example 100M for bytes, or 100Mbit");
    let digits = bits.trim_end_matches(['k', 'm', 'g']);
    let factor = match &bits[digits.len()..] {
        "" => 1,
        "k" => 1_000,
        "m" => 1_000_000,
        "g" => 1_000_000_000,
        _ => return Err(wrong()),
    };
    digits.parse::<u64>().ok().and_then(|number| number.checked_mul(factor)).ok_or_else(wrong)
}

/// Reads a time such as `90s`, `250ms`, `10m` or `1h`, in milliseconds.
pub(crate) fn time(text: &str) -> Result<NonZeroU32, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match &text[digits.len()..] {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(format!("{text:?} is not a time; write for example 1s or 250ms")),
    };
    let number: u32 = digits.parse().map_err(|_| format!("{text:?} is not a time; write for example 1s or 250ms"))?;
    let ms = number.checked_mul(factor).ok_or_else(|| format!("{text:?} is more than 49 days"))?;
    NonZeroU32::new(ms).ok_or_else(|| format!("{text:?} is no time at all"))
}

/// Reads the period of a measurement such as `1s` or `250ms`, in milliseconds.
pub(crate) fn period(text: &str) -> Result<u32, String> {
    let range = MeasureDirtyRate::PERIOD_MS;
    let period = time(text).ok().map(NonZeroU32::get).filter(|period| range.contains(period));
    period.ok_or_else(|| format!("{text:?} is not a time from {}ms to {}s", range.start(), range.end() / 1000))
}

/// A `key=value,key=value,flag` list, whose keys are taken one by one and whose rest is an error.
#[derive(Debug)]
pub(crate) struct Settings {
    option: &'static str,
    values: BTreeMap<String, String>,
}

impl Settings {
    /// Reads the list given to `option`. A key without a value is a flag and reads as `on`.
    pub(crate) fn parse(option: &'static str, text: &str) -> Result<Self, String> {
        let mut values = BTreeMap::new();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').unwrap_or((part, "on"));
            if values.insert(key.to_owned(), value.to_owned()).is_some() {
                return Err(format!("{option} {text:?} has {key} twice"));
            }
        }
        Ok(Self { option, values })
    }

    /// The value of `key`, if it is in the list.
    pub(crate) fn take(&mut self, key: &str) -> Option<String> {
        self.values.remove(key)
    }

    /// The values of all keys that begin with `start`, by the rest of those.
    pub(crate) fn take_all(&mut self, start: &str) -> BTreeMap<String, String> {
        let taken = self.values.extract_if(.., |key, _| key.starts_with(start));
        taken.map(|(key, value)| (key[start.len()..].to_owned(), value)).collect()
    }

    /// The value of `key`, which must be in the list.
    pub(crate) fn require(&mut self, key: &str) -> Result<String, String> {
        self.take(key).ok_or_else(|| format!("{} needs {key}=…", self.option))
    }

    /// Whether the flag `key` is on.
    pub(crate) fn flag(&mut self, key: &str) -> Result<bool, String> {
        match self.take(key).as_deref() {
            None | Some("off") => Ok(false),
            Some("on") => Ok(true),
            Some(other) => Err(format!("{} {key}={other:?} is neither on nor off", self.option)),
        }
    }

    /// The number of `key`, if it is in the list.
    pub(crate) fn number<T: FromStr>(&mut self, key: &str) -> Result<Option<T>, String> {
        let parse =
            |text: String| text.parse().map_err(|_| format!("{} {key}={text:?} is no such number", self.option));
        self.values.remove(key).map(parse).transpose()
    }

    /// Ends the reading: no key may be left.
    pub(crate) fn finish(self, known: &str) -> Result<(), String> {
        match self.values.keys().next() {
            None => Ok(()),
            Some(key) => Err(format!("{} does not know {key:?}; it takes {known}", self.option)),
        }
    }
}

/// A way of memory on the command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum MemoryArg {
    /// Pass it if the target is at a Unix socket on this host, else copy it
    Auto,
    /// Send its content
    Copy,
    /// Pass the memory itself, without sending any of it, to another process of this host
    Pass,
}

impl From<MemoryArg> for MemoryPolicy {
    fn from(memory: MemoryArg) -> Self {
        match memory {
            MemoryArg::Auto => Self::Auto,
            MemoryArg::Copy => Self::Copy,
            MemoryArg::Pass => Self::Pass,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("4096", 4096), ("64k", 65536), ("512M", 512 << 20), ("2GiB", 2 << 30), ("1tb", 1 << 40), ("0", 0)]
        {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "M", "1.5G", "-1", "12 M", "5x", "99999999999T"] {
            assert!(size(text).unwrap_err().contains(text), "{text}");
        }
    }

    #[test]
    fn periods() {
        for (text, ms) in [("1s", 1000), ("100ms", 100), ("60s", 60_000)] {
            assert_eq!(period(text), Ok(ms), "{text}");
        }
        for text in ["", "1", "s", "ms", "-1s", "1.5s", "2m", "99ms", "61s", "4294968s", "0s"] {
            assert!(period(text).unwrap_err().contains(text), "{text}");
        }
    }

    #[test]
    fn times() {
        for (text, ms) in [("90s", 90_000), ("1ms", 1), ("10m", 600_000), ("2h", 7_200_000)] {
            assert_eq!(time(text).map(NonZeroU32::get), Ok(ms), "{text}");
        }
        for text in ["", "5", "s", "0s", "-1s", "1.5s", "1 s", "1d", "5000000s", "1000000h"] {
            assert!(time(text).unwrap_err().contains(text), "{text}");
        }
    }

    #[test]
    fn rates() {
        for (text, bytes) in [
            ("100M", 100 << 20),
            ("1GiB", 1 << 30),
            ("5000", 5000),
            ("100Mbit", 12_500_000),
            ("1Gbit", 125_000_000),
            ("56kbit", 7000),
            ("8bit", 1),
        ] {
            assert_eq!(rate(text).map(NonZeroU64::get), Ok(bytes), "{text}");
        }
        for text in ["0", "0M", "0Gbit", "7bit"] {
            assert!(rate(text).unwrap_err().contains("lets nothing go"), "{text}");
        }
        for text in ["", "fast", "1.5M", "-1M", "Mbit", "1Tbit", "99999999999Gbit", "1kmbit"] {
            assert!(rate(text).unwrap_err().contains(text), "{text}");
        }
    }

    #[test]
    fn settings_are_taken_and_the_rest_is_named() {
        let mut disk = Settings::parse("--disk", "path=/a.img,readonly,id=data").unwrap();
        assert_eq!(disk.require("path").unwrap(), "/a.img");
        assert!(disk.flag("readonly").unwrap());
        assert_eq!(
            disk.finish("path, id, readonly").unwrap_err(),
            "--disk does not know \"id\"; it takes path, id, readonly"
        );
        assert!(Settings::parse("--disk", "path=/a,path=/b").unwrap_err().contains("path twice"));
        assert!(Settings::parse("--disk", "").unwrap().require("path").unwrap_err().contains("needs path="));
        assert!(Settings::parse("--disk", "readonly=yes").unwrap().flag("readonly").is_err());
    }
}
