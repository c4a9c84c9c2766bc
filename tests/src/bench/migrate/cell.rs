//! What is measured: a guest that is moved over a link by contenders who take turns.
//!
//! All of it is plain data, so that a bench is a list ([`super::plan`]) and a new option of `godwit migrate` is a word in it.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::load::Load;
use crate::network::Rate;

/// The question that a cell belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// How does Godwit compare with QEMU?
    AgainstQemu,
    /// What does each codec gain on each kind of content?
    Codecs,
    /// How much memory does the engine take?
    EngineMemory,
    /// How much of a link does a migration use over a long way?
    Distance,
    /// How long is the downtime when the memory is handed over within the host?
    HandOver,
    /// What does each codec gain on a Debian under load?
    RealGuests,
}

/// What lies between the two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Link {
    /// TCP to 127.0.0.1.
    #[serde(rename = "loopback")]
    Loopback,
    /// TCP between network namespaces, at 10 Gbit/s each way.
    #[serde(rename = "10gbit")]
    TenGigabit,
    /// The same at 1 Gbit/s.
    #[serde(rename = "1gbit")]
    Gigabit,
    /// The same at 100 Mbit/s.
    #[serde(rename = "100mbit")]
    HundredMegabit,
    /// 1 Gbit/s each way, with a round trip of 4 ms.
    #[serde(rename = "1gbit-4ms")]
    Gigabit4Ms,
    /// The same with 16 ms.
    #[serde(rename = "1gbit-16ms")]
    Gigabit16Ms,
    /// The same with 64 ms.
    #[serde(rename = "1gbit-64ms")]
    Gigabit64Ms,
    /// The same with 64 ms, where one frame in a thousand is lost each way.
    #[serde(rename = "1gbit-64ms-lossy")]
    Gigabit64MsLossy,
    /// A Unix socket.
    #[serde(rename = "unix-socket")]
    UnixSocket,
}

/// A long way.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Far {
    pub(super) round_trip: Duration,
    /// Share of the frames that are lost, each way.
    pub(super) loss: f64,
}

impl Link {
    /// Every link.
    pub const ALL: [Self; 9] = [
        Self::Loopback,
        Self::TenGigabit,
        Self::Gigabit,
        Self::HundredMegabit,
        Self::Gigabit4Ms,
        Self::Gigabit16Ms,
        Self::Gigabit64Ms,
        Self::Gigabit64MsLossy,
        Self::UnixSocket,
    ];

    /// The speed each way, of those that have one.
    pub(super) fn rate(self) -> Option<Rate> {
        match self {
            Self::Loopback | Self::UnixSocket => None,
            Self::TenGigabit => Some(Rate::from_megabits(10_000)),
            Self::Gigabit | Self::Gigabit4Ms | Self::Gigabit16Ms | Self::Gigabit64Ms | Self::Gigabit64MsLossy => {
                Some(Rate::from_megabits(1000))
            }
            Self::HundredMegabit => Some(Rate::from_megabits(100)),
        }
    }

    /// What makes it long, of those that are.
    pub(super) fn far(self) -> Option<Far> {
        let far = |ms, loss| Some(Far { round_trip: Duration::from_millis(ms), loss });
        match self {
            Self::Loopback | Self::UnixSocket | Self::TenGigabit | Self::Gigabit | Self::HundredMegabit => None,
            Self::Gigabit4Ms => far(4, 0.0),
            Self::Gigabit16Ms => far(16, 0.0),
            Self::Gigabit64Ms => far(64, 0.0),
            Self::Gigabit64MsLossy => far(64, 0.001),
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Loopback => "loopback",
            Self::TenGigabit => "10gbit",
            Self::Gigabit => "1gbit",
            Self::HundredMegabit => "100mbit",
            Self::Gigabit4Ms => "1gbit-4ms",
            Self::Gigabit16Ms => "1gbit-16ms",
            Self::Gigabit64Ms => "1gbit-64ms",
            Self::Gigabit64MsLossy => "1gbit-64ms-lossy",
            Self::UnixSocket => "unix-socket",
        })
    }
}

/// What a micro guest's memory holds when it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Content {
    /// The beginning of a tar of this machine's libraries.
    Tar,
    /// Bytes that no codec can shorten, no page like another.
    Random,
    /// The same with 16 copies of each page, as far from each other as they can be.
    Twin,
    /// Each page full of a word of its own.
    Colour,
    /// Zeros that were written, so that the host backs them.
    Zero,
}

/// Who is moved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Guest {
    /// On this host's KVM, a fresh one in each turn.
    Micro(Micro),
    /// In the nested lab, the same one in all turns.
    Debian(Debian),
}

impl Guest {
    /// For people, and unique within a part.
    pub fn name(&self) -> String {
        match self {
            Self::Micro(micro) => micro.name.clone(),
            Self::Debian(Debian { load, memory_mib }) => format!("Debian, {memory_mib} MiB, {load}"),
        }
    }
}

/// A whole Debian under load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Debian {
    /// What it works on.
    pub load: Load,
    /// Its memory.
    pub memory_mib: u64,
}

/// A micro guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Micro {
    /// For people, and unique within a part.
    pub name: String,
    /// Its memory.
    pub memory_mib: u64,
    /// What its initrd is, and the size of that.
    pub content: Option<(Content, u64)>,
    /// Its command line.
    pub words: String,
}

impl Micro {
    /// Whether it has nothing to do but to tell the time.
    pub(super) fn is_idle(&self) -> bool {
        self.words.split(' ').any(|word| word == "ws=0")
    }
}

/// How QEMU moves a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Variant {
    /// One stream of raw pages.
    Plain,
    /// Two streams.
    Multifd,
    /// Two streams, compressed by zstd at level 1.
    MultifdZstd,
    /// The difference from what was last sent.
    Xbzrle,
}

impl Variant {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Plain, Self::Multifd, Self::MultifdZstd, Self::Xbzrle];

    /// Name of the contender.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "qemu plain",
            Self::Multifd => "qemu multifd",
            Self::MultifdZstd => "qemu multifd+zstd",
            Self::Xbzrle => "qemu xbzrle",
        }
    }
}

/// Who takes a turn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Contender {
    /// Godwit.
    Godwit {
        /// What distinguishes it from others of its kind.
        name: String,
        /// Words for `godwit migrate`.
        options: Vec<String>,
    },
    /// QEMU.
    Qemu(Variant),
    /// One stream of iperf3 while the guest runs in a Godwit: what the link carries on this machine.
    Iperf,
}

impl Contender {
    /// Godwit with words for `godwit migrate`, separated by spaces.
    pub fn godwit(name: &str, options: &str) -> Self {
        let options = options.split_whitespace().map(str::to_owned).collect();
        Self::Godwit { name: name.to_owned(), options }
    }

    /// Name of the column in tables.
    pub fn name(&self) -> String {
        match self {
            Self::Godwit { name, options: _ } => format!("godwit {name}"),
            Self::Qemu(variant) => variant.name().to_owned(),
            Self::Iperf => "iperf3".to_owned(),
        }
    }
}

/// Contenders who take turns at the same guest over the same link, so that what else the machine does hits all of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heat {
    /// The question.
    pub part: Part,
    /// The link.
    pub link: Link,
    /// The guest.
    pub guest: Guest,
    /// Who takes turns, in this order.
    pub contenders: Vec<Contender>,
    /// How many turns each of them has.
    pub runs: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_that_write_nothing_are_idle() {
        let guest = |words: &str| Micro { name: String::new(), memory_mib: 64, content: None, words: words.to_owned() };
        assert!(guest("ws=0 tick=1").is_idle() && guest("tick=1 ws=0").is_idle());
        assert!(!guest("over ws=64M tick=1").is_idle() && !guest("").is_idle());
    }

    #[test]
    fn links_have_one_name() {
        for link in Link::ALL {
            assert_eq!(serde_json::to_value(link).unwrap(), link.to_string());
        }
    }
}
