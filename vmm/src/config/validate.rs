//! The rules for a machine description: first those that hold everywhere, then those of one host.

use super::{
    Boot, ConfigError, Cpus, DirtyTracking, Disk, DiskPlace, HostLimits, MACHINE_VERSION, MAX_DISK_QUEUES,
    MAX_ID_LENGTH, MAX_MEMORY, MAX_NAME_LENGTH, MAX_VCPUS, MIN_MEMORY, MachineConfig, Memory, Nic, SERIAL_ID, Serial,
    Topology,
};
use crate::layout::{COMMAND_LINE_SIZE, HUGE_PAGE_SIZE, PAGE_SIZE, VIRTIO_GSIS};
use std::collections::{BTreeSet, HashMap};
use std::path::Path;

impl MachineConfig {
    /// Checks everything that can be checked without looking at the host.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let Self { version, name, uuid: _, cpus, memory, boot, disks, nics, rng: _, balloon: _, serial, dirty } = self;
        if *version != MACHINE_VERSION {
            return Err(ConfigError::Version { found: *version });
        }
        let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > MAX_NAME_LENGTH || !name.chars().all(fits) {
            return Err(ConfigError::Name { name: name.clone() });
        }
        validate_cpus(*cpus)?;
        validate_memory(*memory)?;
        validate_boot(boot)?;
        validate_serial(serial)?;
        validate_dirty(*dirty)?;
        self.validate_ids()?;
        validate_disks(disks)?;
        validate_nics(nics)
    }

    /// Checks that this host can give what the machine asks for.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate_for(&self, host: HostLimits) -> Result<(), ConfigError> {
        let HostLimits { memory, vcpus, dirty_ring_bytes } = host;
        if self.memory.bytes > memory {
            return Err(ConfigError::MemoryBeyondHost { bytes: self.memory.bytes, host: memory });
        }
        if self.cpus.count > vcpus {
            return Err(ConfigError::Vcpus { count: self.cpus.count, most: vcpus });
        }
        match self.dirty {
            DirtyTracking::Ring { entries } if ring_bytes(entries) > u64::from(dirty_ring_bytes) => {
                Err(ConfigError::RingBeyondHost { entries })
            }
            DirtyTracking::Ring { .. } | DirtyTracking::Log => Ok(()),
        }
    }

    fn validate_ids(&self) -> Result<(), ConfigError> {
        let virtio = self.virtio_ids();
        if virtio.len() > VIRTIO_GSIS.len() {
            return Err(ConfigError::TooManyDevices { count: virtio.len() });
        }
        let fits = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
        let mut seen = BTreeSet::from([SERIAL_ID]);
        for id in virtio {
            if id.is_empty() || id.len() > MAX_ID_LENGTH || !id.chars().all(fits) {
                return Err(ConfigError::Id { id: id.into() });
            }
            if !seen.insert(id) {
                return Err(ConfigError::DuplicateId { id: id.into() });
            }
        }
        Ok(())
    }
}

fn validate_cpus(cpus: Cpus) -> Result<(), ConfigError> {
    if !(1..=MAX_VCPUS).contains(&cpus.count) {
        return Err(ConfigError::Vcpus { count: cpus.count, most: MAX_VCPUS });
    }
    let topology = cpus.topology();
    let Topology { sockets, cores: _, threads } = topology;
    if sockets.checked_mul(topology.per_socket()) != Some(cpus.count) {
        return Err(ConfigError::TopologyCount { topology, count: cpus.count });
    }
    // With these rules the APIC ids of the vCPUs are 0, 1, 2, … without holes, and so are KVM's vCPU ids.
    if threads > 2 || (sockets > 1 && !topology.per_socket().is_power_of_two()) {
        return Err(ConfigError::TopologyShape { topology });
    }
    Ok(())
}

fn validate_memory(memory: Memory) -> Result<(), ConfigError> {
    let Memory { bytes, huge_pages } = memory;
    if !(MIN_MEMORY..=MAX_MEMORY).contains(&bytes) {
        return Err(ConfigError::MemoryRange { bytes });
    }
    let page = if huge_pages { HUGE_PAGE_SIZE } else { PAGE_SIZE };
    if !bytes.is_multiple_of(page) {
        return Err(ConfigError::MemoryPages { bytes, page });
    }
    Ok(())
}

fn validate_boot(boot: &Boot) -> Result<(), ConfigError> {
    let Boot { kernel, initramfs, command_line, entry: _ } = boot;
    not_empty(kernel, "the kernel")?;
    if let Some(initramfs) = initramfs {
        not_empty(initramfs, "the initramfs")?;
    }
    if command_line.len() >= COMMAND_LINE_SIZE || command_line.contains('\0') {
        return Err(ConfigError::CommandLine { length: command_line.len() });
    }
    Ok(())
}

fn validate_serial(serial: &Serial) -> Result<(), ConfigError> {
    match serial {
        Serial::Off | Serial::Terminal => Ok(()),
        Serial::File(path) => not_empty(path, "the serial port's file"),
        Serial::Socket(path) => not_empty(path, "the serial port's socket"),
    }
}

fn validate_dirty(dirty: DirtyTracking) -> Result<(), ConfigError> {
    match dirty {
        DirtyTracking::Log => Ok(()),
        DirtyTracking::Ring { entries } if entries.is_power_of_two() && (1024..=65_536).contains(&entries) => Ok(()),
        DirtyTracking::Ring { entries } => Err(ConfigError::RingEntries { entries }),
    }
}

fn ring_bytes(entries: u32) -> u64 {
    u64::from(entries) * size_of::<kvm_bindings::kvm_dirty_gfn>() as u64
}

fn validate_disks(disks: &[Disk]) -> Result<(), ConfigError> {
    let mut seen = HashMap::<DiskPlace, &Disk>::new();
    for disk in disks {
        let written = disk.place.file().map_or_else(|| disk.place.clone(), |file| DiskPlace::File(file.to_owned()));
        if let DiskPlace::File(path) = &written {
            not_empty(path, &format!("disk {:?}", disk.id))?;
        }
        if !(1..=MAX_DISK_QUEUES).contains(&disk.queues) {
            return Err(ConfigError::DiskQueues { id: disk.id.clone(), queues: disk.queues });
        }
        if let Some(first) = seen.insert(written, disk)
            && !(first.read_only && disk.read_only)
        {
            let (first, second) = (first.id.clone(), disk.id.clone());
            return Err(ConfigError::SharedDisk { first, second, place: disk.place.to_string() });
        }
    }
    Ok(())
}

fn validate_nics(nics: &[Nic]) -> Result<(), ConfigError> {
    let (mut taps, mut macs) = (BTreeSet::new(), BTreeSet::new());
    for Nic { id: _, tap, mac, vhost: _ } in nics {
        let name = tap.name();
        // IFNAMSIZ is 16 with the final zero; a '%' would be a pattern for the kernel to fill in.
        let fits = |c: char| c.is_ascii_graphic() && !"/%".contains(c);
        if name.is_empty() || name.len() > 15 || !name.chars().all(fits) {
            return Err(ConfigError::TapName { name: name.into() });
        }
        if !taps.insert(name) {
            return Err(ConfigError::DuplicateTap { name: name.into() });
        }
        if !macs.insert(*mac) {
            return Err(ConfigError::DuplicateMac { mac: *mac });
        }
    }
    Ok(())
}

fn not_empty(path: &Path, what: &str) -> Result<(), ConfigError> {
    if path.as_os_str().is_empty() { Err(ConfigError::EmptyPath { what: what.into() }) } else { Ok(()) }
}
