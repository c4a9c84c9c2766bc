//! A limit for the C library's memory arenas.
//!
//! When a ninth arena is wanted, glibc opens a file of /sys to count the CPUs, in whichever thread allocates then, and
//! most threads may open nothing. With a limit of its own it does not ask (malloc/arena.c, `arena_get2`). No thread here
//! allocates so much that it would wait for a neighbour in its arena.

#![expect(unsafe_code, reason = "mallopt has no safe wrapper")]

/// As many as glibc makes before it counts CPUs.
const ARENAS: libc::c_int = 8;

/// Sets the limit; called before there are other threads.
pub(super) fn limit() {
    // SAFETY: the call changes a setting of the allocator, under its own lock.
    if unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) } == 0 {
        tracing::warn!("The C library did not take a limit for its memory arenas");
    }
}
