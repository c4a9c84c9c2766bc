//! A virtual machine that never runs, so that the lab's kernel leaves its own code alone.
//!
//! KVM patches its instructions (Linux "static keys") whenever the number of enabled local APICs or of virtual machines
//! starts or stops to be zero: a guest that starts, ends or arrives does that under the feet of another processor. QEMU's
//! software emulator before 8.1 can keep the translation of the breakpoint that the kernel writes meanwhile, because it
//! guarded a page of code against writes only after it had translated it ("accel/tcg: Always lock pages before
//! translation", QEMU 8.1). That processor then takes the same breakpoint for ever: the kernel reports a soft lockup in
//! `__apic_accept_irq`. One virtual machine with one vCPU that is never run keeps each of these numbers above zero.

use anyhow::{Context, Result};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// The virtual machine; it holds the numbers up for as long as it lives.
pub(super) struct Anchor {
    _vcpu: VcpuFd,
    _vm: VmFd,
}

impl Anchor {
    /// Makes it, with a local APIC that is in its state after reset: software-disabled (AMD APM volume 2, 16.4.7).
    pub(super) fn cast() -> Result<Self> {
        let vm = Kvm::new().context("open /dev/kvm")?.create_vm().context("make a virtual machine")?;
        vm.create_irq_chip().context("make its interrupt controllers")?;
        let vcpu = vm.create_vcpu(0).context("make its vCPU")?;
        Ok(Self { _vcpu: vcpu, _vm: vm })
    }
}
