//! Where everything lies in the guest's address spaces: memory, MMIO windows, ports, interrupts, boot data.
//!
//! Read by `boot`, `acpi`, `memory` and the machine's assembly. A guest that moves keeps its layout, so every number here
//! is part of what two versions of the program must agree on: a change needs a new version of the machine description.

use devices::Gpa;
use vm_memory::GuestAddress;

/// The page size of x86-64 and the granularity of KVM's dirty log (Documentation/virt/kvm/api.rst, KVM_GET_DIRTY_LOG).
pub const PAGE_SIZE: u64 = 4096;
/// The size of a huge page that is asked for with MFD_HUGETLB.
pub const HUGE_PAGE_SIZE: u64 = 2 << 20;

/// First address that is not memory: the gap holds the virtio windows, the IOAPIC, the local APICs and KVM's own pages.
pub const MMIO_GAP_START: Gpa = GuestAddress(0xc000_0000);
/// First address after the gap, where the second memory region of a guest above 3 GiB starts.
pub const MMIO_GAP_END: Gpa = GuestAddress(0x1_0000_0000);

/// Window of the first virtio-mmio device; the others follow at a distance of [`VIRTIO_WINDOW_SIZE`].
pub const VIRTIO_WINDOWS: Gpa = GuestAddress(0xd000_0000);
/// Size of a virtio-mmio window: registers up to 0x100, then the device's configuration (virtio 1.3, 4.2.2).
pub const VIRTIO_WINDOW_SIZE: u64 = 0x1000;
/// Offset of QueueNotify in a window (virtio 1.3, 4.2.2).
pub const VIRTIO_QUEUE_NOTIFY: u64 = 0x50;
/// Interrupts of the virtio windows, in order: what is left of the IOAPIC's 24 pins after timer, COM1, RTC and SCI.
pub const VIRTIO_GSIS: [u32; 17] = [5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

/// First I/O port of the serial port COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// Number of ports of a 16550.
pub const COM1_PORTS: u16 = 8;
/// Interrupt of COM1.
pub const COM1_GSI: u32 = 4;

/// PM1a event block: status and enable register (ACPI 6.5, 4.8.3.1).
pub const PM1A_EVENT_PORT: u16 = 0x600;
/// Length of the PM1a event block.
pub const PM1A_EVENT_LENGTH: u8 = 4;
/// PM1a control block (ACPI 6.5, 4.8.3.2).
pub const PM1A_CONTROL_PORT: u16 = 0x604;
/// Length of the PM1a control block.
pub const PM1A_CONTROL_LENGTH: u8 = 2;
/// Interrupt of the ACPI fixed events.
pub const SCI_GSI: u32 = 9;
/// SLP_TYP of the soft-off state S5, as told in `\_S5` and written to the PM1a control register.
pub const SLEEP_TYPE_S5: u8 = 5;
/// The port of the reset register that the FADT names (as on PIIX and ICH chip sets).
pub const RESET_PORT: u16 = 0xcf9;
/// What a guest writes to [`RESET_PORT`] for a reset.
pub const RESET_VALUE: u8 = 0x06;
/// Data port of the keyboard controller, which exists only for its reset line.
pub const I8042_DATA_PORT: u16 = 0x60;
/// Ports of the keyboard controller; its command port, by which old guests reset, is the last.
pub const I8042_PORTS: u64 = 5;
/// Port of the panic notifier (docs/specs/pvpanic.rst in QEMU).
pub const PVPANIC_PORT: u16 = 0x505;

/// Physical address of the I/O APIC in KVM (arch/x86/kvm/ioapic.h).
pub const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
/// Physical address of the local APICs after reset (Intel SDM volume 3, 11.4.1).
pub const LOCAL_APIC_ADDRESS: u32 = 0xfee0_0000;
/// One page for KVM's real-mode identity map (KVM_SET_IDENTITY_MAP_ADDR).
pub const KVM_IDENTITY_MAP: Gpa = GuestAddress(0xfffb_c000);
/// Three pages for KVM's real-mode task state (KVM_SET_TSS_ADDR).
pub const KVM_TSS: Gpa = GuestAddress(0xfffb_d000);

/// The boot GDT.
pub const BOOT_GDT: Gpa = GuestAddress(0x500);
/// `hvm_start_info` of the PVH entry, with its module list and memory map behind it.
pub const PVH_START_INFO: Gpa = GuestAddress(0x6000);
/// The PVH module list.
pub const PVH_MODULES: Gpa = GuestAddress(0x6040);
/// The PVH memory map.
pub const PVH_MEMORY_MAP: Gpa = GuestAddress(0x6080);
/// `boot_params`, the "zero page" of the 64-bit entry (Documentation/arch/x86/zero-page.rst).
pub const BOOT_PARAMS: Gpa = GuestAddress(0x7000);
/// Top level of the boot page tables; the lower levels follow page by page.
pub const BOOT_PML4: Gpa = GuestAddress(0x9000);
/// The kernel command line, ended by a zero byte.
pub const COMMAND_LINE: Gpa = GuestAddress(0x2_0000);
/// Room for the command line with its zero byte.
pub const COMMAND_LINE_SIZE: usize = 0x1_0000;
/// End of conventional memory: the extended BIOS data area starts here on a PC.
pub const LOW_MEMORY_END: Gpa = GuestAddress(0x9_fc00);
/// The ACPI tables, root pointer first: where ACPI 6.5, 5.2.5.1 lets a guest search for it.
pub const ACPI_TABLES: Gpa = GuestAddress(0xe_0000);
/// Room for the ACPI tables.
pub const ACPI_TABLES_SIZE: u64 = 0x2_0000;
/// Kernels and their initramfs lie from 1 MiB on.
pub const HIGH_MEMORY: Gpa = GuestAddress(0x10_0000);

/// The place of one virtio-mmio device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioWindow {
    /// First address of the window.
    pub base: Gpa,
    /// Interrupt of the device.
    pub gsi: u32,
}

/// The window of the virtio device number `index`, or `None` where the machine has no more.
#[must_use]
pub fn virtio_window(index: usize) -> Option<VirtioWindow> {
    let gsi = *VIRTIO_GSIS.get(index)?;
    Some(VirtioWindow { base: GuestAddress(VIRTIO_WINDOWS.0 + index as u64 * VIRTIO_WINDOW_SIZE), gsi })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_apart_and_below_the_apics() {
        let windows: Vec<_> = (0..).map_while(virtio_window).collect();
        assert_eq!(windows.len(), VIRTIO_GSIS.len());
        assert!(windows.windows(2).all(|pair| pair[1].base.0 - pair[0].base.0 == VIRTIO_WINDOW_SIZE));
        let last = windows.last().unwrap();
        assert!(last.base.0 + VIRTIO_WINDOW_SIZE <= u64::from(IOAPIC_ADDRESS));
        assert!(windows[0].base >= MMIO_GAP_START);
    }

    #[test]
    fn interrupts_are_used_once() {
        let mut gsis = VIRTIO_GSIS.to_vec();
        gsis.extend([COM1_GSI, SCI_GSI, 0, 1, 2, 8]);
        gsis.sort_unstable();
        let before = gsis.len();
        gsis.dedup();
        assert_eq!(gsis.len(), before);
    }
}
