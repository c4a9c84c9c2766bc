//! Where a NIC's frames leave and enter the machine, and how they cross without a copy.
//!
//! The queues of the NIC move frames by [`send`] and [`receive`] straight between guest memory and the port's file. One
//! read or write is one frame with a virtio-net header before it. A tap is the real port; tests use a socket pair.

#![expect(unsafe_code, reason = "readv and writev take guest memory by pointer")]

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::ops::BitOr;
use std::os::fd::AsRawFd;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// The bytes of `struct virtio_net_hdr` with `num_buffers`, as it is since VERSION_1 (virtio 1.3, 5.1.6).
pub const HEADER: usize = 12;

/// The longest that a header and a frame can be together: 64 KiB of IP packet, the Ethernet header and a VLAN tag.
pub const MAX_FRAME: usize = HEADER + 14 + 4 + 65536;

/// The most parts of guest memory that one frame may be spread over. `readv` takes `UIO_MAXIOV` (1024) and one of them is
/// the overflow.
pub(super) const MAX_PARTS: usize = 1023;

/// What a port does with frames that are not finished, as a set of `TUN_F_*` (linux/if_tun.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads(u32);

impl Offloads {
    /// Every frame is whole and summed.
    pub const NONE: Self = Self(0);
    /// Frames without checksum.
    pub const CHECKSUM: Self = Self(libc::TUN_F_CSUM);
    /// TCP over IPv4 in segments larger than a frame.
    pub const TSO4: Self = Self(libc::TUN_F_TSO4);
    /// The same over IPv6.
    pub const TSO6: Self = Self(libc::TUN_F_TSO6);
    /// Such segments with ECN.
    pub const ECN: Self = Self(libc::TUN_F_TSO_ECN);
    /// UDP datagrams larger than a frame.
    pub const UFO: Self = Self(libc::TUN_F_UFO);

    /// The `TUN_F_*` bits.
    #[must_use]
    pub fn bits(self) -> u32 {
        self.0
    }

    /// Whether all of `other` is in this set.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Offloads {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// The host's end of a NIC.
pub trait Port: Debug + Send + Sync {
    /// The file of frames, not blocking.
    fn file(&self) -> &File;

    /// All that the port can take and give.
    fn offloads(&self) -> Offloads;

    /// Says which unfinished frames the guest takes.
    ///
    /// # Errors
    /// The host's refusal.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;
}

/// Sends the frame in `parts` and tells how many bytes of it went.
pub(super) fn send<B: BitmapSlice>(file: &File, parts: &[VolatileSlice<'_, B>]) -> io::Result<usize> {
    let guards: Vec<_> = parts.iter().map(VolatileSlice::ptr_guard).collect();
    let vectors: Vec<_> = guards.iter().map(|part| vector(part.as_ptr().cast_mut(), part.len())).collect();
    let count = part_count(vectors.len())?;
    // SAFETY: `vectors` holds `count` ranges that the guards keep mapped; the kernel only reads from them. The guest may
    // change the bytes meanwhile, which the kernel stands.
    let sent = unsafe { libc::writev(file.as_raw_fd(), vectors.as_ptr(), count) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives a frame into `parts`, and what does not fit there into `overflow`; tells how long it is. What was written of
/// guest memory is marked dirty, after it was written.
pub(super) fn receive<B: BitmapSlice>(
    file: &File,
    parts: &[VolatileSlice<'_, B>],
    overflow: &mut [u8],
) -> io::Result<usize> {
    let guards: Vec<_> = parts.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let mut vectors: Vec<_> = guards.iter().map(|part| vector(part.as_ptr(), part.len())).collect();
    vectors.push(vector(overflow.as_mut_ptr(), overflow.len()));
    let count = part_count(vectors.len())?;
    // SAFETY: `vectors` holds `count` writable ranges: guest memory that the guards keep mapped, of which no Rust
    // reference exists, and `overflow`, which is borrowed for this call.
    let received = unsafe { libc::readv(file.as_raw_fd(), vectors.as_ptr(), count) };
    let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    let mut rest = received;
    for part in parts {
        let written = rest.min(part.len());
        part.bitmap().mark_dirty(0, written);
        rest -= written;
    }
    Ok(received)
}

fn vector(base: *mut u8, length: usize) -> libc::iovec {
    libc::iovec { iov_base: base.cast(), iov_len: length }
}

fn part_count(parts: usize) -> io::Result<libc::c_int> {
    libc::c_int::try_from(parts)
        .ok()
        .filter(|_| parts <= MAX_PARTS + 1)
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}
