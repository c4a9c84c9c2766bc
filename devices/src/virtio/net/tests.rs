use super::*;
use crate::virtio::driver::{BUFFERS, Driver, Offer, scribbles};
use crate::virtio::{BrokenRing, QueueSavedV1};
use ::saved::SavedState;
use proptest::collection::vec;
use proptest::proptest;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

mod whole;

const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const PLAIN: u64 = 1 << VIRTIO_F_VERSION_1;
const MERGEABLE: u64 = PLAIN | 1 << VIRTIO_NET_F_MRG_RXBUF;
const SIZE: u16 = 16;
const HEADER_32: u32 = 12;

/// A port whose other end is in the test.
#[derive(Debug)]
struct Wire {
    file: File,
    offloads: Offloads,
    set: Arc<Mutex<Vec<Offloads>>>,
}

impl Port for Wire {
    fn file(&self) -> &File {
        &self.file
    }
    fn offloads(&self) -> Offloads {
        self.offloads
    }
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.set.lock().unwrap().push(offloads);
        Ok(())
    }
}

struct Bench {
    net: Net,
    driver: Driver,
    wire: UnixDatagram,
    set: Arc<Mutex<Vec<Offloads>>>,
}

fn port(offloads: Offloads) -> (Wire, UnixDatagram) {
    let (near, far) = UnixDatagram::pair().unwrap();
    for end in [&near, &far] {
        end.set_nonblocking(true).unwrap();
    }
    (Wire { file: OwnedFd::from(near).into(), offloads, set: Arc::default() }, far)
}

fn bench(features: u64) -> Bench {
    let (port, wire) = port(Offloads::CHECKSUM | Offloads::TSO4);
    let set = Arc::clone(&port.set);
    let parts = NetParts { port: Box::new(port), vhost: None };
    let net = Net::new(MacAddress::unicast(MAC).unwrap(), parts).unwrap();
    Bench { net, driver: Driver::new(3, SIZE, features), wire, set }
}

impl Bench {
    fn process(&mut self, queue: usize) -> Result<Progress, Fault> {
        self.net.process(&mut self.driver.io, queue)
    }

    fn port_is_ready(&mut self) {
        self.net.on_source(&mut self.driver.io, PORT_READY).unwrap();
    }

    /// Offers `count` buffers of `length` bytes for frames, one after the other in memory.
    fn offer_buffers(&mut self, count: u64, length: u32) {
        for number in 0..count {
            self.driver.offer(RECEIVE, &[Offer::Write(BUFFERS + number * u64::from(length), length)]);
        }
    }

    fn arrive(&self, frame: &[u8]) {
        self.wire.send(frame).unwrap();
    }

    fn departed(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 2 * MAX_FRAME];
        let length = self.wire.recv(&mut frame).ok()?;
        frame.truncate(length);
        Some(frame)
    }

    /// Frames and bytes to the driver, frames and bytes from it, frames dropped.
    fn counts(&self) -> [u64; 5] {
        let NetCounts { received_frames, received_bytes, sent_frames, sent_bytes, dropped_frames } =
            self.net.counters().expect("there is no vhost").now();
        [received_frames, received_bytes, sent_frames, sent_bytes, dropped_frames]
    }

    fn status(&self) -> u16 {
        let mut status = [0; 2];
        self.net.read_config(6, &mut status);
        u16::from_le_bytes(status)
    }
}

/// A frame of `length` bytes with its header, of which no two neighbouring bytes are equal.
fn frame(length: usize) -> Vec<u8> {
    let payload = (0..length - HEADER).map(|at| u8::try_from(at % 251).unwrap());
    [0; HEADER].into_iter().chain(payload).collect()
}

fn is_incomplete(outcome: &Result<Progress, Fault>) -> bool {
    matches!(outcome, Err(Fault::Ring(BrokenRing::Incomplete { .. })))
}

#[test]
fn features_follow_the_port() {
    let features = bench(0).net.features();
    for bit in [VIRTIO_NET_F_MAC, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_ANNOUNCE] {
        assert!(features & 1 << bit != 0, "{bit}");
    }
    for bit in [VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_GUEST_UFO, 22] {
        assert!(features & 1 << bit == 0, "{bit}");
    }
}

#[test]
fn the_port_is_told_what_the_driver_takes() {
    let asked = [
        (PLAIN, Offloads::NONE),
        (PLAIN | 1 << VIRTIO_NET_F_GUEST_TSO4, Offloads::NONE),
        (PLAIN | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4, Offloads::CHECKSUM | Offloads::TSO4),
    ];
    for (features, offloads) in asked {
        let mut bench = bench(features);
        bench.net.start(&mut bench.driver.io).unwrap();
        assert_eq!(*bench.set.lock().unwrap(), [offloads]);
    }
}

#[test]
fn configuration_space() {
    let mut bench = bench(PLAIN);
    let mut config = [0xff; 12];
    bench.net.write_config(&mut bench.driver.io, 0, &[0; 6]);
    bench.net.read_config(0, &mut config);
    assert_eq!(config, [0x52, 0x54, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0]);
    bench.net.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 12]);
}

#[test]
fn frames_go_out_from_scattered_buffers() {
    let mut bench = bench(PLAIN);
    let frame = frame(1514);
    bench.driver.put(BUFFERS, &frame[..12]);
    bench.driver.put(BUFFERS + 0x2ff0, &frame[12..100]);
    bench.driver.put(BUFFERS + 0x1000, &frame[100..]);
    let parts = [Offer::Read(BUFFERS, 12), Offer::Read(BUFFERS + 0x2ff0, 88), Offer::Read(BUFFERS + 0x1000, 1414)];
    let head = bench.driver.offer(TRANSMIT, &parts);
    assert_eq!(bench.process(TRANSMIT).unwrap(), Progress::Idle);
    assert_eq!(bench.departed().unwrap(), frame);
    assert_eq!(bench.counts(), [0, 0, 1, 1502, 0], "the header is not of the frame");
    assert_eq!(bench.driver.used(TRANSMIT), [(head.into(), 0)]);
    assert!(bench.driver.interrupted());
    assert!(!bench.driver.kicks_are_suppressed(TRANSMIT));
}

#[test]
fn frames_of_impossible_length_do_not_go_out() {
    let mut bench = bench(PLAIN);
    bench.driver.offer(TRANSMIT, &[Offer::Read(BUFFERS, u32::try_from(MAX_FRAME + 1).unwrap())]);
    bench.driver.offer(TRANSMIT, &[Offer::Read(BUFFERS, 4 << 20)]);
    bench.process(TRANSMIT).unwrap();
    assert_eq!(bench.driver.used(TRANSMIT).len(), 2, "the driver has its buffers back");
    assert_eq!((bench.departed(), bench.counts()), (None, [0, 0, 0, 0, 2]));
    bench.driver.offer(TRANSMIT, &[Offer::Read(BUFFERS, HEADER_32 - 1)]);
    assert!(is_incomplete(&bench.process(TRANSMIT)));
}

#[test]
fn a_port_that_takes_nothing_loses_frames_only() {
    let mut bench = bench(PLAIN);
    let Bench { driver, net, wire, .. } = &mut bench;
    wire.shutdown(std::net::Shutdown::Both).unwrap();
    driver.offer(TRANSMIT, &[Offer::Read(BUFFERS, 64)]);
    net.process(&mut driver.io, TRANSMIT).unwrap();
    assert_eq!(driver.used(TRANSMIT).len(), 1);
    driver.offer(RECEIVE, &[Offer::Write(BUFFERS, 2048)]);
    assert_eq!(net.process(&mut driver.io, RECEIVE).unwrap(), Progress::Idle);
    assert_eq!(bench.counts(), [0, 0, 0, 0, 1]);
}

#[test]
fn frames_come_in_and_mark_their_pages() {
    let mut bench = bench(PLAIN);
    let frame = frame(1514);
    let into = BUFFERS + 0xc00;
    let head = bench.driver.offer(RECEIVE, &[Offer::Write(into, 12), Offer::Write(into + 12, 2000)]);
    bench.driver.clean();
    bench.arrive(&frame);
    bench.port_is_ready();
    assert_eq!(bench.driver.used(RECEIVE), [(head.into(), 1514)]);
    assert!(bench.driver.interrupted());
    let received = bench.driver.get(into, 1514);
    assert_eq!(received[10..12], [1, 0], "num_buffers");
    assert_eq!(received[12..], frame[12..]);
    for (page, dirty) in [(0, true), (1, true), (2, false)] {
        assert_eq!(bench.driver.is_dirty(BUFFERS + page * 0x1000), dirty, "page {page}");
    }
}

#[test]
fn a_frame_without_mergeable_buffers_is_all_or_nothing() {
    let mut bench = bench(PLAIN);
    bench.offer_buffers(2, 1000);
    bench.arrive(&frame(1001));
    bench.arrive(&frame(1000));
    bench.port_is_ready();
    assert_eq!(bench.driver.used(RECEIVE), [(0, 1000)]);
    assert_eq!(bench.driver.get(BUFFERS, 1000)[12..], frame(1000)[12..]);
    assert_eq!(bench.counts(), [1, 988, 0, 0, 1]);
}

#[test]
fn large_frames_fill_many_buffers() {
    let mut bench = bench(MERGEABLE);
    bench.offer_buffers(16, 5000);
    bench.arrive(&frame(65562));
    bench.port_is_ready();
    let used = bench.driver.used(RECEIVE);
    assert_eq!(used.len(), 14);
    assert_eq!(used[0], (0, 5000));
    assert_eq!(used[13], (13, 562));
    let received = bench.driver.get(BUFFERS, 65562);
    assert_eq!(received[10..12], [14, 0], "num_buffers");
    assert_eq!(received[12..], frame(65562)[12..]);
    // The others were put back and serve the next frames.
    bench.arrive(&frame(64));
    bench.arrive(&frame(65));
    bench.port_is_ready();
    assert_eq!(bench.driver.used(RECEIVE), [(14, 64), (15, 65)]);
    assert_eq!(bench.counts(), [3, 65550 + 52 + 53, 0, 0, 0]);
}

#[test]
fn a_frame_waits_for_enough_buffers_and_holds_up_the_next() {
    for event_index in [0, 1 << VIRTIO_RING_F_EVENT_IDX] {
        let mut bench = bench(MERGEABLE | event_index);
        bench.offer_buffers(2, 1000);
        for length in [2500, 70] {
            bench.arrive(&frame(length));
        }
        bench.port_is_ready();
        assert_eq!(bench.driver.used(RECEIVE), []);
        let asks = if event_index == 0 {
            !bench.driver.kicks_are_suppressed(RECEIVE)
        } else {
            bench.driver.kick_event(RECEIVE) == 2
        };
        assert!(asks, "the driver is asked to kick when it adds a buffer");
        assert_eq!(bench.process(RECEIVE).unwrap(), Progress::Idle, "nothing changed");
        bench.driver.offer(RECEIVE, &[Offer::Write(BUFFERS + 2000, 1000)]);
        bench.process(RECEIVE).unwrap();
        assert_eq!(bench.driver.used(RECEIVE), [(0, 1000), (1, 1000), (2, 500)]);
        let received = bench.driver.get(BUFFERS, 2500);
        assert_eq!(received[10..12], [3, 0], "num_buffers");
        assert_eq!(received[12..], frame(2500)[12..]);
        bench.driver.offer(RECEIVE, &[Offer::Write(BUFFERS, 1000)]);
        bench.process(RECEIVE).unwrap();
        assert_eq!(bench.driver.used(RECEIVE), [(3, 70)]);
        assert_eq!(bench.counts(), [2, 2488 + 58, 0, 0, 0], "a frame that waited is one frame");
    }
}

#[test]
fn a_frame_that_no_full_ring_takes_is_dropped() {
    let mut bench = bench(MERGEABLE);
    bench.offer_buffers(SIZE.into(), 100);
    for length in [100 * usize::from(SIZE) + 1, 100] {
        bench.arrive(&frame(length));
    }
    bench.port_is_ready();
    assert_eq!(bench.driver.used(RECEIVE), [(0, 100)]);
    assert_eq!(bench.counts(), [1, 88, 0, 0, 1]);
}

#[test]
fn a_waiting_frame_is_forgotten_at_reset() {
    let mut bench = bench(MERGEABLE);
    bench.offer_buffers(1, 100);
    bench.arrive(&frame(200));
    bench.port_is_ready();
    bench.net.reset();
    bench.offer_buffers(2, 1000);
    bench.process(RECEIVE).unwrap();
    assert_eq!(bench.driver.used(RECEIVE), []);
    assert_eq!(bench.counts(), [0, 0, 0, 0, 1]);
}

#[test]
fn without_buffers_the_port_is_left_alone() {
    let mut bench = bench(PLAIN);
    bench.arrive(&frame(100));
    bench.port_is_ready();
    assert!(!bench.driver.kicks_are_suppressed(RECEIVE));
    assert!(!bench.driver.interrupted());
    bench.offer_buffers(1, 1000);
    bench.driver.set_hold(true);
    bench.process(RECEIVE).unwrap();
    assert_eq!(bench.driver.used(RECEIVE), [], "the machine asks for standstill");
    bench.driver.set_hold(false);
    bench.process(RECEIVE).unwrap();
    assert_eq!(bench.driver.used(RECEIVE), [(0, 100)]);
}

#[test]
fn buffers_too_small_for_a_header_break_the_ring() {
    for features in [PLAIN, MERGEABLE] {
        let mut tiny = bench(features);
        tiny.offer_buffers(1, HEADER_32 - 1);
        assert!(is_incomplete(&tiny.process(RECEIVE)));
        let mut readable = bench(features);
        readable.driver.offer(RECEIVE, &[Offer::Read(BUFFERS, 2000)]);
        assert!(is_incomplete(&readable.process(RECEIVE)));
    }
}

#[test]
fn broken_rings_are_faults() {
    for queue in [RECEIVE, TRANSMIT, CONTROL] {
        let mut looping = bench(MERGEABLE);
        looping.driver.descriptor(queue, 0, BUFFERS, 64, 1, 0);
        looping.driver.make_available(queue, 0);
        assert!(looping.process(queue).is_err(), "queue {queue}");
        let mut outside = bench(MERGEABLE);
        outside.driver.descriptor(queue, 0, u64::MAX - 10, 64, 2, 0);
        outside.driver.make_available(queue, 0);
        assert!(outside.process(queue).is_err(), "queue {queue}");
    }
}

proptest! {
    #[test]
    fn no_rings_upset_the_device(scribble in scribbles(), mergeable: bool, lengths in vec(0..4000_usize, 0..4)) {
        let mut bench = bench(if mergeable { MERGEABLE } else { PLAIN });
        for length in lengths {
            bench.arrive(&vec![1; length]);
        }
        for queue in [RECEIVE, TRANSMIT, CONTROL] {
            bench.driver.scribble(queue, &scribble);
            let _ = bench.process(queue);
        }
    }
}

#[test]
fn a_turn_has_an_end() {
    let mut bench = bench(PLAIN);
    bench.offer_buffers(SIZE.into(), 100);
    for _ in 0..SIZE {
        bench.arrive(&frame(64));
    }
    bench.port_is_ready();
    assert_eq!(bench.driver.used(RECEIVE).len(), usize::from(SIZE));
    assert!(bench.driver.io.queues[RECEIVE].notifier().read().is_ok(), "the device kicks itself for the rest");
    for _ in 0..SIZE {
        bench.driver.offer(TRANSMIT, &[Offer::Read(BUFFERS, 64)]);
    }
    assert_eq!(bench.process(TRANSMIT).unwrap(), Progress::More);
}

#[test]
fn short_frames_are_dropped() {
    let mut bench = bench(MERGEABLE);
    bench.offer_buffers(1, 1000);
    bench.arrive(&[1; HEADER - 1]);
    bench.arrive(&frame(64));
    bench.port_is_ready();
    assert_eq!(bench.driver.used(RECEIVE), [(0, 64)]);
}

fn command(bench: &mut Bench, request: &[u8]) -> u8 {
    bench.driver.put(BUFFERS, request);
    let length = u32::try_from(request.len()).unwrap();
    bench.driver.offer(CONTROL, &[Offer::Read(BUFFERS, length), Offer::Write(BUFFERS + 0x1000, 1)]);
    bench.driver.put(BUFFERS + 0x1000, &[0xff]);
    bench.process(CONTROL).unwrap();
    assert_eq!(bench.driver.used(CONTROL).len(), 1);
    bench.driver.get(BUFFERS + 0x1000, 1)[0]
}

#[test]
fn commands_are_answered() {
    let mut bench = bench(PLAIN);
    assert_eq!(command(&mut bench, &[1, 1, 2, 0, 0, 0, 0, 9]), 0);
    let mut mac = [0; 6];
    bench.net.read_config(0, &mut mac);
    assert_eq!(mac, [2, 0, 0, 0, 0, 9]);
    bench.net.reset();
    bench.net.read_config(0, &mut mac);
    assert_eq!(mac, MAC);
    // Not offered, of odd length, far too long.
    assert_eq!(command(&mut bench, &[4, 0, 2, 0]), 1);
    assert_eq!(command(&mut bench, &[3]), 1);
    assert_eq!(command(&mut bench, &[3; 60_000]), 1);
    bench.driver.offer(CONTROL, &[Offer::Read(BUFFERS, 2)]);
    assert!(is_incomplete(&bench.process(CONTROL)));
}

#[test]
fn after_a_move_host_and_guest_announce() {
    let mut bench = bench(PLAIN | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE | 1 << VIRTIO_NET_F_CTRL_VQ);
    bench.net.announce(&mut bench.driver.io);
    assert_eq!(bench.departed().unwrap(), announce::rarp(bench.net.mac));
    assert_eq!(bench.status(), LINK_UP | ANNOUNCE);
    assert!(bench.driver.interrupted());
    assert_eq!(command(&mut bench, &[3, 0]), 0);
    assert_eq!(bench.status(), LINK_UP);
    let end = Instant::now() + Duration::from_secs(20);
    let mut announced = 1;
    while announced < announce::ROUNDS && Instant::now() < end {
        bench.net.on_source(&mut bench.driver.io, ANNOUNCEMENT_DUE).unwrap();
        announced += u32::from(bench.departed().is_some());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(announced, announce::ROUNDS);
}

#[test]
fn a_driver_that_cannot_announce_is_not_asked() {
    let mut bench = bench(PLAIN);
    bench.net.announce(&mut bench.driver.io);
    assert!(bench.departed().is_some());
    assert_eq!(bench.status(), LINK_UP);
    assert!(!bench.driver.interrupted());
}

fn transport() -> MmioSavedV1 {
    let queue = QueueSavedV1 {
        size: 256,
        ready: true,
        descriptors: 0x1000,
        available: 0x2000,
        used: 0x3000,
        next_available: 7,
        next_used: 7,
        event_index: true,
    };
    MmioSavedV1 {
        device_status: 15,
        device_features_select: 1,
        driver_features_select: 1,
        driver_features: 1 << 32,
        queue_select: 2,
        interrupt_status: 1,
        config_generation: 3,
        queues: vec![queue],
    }
}

fn restore(saved: NetSavedV1) -> Result<(Net, MmioSavedV1), RestoreError> {
    let parts = NetParts { port: Box::new(port(Offloads::NONE).0), vhost: None };
    Net::restore("net0", saved, parts)
}

#[test]
fn what_was_saved_comes_back() {
    let mut bench = bench(PLAIN | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE);
    bench.net.announce(&mut bench.driver.io);
    command(&mut bench, &[1, 1, 2, 0, 0, 0, 0, 9]);
    let saved = bench.net.save(transport());
    let (net, transport_back) = restore(saved.clone()).unwrap();
    assert_eq!(transport_back, transport());
    assert_eq!(net.save(transport()), saved);
    assert!(net.guest_announces);
    assert_eq!(net.mac.octets(), [2, 0, 0, 0, 0, 9]);
    assert_eq!(net.permanent_mac.octets(), MAC);
}

#[test]
fn impossible_addresses_are_refused() {
    let good = NetSavedV1 { transport: transport(), permanent_mac: MAC, mac: MAC, guest_announces: false };
    assert!(restore(good.clone()).is_ok());
    let group = [1, 0, 0, 0, 0, 0];
    for bad in [NetSavedV1 { mac: group, ..good.clone() }, NetSavedV1 { permanent_mac: [0; 6], ..good }] {
        assert!(matches!(restore(bad), Err(RestoreError::BadField { .. })));
    }
}

/// The bytes of the first released version: a change here is a break of the format.
#[test]
fn golden_section() {
    let saved =
        NetSavedV1 { transport: transport(), permanent_mac: MAC, mac: [2, 0, 0, 0, 0, 9], guest_announces: true };
    let mut state = SavedState::new();
    state.put("net0", &saved).unwrap();
    let golden = b"GWSTATE1\x01\x00\x00\x00\x04\x00net0\n\x00virtio-net\
        \x01\x00%\x00\x00\x00\x0f\x01\x01\x80\x80\x80\x80\x10\x02\x01\x03\x01\x80\x02\x01\x80 \x80@\x80`\x07\x07\x01RT\x00\x00\x00\x01\x02\x00\x00\x00\x00\t\x01";
    assert_eq!(state.encode(), golden);
    let mut back = SavedState::decode(golden).unwrap();
    assert_eq!(back.take::<NetSavedV1>("net0").unwrap(), saved);
}
