//! Getting a vCPU out of KVM_RUN: the `immediate_exit` byte of its kvm_run page, and a signal to its thread.
//!
//! The byte makes the *next* KVM_RUN return with EINTR, the signal makes the *current* one return. The byte is set before
//! the signal is sent, so whichever side of the ioctl's entry the thread is on, it comes back (Linux
//! Documentation/virt/kvm/api.rst, `immediate_exit`). Only [`Desk`](super::desk::Desk) moves the byte, under its lock.

#![expect(unsafe_code, reason = "maps the kvm_run page a second time and sends a signal")]

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use vmm_sys_util::errno;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

/// The length of the part of the kvm_run page that is mapped here: one page, which holds the whole fixed part.
const PAGE: usize = 4096;

/// A mapping of one vCPU's kvm_run page of its own, so that the byte stays reachable for as long as anybody wants to
/// flip it, whatever became of the `VcpuFd`.
#[derive(Debug)]
pub(super) struct ImmediateExit {
    page: NonNull<u8>,
}

// SAFETY: the mapping belongs to this value and is only accessed through an atomic.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    pub(super) fn of(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: a new shared mapping at an address of the kernel's choice; it touches no other memory, and the result
        // is checked.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(page.cast::<u8>()) {
            Some(place) if page != libc::MAP_FAILED => Ok(Self { page: place }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    pub(super) fn set(&self, on: bool) {
        self.byte().store(u8::from(on), Ordering::SeqCst);
    }

    fn byte(&self) -> &AtomicU8 {
        // SAFETY: the field lies within the page, which is mapped until this value is dropped. In this process the byte
        // is only accessed here, atomically; the kernel reads it once per KVM_RUN.
        unsafe { AtomicU8::from_ptr(self.page.as_ptr().add(offset_of!(kvm_run, immediate_exit))) }
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that `of` made; `&mut self` says that nobody uses it any more.
        unsafe { libc::munmap(self.page.as_ptr().cast(), PAGE) };
    }
}

/// Makes the kick signal harmless for the whole process: its handler does nothing, being delivered is its whole effect.
pub(super) fn install_handler() -> Result<(), errno::Error> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static INSTALLED: OnceLock<Result<(), errno::Error>> = OnceLock::new();
    *INSTALLED.get_or_init(|| register_signal_handler(SIGRTMIN(), nothing))
}

/// Lets the kick signal reach the calling thread, whatever mask it inherited.
pub(super) fn unblock() {
    if let Err(error) = unblock_signal(SIGRTMIN()) {
        tracing::error!(?error, "The kick signal stays blocked in a vCPU thread");
    }
}

/// Interrupts the thread's KVM_RUN. A thread that has ended already is left alone: its handle is not joined yet, so the
/// thread id is still its own.
pub(super) fn signal(thread: &JoinHandle<()>) {
    if let Err(error) = thread.kill(SIGRTMIN()) {
        tracing::debug!(?error, "A vCPU thread did not take its kick");
    }
}
