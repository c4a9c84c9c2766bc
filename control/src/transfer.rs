//! How memory goes over to another host: as a whole or by its content, over how many connections, and made smaller by
//! which codecs.

use serde::{Deserialize, Serialize};
use serde_json::Number;
use std::fmt;
use std::num::NonZeroU16;
use std::str::FromStr;
use thiserror::Error;

/// How the memory of a guest is to get to the target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryPolicy {
    /// It is passed where both ends are on one host and meet at a Unix socket, and copied elsewhere.
    #[default]
    Auto,
    /// Its content is sent.
    Copy,
    /// The memory itself is passed: both ends map the same pages.
    Pass,
}

/// How the memory of a guest got to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryTransfer {
    /// Its content was sent.
    Copied,
    /// The memory itself was passed.
    Passed,
}

/// Over how many connections the memory of a guest goes: 1 to [`Streams::MAX`], or as many as seem best.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "NumberOrWord", into = "NumberOrWord")]
pub enum Streams {
    /// As many as seem best.
    #[default]
    Auto,
    /// So many.
    Count(NonZeroU16),
}

/// A number of streams that is not possible.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0} streams: give it 1 to {max}, or auto", max = Streams::MAX)]
pub struct StreamsError(String);

/// Streams in JSON.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum NumberOrWord {
    Number(Number),
    Word(String),
}

impl Streams {
    /// The most of them.
    pub const MAX: u16 = 64;

    /// How many, where that was said.
    #[must_use]
    pub fn count(self) -> Option<NonZeroU16> {
        match self {
            Self::Auto => None,
            Self::Count(count) => Some(count),
        }
    }
}

impl TryFrom<u16> for Streams {
    type Error = StreamsError;

    fn try_from(streams: u16) -> Result<Self, StreamsError> {
        let possible = NonZeroU16::new(streams).filter(|streams| streams.get() <= Self::MAX);
        possible.map(Self::Count).ok_or_else(|| StreamsError(streams.to_string()))
    }
}

impl FromStr for Streams {
    type Err = StreamsError;

    fn from_str(text: &str) -> Result<Self, StreamsError> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        text.parse().ok().and_then(|streams: u16| streams.try_into().ok()).ok_or_else(|| StreamsError(text.to_owned()))
    }
}

impl TryFrom<NumberOrWord> for Streams {
    type Error = StreamsError;

    fn try_from(streams: NumberOrWord) -> Result<Self, StreamsError> {
        match streams {
            NumberOrWord::Number(number) => number.to_string().parse(),
            // A number in quotes is none.
            NumberOrWord::Word(word) if word == "auto" => Ok(Self::Auto),
            NumberOrWord::Word(word) => Err(StreamsError(format!("{word:?}"))),
        }
    }
}

impl From<Streams> for NumberOrWord {
    fn from(streams: Streams) -> Self {
        streams.count().map_or_else(|| Self::Word(streams.to_string()), |count| Self::Number(count.get().into()))
    }
}

impl fmt::Display for Streams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Count(count) => count.fmt(f),
        }
    }
}

/// How what is left of the pages is packed together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Packing {
    /// Not at all.
    #[default]
    Stored,
    /// By LZ4.
    Lz4,
    /// By Zstandard, at a level from 1 to 9.
    Zstd(u8),
}

/// Who says which codecs make pages smaller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum CodecChoice {
    /// Measurements do, while pages move.
    #[default]
    Auto,
    /// These do, and no others.
    These(Codecs),
}

/// Which codecs make pages smaller; as text, their names with commas between, or `none`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Codecs {
    /// Zero pages are told, not sent. All other codecs bring this one along.
    pub zero: bool,
    /// Runs of equal words.
    pub rle: bool,
    /// What changed in a page since it was last sent.
    pub delta: bool,
    /// Pages that are equal to others.
    pub dedup: bool,
    /// LZ4 or Zstandard.
    pub packing: Packing,
}

/// What is no list of codecs.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "{text:?} is no list of codecs: {why}; write auto, none, or some of zero, rle, delta, dedup, lz4, zstd and zstd:1 to \
     zstd:9 with commas between"
)]
pub struct CodecsError {
    text: String,
    why: String,
}

impl Codecs {
    const NONE: Self = Self { zero: false, rle: false, delta: false, dedup: false, packing: Packing::Stored };

    fn add(&mut self, name: &str) -> Result<(), String> {
        self.zero = true;
        match name.split_once(':').map_or((name, None), |(name, level)| (name, Some(level))) {
            ("zero", None) => {}
            ("rle", None) => self.rle = true,
            ("delta", None) => self.delta = true,
            ("dedup", None) => self.dedup = true,
            ("lz4", None) => return self.pack(Packing::Lz4),
            ("zstd", None) => return self.pack(Packing::Zstd(1)),
            ("zstd", Some(level)) => match level.parse() {
                Ok(level @ 1..=9) => return self.pack(Packing::Zstd(level)),
                _ => return Err(format!("zstd has no level {level:?}")),
            },
            (alone @ ("none" | "auto"), None) => return Err(format!("{alone} goes with no other")),
            _ => return Err(format!("there is no {name:?}")),
        }
        Ok(())
    }

    fn pack(&mut self, packing: Packing) -> Result<(), String> {
        match std::mem::replace(&mut self.packing, packing) {
            Packing::Stored => Ok(()),
            Packing::Lz4 | Packing::Zstd(_) => Err("what is packed once is not packed again".to_owned()),
        }
    }
}

impl FromStr for CodecChoice {
    type Err = CodecsError;

    fn from_str(text: &str) -> Result<Self, CodecsError> {
        if text == "auto" { Ok(Self::Auto) } else { text.parse().map(Self::These) }
    }
}

impl fmt::Display for CodecChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::These(codecs) => codecs.fmt(f),
        }
    }
}

impl TryFrom<String> for CodecChoice {
    type Error = CodecsError;

    fn try_from(text: String) -> Result<Self, CodecsError> {
        text.parse()
    }
}

impl From<CodecChoice> for String {
    fn from(choice: CodecChoice) -> Self {
        choice.to_string()
    }
}

impl FromStr for Codecs {
    type Err = CodecsError;

    fn from_str(text: &str) -> Result<Self, CodecsError> {
        let mut codecs = Self::NONE;
        if text != "none" {
            let added = text.split(',').try_for_each(|name| codecs.add(name));
            added.map_err(|why| CodecsError { text: text.to_owned(), why })?;
        }
        Ok(codecs)
    }
}

impl fmt::Display for Codecs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { zero, rle, delta, dedup, packing } = *self;
        let named = [(rle, "rle"), (delta, "delta"), (dedup, "dedup"), (packing == Packing::Lz4, "lz4")];
        let on = named.into_iter().filter(|(on, _)| *on);
        let mut names: Vec<_> = on.map(|(_, name)| name.to_owned()).collect();
        if let Packing::Zstd(level) = packing {
            names.push(format!("zstd:{level}"));
        }
        match (names.is_empty(), zero) {
            (true, false) => f.write_str("none"),
            (true, true) => f.write_str("zero"),
            (false, _) => f.write_str(&names.join(",")),
        }
    }
}

impl TryFrom<String> for Codecs {
    type Error = CodecsError;

    fn try_from(text: String) -> Result<Self, CodecsError> {
        text.parse()
    }
}

impl From<Codecs> for String {
    fn from(codecs: Codecs) -> Self {
        codecs.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_codecs_are_read_as_they_are_written() {
        for text in ["none", "zero", "rle", "delta", "dedup", "lz4", "zstd:1", "zstd:9", "rle,delta,dedup,zstd:3"] {
            assert_eq!(text.parse::<Codecs>().unwrap().to_string(), text);
        }
        assert_eq!("zstd,zero".parse::<Codecs>().unwrap().to_string(), "zstd:1");
        assert_eq!("auto".parse(), Ok(CodecChoice::Auto));
        assert_eq!("zero".parse::<CodecChoice>().unwrap().to_string(), "zero");
        assert!("delta".parse::<Codecs>().unwrap().zero, "it brings zero along");
    }

    #[test]
    fn what_is_no_list_is_told_what_there_is() {
        for (text, why) in [
            ("", r#"there is no """#),
            ("gzip", r#"there is no "gzip""#),
            ("rle,none", "none goes with no other"),
            ("auto,rle", "auto goes with no other"),
            ("zstd:0", r#"zstd has no level "0""#),
            ("zstd:10", r#"zstd has no level "10""#),
            ("lz4:3", r#"there is no "lz4:3""#),
            ("lz4,zstd", "not packed again"),
        ] {
            let error = text.parse::<CodecChoice>().unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("zero, rle, delta, dedup, lz4, zstd"), "{text}: {error}");
        }
    }

    #[test]
    fn streams_are_numbers_or_the_word_auto() {
        for (json, streams) in
            [("\"auto\"", Streams::Auto), ("1", 1.try_into().unwrap()), ("64", 64.try_into().unwrap())]
        {
            assert_eq!(serde_json::from_str::<Streams>(json).unwrap(), streams);
            assert_eq!(serde_json::to_string(&streams).unwrap(), json);
            assert_eq!(streams.to_string().parse(), Ok(streams));
        }
        for json in ["0", "65", "70000", "-1", "1.5", "\"1\"", "\"many\""] {
            let error = serde_json::from_str::<Streams>(json).unwrap_err().to_string();
            assert!(error.contains(&format!("{json} streams: give it 1 to 64, or auto")), "{json}: {error}");
        }
    }
}
