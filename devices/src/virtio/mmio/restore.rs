//! Restoring the transport's part of a device from untrusted state.
//!
//! Invariant: what passes is a state that some driver could have reached on this device, as it is configured here.

use super::super::{MmioSavedV1, QueueSavedV1, RestoreError, VirtioDevice, interrupt};
use super::core::{
    ACKNOWLEDGE, Core, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET, QueueSetup, Run, queue_from,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;

impl<D: VirtioDevice> Core<D> {
    /// Takes over `saved`; the device stands still afterwards.
    pub(super) fn restore(&mut self, id: &str, saved: &MmioSavedV1) -> Result<(), RestoreError> {
        let MmioSavedV1 {
            device_status,
            device_features_select,
            driver_features_select,
            driver_features,
            queue_select,
            interrupt_status,
            config_generation,
            queues,
        } = saved;
        let checks = Checks { id };
        checks.status(*device_status)?;
        let negotiated = device_status & FEATURES_OK != 0;
        if negotiated {
            checks.features(*driver_features, self.offered())?;
            self.io.features = *driver_features;
        }
        let only_known = interrupt_status & !(interrupt::USED_BUFFER | interrupt::CONFIG_CHANGE) == 0;
        checks.field("interrupt status", (*interrupt_status).into(), only_known)?;
        let here = self.io.queues.len();
        if queues.len() != here {
            return Err(checks.differs("number of queues", queues.len() as u64, here as u64));
        }
        for (index, queue) in queues.iter().enumerate() {
            self.restore_queue(&checks, index, queue, negotiated)?;
        }
        self.registers.status = *device_status;
        self.registers.device_features_select = *device_features_select;
        self.registers.driver_features_select = *driver_features_select;
        self.registers.driver_features = *driver_features;
        self.registers.queue_select = *queue_select;
        self.io.interrupt.restore(*interrupt_status, *config_generation);
        self.run = Run::Standing;
        Ok(())
    }

    fn restore_queue(
        &mut self,
        checks: &Checks<'_>,
        index: usize,
        saved: &QueueSavedV1,
        negotiated: bool,
    ) -> Result<(), RestoreError> {
        let QueueSavedV1 { size, ready, descriptors, available, used, next_available, next_used, event_index } = saved;
        let setup = QueueSetup { size: *size, descriptors: *descriptors, available: *available, used: *used };
        self.registers.queues[index] = setup;
        if !ready {
            return Ok(());
        }
        checks.field("queue ready", index as u64, negotiated)?;
        let as_negotiated = *event_index == self.io.has(VIRTIO_RING_F_EVENT_IDX);
        checks.field("event index", (*event_index).into(), as_negotiated)?;
        let in_flight = next_available.wrapping_sub(*next_used);
        checks.field("number of chains in flight", in_flight.into(), in_flight <= *size)?;
        let max_size = self.device().queue_max_sizes()[index];
        let mut queue =
            queue_from(setup, max_size, *event_index).map_err(|_| checks.bad("queue setup, of queue", index as u64))?;
        queue.set_next_avail(*next_available);
        queue.set_next_used(*next_used);
        let place = &mut self.io.queues[index];
        *place.queue_mut() = queue;
        place.check_rings().map_err(|_| checks.bad("ring addresses, of queue", index as u64))
    }
}

struct Checks<'a> {
    id: &'a str,
}

impl Checks<'_> {
    fn bad(&self, field: &'static str, value: u64) -> RestoreError {
        RestoreError::BadField { id: self.id.to_owned(), field, value }
    }

    fn differs(&self, field: &'static str, saved: u64, here: u64) -> RestoreError {
        RestoreError::Differs { id: self.id.to_owned(), field, saved, here }
    }

    fn field(&self, field: &'static str, value: u64, holds: bool) -> Result<(), RestoreError> {
        if holds { Ok(()) } else { Err(self.bad(field, value)) }
    }

    fn status(&self, status: u32) -> Result<(), RestoreError> {
        let known = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | NEEDS_RESET | FAILED;
        let has = |bit| status & bit != 0;
        let ordered = (!has(FEATURES_OK) || has(DRIVER)) && (!has(DRIVER_OK) || has(FEATURES_OK));
        self.field("device status", status.into(), status & !known == 0 && ordered)
    }

    fn features(&self, accepted: u64, offered: u64) -> Result<(), RestoreError> {
        if accepted & !offered != 0 {
            return Err(self.differs("features", accepted, offered));
        }
        self.field("features", accepted, accepted & (1 << VIRTIO_F_VERSION_1) != 0)
    }
}
