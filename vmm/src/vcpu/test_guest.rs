//! Small real-mode guests for the tests of vCPUs and state: assembled by hand, counting on ports and MMIO so that an
//! access that is lost or done twice shows.

#![expect(unsafe_code, reason = "gives the test's memory to KVM")]

use super::{Buses, Crew, GuestEnd, VcpuEvents, Vcpus};
use crate::state::Facts;
use devices::{Bus, BusDevice};
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_pit_config, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Long enough for anything on a busy machine; reaching it is a failure.
pub(crate) const LONG: Duration = Duration::from_secs(20);

const MEMORY: usize = 0x1_0000;
const CODE: u64 = 0x1000;
const HANDLER: u64 = 0x1800;
/// Each vCPU's counter: reads at the first port, writes at the fourth after it; 8 ports per vCPU.
const COUNTER_PORTS: u64 = 0x500;
/// As the ports, in memory that is not there; a page per vCPU.
const COUNTER_MMIO: u64 = 0x2_0000;
/// A guest writes here when something is wrong, or when it is done.
const BELL_PORT: u64 = 0x99;

/// What a guest runs. All vCPUs run the same.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Program {
    code: &'static [u8],
    /// What is at [`HANDLER`], for vector 0x40.
    handler: &'static [u8],
    /// The base of ES on vCPU 0; each further vCPU's is `es_step` higher.
    es: u64,
    es_step: u64,
}

/// `jmp $`.
pub(crate) const SPIN: Program = Program { code: b"\xeb\xfe", handler: b"", es: 0, es_step: 0 };

/// `hlt; jmp $-1` with interrupts off.
pub(crate) const HALT: Program = Program { code: b"\xf4\xeb\xfd", handler: b"", es: 0, es_step: 0 };

/// Reads a number from its port, expects it to be EBX, writes it to the other port and to MMIO, reads the next number
/// from MMIO, expects EBX again, counts EBX up and begins anew.
pub(crate) const COUNT: Program = Program {
    code: b"\x66\xed\
        \x66\x39\xd8\
        \x75\x1b\
        \x83\xc2\x04\
        \x66\xef\
        \x83\xea\x04\
        \x26\x66\xa3\x00\x00\
        \x26\x66\xa1\x04\x00\
        \x66\x39\xd8\
        \x75\x04\
        \x66\x43\
        \xeb\xde\
        \xe6\x99\
        \xf4",
    handler: b"",
    es: COUNTER_MMIO,
    es_step: 0x1000,
};

/// `rep insb` of 300 bytes from the counter's port to 0x5000, `rep outsb` of the same to the other port, for ever.
pub(crate) const STRINGS: Program = Program {
    code: b"\xfc\
        \xbf\x00\x50\xb9\x2c\x01\xba\x00\x05\xf3\x6c\
        \xbe\x00\x50\xb9\x2c\x01\xba\x04\x05\xf3\x6e\
        \xeb\xe8",
    handler: b"",
    es: 0,
    es_step: 0,
};

/// Enables the local APIC's timer in TSC deadline mode, vector 0x40, and halts for ever. The handler counts on the port and
/// sets the next deadline 500,000 cycles ahead.
pub(crate) const DEADLINE: Program = Program {
    code: b"\x26\x66\xc7\x06\xf0\x00\xff\x01\x00\x00\
        \x26\x66\xc7\x06\x20\x03\x40\x00\x04\x00\
        \xe8\x81\x00\
        \xfb\
        \xf4\
        \xeb\xfd",
    handler: b"\x66\x89\xd8\xba\x04\x05\x66\xef\x66\x43\
        \x26\x66\xc7\x06\xb0\x00\x00\x00\x00\x00\
        \xe8\x01\x00\
        \xcf\
        \x0f\x31\x66\x05\x20\xa1\x07\x00\x66\x83\xd2\x00\x66\xb9\xe0\x06\x00\x00\x0f\x30\xc3",
    es: 0xfee0_0000,
    es_step: 0,
};

/// Reads the TSC, rings the bell and halts if it is below the one before, counts on the port and begins anew.
pub(crate) const READ_TSC: Program = Program {
    code: b"\x89\xd5\
        \x0f\x31\
        \x66\x89\xd1\
        \x66\x39\xf9\
        \x72\x18\
        \x77\x05\
        \x66\x39\xf0\
        \x72\x11\
        \x66\x89\xc6\
        \x66\x89\xcf\
        \x89\xea\
        \x66\x89\xd8\
        \x66\xef\
        \x66\x43\
        \xeb\xde\
        \xe6\x99\
        \xf4",
    handler: b"",
    es: 0,
    es_step: 0,
};

/// Initializes the PICs and masks some lines, makes some level-triggered, programs PIT counters 2 and 0 and the speaker's
/// gate, routes pin 5 of the I/O APIC, rings the bell, and halts.
pub(crate) const PROGRAM_CHIPS: Program = Program {
    code: b"\xb0\x11\xe6\x20\xe6\xa0\
        \xb0\x20\xe6\x21\xb0\x28\xe6\xa1\
        \xb0\x04\xe6\x21\xb0\x02\xe6\xa1\
        \xb0\x01\xe6\x21\xe6\xa1\
        \xb0\xfb\xe6\x21\xb0\x5a\xe6\xa1\
        \xba\xd1\x04\xb0\x0e\xee\
        \xb0\xb6\xe6\x43\xb0\x34\xe6\x42\xb0\x12\xe6\x42\
        \xb0\x34\xe6\x43\xb0\x00\xe6\x40\xb0\x80\xe6\x40\
        \xb0\x03\xe6\x61\
        \x26\x66\xc7\x06\x00\x00\x1a\x00\x00\x00\
        \x26\x66\xc7\x06\x10\x00\x55\x80\x01\x00\
        \x26\x66\xc7\x06\x00\x00\x1b\x00\x00\x00\
        \x26\x66\xc7\x06\x10\x00\x00\x00\x00\x01\
        \xe6\x99\
        \xf4\xeb\xfd",
    handler: b"",
    es: 0xfec0_0000,
    es_step: 0,
};

/// `ud2` in protected mode with an interrupt table of limit 0, which [`Program::start`] sets for this program: fault upon
/// fault upon fault.
pub(crate) const TRIPLE_FAULT: Program = Program { code: b"\x0f\x0b\xeb\xfe", handler: b"", es: 0, es_step: 0 };

/// `ljmp 0x3000:0`, where there is no memory to execute: KVM emulates and cannot fetch.
pub(crate) const JUMP_AWAY: Program = Program { code: b"\xea\x00\x00\x00\x30", handler: b"", es: 0, es_step: 0 };

/// Numbers that a guest reads one by one and writes one by one.
#[derive(Debug, Default)]
pub(crate) struct Counter {
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    reads: u32,
    writes: u32,
    fault: Option<String>,
}

impl Counter {
    /// How many numbers the guest wrote, if it wrote each of them once and in order.
    pub(crate) fn writes(&self) -> u32 {
        let counts = self.counts.lock().unwrap();
        assert_eq!(counts.fault, None);
        counts.writes
    }
}

impl BusDevice for Counter {
    fn read(&self, _: u64, data: &mut [u8]) {
        let mut counts = self.counts.lock().unwrap();
        data.copy_from_slice(&counts.reads.to_le_bytes()[..data.len()]);
        counts.reads += 1;
    }

    fn write(&self, _: u64, data: &[u8]) {
        let mut counts = self.counts.lock().unwrap();
        if data != &counts.writes.to_le_bytes()[..data.len()] {
            let fault = format!("{data:x?} written where {:#x} was due", counts.writes);
            counts.fault.get_or_insert(fault);
        }
        counts.writes += 1;
    }
}

/// Counts its rings.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    rings: Mutex<u32>,
}

impl Bell {
    pub(crate) fn rings(&self) -> u32 {
        *self.rings.lock().unwrap()
    }
}

impl BusDevice for Bell {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&self, _: u64, _: &[u8]) {
        *self.rings.lock().unwrap() += 1;
    }
}

/// What a guest has outside the VM, and takes along into another one: memory and devices.
#[derive(Debug, Clone)]
pub(crate) struct World {
    pub(crate) memory: Arc<GuestMemoryMmap<()>>,
    pub(crate) ports: Vec<Arc<Counter>>,
    pub(crate) mmio: Vec<Arc<Counter>>,
    pub(crate) bell: Arc<Bell>,
}

impl World {
    pub(crate) fn new(vcpus: u8) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let counters = || (0..vcpus).map(|_| Arc::new(Counter::default())).collect();
        Self { memory: Arc::new(memory), ports: counters(), mmio: counters(), bell: Arc::new(Bell::default()) }
    }

    pub(crate) fn buses(&self) -> Buses {
        let (mut pio, mut mmio) = (Bus::new(), Bus::new());
        for (index, counter) in (0_u64..).zip(&self.ports) {
            pio.insert(COUNTER_PORTS + 8 * index, 8, Arc::clone(counter) as Arc<dyn BusDevice>).unwrap();
        }
        for (index, counter) in (0_u64..).zip(&self.mmio) {
            mmio.insert(COUNTER_MMIO + 0x1000 * index, 0x1000, Arc::clone(counter) as Arc<dyn BusDevice>).unwrap();
        }
        pio.insert(BELL_PORT, 1, Arc::clone(&self.bell) as Arc<dyn BusDevice>).unwrap();
        Buses { pio, mmio }
    }
}

#[derive(Debug)]
pub(super) struct Ends(pub(super) Mutex<Sender<(u8, GuestEnd)>>);

impl VcpuEvents for Ends {
    fn ended(&self, vcpu: u8, end: GuestEnd) {
        let _ = self.0.lock().unwrap().send((vcpu, end));
    }
    fn dirty_ring_full(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Err("there is no ring".into())
    }
}

/// A VM with vCPUs that stand. The fields are dropped in this order: threads, VM, memory.
#[derive(Debug)]
pub(crate) struct TestGuest {
    pub(crate) vcpus: Vcpus,
    pub(crate) facts: Arc<Facts>,
    pub(crate) ends: Receiver<(u8, GuestEnd)>,
    pub(crate) vm: VmFd,
    pub(crate) kvm: Kvm,
    pub(crate) world: World,
}

impl TestGuest {
    /// A VM with `program` loaded and each vCPU at its start.
    pub(crate) fn with(program: Program, vcpus: u8) -> Self {
        let world = World::new(vcpus);
        let buses = world.buses();
        Self::with_buses(program, world, buses)
    }

    pub(crate) fn with_buses(program: Program, world: World, buses: Buses) -> Self {
        world.memory.write_slice(program.code, GuestAddress(CODE)).unwrap();
        world.memory.write_slice(program.handler, GuestAddress(HANDLER)).unwrap();
        // The real-mode interrupt table: segment and offset per vector.
        world.memory.write_obj(u32::try_from(HANDLER).unwrap(), GuestAddress(0x40 * 4)).unwrap();
        Self::new(world, buses, |id, vcpu| program.start(id, vcpu))
    }

    /// An empty VM around `world`, whose vCPUs are as KVM made them: what a saved guest is restored into.
    pub(crate) fn empty(world: World) -> Self {
        let buses = world.buses();
        Self::new(world, buses, |_, _| {})
    }

    fn new(world: World, buses: Buses, start: impl Fn(u8, &VcpuFd)) -> Self {
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        vm.set_tss_address(0xfffb_d000).unwrap();
        vm.create_irq_chip().unwrap();
        vm.create_pit2(kvm_pit_config { flags: kvm_bindings::KVM_PIT_SPEAKER_DUMMY, ..Default::default() }).unwrap();
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: world.memory.get_host_address(GuestAddress(0)).unwrap().expose_provenance() as u64,
        };
        // SAFETY: the mapping is that long and outlives the VM, see TestGuest's fields.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        let vcpus = (0..u8::try_from(world.ports.len()).unwrap()).map(|id| {
            let vcpu = vm.create_vcpu(u64::from(id)).unwrap();
            for leaf in cpuid.as_mut_slice() {
                match leaf.function {
                    // The APIC id, where KVM lists that of the host's CPU, and the TSC deadline timer, which KVM emulates
                    // but does not list everywhere.
                    1 => {
                        leaf.ebx = leaf.ebx & 0x00ff_ffff | u32::from(id) << 24;
                        leaf.ecx |= 1 << 24;
                    }
                    0xb | 0x1f => leaf.edx = u32::from(id),
                    _ => {}
                }
            }
            vcpu.set_cpuid2(&cpuid).unwrap();
            start(id, &vcpu);
            vcpu
        });
        let (sender, ends) = channel();
        let events = Arc::new(Ends(Mutex::new(sender))) as Arc<dyn VcpuEvents>;
        let crew = Crew::start(u32::try_from(world.ports.len()).unwrap()).unwrap();
        let vcpus = Vcpus::seat(crew, vcpus.collect(), &Arc::new(buses), &events).unwrap();
        let facts = Arc::new(Facts::of(&kvm, &vm).unwrap());
        Self { vcpus, facts, ends, vm, kvm, world }
    }

    /// Lets the guest run until `done`, and parks it.
    pub(crate) fn run_until(&self, done: impl Fn(&World) -> bool) {
        self.vcpus.run();
        let start = Instant::now();
        while !done(&self.world) {
            assert!(start.elapsed() < LONG, "the guest does not get there: {:?}", self.world);
            std::thread::sleep(Duration::from_micros(100));
        }
        self.vcpus.park(LONG).unwrap();
    }
}

impl Program {
    fn start(&self, id: u8, vcpu: &VcpuFd) {
        let mut sregs = vcpu.get_sregs().unwrap();
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        sregs.es.base = self.es + self.es_step * u64::from(id);
        if self.code == TRIPLE_FAULT.code {
            sregs.cr0 |= 1;
            sregs.cs = kvm_segment {
                limit: 0xffff_ffff,
                type_: 0xb,
                present: 1,
                db: 1,
                s: 1,
                g: 1,
                selector: 8,
                ..Default::default()
            };
            sregs.idt.limit = 0;
        }
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.get_regs().unwrap();
        regs.rip = CODE;
        regs.rsp = 0x8000 - 0x100 * u64::from(id);
        regs.rflags = 2;
        regs.rdx = COUNTER_PORTS + 8 * u64::from(id);
        if self.code == READ_TSC.code {
            regs.rdx += 4;
        }
        vcpu.set_regs(&regs).unwrap();
        vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).unwrap();
    }
}

/// A sequence that looks random and is the same in each run (xorshift64).
#[derive(Debug)]
pub(crate) struct Moments(u64);

impl Moments {
    pub(crate) fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    /// A pause of 0 to `most` microseconds.
    pub(crate) fn pause(&mut self, most: u64) {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let micros = self.0 % most;
        let start = Instant::now();
        // Sleeping is too coarse for the short ones.
        while start.elapsed() < Duration::from_micros(micros) {
            if micros > 100 {
                std::thread::sleep(Duration::from_micros(micros - 60));
            }
            std::hint::spin_loop();
        }
    }
}
