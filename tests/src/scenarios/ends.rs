//! How guests end: by themselves in each way there is, by order, and by breaking the rules of their devices.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use control::{After, Happening, Phase};
use rustix::process::Signal;

use super::handmade::Program;
use crate::godwit::{Godwit, call};
use crate::place::virtualization;
use crate::scenario::{Context, Needs, Scenario};

/// See its `about`.
pub(super) const ENDS: Scenario = Scenario {
    name: "guest-ends",
    about: "Power-off, reboot, triple fault and panic of a guest, and a signal, each have their exit status and sentence",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(30),
    run: ends,
};

/// See its `about`.
pub(super) const SOFTWARE_KVM: Scenario = Scenario {
    name: "software-kvm",
    about: "A kernel that a KVM without svm and vmx cannot run ends with a sentence that names the nested lab",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(60),
    run: software_kvm,
};

/// See its `about`.
pub(super) const HOSTILE_GUEST: Scenario = Scenario {
    name: "hostile-guest",
    about: "A guest with broken virtqueues loses its device, which says so and needs a reset; the process lives on",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(30),
    run: hostile_guest,
};

const SOON: Duration = Duration::from_secs(10);
/// SLP_TYP 5 and SLP_EN for PM1a_CNT (ACPI 6.5, 4.8.3.2.1).
const SOFT_OFF: u16 = 5 << 10 | 1 << 13;

fn kernel(context: &Context, name: &str, program: Program) -> Result<String> {
    let path = context.work.join(name);
    program.write(&path)?;
    Ok(path.display().to_string())
}

fn ends(context: &Context) -> Result<()> {
    let start = || Program::default().say("here");
    // lidt [2 MiB], where zeros are: no interrupt has a handler; xor ecx, ecx; div ecx
    let no_handlers = [0x0f, 0x01, 0x1d, 0, 0, 0x20, 0, 0x31, 0xc9, 0xf7, 0xf1];
    let guests = [
        ("off", start().out_word(0x604, SOFT_OFF), 0, "The guest powered off"),
        ("reset-register", start().out_byte(0xcf9, 6), 20, "The guest asked for a reboot"),
        ("keyboard-controller", start().out_byte(0x64, 0xfe), 20, "The guest asked for a reboot"),
        ("triple-fault", start().code(&no_handlers), 21, "The guest stopped by a triple fault"),
        ("panic", start().out_byte(0x505, 1), 22, "The guest's kernel panicked"),
    ];
    for (name, program, status, sentence) in guests {
        println!("{name}");
        let kernel = kernel(context, name, program)?;
        let (ended, console) =
            call(context, &["run", "--kernel", &kernel, "--memory=32M", "--serial=file:/dev/stdout"])?;
        ended.expect(status, &format!("godwit: {sentence}"))?;
        ensure!(console.contains("here"), "The guest said {console:?}");
    }
    by_word_of_the_host(context)?;
    by_signal(context)
}

/// The micro guest powers off when it is told to on its console.
fn by_word_of_the_host(context: &Context) -> Result<()> {
    let kernel = context.images.join("micro.elf").display().to_string();
    let godwit = Godwit::run(context, "micro", &["--kernel", &kernel, "--cmdline=ws=16M tick=50", "--memory=64M"])?;
    let mut console = godwit.console()?;
    console.expect("tick", SOON)?;
    console.say("q")?;
    console.expect("end bad=0", SOON)?;
    godwit.finish(SOON)?.expect(0, "godwit: The guest powered off")
}

fn by_signal(context: &Context) -> Result<()> {
    let kernel = kernel(context, "halts", Program::default().say("here"))?;
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let godwit = Godwit::run(context, "halts.d", &["--kernel", &kernel, "--memory=32M"])?;
        let folder = godwit.folder().to_owned();
        godwit.signal(signal)?;
        let ended = godwit.finish(SOON)?;
        ended.expect(0, "godwit: The guest was ended by a signal")?;
        ensure!(ended.status.signal().is_none(), "It did not end by itself: {}", ended.status);
        for socket in ["api.sock", "console.sock"] {
            ensure!(!folder.join(socket).exists(), "{signal:?} left {socket} behind");
        }
    }
    let (help, text) = call(context, &["run", "--help"])?;
    help.expect(0, "")?;
    ensure!(
        text.contains("SIGTERM") && text.contains("triple fault"),
        "The help does not explain exit statuses: {text}"
    );
    Ok(())
}

fn software_kvm(context: &Context) -> Result<()> {
    if virtualization().is_some() {
        println!("the processor has svm or vmx, so there is no such KVM here");
        return Ok(());
    }
    let kernel = context.images.join("vmlinux").display().to_string();
    let (ended, _) = call(context, &["run", "--kernel", &kernel, "--memory=256M", "--serial=off"])?;
    ended.expect(1, "KVM internal error, suberror 1")?;
    ended.expect(1, "cannot run this guest. Run it in the nested lab instead: cargo xtask lab")
}

/// A virtio-mmio window, the first one, and the registers of virtio 1.3, 4.2.2.
const WINDOW: u32 = 0xd000_0000;
const DRIVER_FEATURES: u32 = WINDOW + 0x20;
const DRIVER_FEATURES_SELECT: u32 = WINDOW + 0x24;
const QUEUE_SELECT: u32 = WINDOW + 0x30;
const QUEUE_SIZE: u32 = WINDOW + 0x38;
const QUEUE_READY: u32 = WINDOW + 0x44;
const QUEUE_NOTIFY: u32 = WINDOW + 0x50;
const STATUS: u32 = WINDOW + 0x70;
const QUEUE_DESCRIPTORS: u32 = WINDOW + 0x80;
const QUEUE_AVAILABLE: u32 = WINDOW + 0x90;
const QUEUE_USED: u32 = WINDOW + 0xa0;
const NEEDS_RESET: u8 = 0x40;
/// Where the driver puts its queue.
const DESCRIPTORS: u32 = 0x20_0000;
const AVAILABLE: u32 = 0x20_1000;
const USED: u32 = 0x20_2000;
const OUT_OF_MEMORY: u32 = 0xc000_0000;
const FLAG_NEXT: u32 = 1;

/// A driver up to the moment where its queue is used, with the queue's parts at the given addresses.
fn driver(parts: [u32; 3]) -> Program {
    let status = [0, 1, 3].iter().fold(Program::default(), |program, status| program.store(STATUS, *status));
    let features = status
        .store(DRIVER_FEATURES_SELECT, 1)
        .store(DRIVER_FEATURES, 1)
        .store(DRIVER_FEATURES_SELECT, 0)
        .store(DRIVER_FEATURES, 0)
        .store(STATUS, 0xb);
    let queue = features.store(QUEUE_SELECT, 0).store(QUEUE_SIZE, 16);
    let registers = [QUEUE_DESCRIPTORS, QUEUE_AVAILABLE, QUEUE_USED];
    let placed = registers.iter().zip(parts).fold(queue, |program, (register, part)| program.store(*register, part));
    placed.store(QUEUE_READY, 1).store(STATUS, 0xf)
}

/// A descriptor in the queue: address, length, flags and the next one.
fn descriptor(program: Program, index: u32, [address, length, flags, next]: [u32; 4]) -> Program {
    let at = DESCRIPTORS + 16 * index;
    program.store(at, address).store(at + 4, 0).store(at + 8, length).store(at + 12, flags | next << 16)
}

/// Makes `count` chains available, of which the first begins at `head`.
fn offer(program: Program, head: u32, count: u32) -> Program {
    program.store(AVAILABLE + 4, head).store(AVAILABLE, count << 16)
}

/// Notifies the device and waits for it to give up.
fn suffer(program: Program) -> Program {
    program.store(QUEUE_NOTIFY, 0).await_bits(STATUS, NEEDS_RESET).repeat("the device needs a reset")
}

fn hostile_guest(context: &Context) -> Result<()> {
    let disk = context.work.join("disk");
    fs::File::create(&disk)?.set_len(1 << 20)?;
    let usual = || driver([DESCRIPTORS, AVAILABLE, USED]);
    let one = |fields| offer(descriptor(usual(), 0, fields), 0, 1);
    let guests = [
        ("loop", one([0x30_0000, 16, FLAG_NEXT, 0])),
        ("next-beyond-the-table", one([0x30_0000, 16, FLAG_NEXT, 99])),
        ("address-out-of-memory", one([OUT_OF_MEMORY, 16, FLAG_NEXT, 1])),
        ("huge-length", one([0x30_0000, u32::MAX, FLAG_NEXT, 1])),
        ("head-beyond-the-table", offer(usual(), 500, 1)),
        ("too-many-available", offer(usual(), 0, 1000)),
        ("ring-out-of-memory", driver([DESCRIPTORS, OUT_OF_MEMORY, USED])),
    ];
    for (name, program) in guests {
        println!("{name}");
        survive(context, name, suffer(program), &disk)?;
    }
    Ok(())
}

fn survive(context: &Context, name: &str, program: Program, disk: &Path) -> Result<()> {
    let kernel = kernel(context, &format!("{name}.elf"), program)?;
    let disk = format!("path={}", disk.display());
    let godwit = Godwit::run(context, name, &["--kernel", &kernel, "--memory=32M", "--disk", &disk])?;
    godwit.console()?.expect("the device needs a reset", SOON)?;
    let words = godwit.words();
    ensure!(words.contains("WARN") && words.contains("blk0"), "{name}: no line names the device: {words:?}");
    let mut events = godwit.client().events(After::Sequence(0))?;
    let told = events.find_map(|event| match event.ok()?.what {
        Happening::DeviceNeedsReset { device, .. } => Some(device),
        _ => None,
    });
    ensure!(told.as_deref() == Some("blk0"), "{name}: no event names the device: {told:?}");
    ensure!(godwit.vm()?.phase == Phase::Running, "{name}: the guest does not run on");
    godwit.end()
}
