//! Power as the guest's accesses and the machine see it.

use super::*;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

type Events = Arc<Mutex<Vec<PowerEvent>>>;

fn listener(events: &Events) -> Arc<dyn Fn(PowerEvent) + Send + Sync> {
    let events = Arc::clone(events);
    Arc::new(move |event| events.lock().unwrap().push(event))
}

struct Rig {
    power: PowerManagement,
    sci: EventFd,
    events: Events,
}

fn parts(events: &Events) -> (PowerParts, EventFd) {
    let sci = EventFd::new(EFD_NONBLOCK).unwrap();
    let listener = listener(events);
    (PowerParts { id: "power".into(), sci: sci.try_clone().unwrap(), listener }, sci)
}

impl Rig {
    fn new() -> Self {
        let events = Events::default();
        let (parts, sci) = parts(&events);
        Self { power: PowerManagement::new(parts), sci, events }
    }

    fn read(&self, offset: u64) -> u16 {
        let mut data = [0; 2];
        self.power.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u16) {
        self.power.write(offset, &value.to_le_bytes());
    }

    fn interrupted(&self) -> bool {
        self.sci.read().is_ok()
    }

    fn events(&self) -> Vec<PowerEvent> {
        std::mem::take(&mut self.events.lock().unwrap())
    }
}

#[test]
fn the_button_interrupts_a_guest_that_listens() {
    let rig = Rig::new();
    assert!(!rig.power.is_power_button_enabled());
    rig.write(2, POWER_BUTTON);
    assert!(rig.power.is_power_button_enabled() && !rig.interrupted());
    rig.power.press_power_button();
    assert!(rig.interrupted());
    assert_eq!(rig.read(0), POWER_BUTTON);
    rig.write(0, 0);
    assert_eq!(rig.read(0), POWER_BUTTON, "it is cleared by ones");
    rig.write(0, POWER_BUTTON);
    assert_eq!(rig.read(0), 0);
    assert!(!rig.interrupted());
    rig.power.press_power_button();
    assert!(rig.interrupted());
}

#[test]
fn a_press_before_the_guest_listens_is_kept() {
    let rig = Rig::new();
    rig.power.press_power_button();
    assert!(!rig.interrupted());
    rig.write(2, POWER_BUTTON);
    assert!(rig.interrupted());
}

#[test]
fn registers_take_bytes_words_and_more() {
    let rig = Rig::new();
    rig.power.write(2, &[0x20]);
    rig.power.write(3, &[0x01]);
    assert_eq!(rig.read(2), 0x120);
    rig.write(2, 0xffff);
    assert_eq!(rig.read(2), ENABLE_BITS, "other events do not exist");
    rig.power.press_power_button();
    rig.power.write(0, &[0xff, 0x01, 0, 0]);
    let mut data = [0xff; 8];
    rig.power.read(0, &mut data);
    assert_eq!(data, [0, 0, 0, 0, 1, 0, 0, 0]);
    rig.power.read(u64::MAX, &mut data);
    assert_eq!(data, [0; 8]);
    rig.power.write(u64::MAX, &[1]);
}

#[test]
fn sleep_type_five_is_power_off_and_no_other_is() {
    let rig = Rig::new();
    assert_eq!(rig.read(4), SCI_ENABLED);
    for sleep_type in (0..8).filter(|sleep_type| *sleep_type != 5) {
        rig.write(4, sleep_type << 10 | SLEEP_ENABLE);
    }
    rig.write(4, 5 << 10);
    assert_eq!(rig.events(), []);
    assert_eq!(rig.read(4), 5 << 10 | SCI_ENABLED);
    rig.write(4, 5 << 10 | SLEEP_ENABLE);
    assert_eq!(rig.events(), [PowerEvent::PowerOff]);
    assert_eq!(rig.read(4) & SLEEP_ENABLE, 0, "SLP_EN reads as 0");
    rig.power.write(5, &[5 << 2 | 0x20]);
    assert_eq!(rig.events(), [PowerEvent::PowerOff], "by its upper byte alone");
}

#[test]
fn ports_turn_their_one_write_into_an_event() {
    let events = Events::default();
    let reset = PowerPort::reset_register(listener(&events));
    let keyboard = PowerPort::keyboard_controller(listener(&events));
    let panic = PowerPort::panic_notifier(listener(&events));
    let mut data = [0xff];
    for (port, value) in [(&reset, 0), (&keyboard, 0), (&panic, 1)] {
        port.read(0, &mut data);
        assert_eq!(data[0], value, "{port:?}");
        port.write(0, &[]);
        port.write(0, &[0]);
    }
    reset.write(0, &[2]);
    keyboard.write(4, &[0xd1]);
    keyboard.write(0, &[0xfe]);
    panic.write(0, &[2]);
    assert_eq!(*events.lock().unwrap(), []);
    reset.write(0, &[6]);
    keyboard.write(4, &[0xfe]);
    panic.write(0, &[1]);
    assert_eq!(*events.lock().unwrap(), [PowerEvent::Reset, PowerEvent::Reset, PowerEvent::Panicked]);
}

#[test]
fn a_pressed_button_moves_and_interrupts_there() {
    let rig = Rig::new();
    rig.write(2, POWER_BUTTON);
    rig.power.press_power_button();
    rig.write(4, 3 << 10);
    rig.power.quiesce(Duration::ZERO).unwrap();
    let mut state = SavedState::new();
    rig.power.save(&mut state).unwrap();
    let (parts, sci) = parts(&rig.events);
    let there = Rig { power: PowerManagement::restore(&mut state, parts).unwrap(), sci, events: Events::default() };
    assert!(!there.interrupted());
    there.power.resume();
    assert!(there.interrupted());
    assert_eq!([there.read(0), there.read(2), there.read(4)], [POWER_BUTTON, POWER_BUTTON, 3 << 10 | SCI_ENABLED]);
    there.power.reset();
    assert_eq!([there.read(0), there.read(2), there.read(4)], [0, 0, SCI_ENABLED]);
}

/// The bytes of the first released version: a change here is a break of the format.
#[test]
fn golden_bytes() {
    let rig = Rig::new();
    rig.write(2, POWER_BUTTON);
    let mut state = SavedState::new();
    rig.power.save(&mut state).unwrap();
    let golden = b"GWSTATE1\x01\0\0\0\x05\0power\x08\0acpi-pm1\x01\0\x04\0\0\0\0\x80\x02\x01";
    assert_eq!(state.encode(), golden);
}

#[test]
fn impossible_registers_are_refused() {
    let good = PowerSavedV1 { status: 0, enable: 0, control: SCI_ENABLED };
    for (field, saved) in [
        ("status", PowerSavedV1 { status: 1, ..good }),
        ("enable", PowerSavedV1 { enable: 1, ..good }),
        ("control", PowerSavedV1 { control: SLEEP_ENABLE, ..good }),
    ] {
        let mut state = SavedState::new();
        state.put("power", &saved).unwrap();
        let error = PowerManagement::restore(&mut state, parts(&Events::default()).0).unwrap_err();
        assert!(error.to_string().contains(field), "{error}");
    }
    let error = PowerManagement::restore(&mut SavedState::new(), parts(&Events::default()).0).unwrap_err();
    assert!(matches!(error, PowerError::Section(SavedError::Missing { .. })), "{error}");
}
