//! What happens on a forbidden system call: the kernel sends SIGSYS to the thread, and the handler here names the call
//! and ends the process.
//!
//! Everything in the handler is async-signal-safe: no allocation, no lock that is waited for, only calls that every kind
//! of thread may make. If even those fail, or SIGSYS is blocked, the kernel ends the process by the signal.

#![expect(unsafe_code, reason = "a signal handler, and a call that libc does not wrap")]

use libc::{c_int, c_void, siginfo_t, ucontext_t};
use std::fmt::{self, Write};
use std::io;
use vmm_sys_util::errno;
use vmm_sys_util::signal::register_signal_handler;

/// The exit status after a forbidden system call, beside those of a guest's end.
pub const FORBIDDEN_STATUS: u8 = 24;

/// Asks the kernel whether it knows filters that trap.
pub(super) fn probe() -> io::Result<()> {
    let action = libc::SECCOMP_RET_TRAP;
    // SAFETY: the kernel reads one 32-bit action at the address, a local (seccomp(2), SECCOMP_GET_ACTION_AVAIL).
    let answer = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has [`report`] called on forbidden calls.
pub(super) fn install() -> Result<(), errno::Error> {
    register_signal_handler(libc::SIGSYS, report)
}

/// The kernel's `siginfo_t` of a SIGSYS (linux/asm-generic/siginfo.h, `_sigsys`), as far as it is read.
#[repr(C)]
struct SigSys {
    /// `si_signo`, `si_errno`, `si_code`, and padding.
    head: [c_int; 4],
    call_address: *mut c_void,
    call: c_int,
}

extern "C" fn report(_: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel hands a SA_SIGINFO handler valid pointers to a siginfo_t and a ucontext_t, and the former is
    // larger than what is read of it.
    let (call, registers) =
        unsafe { ((*info.cast::<SigSys>()).call, &(*context.cast::<ucontext_t>()).uc_mcontext.gregs) };
    let argument = |register: c_int| usize::try_from(register).ok().and_then(|index| registers.get(index)).copied();
    let [a, b, c] = [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX].map(|register| argument(register).unwrap_or(0));
    devices::serial::restore_terminal();
    let mut line = Line::default();
    let name = thread_name();
    let name = name.split(|byte| *byte == 0).next().and_then(|name| str::from_utf8(name).ok()).unwrap_or("?");
    // A line that is too long is cut.
    let _ = writeln!(line, "godwit: thread {name} made the forbidden system call {call} ({a:#x}, {b:#x}, {c:#x})");
    // SAFETY: the address and length are those of a local; `_exit` ends the process at once.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.length);
        libc::_exit(FORBIDDEN_STATUS.into());
    }
}

fn thread_name() -> [u8; 16] {
    let mut name = [0; 16];
    // SAFETY: the kernel writes at most 16 bytes at the address, a local of that size (prctl(2), PR_GET_NAME).
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    name
}

/// Text without allocation.
struct Line {
    bytes: [u8; 160],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { bytes: [0; 160], length: 0 }
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = &mut self.bytes[self.length..];
        let taken = text.len().min(room.len());
        room[..taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.length += taken;
        Ok(())
    }
}
