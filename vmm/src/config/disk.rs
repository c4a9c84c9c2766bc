//! The description of a disk: where its bytes are, and how the guest and the host use it.

use crate::old_copy;
use block::NbdUri;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::num::{NonZeroU32, NonZeroU64};
use std::path::{Path, PathBuf};

/// The most queues of a disk: one for each vCPU that a machine can have.
pub const MAX_DISK_QUEUES: u16 = 32;

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Its name in the machine, which the guest reads as serial number.
    pub id: String,
    /// Where its bytes are.
    pub place: DiskPlace,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub read_only: bool,
    /// How writes are cached.
    #[serde(default)]
    pub cache: DiskCache,
    /// How many queues the guest may use, each with a thread of the host.
    #[serde(default = "one_queue")]
    pub queues: u16,
    /// How many milliseconds a request waits for a lost connection before the guest sees an error; for ever if not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<NonZeroU32>,
    /// The most that the guest may read and write.
    #[serde(default)]
    pub limits: DiskLimits,
    /// Where the same disk is for the hosts that its guest moves to.
    #[serde(default, skip_serializing_if = "Places::is_empty")]
    pub places: Places,
}

fn one_queue() -> u16 {
    1
}

/// Where a disk's bytes are.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskPlace {
    /// In a raw file, or on a block device.
    File(PathBuf),
    /// On an NBD server.
    Nbd(ExportUri),
    /// In a raw file, to which it comes from elsewhere while it is used.
    Layered(Layer),
}

impl DiskPlace {
    /// The file that it is written to, where it is one.
    #[must_use]
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::File(file) | Self::Layered(Layer { file, .. }) => Some(file),
            Self::Nbd(_) => None,
        }
    }
}

/// All places of a disk that are known before it moves.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Places {
    /// An export that every host reaches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<ExportUri>,
    /// Files, by the names of the hosts that have them.
    #[serde(default)]
    pub local: BTreeMap<String, PathBuf>,
}

impl Places {
    /// Whether no place is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.remote.is_none() && self.local.is_empty()
    }

    /// The nearest for the host of this name: its own file if that is there and no old copy, otherwise the export.
    #[must_use]
    pub fn nearest(&self, host: &str) -> Option<DiskPlace> {
        let local = self
            .local
            .get(host)
            .filter(|file| file.exists() && !old_copy::place(file).exists())
            .cloned()
            .map(DiskPlace::File);
        local.or_else(|| self.remote.clone().map(DiskPlace::Nbd))
    }
}

/// A file over an export that has what the file lacks.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// The file.
    pub file: PathBuf,
    /// Where the rest is. It is only read.
    pub base: ExportUri,
    /// Whether the base was lent by whom the guest came from, who waits for it to be given up.
    #[serde(default)]
    pub lent: bool,
}

impl fmt::Display for DiskPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Nbd(uri) => uri.0.fmt(f),
            Self::Layered(Layer { file, base, .. }) => write!(f, "{} over {}", file.display(), base.0),
        }
    }
}

/// The URI of an export, such as `nbd://host/data`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ExportUri(pub NbdUri);

impl TryFrom<String> for ExportUri {
    type Error = block::nbd::UriError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Self)
    }
}

impl From<ExportUri> for String {
    fn from(uri: ExportUri) -> Self {
        uri.0.to_string()
    }
}

/// How a disk's writes are cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskCache {
    /// In the host's page cache, until the guest flushes.
    #[default]
    Writeback,
    /// There too, but each write is durable when the guest hears that it is done.
    Writethrough,
    /// Not by the host: a file is read and written past its page cache. The guest flushes what the device caches.
    None,
}

/// The most that a guest may do with a disk in a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskLimits {
    /// Bytes read and written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<NonZeroU64>,
    /// Requests of any kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_second: Option<NonZeroU64>,
}
