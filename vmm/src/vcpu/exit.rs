//! One KVM_RUN and what its exit asks for: port and MMIO accesses go to the buses, ends of the guest are named.
//!
//! Called by the vCPU's thread in a loop. An access is served completely before the next KVM_RUN; that one completes the
//! guest's instruction, so it must happen even when the vCPU is to stand (see [`Desk`](super::desk::Desk)).

#![expect(unsafe_code, reason = "reads the union of the kvm_run page")]

use super::Buses;
use super::end::{GuestEnd, KvmFailure, SUBERROR_EMULATION};
use kvm_bindings::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_IO_IN, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::arch::x86_64::__cpuid;

/// What follows from one KVM_RUN.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The exit is served.
    Again,
    /// A signal or `immediate_exit`; nothing is pending in KVM.
    Interrupted,
    /// The vCPU halted without an interrupt controller in the kernel: nothing can wake it.
    Halted,
    /// The dirty ring wants to be emptied first.
    RingFull,
    /// The guest ended.
    Ended(GuestEnd),
}

pub(super) fn step(vcpu: &mut VcpuFd, buses: &Buses) -> Step {
    match vcpu.run() {
        Ok(VcpuExit::MmioRead(address, data)) => {
            buses.mmio.read(address, data);
            Step::Again
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            buses.mmio.write(address, data);
            Step::Again
        }
        Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => {
            serve_ports(vcpu, buses);
            Step::Again
        }
        Ok(VcpuExit::Hlt) => Step::Halted,
        Ok(VcpuExit::Intr) => Step::Interrupted,
        Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => Step::RingFull,
        Ok(VcpuExit::Shutdown) => Step::Ended(GuestEnd::TripleFault),
        Ok(VcpuExit::SystemEvent(kind, _)) => Step::Ended(system_event(kind)),
        Ok(VcpuExit::InternalError) => Step::Ended(GuestEnd::KvmFailure(internal_error(vcpu))),
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            Step::Ended(GuestEnd::KvmFailure(KvmFailure::FailEntry { reason, cpu }))
        }
        Ok(other) => {
            let exit = format!("{other:?}");
            Step::Ended(GuestEnd::KvmFailure(KvmFailure::UnexpectedExit { exit }))
        }
        Err(error) => match error.errno() {
            libc::EINTR => Step::Interrupted,
            // An application processor that has not been started woke up for nothing.
            libc::EAGAIN => Step::Again,
            errno => Step::Ended(GuestEnd::KvmFailure(KvmFailure::Run { errno })),
        },
    }
}

/// Serves a KVM_EXIT_IO. A string instruction exits once for several accesses to its port; how wide each one is stands
/// only in the page, not in what kvm-ioctls hands on.
fn serve_ports(vcpu: &mut VcpuFd, buses: &Buses) {
    let run = vcpu.get_kvm_run();
    // SAFETY: KVM_RUN returned with KVM_EXIT_IO, which makes `io` the valid field of the union.
    let io = unsafe { run.__bindgen_anon_1.io };
    let (Ok(offset), width) = (usize::try_from(io.data_offset), usize::from(io.size)) else { return };
    let length = width * io.count as usize;
    // SAFETY: the kernel put `count` items of `size` bytes at this offset of the vCPU's mapping, which kvm-ioctls mapped
    // whole; the mapping lives as long as `vcpu`, which stays mutably borrowed for as long as the slice does.
    let data = unsafe { std::slice::from_raw_parts_mut(std::ptr::from_mut(run).cast::<u8>().add(offset), length) };
    for item in data.chunks_exact_mut(width.max(1)) {
        if u32::from(io.direction) == KVM_EXIT_IO_IN {
            buses.pio.read(u64::from(io.port), item);
        } else {
            buses.pio.write(u64::from(io.port), item);
        }
    }
}

fn system_event(kind: u32) -> GuestEnd {
    match kind {
        KVM_SYSTEM_EVENT_SHUTDOWN => GuestEnd::PowerOff,
        KVM_SYSTEM_EVENT_RESET => GuestEnd::Reboot,
        KVM_SYSTEM_EVENT_CRASH => GuestEnd::Panic,
        other => GuestEnd::KvmFailure(KvmFailure::UnexpectedExit { exit: format!("system event {other}") }),
    }
}

fn internal_error(vcpu: &mut VcpuFd) -> KvmFailure {
    let rip = vcpu.get_regs().ok().map(|registers| registers.rip);
    let run = vcpu.get_kvm_run();
    // SAFETY: KVM_RUN returned with KVM_EXIT_INTERNAL_ERROR, which makes `internal` the valid field of the union, or
    // `emulation_failure`, which begins with the same fields. Any bytes are valid values of both.
    let (internal, emulation) = unsafe { (run.__bindgen_anon_1.internal, run.__bindgen_anon_1.emulation_failure) };
    let words = internal.data.len().min(internal.ndata as usize);
    let mut instruction = Vec::new();
    // The flags are there if KVM gave at least one word, the bytes if the flag says so (api.rst, emulation_failure).
    let flags = if words > 0 { emulation.flags } else { 0 };
    if internal.suberror == SUBERROR_EMULATION
        && flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0
    {
        // SAFETY: the flag says that this part of the union is valid; any bytes are.
        let bytes = unsafe { emulation.__bindgen_anon_1.__bindgen_anon_1 };
        instruction = bytes.insn_bytes.iter().copied().take(usize::from(bytes.insn_size)).collect();
    }
    KvmFailure::InternalError {
        suberror: internal.suberror,
        rip,
        instruction,
        data: internal.data[..words].to_vec(),
        virtualizes: cpu_virtualizes(),
    }
}

/// Whether the CPU has VMX (leaf 1, ECX bit 5; Intel SDM volume 2, CPUID) or SVM (leaf 0x8000_0001, ECX bit 2; AMD APM
/// volume 3, appendix E). Asked of the CPU, since the seccomp filter of a vCPU thread opens no files.
fn cpu_virtualizes() -> bool {
    const EXTENDED: u32 = 0x8000_0001;
    let vmx = __cpuid(1).ecx & (1 << 5) != 0;
    let svm = __cpuid(0x8000_0000).eax >= EXTENDED && __cpuid(EXTENDED).ecx & (1 << 2) != 0;
    vmx || svm
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_events_are_ends() {
        assert_eq!(system_event(1), GuestEnd::PowerOff);
        assert_eq!(system_event(2), GuestEnd::Reboot);
        assert_eq!(system_event(3), GuestEnd::Panic);
        assert!(matches!(system_event(9), GuestEnd::KvmFailure(KvmFailure::UnexpectedExit { .. })));
    }

    #[test]
    fn the_cpu_is_judged_as_cpuinfo_does() {
        let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let flags = flags.lines().find(|line| line.starts_with("flags")).unwrap();
        let listed = flags.split_whitespace().any(|flag| flag == "svm" || flag == "vmx");
        assert_eq!(cpu_virtualizes(), listed);
    }
}
