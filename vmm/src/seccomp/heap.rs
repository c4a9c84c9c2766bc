//! Keeps the C library's allocator from opening files.
//!
//! It does so in whichever thread allocates or frees at that moment, and most threads may open nothing (glibc 2.36,
//! malloc/arena.c):
//!
//! - When a ninth arena is wanted, `arena_get2` counts the CPUs in /sys. With a limit of its own it does not ask. No thread
//!   here allocates so much that it would wait for a neighbour in its arena.
//! - When the end of an arena is free and longer than a threshold, `shrink_heap` asks /proc how memory is overcommitted.
//!   Without a threshold it does not shrink. What is large goes back to the kernel all the same: once the threshold is set
//!   by hand, blocks from 128 KiB on are always mapped one by one.

#![expect(unsafe_code, reason = "mallopt has no safe wrapper")]

/// As many arenas as glibc makes before it counts CPUs.
const ARENAS: libc::c_int = 8;

/// No arena is shrunk (mallopt(3)).
const NEVER: libc::c_int = -1;

/// Changes the allocator's settings; called before there are other threads.
pub(super) fn open_no_files() {
    for (setting, value) in [(libc::M_ARENA_MAX, ARENAS), (libc::M_TRIM_THRESHOLD, NEVER)] {
        // SAFETY: the call changes a setting of the allocator, under its own lock.
        if unsafe { libc::mallopt(setting, value) } == 0 {
            tracing::warn!("The C library did not take the setting {setting} of its allocator");
        }
    }
}
