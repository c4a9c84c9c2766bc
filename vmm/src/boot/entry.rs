//! The state in which a vCPU finds itself when a guest starts: what firmware would have left behind.
//!
//! The tables are written by `load`; the machine then calls [`set_firmware_state`] for each vCPU and [`set_registers`]
//! for the boot vCPU. The others wait in KVM for INIT and SIPI. Nothing here is called for a guest that moves in.

use super::{BootError, Entry};
use crate::layout::{BOOT_GDT, BOOT_PML4};
use devices::{Gpa, GuestRam};
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::errno;

/// Why a vCPU could not be prepared.
#[derive(Debug, Error)]
pub enum EntryError {
    /// KVM refused an operation.
    #[error("KVM could not {action} of a vCPU")]
    Refused {
        /// What was asked of it.
        action: &'static str,
        /// What it said.
        #[source]
        source: errno::Error,
    },
    /// KVM does not know a register.
    #[error("KVM does not accept MSR {index:#x} = {value:#x}")]
    Msr {
        /// The register.
        index: u32,
        /// The value.
        value: u64,
    },
}

impl EntryError {
    fn refused(action: &'static str) -> impl FnOnce(errno::Error) -> Self {
        move |source| Self::Refused { action, source }
    }
}

// Intel SDM volume 3, 2.5 and 2.2.1.
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always set; interrupts are off.
const RFLAGS: u64 = 1 << 1;

// Page table entries (Intel SDM volume 3, 4.5): present and writable; 2 MiB page.
const TABLE: u64 = 0b11;
const PAGE_2M: u64 = 0b11 | 1 << 7;

// The selectors are those that the 64-bit boot protocol asks for (__BOOT_CS, __BOOT_DS).
const SELECTOR_CODE: u16 = 0x10;
const SELECTOR_DATA: u16 = 0x18;
const SELECTOR_TASK: u16 = 0x20;
const GDT_ENTRIES: usize = 5;

// Segment types (Intel SDM volume 3, 3.4.5.1 and 3.5), accessed or busy as after a load.
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_TASK: u8 = 0xb;

const MSR_MISC_ENABLE: u32 = 0x1a0;
/// Fast string operations.
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// MTRRs enabled, memory write-back where none says otherwise. Without it Linux leaves PAT off.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const DELIVERY_NMI: u32 = 4 << 8;
const DELIVERY_EXTINT: u32 = 7 << 8;

/// Makes the boot vCPU start at `entry`.
///
/// # Errors
/// [`EntryError::Refused`].
pub fn set_registers(vcpu: &VcpuFd, entry: &Entry) -> Result<(), EntryError> {
    let mut special = vcpu.get_sregs().map_err(EntryError::refused("read the special registers"))?;
    let Segments { code, data, task } = Segments::of(entry);
    special.cs = code;
    [special.ds, special.es, special.fs, special.gs, special.ss] = [data; 5];
    special.tr = task;
    special.gdt.base = BOOT_GDT.0;
    special.gdt.limit = u16::try_from(GDT_ENTRIES * 8 - 1).expect("40 bytes");
    // Written whole: the caches, which are off after reset, are on afterwards, as firmware leaves them.
    let regs = match *entry {
        Entry::Long64 { rip, boot_params } => {
            special.cr0 = CR0_PE | CR0_ET | CR0_PG;
            special.cr3 = BOOT_PML4.0;
            special.cr4 = CR4_PAE;
            special.efer = EFER_LME | EFER_LMA;
            kvm_regs { rip, rsi: boot_params, rflags: RFLAGS, ..Default::default() }
        }
        Entry::Pvh32 { eip, start_info } => {
            special.cr0 = CR0_PE | CR0_ET;
            special.cr4 = 0;
            special.efer = 0;
            kvm_regs { rip: eip.into(), rbx: start_info.into(), rflags: RFLAGS, ..Default::default() }
        }
    };
    vcpu.set_sregs(&special).map_err(EntryError::refused("set the special registers"))?;
    vcpu.set_regs(&regs).map_err(EntryError::refused("set the registers"))
}

/// Gives a new vCPU the machine-specific registers and local APIC pins that firmware sets on every processor.
///
/// # Errors
/// [`EntryError`].
pub fn set_firmware_state(vcpu: &VcpuFd) -> Result<(), EntryError> {
    let entries = [
        kvm_msr_entry { index: MSR_MISC_ENABLE, data: MISC_ENABLE_FAST_STRINGS, ..Default::default() },
        kvm_msr_entry { index: MSR_MTRR_DEFAULT_TYPE, data: MTRR_ENABLED_WRITE_BACK, ..Default::default() },
    ];
    let msrs = Msrs::from_entries(&entries).expect("two entries are below the limit");
    let set = vcpu.set_msrs(&msrs).map_err(EntryError::refused("set the MSRs"))?;
    if let Some(&kvm_msr_entry { index, data: value, .. }) = entries.get(set) {
        return Err(EntryError::Msr { index, value });
    }
    // Intel SDM volume 3, 11.5.1: LINT0 takes the 8259's interrupts, LINT1 is the NMI.
    let mut apic = vcpu.get_lapic().map_err(EntryError::refused("read the local APIC"))?;
    for (register, delivery) in [(APIC_LVT_LINT0, DELIVERY_EXTINT), (APIC_LVT_LINT1, DELIVERY_NMI)] {
        for (byte, value) in apic.regs[register..].iter_mut().zip(delivery.to_le_bytes()) {
            *byte = value.cast_signed();
        }
    }
    vcpu.set_lapic(&apic).map_err(EntryError::refused("set the local APIC"))
}

/// Writes the GDT, and for the 64-bit entry page tables that map the first 4 GiB to themselves.
pub(super) fn write_tables(ram: &GuestRam, entry: &Entry) -> Result<(), BootError> {
    let Segments { code, data, task } = Segments::of(entry);
    let gdt: [u64; GDT_ENTRIES] = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task)];
    write_table(ram, BOOT_GDT, gdt)?;
    match entry {
        Entry::Long64 { .. } => Ok(write_page_tables(ram)?),
        Entry::Pvh32 { .. } => Ok(()),
    }
}

fn write_page_tables(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    let page = |index: u64| GuestAddress(BOOT_PML4.0 + index * 4096);
    write_table(ram, page(0), [page(1).0 | TABLE])?;
    write_table(ram, page(1), [2, 3, 4, 5].map(|index| page(index).0 | TABLE))?;
    for gib in 0..4 {
        let pages: [u64; 512] = std::array::from_fn(|index| (gib * 512 + index as u64) << 21 | PAGE_2M);
        write_table(ram, page(2 + gib), pages)?;
    }
    Ok(())
}

fn write_table<const N: usize>(ram: &GuestRam, at: Gpa, entries: [u64; N]) -> Result<(), GuestMemoryError> {
    let mut bytes = [0; 4096];
    for (slot, entry) in bytes.chunks_exact_mut(8).zip(entries) {
        slot.copy_from_slice(&entry.to_le_bytes());
    }
    ram.write_slice(&bytes[..N * 8], at)
}

struct Segments {
    code: kvm_segment,
    data: kvm_segment,
    task: kvm_segment,
}

impl Segments {
    fn of(entry: &Entry) -> Self {
        let long = matches!(entry, Entry::Long64 { .. });
        let flat = |selector, type_| kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            s: 1,
            g: 1,
            db: 1,
            ..Default::default()
        };
        let code = flat(SELECTOR_CODE, TYPE_CODE);
        let code = if long { kvm_segment { db: 0, l: 1, ..code } } else { code };
        // A task register is needed for a valid state; the kernel replaces it before it uses one.
        let task =
            kvm_segment { limit: 0x67, selector: SELECTOR_TASK, type_: TYPE_TASK, present: 1, ..Default::default() };
        Self { code, data: flat(SELECTOR_DATA, TYPE_DATA), task }
    }
}

/// The descriptor of a segment (Intel SDM volume 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let kvm_segment { base, limit, type_, present, dpl, db, s, l, g, .. } = *segment;
    let limit = u64::from(if g == 1 { limit >> 12 } else { limit });
    let access = u64::from(type_ | s << 4 | dpl << 5 | present << 7);
    let flags = u64::from(l << 1 | db << 2 | g << 3);
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24) << 56
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestMemory;

    #[test]
    fn descriptors_have_their_documented_values() {
        let pvh = Segments::of(&Entry::Pvh32 { eip: 0, start_info: 0 });
        assert_eq!(descriptor(&pvh.code), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&pvh.data), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&pvh.task), 0x0000_8b00_0000_0067);
        let long = Segments::of(&Entry::Long64 { rip: 0, boot_params: 0 });
        assert_eq!(descriptor(&long.code), 0x00af_9b00_0000_ffff);
    }

    #[test]
    fn page_tables_map_four_gib_to_themselves() {
        let memory = GuestMemory::create(1 << 20, false).unwrap();
        let ram = memory.ram();
        write_page_tables(ram).unwrap();
        let read = |table: u64, index: u64| ram.read_obj::<u64>(GuestAddress((table & !0xfff) + index * 8)).unwrap();
        for address in [0_u64, 0x20_0000, 0x1234_5678, 0xffff_ffff] {
            let pointers = read(BOOT_PML4.0, address >> 39);
            let directory = read(pointers, address >> 30 & 511);
            let page = read(directory, address >> 21 & 511);
            assert_eq!(page, (address & !0x1f_ffff) | PAGE_2M, "{address:#x}");
        }
    }

    #[test]
    fn tables_stay_below_the_command_line() {
        const { assert!(BOOT_PML4.0 + 6 * 4096 <= crate::layout::COMMAND_LINE.0) };
    }
}
