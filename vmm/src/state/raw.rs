//! The three vCPU ioctls that kvm-ioctls does not have on x86-64: KVM_GET/SET_SREGS2 and the TSC offset attribute.

#![expect(unsafe_code, reason = "issues ioctls")]

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr, kvm_sregs2};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno::{Error, errno_result};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

pub(super) fn sregs2(vcpu: &VcpuFd) -> Result<kvm_sregs2, Error> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the ioctl writes one kvm_sregs2 to the reference.
    checked(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) })?;
    Ok(sregs)
}

pub(super) fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> Result<(), Error> {
    // SAFETY: the ioctl reads one kvm_sregs2 from the reference.
    checked(unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) })
}

/// What KVM adds to the (scaled) host TSC for this vCPU (Linux Documentation/virt/kvm/devices/vcpu.rst, section 4).
pub(super) fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, Error> {
    let mut offset = 0_u64;
    let attribute = tsc_offset_at(std::ptr::from_mut(&mut offset));
    // SAFETY: the ioctl reads the attribute and writes one u64 to its address, which is that of `offset`.
    checked(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) })?;
    Ok(offset)
}

pub(super) fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<(), Error> {
    let attribute = tsc_offset_at(std::ptr::from_mut(&mut offset));
    // SAFETY: the ioctl reads the attribute and one u64 from its address, which is that of `offset`.
    checked(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) })
}

fn tsc_offset_at(place: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: place.expose_provenance() as u64,
        flags: 0,
    }
}

fn checked(result: libc::c_int) -> Result<(), Error> {
    if result < 0 { errno_result() } else { Ok(()) }
}
