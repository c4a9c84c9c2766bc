//! The XSAVE area of a vCPU as bytes.
//!
//! KVM says per VM how long it is (KVM_CAP_XSAVE2), 4096 bytes or more; a KVM from before that says nothing and uses 4096.
//! The standard format grows at the end, so a shorter area from another host is the same area with zeros behind.

#![expect(unsafe_code, reason = "KVM_GET_XSAVE2 and KVM_SET_XSAVE trust the buffer's length")]

use super::vcpu::VcpuStateError;
use kvm_bindings::{Xsave, kvm_xsave};
use kvm_ioctls::VcpuFd;

/// The least length of KVM's structure.
pub(super) const LEGACY_BYTES: usize = size_of::<kvm_xsave>();
/// The area is made of these.
const WORD: usize = size_of::<u32>();

/// `bytes` is what KVM_CAP_XSAVE2 answered for this VM.
pub(super) fn read(vcpu: &VcpuFd, bytes: usize) -> Result<Vec<u8>, VcpuStateError> {
    let mut area = area(bytes);
    if bytes > LEGACY_BYTES {
        // SAFETY: the area has the length that KVM asks for this VM, and no XSTATE feature is requested after the VM was
        // made.
        unsafe { vcpu.get_xsave2(&mut area) }.map_err(|source| VcpuStateError::kvm("KVM_GET_XSAVE2", source))?;
        let fam = area.as_fam_struct_ref();
        Ok(fam.xsave.region.iter().chain(area.as_slice()).flat_map(|word| word.to_le_bytes()).take(bytes).collect())
    } else {
        let area = vcpu.get_xsave().map_err(|source| VcpuStateError::kvm("KVM_GET_XSAVE", source))?;
        Ok(area.region.iter().flat_map(|word| word.to_le_bytes()).collect())
    }
}

/// The caller has checked that `saved` is no longer than `bytes`.
pub(super) fn write(vcpu: &VcpuFd, saved: &[u8], bytes: usize) -> Result<(), VcpuStateError> {
    let (words, []) = saved.as_chunks::<WORD>() else {
        return Err(VcpuStateError::XsaveUnit { found: saved.len(), unit: WORD });
    };
    let mut area = area(bytes);
    let mut words = words.iter().map(|word| u32::from_le_bytes(*word));
    // SAFETY: the length of the flexible part stays as it is; only the fixed part is written through this reference.
    let fixed = unsafe { &mut area.as_mut_fam_struct().xsave.region };
    for (place, word) in fixed.iter_mut().zip(&mut words) {
        *place = word;
    }
    for (place, word) in area.as_mut_slice().iter_mut().zip(words) {
        *place = word;
    }
    // SAFETY: the area has the length that KVM reads for this VM.
    unsafe { vcpu.set_xsave2(&area) }.map_err(|source| VcpuStateError::kvm("KVM_SET_XSAVE", source))
}

fn area(bytes: usize) -> Xsave {
    let flexible = bytes.saturating_sub(LEGACY_BYTES).div_ceil(WORD);
    Xsave::new(flexible).expect("KVM's answer to KVM_CAP_XSAVE2 is a few KiB")
}
