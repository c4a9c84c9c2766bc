//! The description of a machine: what the user asks for, and what travels in a migration's Hello.
//!
//! `godwit run` builds it from its options, `godwit receive` gets it from the source. Two kinds of fields must be told
//! apart: what the guest can see (it moves unchanged) and what belongs to the host (paths, taps, where the console
//! goes): the latter, and only they, are in [`HostResources`], which a target may lay over what it received.
//! Invariant: the machine is built only from a description for which [`MachineConfig::validate`] and
//! [`MachineConfig::validate_for`] said yes. A description comes from a peer, so nothing in it is trusted before.

mod disk;
mod error;
mod validate;

pub use disk::{Disk, DiskCache, DiskLimits, DiskPlace, ExportUri, Layer, MAX_DISK_QUEUES, Places};
pub use error::ConfigError;

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use uuid::Uuid;

/// The version of the description that this program writes and reads.
pub const MACHINE_VERSION: u16 = 1;
/// The most vCPUs of a machine.
pub const MAX_VCPUS: u32 = 32;
/// The least memory of a machine.
pub const MIN_MEMORY: u64 = 32 << 20;
/// The most memory of a machine: what 40 bits of physical address reach, which every 64-bit host has.
pub const MAX_MEMORY: u64 = 1 << 39;
/// The longest name of a device: the serial number of a virtio disk has 20 bytes (virtio 1.3, 5.2.6).
pub const MAX_ID_LENGTH: usize = 20;
/// The longest name of a machine.
pub const MAX_NAME_LENGTH: usize = 64;
/// Name of the entropy device.
pub const RNG_ID: &str = "rng0";
/// Name of the balloon.
pub const BALLOON_ID: &str = "balloon0";
/// Name of the serial port.
pub const SERIAL_ID: &str = "serial0";
/// Entries of a dirty ring where the user does not say.
pub const DEFAULT_RING_ENTRIES: u32 = 65_536;

/// One machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// [`MACHINE_VERSION`] of the program that wrote it.
    pub version: u16,
    /// What people call the machine.
    pub name: String,
    /// The machine's identity, kept by every move.
    pub uuid: Uuid,
    /// Number and arrangement of the vCPUs.
    pub cpus: Cpus,
    /// The RAM.
    pub memory: Memory,
    /// What the guest starts from.
    pub boot: Boot,
    /// The disks, in the order in which the guest sees them.
    #[serde(default)]
    pub disks: Vec<Disk>,
    /// The network cards, in the order in which the guest sees them.
    #[serde(default)]
    pub nics: Vec<Nic>,
    /// Whether there is an entropy device.
    #[serde(default)]
    pub rng: bool,
    /// The balloon, if there is one.
    #[serde(default)]
    pub balloon: Option<Balloon>,
    /// Where the serial port goes.
    #[serde(default)]
    pub serial: Serial,
    /// How pages that the guest writes are found.
    #[serde(default)]
    pub dirty: DirtyTracking,
}

/// The vCPUs. Their APIC ids are 0 to `count - 1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpus {
    /// How many.
    pub count: u32,
    /// How the guest sees them arranged; all cores of one socket if not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology: Option<Topology>,
}

/// An arrangement of vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topology {
    /// Sockets of the machine.
    pub sockets: u32,
    /// Cores of a socket.
    pub cores: u32,
    /// Threads of a core.
    pub threads: u32,
}

impl Topology {
    /// Logical processors of one socket.
    #[must_use]
    pub fn per_socket(&self) -> u32 {
        self.cores.saturating_mul(self.threads)
    }
}

impl Cpus {
    /// The arrangement, with the default filled in.
    #[must_use]
    pub fn topology(&self) -> Topology {
        self.topology.unwrap_or(Topology { sockets: 1, cores: self.count, threads: 1 })
    }
}

/// The RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// How much.
    pub bytes: u64,
    /// Whether the host backs it with reserved huge pages.
    #[serde(default)]
    pub huge_pages: bool,
}

/// What the guest starts from. Read at power-on only: a machine that moved has it in its memory already.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// An ELF kernel or a bzImage.
    pub kernel: PathBuf,
    /// The initial file system.
    #[serde(default)]
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(default)]
    pub command_line: String,
    /// How the kernel is entered.
    #[serde(default)]
    pub entry: EntryKind,
}

/// How a kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EntryKind {
    /// By PVH where the kernel has the note for it, otherwise in 64-bit mode.
    #[default]
    Auto,
    /// By the PVH protocol.
    Pvh,
    /// By the 64-bit Linux boot protocol.
    Long64,
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Its name in the machine.
    pub id: String,
    /// The host's end of it.
    pub tap: Tap,
    /// Its address.
    pub mac: Mac,
    /// Whether the host's kernel moves its packets.
    #[serde(default)]
    pub vhost: Vhost,
}

/// A tap interface of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Tap {
    /// One that exists, by its name.
    Existing(String),
    /// A new one of this name, which goes when the machine goes.
    Create(String),
}

impl Tap {
    /// The interface's name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Existing(name) | Self::Create(name) => name,
        }
    }
}

/// Use of vhost-net.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Vhost {
    /// Where the kernel has it.
    #[default]
    Auto,
    /// Always; it is an error if the kernel does not have it.
    On,
    /// Never.
    Off,
}

/// The address of a network card, written as `52:54:00:12:34:56`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// An address for card number `index` of a machine, always the same, locally administered and unicast
    /// (IEEE 802, 8.4).
    #[must_use]
    pub fn derived(machine: Uuid, index: u8) -> Self {
        let [a, b, c, d, ..] = *machine.as_bytes();
        Self([0x52, a, b, c, d, index])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let wrong = || ConfigError::Mac { text: text.into() };
        let mut bytes = [0_u8; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let two_digits = |part: &&str| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            let part = parts.next().filter(two_digits).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() || bytes[0] & 1 == 1 {
            return Err(wrong());
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Mac {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

/// A balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Whether the guest takes pages back by itself before it runs out of memory.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Whether the guest reports pages that it does not use, so that the host takes them back.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// Where the serial port goes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Serial {
    /// Nowhere: what the guest writes is dropped.
    #[default]
    Off,
    /// The terminal that the program was started on.
    Terminal,
    /// A file, which is appended to.
    File(PathBuf),
    /// A Unix socket that one client at a time may connect to.
    Socket(PathBuf),
}

/// How pages that the guest writes are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DirtyTracking {
    /// By KVM's bitmap.
    #[default]
    Log,
    /// By KVM's ring of addresses, one per vCPU.
    Ring {
        /// Room in each ring.
        entries: u32,
    },
}

/// The fields of a machine that belong to the host, all of those that a migration's target may set itself. What is not
/// mentioned stays as the source had it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostResources {
    /// The host's name, by which disks with several places find the nearest.
    #[serde(default)]
    pub name: String,
    /// Where disks are, by the disks' names.
    #[serde(default)]
    pub disks: BTreeMap<String, DiskPlace>,
    /// The taps behind network cards, by the cards' names.
    #[serde(default)]
    pub taps: BTreeMap<String, Tap>,
    /// Use of vhost-net for each network card.
    #[serde(default)]
    pub vhost: Option<Vhost>,
    /// Where the serial port goes.
    #[serde(default)]
    pub serial: Option<Serial>,
    /// Whether reserved huge pages back the memory.
    #[serde(default)]
    pub huge_pages: Option<bool>,
    /// How pages that the guest writes are found.
    #[serde(default)]
    pub dirty: Option<DirtyTracking>,
}

/// What the host can give to a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostLimits {
    /// The host's memory in bytes.
    pub memory: u64,
    /// The most vCPUs of its KVM.
    pub vcpus: u32,
    /// The largest dirty ring of its KVM in bytes; 0 for none.
    pub dirty_ring_bytes: u32,
}

impl HostLimits {
    /// What this host can give.
    ///
    /// # Errors
    /// [`ConfigError::HostMemory`] if the host does not tell its memory.
    pub fn of(capabilities: &crate::kvm::Capabilities) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let memory = mem_total(&text).ok_or(ConfigError::HostMemory)?;
        Ok(Self { memory, vcpus: capabilities.max_vcpus, dirty_ring_bytes: capabilities.dirty_ring_bytes })
    }
}

fn mem_total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

impl MachineConfig {
    /// Names of the virtio devices, in the order of their windows.
    #[must_use]
    pub fn virtio_ids(&self) -> Vec<&str> {
        let disks = self.disks.iter().map(|disk| disk.id.as_str());
        let nics = self.nics.iter().map(|nic| nic.id.as_str());
        let rng = self.rng.then_some(RNG_ID);
        disks.chain(nics).chain(rng).chain(self.balloon.map(|_| BALLOON_ID)).collect()
    }

    /// The machine with the host's side of it replaced where `resources` says so.
    ///
    /// # Errors
    /// [`ConfigError::UnknownDevice`] if `resources` names a device that the machine does not have.
    pub fn with_host_resources(mut self, resources: &HostResources) -> Result<Self, ConfigError> {
        let HostResources { name, disks, taps, vhost, serial, huge_pages, dirty } = resources;
        for disk in &mut self.disks {
            disk.place = disk.places.nearest(name).unwrap_or_else(|| disk.place.clone());
        }
        for (id, place) in disks {
            let known = names(self.disks.iter().map(|disk| &disk.id));
            let disk = self.disks.iter_mut().find(|disk| disk.id == *id);
            disk.ok_or_else(|| ConfigError::UnknownDevice { kind: "disk", id: id.clone(), known })?
                .place
                .clone_from(place);
        }
        for (id, tap) in taps {
            let known = names(self.nics.iter().map(|nic| &nic.id));
            let nic = self.nics.iter_mut().find(|nic| nic.id == *id);
            nic.ok_or_else(|| ConfigError::UnknownDevice { kind: "network card", id: id.clone(), known })?
                .tap
                .clone_from(tap);
        }
        if let Some(vhost) = *vhost {
            self.nics.iter_mut().for_each(|nic| nic.vhost = vhost);
        }
        self.serial = serial.clone().unwrap_or(self.serial);
        self.memory.huge_pages = huge_pages.unwrap_or(self.memory.huge_pages);
        self.dirty = dirty.unwrap_or(self.dirty);
        Ok(self)
    }
}

fn names<'a>(ids: impl Iterator<Item = &'a String>) -> String {
    let ids: Vec<_> = ids.map(String::as_str).collect();
    if ids.is_empty() { "none".into() } else { ids.join(", ") }
}

#[cfg(test)]
mod tests;
