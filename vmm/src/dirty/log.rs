//! The dirty log: a bitmap per memory slot that KVM fills and that is read and cleared apart.
//!
//! With KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (Documentation/virt/kvm/api.rst, 7.18) reading changes nothing, and only
//! clearing a bit protects its page again. With KVM_DIRTY_LOG_INITIALLY_SET the bitmap starts all ones and nothing is
//! protected until it is cleared, so that switching it on does not stop the guest; `start` clears it in pieces.

#![expect(unsafe_code, reason = "kvm-ioctls has no KVM_CLEAR_DIRTY_LOG")]

use super::{DirtyError, DirtyTracker};
use crate::layout::PAGE_SIZE;
use crate::memory::Slots;
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVMIO,
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::{VcpuFd, VmFd};
use migration::{DirtyLedger, RamRegion};
use std::sync::Arc;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_ref};

/// Pages that are protected by one call: KVM holds its MMU lock that long, and a vCPU that faults waits for it.
const CHUNK_PAGES: u64 = 1 << 16;
const WORD_BITS: u64 = u64::BITS as u64;
const CHUNK_WORDS: usize = (CHUNK_PAGES / WORD_BITS) as usize;

/// [`DirtyTracker`] by KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG.
#[derive(Debug)]
pub struct DirtyLog {
    slots: Arc<Slots>,
}

impl DirtyLog {
    /// Prepares the VM of `slots` for the log. Nothing is tracked yet, and nothing costs anything.
    ///
    /// # Errors
    /// [`DirtyError::Unsupported`] if KVM cannot clear apart from reading (before Linux 5.5).
    pub fn new(slots: Arc<Slots>) -> Result<Self, DirtyError> {
        let manual = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        let cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
        let offered = u32::try_from(slots.vm().check_extension_raw(cap.into())).unwrap_or(0);
        if offered & manual != manual {
            return Err(DirtyError::Unsupported { what: "dirty log with manual protection" });
        }
        let enable = kvm_enable_cap { cap, args: [manual.into(), 0, 0, 0], ..Default::default() };
        slots.vm().enable_cap(&enable).map_err(DirtyError::refused("enable the manual dirty log"))?;
        Ok(Self { slots })
    }

    fn clear_everything(&self) -> Result<(), DirtyError> {
        let ones = [u64::MAX; CHUNK_WORDS];
        for (_, slot, region) in self.slots.iter() {
            for first in (0..region.pages).step_by(CHUNK_WORDS * u64::BITS as usize) {
                let words = words_of(CHUNK_PAGES.min(region.pages - first));
                clear(self.slots.vm(), slot, region, first, &ones[..words])?;
            }
        }
        Ok(())
    }
}

impl DirtyTracker for DirtyLog {
    fn attach(&self, _: &VcpuFd) -> Result<(), DirtyError> {
        Ok(()) // The log belongs to the memory, whoever writes it.
    }

    fn start(&self) -> Result<(), DirtyError> {
        self.slots.log_dirty_pages(true).map_err(|source| DirtyError::Switch { source })?;
        self.clear_everything().inspect_err(|_| {
            // The first error is the one to tell; a log that stays on costs only speed.
            let _ = self.stop();
        })
    }

    fn harvest(&self, ledger: &mut DirtyLedger) -> Result<(), DirtyError> {
        let vm = self.slots.vm();
        for (id, slot, region) in self.slots.iter() {
            let bytes = usize::try_from(region.pages * PAGE_SIZE).expect("sizes have 64 bits on x86-64");
            let words = vm.get_dirty_log(slot, bytes).map_err(DirtyError::refused("read the dirty log"))?;
            let inside = ledger.mark_words(id, 0, &words);
            debug_assert!(inside, "KVM keeps one bit per page of the slot");
            let chunks = words.chunks(CHUNK_WORDS).zip((0_u64..).step_by(CHUNK_WORDS * u64::BITS as usize));
            for (chunk, first) in chunks.filter(|(chunk, _)| chunk.iter().any(|&word| word != 0)) {
                clear(vm, slot, region, first, chunk)?;
            }
        }
        Ok(())
    }

    fn written_by_vcpu(&self) -> Option<Vec<u64>> {
        None // One bit per page, for all vCPUs.
    }

    fn ring_full(&self) -> Result<(), DirtyError> {
        Ok(()) // There is no ring; KVM never asks.
    }

    fn stop(&self) -> Result<(), DirtyError> {
        self.slots.log_dirty_pages(false).map_err(|source| DirtyError::Switch { source })
    }
}

fn words_of(pages: u64) -> usize {
    usize::try_from(pages.div_ceil(WORD_BITS)).expect("sizes have 64 bits on x86-64")
}

/// Clears the bits that are set in `words` and protects their pages. `first` must be a multiple of 64.
fn clear(vm: &VmFd, slot: u32, region: &RamRegion, first: u64, words: &[u64]) -> Result<(), DirtyError> {
    // The last word may reach over the end of the slot; KVM wants the number of pages without that.
    let pages = (words.len() as u64 * WORD_BITS).min(region.pages - first);
    let request = kvm_clear_dirty_log {
        slot,
        num_pages: u32::try_from(pages).expect("a chunk is far below 4 Gi pages"),
        first_page: first,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_ptr().cast_mut().cast() },
    };
    let size = u32::try_from(size_of::<kvm_clear_dirty_log>()).expect("24 bytes");
    // KVM_CLEAR_DIRTY_LOG, include/uapi/linux/kvm.h.
    let number = ioctl_expr(_IOC_READ | _IOC_WRITE, KVMIO, 0xc0, size);
    // SAFETY: KVM reads `pages` bits, rounded up to whole words, from the bitmap, and there are as many words; despite
    // the pointer's type it writes nothing there. Both live until the call returns.
    if unsafe { ioctl_with_ref(vm, number, &request) } < 0 {
        return Err(DirtyError::Refused { action: "clear the dirty log", source: errno::Error::last() });
    }
    Ok(())
}
