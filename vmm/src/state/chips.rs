//! The interrupt controllers and the timer that KVM emulates for the whole VM: two PICs, the I/O APIC and the PIT.
//!
//! Interrupts flow from the PIT through the PICs and the I/O APIC to the local APICs. Saving goes with the flow, restoring
//! against it: an interrupt that moves while the state is read is then caught further down, perhaps twice, but not lost,
//! and one that the I/O APIC raises again on restore finds its local APIC in place.

#![expect(unsafe_code, reason = "reads the union of struct kvm_irqchip")]

use super::registers::mirror;
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_ioapic_state, kvm_irqchip, kvm_pic_state,
    kvm_pit_channel_state, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use saved::Saved;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm_sys_util::errno;

/// The number of pins of KVM's I/O APIC (KVM_IOAPIC_NUM_PINS).
const PINS: usize = 24;
/// Where KVM's I/O APIC always is (IOAPIC_DEFAULT_BASE_ADDRESS); a guest cannot move it.
const IOAPIC_BASE: u64 = 0xfec0_0000;
/// What KVM has as the mode of a counter that was never programmed.
const PIT_MODE_UNSET: u8 = 0xff;
/// KVM_PIT_FLAGS_HPET_LEGACY and KVM_PIT_FLAGS_SPEAKER_DATA_ON.
const PIT_FLAGS: u32 = 0b11;

mirror! {
    /// One 8259 (struct kvm_pic_state).
    PicV1 of kvm_pic_state {
        /// Levels seen last, to find edges.
        last_irr: u8,
        /// Requests.
        irr: u8,
        /// Masked lines.
        imr: u8,
        /// In service.
        isr: u8,
        /// The line of highest priority.
        priority_add: u8,
        /// The first vector.
        irq_base: u8,
        /// Whether reads give the in-service register.
        read_reg_select: u8,
        /// Polling.
        poll: u8,
        /// Special mask mode.
        special_mask: u8,
        /// The next initialization word.
        init_state: u8,
        /// Automatic end of interrupt.
        auto_eoi: u8,
        /// Rotation on automatic end of interrupt.
        rotate_on_auto_eoi: u8,
        /// Special fully nested mode.
        special_fully_nested_mode: u8,
        /// Whether a fourth initialization word comes.
        init4: u8,
        /// Level-triggered lines.
        elcr: u8,
        /// Lines that can be level-triggered.
        elcr_mask: u8,
    }
}

mirror! {
    /// One counter of the 8254 (struct kvm_pit_channel_state). When it was loaded stays behind: that is a time of the
    /// source host, and a restored counter starts a new period.
    PitChannelV1 of kvm_pit_channel_state {
        /// Reload value; up to 65536.
        count: u32,
        /// The latched count.
        latched_count: u16,
        /// What is latched of the count.
        count_latched: u8,
        /// Whether the status is latched.
        status_latched: u8,
        /// The latched status.
        status: u8,
        /// Which byte is read next.
        read_state: u8,
        /// Which byte is written next.
        write_state: u8,
        /// The byte written first.
        write_latch: u8,
        /// How it is read and written.
        rw_mode: u8,
        /// The counter's mode, 0 to 5, or 255 before it was programmed.
        mode: u8,
        /// Decimal counting.
        bcd: u8,
        /// The gate's level.
        gate: u8,
    }
}

/// The I/O APIC (struct kvm_ioapic_state).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicV1 {
    /// The selected register.
    pub ioregsel: u32,
    /// Its id.
    pub id: u32,
    /// Requests that were not delivered yet.
    pub irr: u32,
    /// The redirection table.
    pub redirections: [u64; PINS],
}

/// The chips of one VM, version 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChipsSavedV1 {
    /// The first PIC.
    pub pic_master: PicV1,
    /// The second PIC.
    pub pic_slave: PicV1,
    /// The I/O APIC.
    pub ioapic: IoApicV1,
    /// The three counters of the PIT.
    pub pit_channels: [PitChannelV1; 3],
    /// The PIT's flags: HPET replaces it, the speaker is on.
    pub pit_flags: u32,
}

impl Saved for ChipsSavedV1 {
    const KIND: &'static str = "chips";
    const VERSION: u16 = 1;
}

/// Why the chips could not be saved or restored.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ChipsError {
    /// KVM refused.
    #[error("{call} of the {chip} failed")]
    Kvm {
        /// The ioctl.
        call: &'static str,
        /// The chip.
        chip: &'static str,
        /// Its error.
        #[source]
        source: errno::Error,
    },
    /// A field has a value that the chip cannot have.
    #[error("The saved {chip} has {field} {found:#x}, over its maximum of {most:#x}")]
    Value {
        /// The chip.
        chip: &'static str,
        /// The field.
        field: &'static str,
        /// The value found.
        found: u32,
        /// The largest possible.
        most: u32,
    },
}

/// Reads the chips. The vCPUs are parked and the devices stand still.
///
/// # Errors
/// [`ChipsError::Kvm`] if the VM has no such chips.
pub fn save_chips(vm: &VmFd) -> Result<ChipsSavedV1, ChipsError> {
    let pit = vm.get_pit2().map_err(|source| ChipsError::Kvm { call: "KVM_GET_PIT2", chip: "PIT", source })?;
    let [first, second, third] = &pit.channels;
    Ok(ChipsSavedV1 {
        pit_channels: [first.into(), second.into(), third.into()],
        pit_flags: pit.flags,
        pic_master: save_pic(vm, KVM_IRQCHIP_PIC_MASTER)?,
        pic_slave: save_pic(vm, KVM_IRQCHIP_PIC_SLAVE)?,
        ioapic: save_ioapic(vm)?,
    })
}

/// Writes the chips, after the local APICs. The vCPUs are parked and no device raises a line yet.
///
/// # Errors
/// [`ChipsError`] if a value is not possible or KVM refuses.
pub fn restore_chips(vm: &VmFd, saved: &ChipsSavedV1) -> Result<(), ChipsError> {
    check(saved)?;
    let ChipsSavedV1 { pic_master, pic_slave, ioapic, pit_channels: [first, second, third], pit_flags } = saved;
    restore_ioapic(vm, ioapic)?;
    restore_pic(vm, KVM_IRQCHIP_PIC_SLAVE, pic_slave)?;
    restore_pic(vm, KVM_IRQCHIP_PIC_MASTER, pic_master)?;
    let channels = [first.into(), second.into(), third.into()];
    vm.set_pit2(&kvm_pit_state2 { channels, flags: *pit_flags, ..Default::default() })
        .map_err(|source| ChipsError::Kvm { call: "KVM_SET_PIT2", chip: "PIT", source })
}

fn check(saved: &ChipsSavedV1) -> Result<(), ChipsError> {
    let most = |chip, field, found, most| {
        if found <= most { Ok(()) } else { Err(ChipsError::Value { chip, field, found, most }) }
    };
    for pic in [&saved.pic_master, &saved.pic_slave] {
        most("PIC", "priority", u32::from(pic.priority_add), 7)?;
        most("PIC", "initialization state", u32::from(pic.init_state), 3)?;
    }
    most("I/O APIC", "id", saved.ioapic.id, 0xf)?;
    most("I/O APIC", "request register", saved.ioapic.irr, (1 << PINS) - 1)?;
    most("I/O APIC", "selected register", saved.ioapic.ioregsel, 0xff)?;
    for channel in &saved.pit_channels {
        most("PIT", "count", channel.count, 0x1_0000)?;
        if channel.mode != PIT_MODE_UNSET {
            most("PIT", "mode", u32::from(channel.mode), 5)?;
        }
        most("PIT", "access mode", u32::from(channel.rw_mode), 3)?;
    }
    most("PIT", "flags", saved.pit_flags, PIT_FLAGS)
}

fn save_chip(vm: &VmFd, chip_id: u32, chip: &'static str) -> Result<kvm_irqchip, ChipsError> {
    let mut state = kvm_irqchip { chip_id, ..Default::default() };
    vm.get_irqchip(&mut state).map_err(|source| ChipsError::Kvm { call: "KVM_GET_IRQCHIP", chip, source })?;
    Ok(state)
}

fn restore_chip(vm: &VmFd, state: &kvm_irqchip, chip: &'static str) -> Result<(), ChipsError> {
    vm.set_irqchip(state).map_err(|source| ChipsError::Kvm { call: "KVM_SET_IRQCHIP", chip, source })
}

fn save_pic(vm: &VmFd, chip_id: u32) -> Result<PicV1, ChipsError> {
    let state = save_chip(vm, chip_id, "PIC")?;
    // SAFETY: the ioctl filled the union for a PIC; any bytes are a valid kvm_pic_state.
    Ok((unsafe { &state.chip.pic }).into())
}

fn restore_pic(vm: &VmFd, chip_id: u32, saved: &PicV1) -> Result<(), ChipsError> {
    let mut state = kvm_irqchip { chip_id, ..Default::default() };
    state.chip.pic = saved.into();
    restore_chip(vm, &state, "PIC")
}

fn save_ioapic(vm: &VmFd) -> Result<IoApicV1, ChipsError> {
    let state = save_chip(vm, KVM_IRQCHIP_IOAPIC, "I/O APIC")?;
    // SAFETY: the ioctl filled the union for the I/O APIC; any bytes are a valid kvm_ioapic_state.
    let ioapic = unsafe { state.chip.ioapic };
    // SAFETY: `bits` is the whole of each entry; any bits are valid.
    let redirections = ioapic.redirtbl.map(|entry| unsafe { entry.bits });
    Ok(IoApicV1 { ioregsel: ioapic.ioregsel, id: ioapic.id, irr: ioapic.irr, redirections })
}

fn restore_ioapic(vm: &VmFd, saved: &IoApicV1) -> Result<(), ChipsError> {
    let IoApicV1 { ioregsel, id, irr, redirections } = *saved;
    let mut ioapic = kvm_ioapic_state { base_address: IOAPIC_BASE, ioregsel, id, irr, ..Default::default() };
    for (entry, bits) in ioapic.redirtbl.iter_mut().zip(redirections) {
        entry.bits = bits;
    }
    let mut state = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
    state.chip.ioapic = ioapic;
    restore_chip(vm, &state, "I/O APIC")
}
