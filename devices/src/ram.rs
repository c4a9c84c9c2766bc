//! The guest's memory as devices see it.

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Guest memory whose bitmap records each 4 KiB page that a thread of this process wrote: one of the three sources of
/// dirty pages, beside KVM's log and vhost's. Clones share the mapping.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;

/// A guest physical address.
pub type Gpa = GuestAddress;
