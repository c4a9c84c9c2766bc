//! The dirty ring: per vCPU, a ring of the addresses of pages that it wrote (Documentation/virt/kvm/api.rst, 8.29).
//!
//! Compared with the log, a harvest costs as much as was written and not as much as the guest has memory, and a vCPU that
//! writes too fast stops by itself when its ring is full. KVM pushes an entry by setting its DIRTY flag; the harvest takes
//! it and sets RESET; KVM_RESET_DIRTY_RINGS protects the pages of all such entries again and frees them. Both flags are
//! passed with acquire and release order (KVM_CAP_DIRTY_LOG_RING_ACQ_REL).
//!
//! KVM keeps a reserve in each ring for what one run of a vCPU may still write after the ring is "full", so a ring in which
//! every entry is taken has been overrun and pages are lost. A sound KVM never does that, but one that emulates many
//! instructions in one go does. Logging then ends at once, so that the vCPU goes on, and the next harvest tells it.
//!
//! Entries taken on behalf of a full ring wait in a bitmap for the next harvest. On x86-64 every write of KVM to guest
//! memory happens in the context of a vCPU, so there are no pages beside the rings (no RING_WITH_BITMAP as on arm64).

#![expect(unsafe_code, reason = "the rings are memory shared with the kernel")]

use super::{DirtyError, DirtyTracker};
use crate::memory::Slots;
use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO, kvm_dirty_gfn, kvm_enable_cap};
use kvm_ioctls::VcpuFd;
use migration::DirtyLedger;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{_IOC_NONE, ioctl, ioctl_expr};

/// KVM_DIRTY_GFN_F_DIRTY, include/uapi/linux/kvm.h: the entry holds a page that nobody took yet.
const FLAG_DIRTY: u32 = 1;
/// KVM_DIRTY_GFN_F_RESET: the entry was taken and may be protected and reused.
const FLAG_RESET: u32 = 2;
const WORD_BITS: u64 = u64::BITS as u64;

/// [`DirtyTracker`] by KVM's dirty rings.
#[derive(Debug)]
pub struct DirtyRing {
    slots: Arc<Slots>,
    entries: u32,
    /// Taken by harvests and by vCPU threads with a full ring; nothing else is locked while it is held.
    rings: Mutex<Rings>,
}

#[derive(Debug)]
struct Rings {
    rings: Vec<Ring>,
    /// Pages that were taken from the rings since the last harvest: a bitmap per slot. Empty while tracking is off.
    pending: Vec<Vec<u64>>,
    /// A ring was overrun: its entries and KVM's counters no longer agree, and never will.
    overrun: bool,
}

impl DirtyRing {
    /// Prepares the VM of `slots` for rings of `entries`, a power of two. Must come before the first vCPU is created.
    ///
    /// # Errors
    /// [`DirtyError`] if KVM has no dirty ring of that size, or has vCPUs already.
    pub fn new(slots: Arc<Slots>, entries: u32) -> Result<Self, DirtyError> {
        let cap = KVM_CAP_DIRTY_LOG_RING_ACQ_REL;
        let bytes = u64::from(entries) * size_of::<kvm_dirty_gfn>() as u64;
        let most = u64::try_from(slots.vm().check_extension_raw(cap.into())).unwrap_or(0);
        if bytes > most || !entries.is_power_of_two() {
            return Err(DirtyError::Unsupported { what: "dirty ring of that size" });
        }
        let enable = kvm_enable_cap { cap, args: [bytes, 0, 0, 0], ..Default::default() };
        slots.vm().enable_cap(&enable).map_err(DirtyError::refused("enable the dirty ring"))?;
        Ok(Self { slots, entries, rings: Mutex::new(Rings { rings: Vec::new(), pending: Vec::new(), overrun: false }) })
    }

    fn lock(&self) -> MutexGuard<'_, Rings> {
        // A thread that died while it held the lock cannot leave the rings torn: every entry is taken at once.
        self.rings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Empties all rings into the pending bitmaps and lets KVM watch those pages again.
    fn collect(&self, rings: &mut Rings) -> Result<(), DirtyError> {
        let Rings { rings, pending, overrun } = rings;
        let (mut taken, mut overrun_now) = (0_u32, false);
        for ring in rings {
            let before = taken;
            // An overrun ring could go on for ever; a sound one ends before its last entry.
            while taken - before < self.entries
                && let Some(page) = ring.take()
            {
                ring.pending += u64::from(note(pending, page));
                taken += 1;
            }
            overrun_now |= taken - before == self.entries;
        }
        if taken > 0 {
            self.reset()?;
        }
        if overrun_now {
            *overrun = true;
            self.slots.log_dirty_pages(false).map_err(|source| DirtyError::Switch { source })?;
        }
        Ok(())
    }

    fn trusted(&self, rings: &Rings) -> Result<(), DirtyError> {
        if rings.overrun { Err(DirtyError::Overrun { entries: self.entries }) } else { Ok(()) }
    }

    fn reset(&self) -> Result<(), DirtyError> {
        // KVM_RESET_DIRTY_RINGS, include/uapi/linux/kvm.h.
        let number = ioctl_expr(_IOC_NONE, KVMIO, 0xc7, 0);
        // SAFETY: the call has no argument and touches no memory of ours but the rings' flags, which are atomics here.
        if unsafe { ioctl(&**self.slots.vm(), number) } < 0 {
            return Err(DirtyError::Refused { action: "reset the dirty rings", source: errno::Error::last() });
        }
        Ok(())
    }
}

impl DirtyTracker for DirtyRing {
    fn attach(&self, vcpu: &VcpuFd) -> Result<(), DirtyError> {
        let ring = Ring::map(vcpu, self.entries).map_err(|error| DirtyError::Refused {
            action: "map a dirty ring",
            source: errno::Error::new(error.raw_os_error().unwrap_or(libc::EIO)),
        })?;
        self.lock().rings.push(ring);
        Ok(())
    }

    fn start(&self) -> Result<(), DirtyError> {
        let mut rings = self.lock();
        // What an earlier run of the tracker left behind goes before the slots are switched on.
        rings.pending.clear();
        self.collect(&mut rings)?;
        self.trusted(&rings)?;
        rings.rings.iter_mut().for_each(|ring| (ring.pending, ring.harvested) = (0, 0));
        rings.pending = self.slots.iter().map(|(_, _, region)| vec![0; words_of(region.pages)]).collect();
        self.slots.log_dirty_pages(true).map_err(|source| DirtyError::Switch { source })
    }

    fn harvest(&self, ledger: &mut DirtyLedger) -> Result<(), DirtyError> {
        let mut rings = self.lock();
        self.collect(&mut rings)?;
        self.trusted(&rings)?;
        for ((id, _, _), words) in self.slots.iter().zip(&mut rings.pending) {
            let inside = ledger.mark_words(id, 0, words);
            debug_assert!(inside, "pages beyond the slot are not noted");
            words.fill(0);
        }
        rings.rings.iter_mut().for_each(|ring| ring.harvested = std::mem::take(&mut ring.pending));
        Ok(())
    }

    fn written_by_vcpu(&self) -> Option<Vec<u64>> {
        Some(self.lock().rings.iter().map(|ring| ring.harvested).collect())
    }

    fn ring_full(&self) -> Result<(), DirtyError> {
        self.collect(&mut self.lock())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        let mut rings = self.lock();
        let switched = self.slots.log_dirty_pages(false).map_err(|source| DirtyError::Switch { source });
        rings.pending = Vec::new();
        let emptied = self.collect(&mut rings);
        switched.and(emptied)
    }
}

fn words_of(pages: u64) -> usize {
    usize::try_from(pages.div_ceil(WORD_BITS)).expect("sizes have 64 bits on x86-64")
}

/// Notes a page, unless tracking is off or KVM named a page that no slot has. Whether it was not noted before.
fn note(pending: &mut [Vec<u64>], Taken { slot, page }: Taken) -> bool {
    let word =
        usize::try_from(page / WORD_BITS).ok().and_then(|word| pending.get_mut(usize::from(slot))?.get_mut(word));
    word.is_some_and(|word| {
        let before = *word;
        *word |= 1 << (page % WORD_BITS);
        *word != before
    })
}

/// A page out of a ring.
struct Taken {
    slot: u16,
    page: u64,
}

/// One vCPU's ring. The mapping holds the vCPU's file, so it may outlive the descriptor.
#[derive(Debug)]
struct Ring {
    first: NonNull<kvm_dirty_gfn>,
    /// A power of two.
    entries: u32,
    /// The next entry to take; wraps, and is used modulo `entries`.
    next: u32,
    /// How many pages were noted first by this ring since the last harvest. A KVM that emulates instructions has an entry
    /// for each write, so entries are not counted.
    pending: u64,
    /// The same of the last harvest.
    harvested: u64,
}

// SAFETY: the mapping belongs to the whole process; a `Ring` is used by one thread at a time, and what the kernel writes
// beside it is read through atomics only.
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: &VcpuFd, entries: u32) -> io::Result<Self> {
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096;
        // SAFETY: a new mapping, at an address of the kernel's choice, of the descriptor's dirty ring.
        let address = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), bytes(entries), access, libc::MAP_SHARED, vcpu.as_raw_fd(), offset)
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let first = NonNull::new(address.cast()).expect("mmap never maps address 0 by its own choice");
        Ok(Self { first, entries, next: 0, pending: 0, harvested: 0 })
    }

    fn take(&mut self) -> Option<Taken> {
        let index = self.next & (self.entries - 1);
        // SAFETY: `index` is below `entries`, so the entry lies in the mapping, which lives as long as `self`.
        let entry = unsafe { self.first.add(index as usize).as_ptr() };
        // SAFETY: `flags` is an aligned u32 of the entry, and both sides access it atomically only.
        let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
        if flags.load(Ordering::Acquire) & FLAG_DIRTY == 0 {
            return None;
        }
        // SAFETY: with DIRTY set the entry is ours until RESET is: the kernel does not touch it, and the acquire above
        // makes what it wrote before visible.
        let (slot, page) = unsafe { ((*entry).slot, (*entry).offset) };
        flags.store(FLAG_RESET, Ordering::Release);
        self.next = self.next.wrapping_add(1);
        // The upper half of the slot is the address space: ours has no memory in that of system management mode.
        let slot = u16::try_from(slot & 0xffff).expect("masked to 16 bits");
        Some(Taken { slot, page })
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `map` made, and nothing borrows from it any more.
        unsafe { libc::munmap(self.first.as_ptr().cast(), bytes(self.entries)) };
    }
}

fn bytes(entries: u32) -> usize {
    entries as usize * size_of::<kvm_dirty_gfn>()
}
