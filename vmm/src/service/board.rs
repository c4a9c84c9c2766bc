//! The notice board of a process: what is known of the guest, for API threads that must not wait for its owner.
//!
//! The service and the migration threads write it; API threads read it. One lock, held for moments, never together with
//! another.

use crate::config::{DirtyTracking, MachineConfig, Vhost};
use crate::machine::Machine;
use control::{
    API_VERSION, BalloonInfo, DirtyTrackerKind, DiskInfo, DiskList, Events, Happening, LastMigration, MetricKind,
    MetricName, Metrics, MigrationStatus, NicBackend, NicInfo, NicList, Phase, Value, VmInfo,
};
use devices::virtio::balloon::Balloon;
use devices::virtio::mmio::Mmio;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use uuid::Uuid;

/// What is posted.
#[derive(Debug)]
struct Notes {
    phase: Phase,
    machine: Option<MachineNotes>,
    migration: Option<MigrationStatus>,
}

/// What is posted of a machine.
#[derive(Debug)]
struct MachineNotes {
    config: MachineConfig,
    disk_bytes: Vec<u64>,
    balloon: Option<Arc<Mmio<Balloon>>>,
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
        let notes = Notes { phase, machine: None, migration: None };
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

    /// Posts the machine that is here now.
    pub(crate) fn post_machine(&self, machine: &Machine) {
        let disk_bytes = machine.disks().iter().map(|disk| disk.with(|disk, _| disk.backend().capacity())).collect();
        let notes = MachineNotes { config: machine.config().clone(), disk_bytes, balloon: machine.balloon().cloned() };
        self.notes().machine = Some(notes);
    }

    /// Posts a migration that begins.
    pub(crate) fn begin_migration(&self, status: MigrationStatus) {
        let begun = Happening::MigrationStarted {
            job: status.job,
            role: status.role,
            peer: status.peer.clone(),
            mode: status.mode,
        };
        self.notes().migration = Some(status);
        self.events.publish(begun);
    }

    /// Changes what is posted of the migration.
    pub(crate) fn note_migration(&self, note: impl FnOnce(&mut MigrationStatus)) {
        if let Some(status) = &mut self.notes().migration {
            note(status);
        }
    }

    /// Says that the migration is over, as it is posted.
    pub(crate) fn end_migration(&self) {
        let Some(status) = self.migration() else { return };
        self.events.publish(Happening::MigrationEnded {
            job: status.job,
            state: status.state,
            downtime_ms: status.downtime_ms,
            total_ms: status.total_ms,
            error: status.error,
        });
    }

    pub(crate) fn migration(&self) -> Option<MigrationStatus> {
        self.notes().migration.clone()
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
            machine.config.disks.iter().zip(&machine.disk_bytes).map(|(disk, bytes)| DiskInfo {
                id: disk.id.clone(),
                path: disk.path.display().to_string(),
                bytes: *bytes,
                read_only: disk.read_only,
                counters: None,
            })
        });
        DiskList { disks: disks.collect() }
    }

    pub(crate) fn nics(&self) -> NicList {
        let notes = self.notes();
        let nics = notes.machine.iter().flat_map(|machine| {
            machine.config.nics.iter().map(|nic| NicInfo {
                id: nic.id.clone(),
                tap: nic.tap.name().to_owned(),
                mac: nic.mac.to_string(),
                backend: match nic.vhost {
                    Vhost::On => NicBackend::VhostNet,
                    Vhost::Auto | Vhost::Off => NicBackend::Tap,
                },
                counters: None,
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

    pub(crate) fn metrics(&self) -> Metrics {
        let vm = self.vm();
        let mut metrics = Metrics::default();
        let mut gauge = |name, help, value: u64| {
            metrics.push(MetricName::new(name), MetricKind::Gauge, help, Value::Integer(value));
        };
        gauge("godwit_vcpus", "Number of vCPUs", vm.vcpus.into());
        gauge("godwit_memory_bytes", "Guest memory", vm.memory_bytes);
        gauge("godwit_running", "1 while the guest runs", u64::from(matches!(vm.phase, Phase::Running)));
        gauge("godwit_migrating", "1 while a migration is under way", u64::from(vm.phase == Phase::Migrating));
        if let Some(balloon) = self.balloon() {
            gauge("godwit_balloon_target_bytes", "Memory that the balloon is asked to hold", balloon.target_bytes);
            gauge("godwit_balloon_actual_bytes", "Memory that the balloon holds", balloon.actual_bytes);
        }
        if let Some(migration) = self.migration() {
            let rounds = migration.rounds.len() as u64;
            gauge("godwit_migration_rounds", "Rounds of the last migration", rounds);
            gauge("godwit_migration_sent_bytes", "Bytes sent by the last migration", migration.progress.bytes_sent);
            gauge("godwit_migration_remaining_bytes", "Bytes left to send", migration.progress.remaining_bytes);
        }
        metrics
    }
}
