//! One guest's machine, assembled: made empty, started by power-on or from saved state, then led as a whole.
//!
//! ```text
//! EmptyMachine --power_on--> Machine (stands) <--run / stand--> Machine (runs)
//!             \--restore--->                  --save--> SavedState
//! ```
//! The service leads it; while it migrates, the migration owns it. Order is everything here. To stand: vCPUs first, then
//! devices, so that nobody asks a device that does not answer. To run: devices first, then vCPUs. To save: after both
//! stand. To drop: vCPUs, devices, VM.

mod chassis;
mod disks;
mod ends;
mod error;
mod fittings;
mod line;
mod resources;

pub(crate) use disks::file_options;
pub use disks::{DiskLocks, OpenError};
pub use ends::{Notice, NoticeListener};
pub use error::MachineError;
pub use line::{LineError, LineInput, SerialLine};
pub use resources::{ResourceError, Resources};

use crate::acpi;
use crate::boot::{self, entry};
use crate::config::{DiskPlace, MachineConfig};
use crate::cpuid::{self, GuestCpu};
use crate::kvm::KvmHost;
use crate::memory::GuestMemory;
use crate::seccomp;
use crate::state;
use crate::vcpu::{Crew, GuestEnd, VcpuEvents, Vcpus};
use block::{LayeredBackend, LoggedBackend};
use chassis::Chassis;
use devices::virtio::balloon::Balloon;
use devices::virtio::blk::Blk;
use devices::virtio::mmio::Mmio;
use devices::virtio::net::Net;
use devices::{Device, Worker};
use disks::{Coming, Disks};
use ends::Ends;
use fittings::{Fittings, Origin};
use kvm_ioctls::VcpuFd;
use migration::DirtyLedger;
use saved::SavedState;
use std::sync::Arc;
use std::time::Duration;

/// How long a vCPU may take to leave the guest, and a device to complete what is in flight.
const STAND_WITHIN: Duration = Duration::from_secs(5);

/// A VM with memory and host resources, in which no guest is yet.
#[derive(Debug)]
pub struct EmptyMachine {
    config: MachineConfig,
    threads: Threads,
    vcpus: Vec<VcpuFd>,
    chassis: Chassis,
    resources: Resources,
    line: Arc<SerialLine>,
    ends: Arc<Ends>,
}

impl EmptyMachine {
    /// Makes the VM of a validated `config`, with fresh memory. `listener` hears what happens to it.
    ///
    /// # Errors
    /// [`MachineError`] if the host lacks something.
    pub fn new(
        host: &KvmHost,
        config: MachineConfig,
        resources: Resources,
        line: Arc<SerialLine>,
        listener: NoticeListener,
    ) -> Result<Self, MachineError> {
        let memory = GuestMemory::create(config.memory.bytes, config.memory.huge_pages)?;
        Self::around(host, config, memory, resources, line, listener)
    }

    /// The same around memory that is there.
    ///
    /// # Errors
    /// [`MachineError`] if the host lacks something.
    pub fn around(
        host: &KvmHost,
        config: MachineConfig,
        memory: GuestMemory,
        resources: Resources,
        line: Arc<SerialLine>,
        listener: NoticeListener,
    ) -> Result<Self, MachineError> {
        let threads = Threads::start(&config)?;
        let (chassis, vcpus) = Chassis::build(host, &config, memory)?;
        let ends = Arc::new(Ends::new(listener, Arc::clone(&chassis.tracker)));
        Ok(Self { config, threads, vcpus, chassis, resources, line, ends })
    }

    /// The machine's memory, to be filled.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        self.chassis.memory()
    }

    /// Loads the kernel and brings vCPUs and devices to where firmware would leave them. The machine stands.
    ///
    /// # Errors
    /// [`MachineError`]; a file that cannot be booted is named in it.
    pub fn power_on(self, host: &KvmHost) -> Result<Machine, MachineError> {
        let ram = self.chassis.memory().ram();
        let rsdp = acpi::write_tables(ram, &self.config)?;
        let entry = boot::load(ram, &self.config.boot, rsdp)?;
        let supported = host.supported_cpuid()?;
        let cpu = GuestCpu::new(&cpuid::for_vcpu(supported, &self.config.cpus, 0)?, host.arch_capabilities());
        for (id, vcpu) in (0..).zip(&self.vcpus) {
            let table = cpuid::for_vcpu(supported, &self.config.cpus, id)?;
            vcpu.set_cpuid2(&table)
                .map_err(|source| MachineError::Kvm { action: "set the CPUID of a vCPU", source })?;
            entry::set_firmware_state(vcpu)?;
        }
        if let Some(boot_vcpu) = self.vcpus.first() {
            entry::set_registers(boot_vcpu, &entry)?;
        }
        self.assemble(Origin::PowerOn, cpu)
    }

    /// Restores vCPUs, chips and devices from `state`, of which nothing may be left over. The machine stands. Memory was
    /// filled before. `cpu` is what the guest was started with, to be told to the next target.
    ///
    /// # Errors
    /// [`MachineError`] if the state is not one of this machine.
    pub fn restore(self, mut state: SavedState, cpu: GuestCpu) -> Result<Machine, MachineError> {
        let machine = self.assemble(Origin::Saved(&mut state), cpu)?;
        let Chassis { slots, tracker: _, facts } = &machine.chassis;
        state::restore(slots.vm(), &machine.vcpus, facts, &mut state)?;
        state.finish()?;
        Ok(machine)
    }

    fn assemble(self, origin: Origin<'_>, cpu: GuestCpu) -> Result<Machine, MachineError> {
        let Self { config, threads, vcpus, chassis, mut resources, line, ends } = self;
        let Threads { crew, devices } = threads;
        let starts = matches!(origin, Origin::PowerOn);
        let coming = std::mem::take(&mut resources.disks.coming);
        let (fittings, buses) = Fittings::build(&chassis, &config, resources, origin, devices, &line, &ends)?;
        let vcpus = Vcpus::seat(crew, vcpus, &Arc::new(buses), &(Arc::clone(&ends) as Arc<dyn VcpuEvents>))?;
        let came = Vec::new();
        let machine =
            Machine { vcpus, fittings, coming, came, line, chassis, ends, config, cpu, stance: Stance::Standing };
        if starts {
            // Devices from saved state stand already; these are made to, so that both kinds are led alike from here.
            machine.quiesce_devices()?;
        }
        Ok(machine)
    }
}

/// The threads that every machine has. Started before the VM is made: they get ready meanwhile.
#[derive(Debug)]
struct Threads {
    crew: Crew,
    devices: Worker,
}

impl Threads {
    fn start(config: &MachineConfig) -> Result<Self, MachineError> {
        let crew = Crew::start(config.cpus.count)?;
        Ok(Self { crew, devices: Worker::spawn("devices", seccomp::enter_worker)? })
    }
}

/// Whether vCPUs and devices work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stance {
    Running,
    Standing,
}

/// A machine with a guest in it.
#[derive(Debug)]
pub struct Machine {
    // In the order in which they must be dropped.
    vcpus: Vcpus,
    fittings: Fittings,
    /// Disks that are partly elsewhere.
    coming: Vec<Coming>,
    /// Disks that are all here, which those who lent them may not have heard yet.
    came: Vec<Coming>,
    line: Arc<SerialLine>,
    chassis: Chassis,
    ends: Arc<Ends>,
    config: MachineConfig,
    cpu: GuestCpu,
    stance: Stance,
}

impl Machine {
    /// What the machine is.
    #[must_use]
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// What the guest was told of its CPU when it started.
    #[must_use]
    pub fn cpu(&self) -> &GuestCpu {
        &self.cpu
    }

    /// Its memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        self.chassis.memory()
    }

    /// Whether vCPUs and devices work.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.stance == Stance::Running
    }

    /// How the guest ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<&GuestEnd> {
        self.ends.first()
    }

    /// Lets devices and vCPUs work, and what is missing of disks come. Nothing happens if they do.
    pub fn run(&mut self) {
        self.coming.iter_mut().for_each(|coming| coming.fetch(&self.ends));
        if self.stance == Stance::Standing {
            self.fittings.each().for_each(Device::resume);
            self.vcpus.run();
            self.stance = Stance::Running;
        }
    }

    /// Makes vCPUs and devices stand; nothing of this process touches the guest from then on. Nothing happens if they
    /// stand.
    ///
    /// # Errors
    /// [`MachineError`] if one does not stand in time; all run on then.
    pub fn stand(&mut self) -> Result<(), MachineError> {
        if self.stance == Stance::Running {
            self.vcpus.park(STAND_WITHIN)?;
            if let Err(error) = self.quiesce_devices() {
                self.vcpus.run();
                return Err(error);
            }
            self.stance = Stance::Standing;
        }
        Ok(())
    }

    fn quiesce_devices(&self) -> Result<(), MachineError> {
        for (index, device) in self.fittings.each().enumerate() {
            if let Err(error) = device.quiesce(STAND_WITHIN) {
                self.fittings.each().take(index).for_each(Device::resume);
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Takes a share of its time away from each vCPU from now on; see [`Vcpus::throttle`]. A machine that takes the place
    /// of this one, here or elsewhere, is not throttled.
    ///
    /// # Errors
    /// [`MachineError`] if there is not one share for each vCPU, or the host has no thread for it.
    pub fn throttle(&self, shares: &[f64]) -> Result<(), MachineError> {
        Ok(self.vcpus.throttle(shares)?)
    }

    /// How much time each vCPU lost so far by [`throttle`](Self::throttle).
    #[must_use]
    pub fn time_taken(&self) -> Vec<Duration> {
        self.vcpus.time_taken()
    }

    /// The state of everything but memory. The machine stands.
    ///
    /// # Errors
    /// [`MachineError`] if a piece cannot be read; the machine is as before.
    pub fn save(&self) -> Result<SavedState, MachineError> {
        let mut state = SavedState::new();
        let Chassis { slots, tracker: _, facts } = &self.chassis;
        state::save(slots.vm(), &self.vcpus, facts, &mut state)?;
        for device in self.fittings.each() {
            device.save(&mut state)?;
        }
        Ok(state)
    }

    /// Saves the machine, takes it apart, and makes a new VM of the saved state around the same memory, taps and console:
    /// what a migration does, without another host. Gives the machine, which stands, and the state's length in bytes.
    ///
    /// # Errors
    /// [`MachineError`]; the guest is lost then, so this is for tests.
    pub fn pulse(mut self, host: &KvmHost, listener: NoticeListener) -> Result<(Self, u64), MachineError> {
        self.stand()?;
        let state = self.save()?.encode();
        let Self { vcpus, fittings, coming, came, line, chassis, ends, config, cpu, stance: _ } = self;
        let (memory, taps) = (chassis.memory().clone(), fittings.duplicate_taps()?);
        // The last of them takes the VM along, so that its interrupts' descriptors can be bound to the next.
        drop((vcpus, fittings, coming, came, ends, chassis));
        let disks = Disks::open(&config, DiskLocks::Take).map_err(ResourceError::from)?;
        let machine = EmptyMachine::around(host, config, memory, Resources { disks, taps }, line, listener)?;
        let bytes = state.len() as u64;
        Ok((machine.restore(SavedState::decode(&state)?, cpu)?, bytes))
    }

    /// Starts to log the pages that anyone changes from now on. What this process wrote before, such as kernel and
    /// initramfs, is no change.
    ///
    /// # Errors
    /// [`MachineError`] if KVM or an accelerator refuses.
    pub fn start_dirty_log(&self) -> Result<(), MachineError> {
        self.memory().forget_writes();
        self.chassis.tracker.start()?;
        self.fittings.each().try_for_each(|device| device.log_dirty(true)).map_err(MachineError::from)
    }

    /// Marks the pages that changed since the last harvest: by KVM's word, by this process, by accelerators.
    ///
    /// # Errors
    /// [`MachineError`] if KVM refuses.
    pub fn harvest_dirty(&self, ledger: &mut DirtyLedger) -> Result<(), MachineError> {
        self.chassis.tracker.harvest(ledger)?;
        self.memory().harvest_writes(ledger);
        for device in self.fittings.each() {
            device.harvest_dirty(&mut |gpa| {
                if let Some((region, page)) = self.memory().page_at(gpa) {
                    ledger.mark(region, page.0);
                }
            });
        }
        Ok(())
    }

    /// How many pages each vCPU wrote among those of the last harvest; `None` with a tracker that does not know it. See
    /// [`DirtyTracker::written_by_vcpu`](crate::dirty::DirtyTracker::written_by_vcpu).
    #[must_use]
    pub fn written_by_vcpu(&self) -> Option<Vec<u64>> {
        self.chassis.tracker.written_by_vcpu()
    }

    /// Stops the log.
    ///
    /// # Errors
    /// [`MachineError`] if KVM or an accelerator refuses; everything was tried.
    pub fn stop_dirty_log(&self) -> Result<(), MachineError> {
        let devices = self.fittings.each().map(|device| device.log_dirty(false)).fold(Ok(()), Result::and);
        self.chassis.tracker.stop()?;
        Ok(devices?)
    }

    /// Gives up what only one host may hold. The machine stands.
    pub fn release(&self) {
        self.fittings.each().for_each(Device::release);
    }

    /// Takes back what [`release`](Self::release) gave up.
    ///
    /// # Errors
    /// [`MachineError`] if another host holds something.
    pub fn reacquire(&self) -> Result<(), MachineError> {
        Ok(self.fittings.each().try_for_each(Device::reacquire)?)
    }

    /// Tells the world that the guest is here now.
    pub fn announce(&self) {
        self.fittings.each().for_each(Device::announce);
    }

    /// Presses the power button.
    pub fn press_power_button(&self) {
        self.fittings.power.press_power_button();
    }

    /// The balloon, if the machine has one.
    #[must_use]
    pub fn balloon(&self) -> Option<&Arc<Mmio<Balloon>>> {
        self.fittings.balloon.as_ref()
    }

    /// The disks, in the order of the configuration.
    #[must_use]
    pub fn disks(&self) -> &[Arc<Mmio<Blk>>] {
        &self.fittings.disks
    }

    /// What the disks are on, in the order of the configuration.
    #[must_use]
    pub fn logged_disks(&self) -> &[Arc<LoggedBackend>] {
        &self.fittings.logged
    }

    /// The disks of which something is elsewhere, by their ids.
    pub fn coming_disks(&self) -> impl Iterator<Item = (&str, &Arc<LayeredBackend>)> {
        self.coming.iter().map(|coming| (coming.id.as_str(), &coming.disk))
    }

    /// Takes note of disks that have come: each is in its file from now on. Whether there were any.
    pub fn settle_disks(&mut self) -> bool {
        let (whole, coming): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.coming).into_iter().partition(|coming| coming.disk.is_whole());
        self.coming = coming;
        self.came.retain(|came| !came.is_over());
        for Coming { id, .. } in &whole {
            for disk in self.config.disks.iter_mut().filter(|disk| disk.id == *id) {
                if let DiskPlace::Layered(layer) = &disk.place {
                    disk.place = DiskPlace::File(layer.file.clone());
                }
            }
        }
        let any = !whole.is_empty();
        self.came.extend(whole);
        any
    }

    /// The NICs, in the order of the configuration.
    #[must_use]
    pub fn nics(&self) -> &[Arc<Mmio<Net>>] {
        &self.fittings.nics
    }
}
