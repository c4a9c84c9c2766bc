//! Builds and runs one guest on KVM, and brings it together with the migration engine and the control API.
//!
//! From below: [`kvm`], [`memory`] and [`layout`] are the VM; [`boot`], [`acpi`] and [`cpuid`] what a guest finds when it
//! starts; [`vcpu`] runs it, [`state`] saves and restores it, [`dirty`] tells what it wrote, and
//! [`dirty_rate`] how fast. [`machine`] is all of that
//! assembled from a [`config`], with devices. [`migrate`] moves a machine, and [`service`] leads it through the life of a
//! process. The binary `godwit` is the command line on top.

pub mod acpi;
pub mod boot;
pub mod config;
pub mod cpuid;
pub mod dirty;
pub mod dirty_rate;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod migrate;
mod old_copy;
pub mod seccomp;
pub mod service;
pub mod state;
pub mod vcpu;
