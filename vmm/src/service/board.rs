//! The notice board of a process: what is known of the guest, for API threads that must not wait for its owner.
//!
//! The service and the migration threads write it; API threads read it. One lock, held for moments, never together with
//! another.

use crate::config::{DirtyTracking, MachineConfig};
use crate::machine::Machine;
use block::layered::Missing;
use control::{
    API_VERSION, BalloonInfo, DirtyRate, DirtyTrackerKind, DiskBefore, DiskCounters, DiskInfo, DiskList, Events,
    Happening, JobId, LastDirtyRate, LastMigration, MeasurementState, MeasurementStatus, MigrationStatus, NicBackend,
    NicCounters, NicInfo, NicList, Phase, VmInfo,
};
use devices::virtio::balloon::Balloon;
use devices::virtio::blk::{BlkCounters, BlkCounts};
use devices::virtio::mmio::Mmio;
use devices::virtio::net::{NetCounters, NetCounts};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use uuid::Uuid;

/// What is posted.
#[derive(Debug)]
struct Notes {
    phase: Phase,
    machine: Option<MachineNotes>,
    migration: Option<MoveNotes>,
    measurement: Option<MeasurementStatus>,
    /// What the disks were like at the host that the guest came from.
    disks_before: BTreeMap<String, DiskBefore>,
}

/// What is posted of a machine.
#[derive(Debug)]
struct MachineNotes {
    config: MachineConfig,
    disks: Vec<DiskNotes>,
    /// The counters of each NIC; `None` where vhost-net moves its frames.
    nics: Vec<Option<Arc<NetCounters>>>,
    balloon: Option<Arc<Mmio<Balloon>>>,
}

/// What is posted of a disk.
#[derive(Debug)]
struct DiskNotes {
    bytes: u64,
    counters: Arc<BlkCounters>,
    /// How much of it is elsewhere, if anything.
    missing: Option<Missing>,
}

/// What is posted of a migration.
#[derive(Debug)]
struct MoveNotes {
    status: MigrationStatus,
    begun: Instant,
}

/// The notice board. Clones are the same board.
#[derive(Debug, Clone)]
pub(crate) struct Board {
    notes: Arc<Mutex<Notes>>,
    events: Events,
    started: (Instant, SystemTime),
}

impl Board {
    pub(crate) fn new(phase: Phase, events: Events) -> Self {
        let notes = Notes { phase, machine: None, migration: None, measurement: None, disks_before: BTreeMap::new() };
        Self { notes: Arc::new(Mutex::new(notes)), events, started: (Instant::now(), SystemTime::now()) }
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn phase(&self) -> Phase {
        self.notes().phase
    }

    /// Changes the phase and says so.
    pub(crate) fn enter(&self, to: Phase) {
        let from = std::mem::replace(&mut self.notes().phase, to);
        if from != to {
            tracing::info!(%from, %to, "phase");
            self.events.publish(Happening::PhaseChanged { from, to });
        }
    }

    /// Posts the machine that is here now, and whether its guest runs.
    pub(crate) fn post_machine(&self, machine: &Machine) {
        self.post_devices(machine);
        self.enter(if machine.is_running() { Phase::Running } else { Phase::Paused });
    }

    /// Posts the machine's devices and where they are.
    pub(crate) fn post_devices(&self, machine: &Machine) {
        let coming: BTreeMap<_, _> = machine.coming_disks().collect();
        let disks = machine.config().disks.iter().zip(machine.disks()).map(|(config, disk)| {
            let missing = coming.get(config.id.as_str()).map(|disk| disk.missing());
            disk.with(|disk, _| DiskNotes { bytes: disk.capacity(), counters: Arc::clone(disk.counters()), missing })
        });
        let notes = MachineNotes {
            config: machine.config().clone(),
            disks: disks.collect(),
            nics: machine.nics().iter().map(|nic| nic.with(|nic, _| nic.counters().cloned())).collect(),
            balloon: machine.balloon().cloned(),
        };
        self.notes().machine = Some(notes);
    }

    /// Posts what the disks of a guest that is coming were like at its source.
    pub(crate) fn note_disks_before(&self, before: BTreeMap<String, DiskBefore>) {
        self.notes().disks_before = before;
    }

    /// Posts that a disk has become longer.
    pub(crate) fn note_disk_length(&self, id: &str, bytes: u64) {
        let mut notes = self.notes();
        let Some(MachineNotes { config, disks, .. }) = &mut notes.machine else { return };
        let disk = config.disks.iter().zip(disks).find(|(disk, _)| disk.id == id);
        if let Some((_, notes)) = disk {
            notes.bytes = bytes;
        }
    }

    /// Posts a migration that begins.
    pub(crate) fn begin_migration(&self, status: MigrationStatus) {
        let begun = Happening::MigrationStarted {
            job: status.job,
            role: status.role,
            peer: status.peer.clone(),
            mode: status.mode,
        };
        self.notes().migration = Some(MoveNotes { status, begun: Instant::now() });
        self.events.publish(begun);
    }

    /// Changes what is posted of a migration, and how long it has taken; nothing if another has begun since.
    pub(crate) fn note_migration<T>(&self, job: JobId, note: impl FnOnce(&mut MigrationStatus) -> T) -> Option<T> {
        let mut notes = self.notes();
        let MoveNotes { status, begun } = notes.migration.as_mut().filter(|posted| posted.status.job == job)?;
        status.total_ms = begun.elapsed().into();
        Some(note(status))
    }

    /// The same for the last time, and says so.
    pub(crate) fn end_migration(&self, job: JobId, note: impl FnOnce(&mut MigrationStatus)) {
        let ended = self.note_migration(job, |status| {
            note(status);
            Box::new(status.clone())
        });
        if let Some(migration) = ended {
            self.events.publish(Happening::MigrationEnded { migration });
        }
    }

    pub(crate) fn migration(&self) -> Option<MigrationStatus> {
        self.notes().migration.as_ref().map(|migration| migration.status.clone())
    }

    /// Posts a measurement that begins.
    pub(crate) fn begin_measurement(&self, status: MeasurementStatus) {
        self.notes().measurement = Some(status);
    }

    /// Posts how the measurement ended: with what it found, or why it found nothing; and says so.
    pub(crate) fn end_measurement(&self, found: Result<DirtyRate, String>) {
        let mut notes = self.notes();
        let Some(status) = &mut notes.measurement else { return };
        match found {
            Ok(found) => (status.state, status.found) = (MeasurementState::Completed, Some(found)),
            Err(error) => (status.state, status.error) = (MeasurementState::Failed, Some(error)),
        }
        let measurement = Box::new(status.clone());
        drop(notes);
        self.events.publish(Happening::MeasurementEnded { measurement });
    }

    pub(crate) fn last_dirty_rate(&self) -> LastDirtyRate {
        LastDirtyRate { measurement: self.notes().measurement.clone() }
    }

    pub(crate) fn events(&self) -> &Events {
        &self.events
    }

    pub(crate) fn last_migration(&self) -> LastMigration {
        LastMigration { migration: self.migration() }
    }

    pub(crate) fn vm(&self) -> VmInfo {
        let (started, started_at) = self.started;
        let since_epoch = started_at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let notes = self.notes();
        let config = notes.machine.as_ref().map(|machine| &machine.config);
        VmInfo {
            id: config.map_or_else(Uuid::nil, |config| config.uuid),
            name: config.map_or_else(String::new, |config| config.name.clone()),
            phase: notes.phase,
            vcpus: config.map_or(0, |config| config.cpus.count),
            memory_bytes: config.map_or(0, |config| config.memory.bytes),
            pid: std::process::id(),
            started_at_ms: u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX),
            uptime_ms: started.elapsed().into(),
            disks: config.map_or_else(Vec::new, |config| config.disks.iter().map(|disk| disk.id.clone()).collect()),
            nics: config.map_or_else(Vec::new, |config| config.nics.iter().map(|nic| nic.id.clone()).collect()),
            dirty_tracker: match config.map(|config| config.dirty) {
                Some(DirtyTracking::Ring { .. }) => DirtyTrackerKind::Ring,
                Some(DirtyTracking::Log) | None => DirtyTrackerKind::Log,
            },
            api_version: API_VERSION.to_owned(),
            godwit_version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    pub(crate) fn disks(&self) -> DiskList {
        let notes = self.notes();
        let disks = notes.machine.iter().flat_map(|machine| {
            machine.config.disks.iter().zip(&machine.disks).map(|(disk, DiskNotes { bytes, counters, missing })| {
                DiskInfo {
                    id: disk.id.clone(),
                    place: disk.place.to_string(),
                    bytes: *bytes,
                    missing_bytes: missing.as_ref().map(Missing::bytes),
                    read_only: disk.read_only,
                    counters: disk_counters(counters.now()),
                    before: notes.disks_before.get(&disk.id).cloned(),
                }
            })
        });
        DiskList { disks: disks.collect() }
    }

    pub(crate) fn nics(&self) -> NicList {
        let notes = self.notes();
        let nics = notes.machine.iter().flat_map(|machine| {
            machine.config.nics.iter().zip(&machine.nics).map(|(nic, counters)| NicInfo {
                id: nic.id.clone(),
                tap: nic.tap.name().to_owned(),
                mac: nic.mac.to_string(),
                backend: if counters.is_some() { NicBackend::Tap } else { NicBackend::VhostNet },
                counters: counters.as_ref().map(|counters| nic_counters(counters.now())),
            })
        });
        NicList { nics: nics.collect() }
    }

    /// The balloon's figures; `None` for a machine without one.
    pub(crate) fn balloon(&self) -> Option<BalloonInfo> {
        let balloon = self.notes().machine.as_ref()?.balloon.clone()?;
        Some(balloon.with(|balloon, _| {
            BalloonInfo {
                target_bytes: balloon.target_bytes(),
                actual_bytes: balloon.actual_bytes(),
                statistics: balloon
                    .statistics()
                    .iter()
                    .map(|(name, value)| (name.name().to_owned(), value))
                    .collect::<BTreeMap<_, _>>(),
            }
        }))
    }
}

fn disk_counters(counts: BlkCounts) -> DiskCounters {
    let BlkCounts { reads, read_bytes, writes, written_bytes, flushes, errors, read_time, write_time } = counts;
    let (read_time_ms, write_time_ms) = (read_time.into(), write_time.into());
    DiskCounters { reads, read_bytes, writes, written_bytes, flushes, errors, read_time_ms, write_time_ms }
}

fn nic_counters(counts: NetCounts) -> NicCounters {
    let NetCounts { received_frames, received_bytes, sent_frames, sent_bytes, dropped_frames } = counts;
    let (received_packets, sent_packets, dropped_packets) = (received_frames, sent_frames, dropped_frames);
    NicCounters { received_packets, received_bytes, sent_packets, sent_bytes, dropped_packets }
}
