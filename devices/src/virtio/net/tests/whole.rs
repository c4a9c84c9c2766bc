//! The NIC behind its real transport, on a real worker.

use super::*;
use crate::virtio::{FailureListener, Mmio, MmioParts, mmio};
use crate::{BusDevice, Device, Worker};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A driver that speaks to the registers of a whole device, with its worker, and sets all three queues up.
struct Machine {
    nic: Mmio<Net>,
    driver: Driver,
    wire: UnixDatagram,
}

impl Machine {
    fn new(features: u64) -> Self {
        let (port, wire) = port(Offloads::NONE);
        let net = Net::new(MacAddress::unicast(MAC).unwrap(), NetParts { port: Box::new(port), vhost: None }).unwrap();
        let driver = Driver::new(3, SIZE, features);
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let parts = MmioParts {
            id: "net0".into(),
            ram: driver.io.ram.clone(),
            irq,
            worker: Worker::spawn("net0", || {}).unwrap(),
            on_failure: FailureListener::new(|_| {}),
        };
        let machine = Self { nic: Mmio::new(net, parts).unwrap(), driver, wire };
        machine.set_up(features);
        machine
    }

    fn write(&self, register: u64, value: u64) {
        self.nic.write(register, &u32::try_from(value & 0xffff_ffff).unwrap().to_le_bytes());
    }

    fn set_up(&self, features: u64) {
        let status = |value| self.write(0x70, value);
        status(1);
        status(3);
        for half in [0, 1] {
            self.write(0x24, half);
            self.write(0x20, features >> (32 * half));
        }
        status(11);
        for queue in &self.driver.io.queues {
            let state = queue.state();
            self.write(0x30, queue.index() as u64);
            self.write(0x38, state.size.into());
            for (register, address) in [(0x80, state.desc_table), (0x90, state.avail_ring), (0xa0, state.used_ring)] {
                self.write(register, address);
                self.write(register + 4, address >> 32);
            }
            self.write(0x44, 1);
        }
        status(15);
    }

    fn kick(&self, queue: usize) {
        self.write(mmio::QUEUE_NOTIFY, queue as u64);
    }

    /// Receives until `count` frames came or long enough passed, giving each buffer back to the device at once.
    fn receive(&mut self, count: usize) -> Vec<u8> {
        let mut numbers = Vec::new();
        let end = Instant::now() + Duration::from_secs(20);
        while numbers.len() < count && Instant::now() < end {
            for (head, length) in self.driver.used(RECEIVE) {
                assert_eq!(length, 64);
                let place = BUFFERS + u64::from(head) * 0x1000;
                numbers.push(self.driver.get(place + 12, 1)[0]);
                self.driver.offer(RECEIVE, &[Offer::Write(place, 2048)]);
                self.kick(RECEIVE);
            }
        }
        numbers
    }

    fn send_numbered(&self, numbers: std::ops::Range<u8>) -> impl Iterator<Item = u8> + use<> {
        let mut frame = [0; 64];
        for number in numbers.clone() {
            frame[12] = number;
            while self.wire.send(&frame).is_err() {
                std::thread::yield_now();
            }
        }
        numbers
    }
}

#[test]
fn a_whole_device_loses_no_frame_to_missing_buffers_or_standstill() {
    let mut machine = Machine::new(MERGEABLE | 1 << VIRTIO_RING_F_EVENT_IDX);
    // No buffers at all, and the kernel's queue of the port fills up.
    let mut sent: Vec<u8> = machine.send_numbered(0..8).collect();
    for number in 0..u64::from(SIZE) {
        machine.driver.offer(RECEIVE, &[Offer::Write(BUFFERS + number * 0x1000, 2048)]);
    }
    machine.kick(RECEIVE);
    let mut received = machine.receive(8);
    for first in [8, 40, 72] {
        machine.nic.quiesce(Duration::from_secs(5)).unwrap();
        sent.extend(machine.send_numbered(first..first + 8));
        assert_eq!(machine.driver.used(RECEIVE), [], "the device stands still");
        machine.nic.resume();
        sent.extend(machine.send_numbered(first + 8..first + 32));
        received.extend(machine.receive(32));
    }
    assert_eq!(received, sent);
}

#[test]
fn a_whole_device_sends_and_survives_a_broken_ring() {
    let mut machine = Machine::new(PLAIN);
    machine.driver.put(BUFFERS, &frame(100));
    machine.driver.offer(TRANSMIT, &[Offer::Read(BUFFERS, 100)]);
    machine.kick(TRANSMIT);
    let mut received = [0; 200];
    machine.wire.set_nonblocking(false).unwrap();
    machine.wire.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(machine.wire.recv(&mut received).unwrap(), 100);
    machine.driver.offer(TRANSMIT, &[Offer::Read(u64::MAX - 1, 100)]);
    machine.kick(TRANSMIT);
    let end = Instant::now() + Duration::from_secs(20);
    let mut status = [0; 4];
    while status[0] & 0x40 == 0 && Instant::now() < end {
        machine.nic.read(0x70, &mut status);
    }
    assert_eq!(status[0] & 0x40, 0x40, "the device needs a reset");
    machine.write(0x70, 0);
    machine.nic.read(0x70, &mut status);
    assert_eq!(status, [0; 4]);
}

#[test]
fn a_whole_device_moves_and_announces_itself() {
    let mut old = Machine::new(MERGEABLE | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE | 1 << VIRTIO_NET_F_CTRL_VQ);
    old.driver.offer(RECEIVE, &[Offer::Write(BUFFERS, 2048)]);
    old.nic.quiesce(Duration::from_secs(5)).unwrap();
    let mut state = SavedState::new();
    old.nic.save(&mut state).unwrap();
    let (port, wire) = port(Offloads::NONE);
    let parts = NetParts { port: Box::new(port), vhost: None };
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    let place = MmioParts {
        id: "net0".into(),
        ram: old.driver.io.ram.clone(),
        irq: irq.try_clone().unwrap(),
        worker: Worker::spawn("net0", || {}).unwrap(),
        on_failure: FailureListener::new(|_| {}),
    };
    let nic = Mmio::restore(&mut state, parts, place).unwrap();
    state.finish().unwrap();
    wire.send(&frame(64)).unwrap();
    nic.resume();
    nic.announce();
    let mut status = [0; 4];
    nic.read(0x100 + 6, &mut status[..2]);
    assert_eq!(status[0], 3, "the link is up and the guest is asked to announce itself");
    let mut new = Machine { nic, driver: old.driver, wire };
    new.driver.offer(RECEIVE, &[Offer::Write(BUFFERS + 0x1000, 2048)]);
    assert_eq!(new.receive(1), [0]);
    assert!(irq.read().is_ok());
    new.wire.set_nonblocking(false).unwrap();
    new.wire.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    for _ in 0..announce::ROUNDS {
        let mut frame = [0; 100];
        assert_eq!(new.wire.recv(&mut frame).unwrap(), 72);
    }
}
