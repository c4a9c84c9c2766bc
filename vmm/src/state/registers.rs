//! Frozen mirrors of KVM's register structures, version 1: plain fields, no padding, no kvm-bindings on the wire.
//!
//! Each mirror is made from the KVM structure and turned back into it field by field. A field that KVM adds one day does
//! not slip in unseen: it stays at zero here until a version 2 of the section says otherwise.

use kvm_bindings::{
    KVM_SREGS2_FLAGS_PDPTRS_VALID, kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs,
    kvm_sregs2, kvm_vcpu_events,
};
use serde::{Deserialize, Serialize};

/// Declares a mirror of a flat KVM structure and both conversions. What the KVM structure has beyond is padding.
macro_rules! mirror {
    ($(#[$about:meta])* $name:ident of $kvm:ident { $($(#[$doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct $name {
            $($(#[$doc])* pub $field: $type,)*
        }
        impl From<&$kvm> for $name {
            fn from(kvm: &$kvm) -> Self {
                Self { $($field: kvm.$field,)* }
            }
        }
        impl From<&$name> for $kvm {
            fn from(saved: &$name) -> Self {
                let $name { $($field,)* } = *saved;
                let mut kvm = Self::default();
                $(kvm.$field = $field;)*
                kvm
            }
        }
    };
}
pub(super) use mirror;

mirror! {
    /// The general registers (struct kvm_regs).
    RegistersV1 of kvm_regs {
        /// RAX.
        rax: u64,
        /// RBX.
        rbx: u64,
        /// RCX.
        rcx: u64,
        /// RDX.
        rdx: u64,
        /// RSI.
        rsi: u64,
        /// RDI.
        rdi: u64,
        /// RSP.
        rsp: u64,
        /// RBP.
        rbp: u64,
        /// R8.
        r8: u64,
        /// R9.
        r9: u64,
        /// R10.
        r10: u64,
        /// R11.
        r11: u64,
        /// R12.
        r12: u64,
        /// R13.
        r13: u64,
        /// R14.
        r14: u64,
        /// R15.
        r15: u64,
        /// RIP.
        rip: u64,
        /// RFLAGS.
        rflags: u64,
    }
}

mirror! {
    /// A segment register with its hidden part (struct kvm_segment).
    SegmentV1 of kvm_segment {
        /// Base address.
        base: u64,
        /// Limit.
        limit: u32,
        /// Selector.
        selector: u16,
        /// Type.
        type_: u8,
        /// Present.
        present: u8,
        /// Privilege level.
        dpl: u8,
        /// Default operation size.
        db: u8,
        /// Code or data, not system.
        s: u8,
        /// 64-bit code.
        l: u8,
        /// Granularity.
        g: u8,
        /// Available to software.
        avl: u8,
        /// Not loaded.
        unusable: u8,
    }
}

mirror! {
    /// A descriptor table register (struct kvm_dtable).
    TableV1 of kvm_dtable {
        /// Base address.
        base: u64,
        /// Limit.
        limit: u16,
    }
}

mirror! {
    /// The debug registers (struct kvm_debugregs).
    DebugRegistersV1 of kvm_debugregs {
        /// DR0 to DR3.
        db: [u64; 4],
        /// DR6.
        dr6: u64,
        /// DR7.
        dr7: u64,
    }
}

mirror! {
    /// One CPUID leaf (struct kvm_cpuid_entry2).
    CpuidEntryV1 of kvm_cpuid_entry2 {
        /// The leaf.
        function: u32,
        /// The subleaf.
        index: u32,
        /// Whether the subleaf counts.
        flags: u32,
        /// EAX.
        eax: u32,
        /// EBX.
        ebx: u32,
        /// ECX.
        ecx: u32,
        /// EDX.
        edx: u32,
    }
}

/// The system registers (struct kvm_sregs2, or kvm_sregs on an older KVM).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemRegistersV1 {
    /// CS.
    pub cs: SegmentV1,
    /// DS.
    pub ds: SegmentV1,
    /// ES.
    pub es: SegmentV1,
    /// FS.
    pub fs: SegmentV1,
    /// GS.
    pub gs: SegmentV1,
    /// SS.
    pub ss: SegmentV1,
    /// The task register.
    pub tr: SegmentV1,
    /// The local descriptor table register.
    pub ldt: SegmentV1,
    /// GDTR.
    pub gdt: TableV1,
    /// IDTR.
    pub idt: TableV1,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8.
    pub cr8: u64,
    /// EFER.
    pub efer: u64,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// The page directory pointers of PAE paging as the CPU holds them, where they count. Without them KVM would read
    /// them from guest memory again, which may have changed since (Intel SDM volume 3, 4.4.1).
    pub pdptrs: Option<[u64; 4]>,
}

/// The fields that both KVM structures share. kvm_sregs' interrupt bitmap is not carried: the events say the same.
macro_rules! shared_system_registers {
    (from $kvm:ident, $pdptrs:expr) => {
        Self {
            cs: (&$kvm.cs).into(),
            ds: (&$kvm.ds).into(),
            es: (&$kvm.es).into(),
            fs: (&$kvm.fs).into(),
            gs: (&$kvm.gs).into(),
            ss: (&$kvm.ss).into(),
            tr: (&$kvm.tr).into(),
            ldt: (&$kvm.ldt).into(),
            gdt: (&$kvm.gdt).into(),
            idt: (&$kvm.idt).into(),
            cr0: $kvm.cr0,
            cr2: $kvm.cr2,
            cr3: $kvm.cr3,
            cr4: $kvm.cr4,
            cr8: $kvm.cr8,
            efer: $kvm.efer,
            apic_base: $kvm.apic_base,
            pdptrs: $pdptrs,
        }
    };
    (into $saved:ident { $($more:ident: $value:expr),* }) => {
        Self {
            cs: (&$saved.cs).into(),
            ds: (&$saved.ds).into(),
            es: (&$saved.es).into(),
            fs: (&$saved.fs).into(),
            gs: (&$saved.gs).into(),
            ss: (&$saved.ss).into(),
            tr: (&$saved.tr).into(),
            ldt: (&$saved.ldt).into(),
            gdt: (&$saved.gdt).into(),
            idt: (&$saved.idt).into(),
            cr0: $saved.cr0,
            cr2: $saved.cr2,
            cr3: $saved.cr3,
            cr4: $saved.cr4,
            cr8: $saved.cr8,
            efer: $saved.efer,
            apic_base: $saved.apic_base,
            $($more: $value),*
        }
    };
}

const PDPTRS_VALID: u64 = KVM_SREGS2_FLAGS_PDPTRS_VALID as u64;

impl From<&kvm_sregs2> for SystemRegistersV1 {
    fn from(kvm: &kvm_sregs2) -> Self {
        shared_system_registers!(from kvm, (kvm.flags & PDPTRS_VALID != 0).then_some(kvm.pdptrs))
    }
}

impl From<&SystemRegistersV1> for kvm_sregs2 {
    fn from(saved: &SystemRegistersV1) -> Self {
        shared_system_registers!(into saved {
            flags: if saved.pdptrs.is_some() { PDPTRS_VALID } else { 0 },
            pdptrs: saved.pdptrs.unwrap_or_default()
        })
    }
}

impl From<&kvm_sregs> for SystemRegistersV1 {
    fn from(kvm: &kvm_sregs) -> Self {
        shared_system_registers!(from kvm, None)
    }
}

impl From<&SystemRegistersV1> for kvm_sregs {
    fn from(saved: &SystemRegistersV1) -> Self {
        shared_system_registers!(into saved { interrupt_bitmap: [0; 4] })
    }
}

/// What is about to be delivered to the vCPU (struct kvm_vcpu_events).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventsV1 {
    /// Which fields KVM said are valid.
    pub flags: u32,
    /// The exception in delivery.
    pub exception: ExceptionV1,
    /// The interrupt in delivery.
    pub interrupt: InterruptV1,
    /// The non-maskable interrupt.
    pub nmi: NmiV1,
    /// The vector of a start-up IPI.
    pub sipi_vector: u32,
    /// System management mode.
    pub smi: SmiV1,
    /// A triple fault is about to be reported.
    pub triple_fault_pending: u8,
}

/// An exception in delivery.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExceptionV1 {
    /// Its delivery has begun.
    pub injected: u8,
    /// The vector.
    pub nr: u8,
    /// It has an error code.
    pub has_error_code: u8,
    /// It waits for delivery.
    pub pending: u8,
    /// The error code.
    pub error_code: u32,
    /// It has a payload.
    pub has_payload: u8,
    /// CR2 or DR6 to be.
    pub payload: u64,
}

/// An interrupt in delivery.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterruptV1 {
    /// Its delivery has begun.
    pub injected: u8,
    /// The vector.
    pub nr: u8,
    /// It comes from an INT instruction.
    pub soft: u8,
    /// Interrupts are held off for one instruction (after STI or MOV SS).
    pub shadow: u8,
}

/// A non-maskable interrupt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NmiV1 {
    /// Its delivery has begun.
    pub injected: u8,
    /// It waits for delivery.
    pub pending: u8,
    /// They are masked until IRET.
    pub masked: u8,
}

/// System management mode.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SmiV1 {
    /// The vCPU is in it.
    pub smm: u8,
    /// An SMI waits for delivery.
    pub pending: u8,
    /// It was entered inside an NMI.
    pub smm_inside_nmi: u8,
    /// An INIT waits for its end.
    pub latched_init: u8,
}

impl From<&kvm_vcpu_events> for EventsV1 {
    fn from(kvm: &kvm_vcpu_events) -> Self {
        let kvm_vcpu_events { exception, interrupt, nmi, smi, triple_fault, .. } = kvm;
        Self {
            flags: kvm.flags,
            exception: ExceptionV1 {
                injected: exception.injected,
                nr: exception.nr,
                has_error_code: exception.has_error_code,
                pending: exception.pending,
                error_code: exception.error_code,
                has_payload: kvm.exception_has_payload,
                payload: kvm.exception_payload,
            },
            interrupt: InterruptV1 {
                injected: interrupt.injected,
                nr: interrupt.nr,
                soft: interrupt.soft,
                shadow: interrupt.shadow,
            },
            nmi: NmiV1 { injected: nmi.injected, pending: nmi.pending, masked: nmi.masked },
            sipi_vector: kvm.sipi_vector,
            smi: SmiV1 {
                smm: smi.smm,
                pending: smi.pending,
                smm_inside_nmi: smi.smm_inside_nmi,
                latched_init: smi.latched_init,
            },
            triple_fault_pending: triple_fault.pending,
        }
    }
}

impl From<&EventsV1> for kvm_vcpu_events {
    fn from(saved: &EventsV1) -> Self {
        let EventsV1 { flags, exception, interrupt, nmi, sipi_vector, smi, triple_fault_pending } = *saved;
        let mut kvm = Self { flags, sipi_vector, ..Default::default() };
        let ExceptionV1 { injected, nr, has_error_code, pending, error_code, has_payload, payload } = exception;
        kvm.exception.injected = injected;
        kvm.exception.nr = nr;
        kvm.exception.has_error_code = has_error_code;
        kvm.exception.pending = pending;
        kvm.exception.error_code = error_code;
        kvm.exception_has_payload = has_payload;
        kvm.exception_payload = payload;
        let InterruptV1 { injected, nr, soft, shadow } = interrupt;
        kvm.interrupt.injected = injected;
        kvm.interrupt.nr = nr;
        kvm.interrupt.soft = soft;
        kvm.interrupt.shadow = shadow;
        let NmiV1 { injected, pending, masked } = nmi;
        kvm.nmi.injected = injected;
        kvm.nmi.pending = pending;
        kvm.nmi.masked = masked;
        let SmiV1 { smm, pending, smm_inside_nmi, latched_init } = smi;
        kvm.smi.smm = smm;
        kvm.smi.pending = pending;
        kvm.smi.smm_inside_nmi = smm_inside_nmi;
        kvm.smi.latched_init = latched_init;
        kvm.triple_fault.pending = triple_fault_pending;
        kvm
    }
}
