//! A driver of a disk as a guest has it, at the registers and in the memory of one queue: no faster than it must be, so that
//! what is measured is the device.
//!
//! Its chains are laid out once: a header, a buffer of 4 KiB and a status for each request that may be in flight.

use std::sync::atomic::Ordering;

use anyhow::{Result, ensure};
use devices::virtio::blk::Blk;
use devices::virtio::mmio::Mmio;
use devices::{BusDevice, Gpa, GuestRam};
use vm_memory::{Address, Bytes};

const SIZE: u16 = 256;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
/// A header and a status for each request.
const HEADS: u64 = 0x8000;
const HEAD: u64 = 32;
const STATUS: u64 = 16;
const DATA: u32 = 0x1_0000;
/// Bytes of one request's data.
pub(super) const BLOCK: u32 = 4096;
/// Descriptors of one request.
const CHAIN: u16 = 3;
/// The most requests in flight.
pub(super) const SLOTS: u16 = SIZE / CHAIN;
/// Bytes of memory that all of it takes.
pub(super) const MEMORY: usize = DATA as usize + BLOCK as usize * SLOTS as usize;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// VERSION_1, EVENT_IDX, and the disk's FLUSH.
const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 9;

/// A driver that has brought the device up.
pub(super) struct Driver<'a> {
    device: &'a Mmio<Blk>,
    ram: GuestRam,
    available: u16,
    used: u16,
    /// The available index when the device was last kicked, or need not be.
    told: u16,
}

impl<'a> Driver<'a> {
    pub(super) fn bring_up(device: &'a Mmio<Blk>, ram: &GuestRam) -> Result<Self> {
        let write = |offset: u64, value: u32| device.write(offset, &value.to_le_bytes());
        let status = || {
            let mut value = [0; 4];
            device.read(0x70, &mut value);
            u32::from_le_bytes(value)
        };
        for step in [0, 1, 3] {
            write(0x70, step);
        }
        for (select, half) in [(0, FEATURES & 0xffff_ffff), (1, FEATURES >> 32)] {
            write(0x24, select);
            write(0x20, u32::try_from(half)?);
        }
        write(0x70, 11);
        ensure!(status() & 8 != 0, "The device does not agree to the features {FEATURES:#x}");
        write(0x30, 0);
        write(0x38, SIZE.into());
        for (register, address) in [(0x80, DESCRIPTORS), (0x90, AVAILABLE), (0xa0, USED)] {
            write(register, u32::try_from(address)?);
            write(register + 4, 0);
        }
        write(0x44, 1);
        write(0x70, 15);
        ensure!(status() == 15, "The device does not begin: its status is {:#x}", status());
        let driver = Self { device, ram: ram.clone(), available: 0, used: 0, told: 0 };
        (0..SLOTS).try_for_each(|slot| driver.lay_out(slot))?;
        Ok(driver)
    }

    fn put<T: vm_memory::ByteValued>(&self, value: T, address: u64) -> Result<()> {
        Ok(self.ram.write_obj(value, Gpa::new(address))?)
    }

    fn lay_out(&self, slot: u16) -> Result<()> {
        let (head, data) = (HEADS + HEAD * u64::from(slot), u64::from(DATA + BLOCK * u32::from(slot)));
        let first = slot * CHAIN;
        let pieces = [(head, 16, NEXT), (data, BLOCK, NEXT | WRITE), (head + STATUS, 1, WRITE)];
        for (index, (address, length, flags)) in (first..).zip(pieces) {
            let place = DESCRIPTORS + 16 * u64::from(index);
            self.put(address, place)?;
            self.put::<u32>(length, place + 8)?;
            self.put(flags, place + 12)?;
            self.put(index + 1, place + 14)?;
        }
        // A read; its sector is written with each request.
        self.put(0_u32, head)
    }

    /// Offers to read the block `block` into a slot that is not in flight. The device does not know yet.
    pub(super) fn offer(&mut self, slot: u16, block: u64) -> Result<()> {
        self.put(block * u64::from(BLOCK / 512), HEADS + HEAD * u64::from(slot) + 8)?;
        self.put(slot * CHAIN, AVAILABLE + 4 + 2 * u64::from(self.available % SIZE))?;
        self.available = self.available.wrapping_add(1);
        Ok(())
    }

    /// Tells the device of what was offered, and kicks it if it wants that.
    pub(super) fn publish(&mut self) -> Result<()> {
        self.ram.store(self.available, Gpa::new(AVAILABLE + 2), Ordering::SeqCst)?;
        let event: u16 = self.ram.load(Gpa::new(USED + 4 + 8 * u64::from(SIZE)), Ordering::SeqCst)?;
        // The rule of virtio 1.3, 2.7.10.1.
        let new = self.available.wrapping_sub(self.told);
        if self.available.wrapping_sub(event).wrapping_sub(1) < new {
            self.device.write(0x50, &0_u32.to_le_bytes());
        }
        self.told = self.available;
        Ok(())
    }

    /// Calls `each` with the slots whose requests are done.
    pub(super) fn completed(&mut self, mut each: impl FnMut(u16)) -> Result<()> {
        let used: u16 = self.ram.load(Gpa::new(USED + 2), Ordering::Acquire)?;
        while self.used != used {
            let head: u32 = self.ram.read_obj(Gpa::new(USED + 4 + 8 * u64::from(self.used % SIZE)))?;
            let slot = u16::try_from(head)? / CHAIN;
            let status: u8 = self.ram.read_obj(Gpa::new(HEADS + HEAD * u64::from(slot) + STATUS))?;
            ensure!(status == 0, "A request failed with status {status}");
            each(slot);
            self.used = self.used.wrapping_add(1);
        }
        // An interrupt for the next one, as Linux wants it.
        self.put(self.used, AVAILABLE + 4 + 2 * u64::from(SIZE))
    }
}
