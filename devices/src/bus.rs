//! An address space, ports or MMIO, and the devices that answer in it. Built once, then read by every vCPU thread.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;
use thiserror::Error;

/// Something that answers to reads and writes in one range of a bus. Offsets count from the start of the range.
///
/// Accesses come from any vCPU thread, in parallel, with any length that the guest's instruction has (1 to 8 bytes on
/// x86-64) and any offset of the range; a device takes what makes no sense without panic.
pub trait BusDevice: Debug + Send + Sync {
    /// Fills `data` with what is at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a range could not be put on a bus.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or passes the end of the address space.
    #[error("A device range of {length:#x} bytes at {base:#x} is not possible")]
    BadRange {
        /// First address.
        base: u64,
        /// Length in bytes.
        length: u64,
    },
    /// The range touches one that is taken.
    #[error("The device range at {base:#x} overlaps the one at {taken:#x}")]
    Overlap {
        /// First address of the new range.
        base: u64,
        /// First address of the range that is there.
        taken: u64,
    },
}

#[derive(Debug, Clone)]
struct Place {
    length: u64,
    device: Arc<dyn BusDevice>,
}

/// Devices by address range.
#[derive(Debug, Clone, Default)]
pub struct Bus {
    places: BTreeMap<u64, Place>,
}

impl Bus {
    /// A bus without devices.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `base..base + length`.
    ///
    /// # Errors
    /// [`BusError`] if the range is impossible or taken.
    pub fn insert(&mut self, base: u64, length: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let end = base.checked_add(length).filter(|_| length > 0).ok_or(BusError::BadRange { base, length })?;
        if let Some((&taken, place)) = self.places.range(..end).next_back()
            && taken + place.length > base
        {
            return Err(BusError::Overlap { base, taken });
        }
        self.places.insert(base, Place { length, device });
        Ok(())
    }

    /// Reads at `address`. Where nothing answers, `data` is all ones, as on hardware.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes at `address`. Where nothing answers, the write is dropped.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(&dyn BusDevice, u64)> {
        let (base, place) = self.places.range(..=address).next_back()?;
        let offset = address - base;
        let fits = offset.checked_add(length as u64)? <= place.length;
        fits.then_some((place.device.as_ref(), offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[derive(Debug, Default)]
    struct Register(AtomicU64);
    impl BusDevice for Register {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.store(offset + data.len() as u64, Ordering::Relaxed);
        }
    }

    #[test]
    fn accesses_reach_their_device_by_offset() {
        let register = Arc::new(Register::default());
        let mut bus = Bus::new();
        bus.insert(0x100, 8, register.clone()).unwrap();
        let mut data = [0; 2];
        bus.read(0x103, &mut data);
        assert_eq!(data, [3, 3]);
        bus.write(0x104, &[0; 4]);
        assert_eq!(register.0.load(Ordering::Relaxed), 8);
    }

    #[test]
    fn nothing_answers_outside_or_across_the_edge() {
        let mut bus = Bus::new();
        bus.insert(0x100, 8, Arc::new(Register::default())).unwrap();
        for address in [0xff, 0x108, 0x107, u64::MAX] {
            let mut data = [0; 2];
            bus.read(address, &mut data);
            assert_eq!(data, [0xff; 2], "{address:#x}");
            bus.write(address, &[0; 2]);
        }
    }

    #[test]
    fn overlaps_and_impossible_ranges_are_refused() {
        let mut bus = Bus::new();
        let mut insert = |base, length| bus.insert(base, length, Arc::new(Register::default()));
        insert(0x100, 0x10).unwrap();
        insert(0x110, 0x10).unwrap();
        for (base, length) in [(0xf1, 0x10), (0x108, 1), (0x11f, 1), (0xf0, 0x100)] {
            assert!(matches!(insert(base, length), Err(BusError::Overlap { .. })), "{base:#x}");
        }
        assert_eq!(insert(0x200, 0), Err(BusError::BadRange { base: 0x200, length: 0 }));
        assert_eq!(insert(u64::MAX, 2), Err(BusError::BadRange { base: u64::MAX, length: 2 }));
    }
}
