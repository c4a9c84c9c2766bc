//! The devices of a machine: built from its description, new or from saved state, and wired to buses and interrupts.
//!
//! This is the one list of what a machine has. A device kind is added by a line in `virtio_devices` (or beside the serial
//! port), and by nothing else here.

use super::MachineError;
use super::chassis::Chassis;
use super::disks::{Disks, blk_parts};
use super::ends::Ends;
use super::line::SerialLine;
use super::resources::{Resources, net_parts};
use crate::config::{self, BALLOON_ID, MachineConfig, RNG_ID};
use crate::layout::{
    COM1_GSI, COM1_PORT, COM1_PORTS, I8042_DATA_PORT, I8042_PORTS, PM1A_EVENT_PORT, PVPANIC_PORT, RESET_PORT, SCI_GSI,
    VIRTIO_QUEUE_NOTIFY, VIRTIO_WINDOW_SIZE, VirtioWindow, virtio_window,
};
use crate::seccomp;
use crate::vcpu::Buses;
use block::{Backend, LoggedBackend};
use devices::power::{PM_PORTS, PowerEvent, PowerManagement, PowerParts, PowerPort};
use devices::virtio::balloon::{Balloon, BalloonParts};
use devices::virtio::blk::Blk;
use devices::virtio::mmio::{Mmio, MmioParts};
use devices::virtio::net::{MacAddress, Net, Tap};
use devices::virtio::rng::Rng;
use devices::virtio::{FailureListener, VirtioDevice};
use devices::{BusDevice, Device, Worker};
use kvm_ioctls::IoEventAddress;
use saved::SavedState;
use std::sync::Arc;
use std::time::Duration;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The id of the power management registers' section.
const POWER_ID: &str = "power0";

/// How often the balloon asks the guest for its memory statistics.
const STATISTICS_EVERY: Duration = Duration::from_secs(2);

/// Whether devices start in their power-on state or from saved sections.
#[derive(Debug)]
pub(crate) enum Origin<'a> {
    PowerOn,
    Saved(&'a mut SavedState),
}

/// All devices of a machine.
#[derive(Debug)]
pub(crate) struct Fittings {
    /// Every device, in the order in which they are led.
    pub(crate) all: Vec<Arc<dyn Device>>,
    pub(crate) power: Arc<PowerManagement>,
    pub(crate) balloon: Option<Arc<Mmio<Balloon>>>,
    pub(crate) disks: Vec<Arc<Mmio<Blk>>>,
    /// What the disks are on.
    pub(crate) logged: Vec<Arc<LoggedBackend>>,
    pub(crate) nics: Vec<Arc<Mmio<Net>>>,
    /// Second handles to the NICs' taps, by which they outlive the NICs.
    taps: Vec<Tap>,
}

/// A machine in the course of being fitted out.
struct Fitter<'a> {
    chassis: &'a Chassis,
    origin: Origin<'a>,
    buses: Buses,
    all: Vec<Arc<dyn Device>>,
    windows: usize,
    shared_worker: Worker,
    ends: &'a Arc<Ends>,
}

impl Fittings {
    /// Builds the devices of `config` on `resources`, wires them, and gives them with the buses they are on. The light
    /// ones work on `shared_worker`. Devices from saved state stand still.
    pub(crate) fn build(
        chassis: &Chassis,
        config: &MachineConfig,
        resources: Resources,
        origin: Origin<'_>,
        shared_worker: Worker,
        line: &SerialLine,
        ends: &Arc<Ends>,
    ) -> Result<(Self, Buses), MachineError> {
        let mut fitter =
            Fitter { chassis, origin, buses: Buses::default(), all: Vec::new(), windows: 0, shared_worker, ends };
        let Resources { disks: Disks { backends, coming: _ }, taps } = resources;
        let logged = backends.clone();
        let disks = config
            .disks
            .iter()
            .zip(backends)
            .map(|(disk, backend)| {
                // Its queues have threads of their own.
                fitter
                    .virtio(&disk.id, None, blk_parts(disk, backend as Arc<dyn Backend>), |parts| Ok(Blk::new(parts)?))
            })
            .collect::<Result<_, _>>()?;
        let kept_taps = duplicate(&taps)?;
        let nics = config
            .nics
            .iter()
            .zip(taps)
            .map(|(nic, tap)| {
                let parts = net_parts(nic, tap, chassis.memory().ram())?;
                let mac = MacAddress::unicast(nic.mac.0)?;
                fitter.virtio(&nic.id, Some(&nic.id), parts, |parts| Ok(Net::new(mac, parts)?))
            })
            .collect::<Result<_, MachineError>>()?;
        if config.rng {
            fitter.virtio(RNG_ID, None, Rng::host_random()?, |random| Ok(Rng::new(random)))?;
        }
        let balloon = match config.balloon {
            Some(config::Balloon { deflate_on_oom, free_page_reporting }) => {
                let parts = BalloonParts {
                    ram_bytes: config.memory.bytes,
                    statistics_every: STATISTICS_EVERY,
                    deflate_on_oom,
                    free_page_reporting,
                };
                Some(fitter.virtio(BALLOON_ID, None, parts, |parts| Ok(Balloon::new(parts)?))?)
            }
            None => None,
        };
        fitter.serial(line)?;
        let power = fitter.power()?;
        let Fitter { buses, all, .. } = fitter;
        Ok((Self { all, power, balloon, disks, logged, nics, taps: kept_taps }, buses))
    }

    /// Every device, in the order in which they are led.
    pub(crate) fn each(&self) -> impl Iterator<Item = &dyn Device> {
        self.all.iter().map(AsRef::as_ref)
    }

    /// The NICs' taps, for a machine that takes the place of this one.
    pub(crate) fn duplicate_taps(&self) -> std::io::Result<Vec<Tap>> {
        duplicate(&self.taps)
    }
}

fn duplicate(taps: &[Tap]) -> std::io::Result<Vec<Tap>> {
    taps.iter().map(Tap::try_clone).collect()
}

impl Fitter<'_> {
    /// Makes a virtio device and puts it into the next window. It works on a thread named `own_worker`, or on the shared
    /// one.
    fn virtio<D: VirtioDevice>(
        &mut self,
        id: &str,
        own_worker: Option<&str>,
        device_parts: D::Parts,
        new: impl FnOnce(D::Parts) -> Result<D, MachineError>,
    ) -> Result<Arc<Mmio<D>>, MachineError>
    where
        Mmio<D>: Device,
    {
        let window = virtio_window(self.windows).ok_or(MachineError::TooManyDevices)?;
        self.windows += 1;
        let irq = self.interrupt(window.gsi)?;
        let worker = match own_worker {
            Some(name) => Worker::spawn(name, seccomp::enter_worker)?,
            None => self.shared_worker.clone(),
        };
        // Weak, since a worker may let go of its device a moment after the machine did, and would hold its VM.
        let (ends, device) = (Arc::downgrade(self.ends), id.to_owned());
        let on_failure = FailureListener::new(move |cause| {
            if let Some(ends) = ends.upgrade() {
                ends.on_device_failure(&device, cause);
            }
        });
        let parts = MmioParts { id: id.to_owned(), ram: self.chassis.memory().ram().clone(), irq, worker, on_failure };
        let device = Arc::new(match &mut self.origin {
            Origin::PowerOn => Mmio::new(new(device_parts)?, parts)?,
            Origin::Saved(state) => Mmio::restore(state, device_parts, parts)?,
        });
        self.bind_notifiers(&device, window)?;
        self.buses.mmio.insert(window.base.0, VIRTIO_WINDOW_SIZE, Arc::clone(&device) as Arc<dyn BusDevice>)?;
        self.all.push(Arc::clone(&device) as Arc<dyn Device>);
        Ok(device)
    }

    fn bind_notifiers<D: VirtioDevice>(&self, device: &Mmio<D>, window: VirtioWindow) -> Result<(), MachineError> {
        let address = IoEventAddress::Mmio(window.base.0 + VIRTIO_QUEUE_NOTIFY);
        for (queue, notifier) in (0_u32..).zip(device.queue_notifiers()?) {
            self.chassis
                .vm()
                .register_ioevent(&notifier, &address, queue)
                .map_err(|source| MachineError::Kvm { action: "bind a queue's notification", source })?;
        }
        Ok(())
    }

    /// Takes the serial port, which outlives the machine, into this one.
    fn serial(&mut self, line: &SerialLine) -> Result<(), MachineError> {
        match &mut self.origin {
            Origin::PowerOn => line.port().reset(),
            Origin::Saved(state) => line.port().restore(state)?,
        }
        self.bind_interrupt(line.irq(), COM1_GSI)?;
        self.buses.pio.insert(COM1_PORT.into(), COM1_PORTS.into(), Arc::clone(line.port()) as Arc<dyn BusDevice>)?;
        self.all.push(Arc::clone(line.port()) as Arc<dyn Device>);
        Ok(())
    }

    fn power(&mut self) -> Result<Arc<PowerManagement>, MachineError> {
        let ends = Arc::clone(self.ends);
        let listener: Arc<dyn Fn(PowerEvent) + Send + Sync> = Arc::new(move |event| ends.on_power(event));
        let parts =
            PowerParts { id: POWER_ID.to_owned(), sci: self.interrupt(SCI_GSI)?, listener: Arc::clone(&listener) };
        let power = Arc::new(match &mut self.origin {
            Origin::PowerOn => PowerManagement::new(parts),
            Origin::Saved(state) => PowerManagement::restore(state, parts)?,
        });
        let pio = &mut self.buses.pio;
        pio.insert(PM1A_EVENT_PORT.into(), PM_PORTS, Arc::clone(&power) as Arc<dyn BusDevice>)?;
        pio.insert(RESET_PORT.into(), 1, Arc::new(PowerPort::reset_register(Arc::clone(&listener))))?;
        pio.insert(
            I8042_DATA_PORT.into(),
            I8042_PORTS,
            Arc::new(PowerPort::keyboard_controller(Arc::clone(&listener))),
        )?;
        pio.insert(PVPANIC_PORT.into(), 1, Arc::new(PowerPort::panic_notifier(listener)))?;
        self.all.push(Arc::clone(&power) as Arc<dyn Device>);
        Ok(power)
    }

    /// An event that raises interrupt `gsi`.
    fn interrupt(&self, gsi: u32) -> Result<EventFd, MachineError> {
        let irq = EventFd::new(EFD_NONBLOCK)?;
        self.bind_interrupt(&irq, gsi)?;
        Ok(irq)
    }

    fn bind_interrupt(&self, irq: &EventFd, gsi: u32) -> Result<(), MachineError> {
        let refused = |source| MachineError::Kvm { action: "bind an interrupt", source };
        self.chassis.vm().register_irqfd(irq, gsi).map_err(refused)
    }
}
