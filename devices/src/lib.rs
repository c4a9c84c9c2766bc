//! Device models: what the guest sees on its port and MMIO buses, and the host back ends behind it.
//!
//! `vmm` builds the devices, puts them on a [`Bus`], and leads them through a guest's life by [`Device`]. The crate knows
//! neither KVM nor migration: interrupts and queue notifications are `EventFd`s that `vmm` binds to irqfd and ioeventfd,
//! and state goes in and out as [`saved`] sections. All the guest writes is untrusted.

pub mod bus;
pub mod device;
pub mod power;
pub mod ram;
pub mod serial;
pub mod virtio;
pub mod worker;

pub use bus::{Bus, BusDevice, BusError};
pub use device::{Device, QuiesceError};
pub use ram::{Gpa, GuestRam};
pub use worker::Worker;
