//! What can be wrong with a machine description, each in a sentence that names the value and the remedy.

use super::{MACHINE_VERSION, MAX_DISK_QUEUES, MAX_ID_LENGTH, MAX_MEMORY, MAX_NAME_LENGTH, MIN_MEMORY, Mac, Topology};
use crate::layout::{COMMAND_LINE_SIZE, VIRTIO_GSIS};
use thiserror::Error;

/// What is wrong with a description, and what to do.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Written by another version of the program.
    #[error("The machine description has version {found}; this program knows version {MACHINE_VERSION}")]
    Version {
        /// The version of the description.
        found: u16,
    },
    /// The machine's name cannot be used.
    #[error("The machine name {name:?} is not 1 to {MAX_NAME_LENGTH} letters, digits, '-', '_' or '.'")]
    Name {
        /// The name.
        name: String,
    },
    /// The number of vCPUs is out of range.
    #[error("A machine cannot have {count} vCPUs: give it 1 to {most}")]
    Vcpus {
        /// How many were asked for.
        count: u32,
        /// The most that are possible here.
        most: u32,
    },
    /// The topology does not have as many processors as there are vCPUs.
    #[error("{sockets} sockets of {cores} cores of {threads} threads are not {count} vCPUs", sockets = topology.sockets,
        cores = topology.cores, threads = topology.threads)]
    TopologyCount {
        /// The topology.
        topology: Topology,
        /// The vCPUs.
        count: u32,
    },
    /// The topology cannot be told to a guest.
    #[error("A topology of {threads} threads per core and {cores} cores per socket is not possible: threads must be 1 or 2, \
        and a machine with several sockets needs a power of two of processors in each", threads = topology.threads,
        cores = topology.cores)]
    TopologyShape {
        /// The topology.
        topology: Topology,
    },
    /// The size of the memory is out of range.
    #[error("A machine cannot have {bytes} bytes of memory: give it {} MiB to {} MiB", MIN_MEMORY >> 20, MAX_MEMORY >> 20)]
    MemoryRange {
        /// How much was asked for.
        bytes: u64,
    },
    /// The memory is not made of whole pages.
    #[error("The memory size {bytes} is not a multiple of the page size {page}; {} would be", bytes / page * page)]
    MemoryPages {
        /// How much was asked for.
        bytes: u64,
        /// The page size.
        page: u64,
    },
    /// The host has less memory.
    #[error("The host has {} MiB of memory, the machine asks for {} MiB: give the machine less, or use a host with more",
        host >> 20, bytes >> 20)]
    MemoryBeyondHost {
        /// How much was asked for.
        bytes: u64,
        /// How much there is.
        host: u64,
    },
    /// The host does not tell how much memory it has.
    #[error("The host does not tell its memory in /proc/meminfo: mount /proc")]
    HostMemory,
    /// The command line cannot be given to a kernel.
    #[error("The kernel command line of {length} bytes is longer than {} bytes or holds a zero byte", COMMAND_LINE_SIZE - 1)]
    CommandLine {
        /// Its length.
        length: usize,
    },
    /// The name of a device cannot be used.
    #[error("The device name {id:?} is not 1 to {MAX_ID_LENGTH} letters, digits, '-' or '_'")]
    Id {
        /// The name.
        id: String,
    },
    /// Two devices have one name.
    #[error("Two devices are named {id:?}: every device needs its own name")]
    DuplicateId {
        /// The name.
        id: String,
    },
    /// A disk has no queue, or too many.
    #[error("Disk {id:?} cannot have {queues} queues: give it 1 to {MAX_DISK_QUEUES}")]
    DiskQueues {
        /// The disk.
        id: String,
        /// How many were asked for.
        queues: u16,
    },
    /// Two disks write to one place.
    #[error(
        "The disks {first:?} and {second:?} both use {place} and one of them writes: make both read-only or copy it"
    )]
    SharedDisk {
        /// The first disk.
        first: String,
        /// The second disk.
        second: String,
        /// Where both are.
        place: String,
    },
    /// Two network cards have one tap.
    #[error("Two network cards use the tap {name:?}: every card needs its own")]
    DuplicateTap {
        /// The tap.
        name: String,
    },
    /// Two network cards have one address.
    #[error("Two network cards have the address {mac}: every card needs its own")]
    DuplicateMac {
        /// The address.
        mac: Mac,
    },
    /// An address cannot be that of a network card.
    #[error(
        "{text:?} is not the address of a network card: write six bytes like 52:54:00:12:34:56, the first of them even"
    )]
    Mac {
        /// What was given.
        text: String,
    },
    /// The name of a tap cannot be used.
    #[error("The tap name {name:?} is not 1 to 15 characters without '/', '%' and spaces")]
    TapName {
        /// The name.
        name: String,
    },
    /// There are more virtio devices than windows.
    #[error("{count} disks, network cards and other virtio devices are too many: a machine has room for {}", VIRTIO_GSIS.len())]
    TooManyDevices {
        /// How many were asked for.
        count: usize,
    },
    /// The dirty ring has an impossible size.
    #[error("A dirty ring of {entries} entries is not possible: give it a power of two from 1024 to 65536")]
    RingEntries {
        /// How many were asked for.
        entries: u32,
    },
    /// The host's KVM has no dirty ring, or only smaller ones.
    #[error("The host's KVM has no dirty ring of {entries} entries: use the dirty log")]
    RingBeyondHost {
        /// How many were asked for.
        entries: u32,
    },
    /// A path is empty.
    #[error("The path of {what} is empty")]
    EmptyPath {
        /// What the path is for.
        what: String,
    },
    /// The target names a device that the machine does not have.
    #[error("The machine has no {kind} named {id:?}; it has {known}")]
    UnknownDevice {
        /// Kind of device.
        kind: &'static str,
        /// The name.
        id: String,
        /// The names that exist.
        known: String,
    },
}
