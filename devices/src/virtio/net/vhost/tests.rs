use super::*;
use crate::virtio::driver::{Driver, RAM};
use crate::virtio::net::tap::tests::{ARP_REQUEST, in_namespace, ip};
use std::cell::RefCell;
use vhost::{VhostUserDirtyLogRegion, VhostUserMemoryRegionBase};

type Answer<T> = Result<T, vhost::Error>;

/// A kernel that notes what it is asked, stops at `refuses`, and says that it consumed seven chains of each queue.
#[derive(Default)]
struct Fake {
    asked: RefCell<Vec<String>>,
    refuses: &'static str,
}

impl Fake {
    fn note(&self, what: String) -> Answer<()> {
        let refused = !self.refuses.is_empty() && what.starts_with(self.refuses);
        self.asked.borrow_mut().push(what);
        if refused { Err(vhost::Error::IoctlError(io::Error::from_raw_os_error(libc::EFAULT))) } else { Ok(()) }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.take()
    }
}

impl VhostBackend for Fake {
    fn get_features(&self) -> Answer<u64> {
        Ok(RING_FEATURES | LOG_ALL)
    }
    fn set_features(&self, features: u64) -> Answer<()> {
        self.note(format!("features {features:#x}"))
    }
    fn set_owner(&self) -> Answer<()> {
        Ok(())
    }
    fn reset_owner(&self) -> Answer<()> {
        Ok(())
    }
    fn set_mem_table(&self, regions: &[VhostUserMemoryRegionInfo]) -> Answer<Option<Vec<VhostUserMemoryRegionBase>>> {
        let regions: Vec<_> = regions.iter().map(|r| (r.guest_phys_addr, r.memory_size)).collect();
        self.note(format!("memory {regions:?}")).map(|()| None)
    }
    fn set_log_base(&self, base: u64, _: Option<VhostUserDirtyLogRegion>) -> Answer<()> {
        assert_ne!(base, 0);
        self.note("log base".into())
    }
    fn set_log_fd(&self, _: RawFd) -> Answer<()> {
        Ok(())
    }
    fn set_vring_num(&self, queue: usize, size: u16) -> Answer<()> {
        self.note(format!("{queue} size {size}"))
    }
    fn set_vring_addr(&self, queue: usize, ring: &VringConfigData) -> Answer<()> {
        self.note(format!(
            "{queue} rings, log {:?}",
            (ring.flags != 0).then_some(ring.log_addr == Some(ring.used_ring_addr))
        ))
    }
    fn set_vring_base(&self, queue: usize, base: u16) -> Answer<()> {
        self.note(format!("{queue} base {base}"))
    }
    fn get_vring_base(&self, queue: usize) -> Answer<u32> {
        self.note(format!("{queue} base?")).map(|()| 7)
    }
    fn set_vring_call(&self, queue: usize, _: &EventFd) -> Answer<()> {
        self.note(format!("{queue} call"))
    }
    fn set_vring_kick(&self, queue: usize, _: &EventFd) -> Answer<()> {
        self.note(format!("{queue} kick"))
    }
    fn set_vring_err(&self, _: usize, _: &EventFd) -> Answer<()> {
        Ok(())
    }
}

impl VhostNet for Fake {
    fn set_backend(&self, queue: usize, port: Option<&File>) -> Answer<()> {
        self.note(format!("{queue} {}", if port.is_some() { "begins" } else { "ends" }))
    }
}

fn begin(kernel: &Fake, driver: &Driver, log: Option<&DirtyLog>) -> Answer<()> {
    let (call, port) = (EventFd::new(0).unwrap(), tempfile::tempfile().unwrap());
    hand_over(kernel, &driver.io, &call, &port, Setting { features: RING_FEATURES, log })
}

#[test]
fn rings_are_handed_over_before_either_begins() {
    let kernel = Fake::default();
    begin(&kernel, &Driver::new(3, 16, 0), None).unwrap();
    let set_up = ["size 16", "base 0", "rings, log None", "call", "kick"];
    let mut expected = vec!["features 0x130008000".to_owned(), format!("memory [(0, {RAM})]")];
    expected.extend([0, 1].iter().flat_map(|queue| set_up.map(|step| format!("{queue} {step}"))));
    expected.extend(["0 begins".to_owned(), "1 begins".to_owned()]);
    assert_eq!(kernel.asked(), expected);
}

#[test]
fn a_log_has_its_place_before_a_feature_names_it() {
    let (kernel, driver) = (Fake::default(), Driver::new(3, 16, 0));
    let log = DirtyLog::new(Gpa::new(RAM - 1));
    begin(&kernel, &driver, Some(&log)).unwrap();
    let asked = kernel.asked();
    assert_eq!(asked[..2], ["log base", "features 0x134008000"]);
    assert!(asked.contains(&"1 rings, log Some(true)".to_owned()));
    switch_log(&kernel, &driver.io, Setting { features: RING_FEATURES, log: Some(&log) }).unwrap();
    let on = ["log base", "features 0x134008000", "0 rings, log Some(true)", "1 rings, log Some(true)"];
    assert_eq!(kernel.asked(), on);
    switch_log(&kernel, &driver.io, Setting { features: RING_FEATURES, log: None }).unwrap();
    assert_eq!(kernel.asked(), ["features 0x130008000", "0 rings, log None", "1 rings, log None"]);
}

#[test]
fn rings_come_back_after_both_ended() {
    let (kernel, mut driver) = (Fake::default(), Driver::new(3, 16, 0));
    // Where the kernel left the used ring of queue 0.
    let used = driver.io.queues[RECEIVE].state().used_ring;
    driver.put(used + 2, &5_u16.to_le_bytes());
    take_back(&kernel, &mut driver.io).unwrap();
    assert_eq!(kernel.asked(), ["0 ends", "1 ends", "0 base?", "1 base?"]);
    let indices =
        |queue: usize| (driver.io.queues[queue].state().next_avail, driver.io.queues[queue].state().next_used);
    assert_eq!([indices(0), indices(1), indices(2)], [(7, 5), (7, 0), (0, 0)]);
}

#[test]
fn every_refusal_is_passed_on() {
    for refuses in ["features", "memory", "log base", "1 size", "0 base", "1 rings", "0 call", "1 kick", "1 begins"] {
        let kernel = Fake { refuses, ..Fake::default() };
        let log = DirtyLog::new(Gpa::new(RAM - 1));
        let error = begin(&kernel, &Driver::new(3, 16, 0), Some(&log)).unwrap_err();
        assert_eq!(io_error(error).raw_os_error(), Some(libc::EFAULT), "{refuses}");
        assert!(kernel.asked().last().unwrap().starts_with(refuses));
    }
    for refuses in ["1 ends", "0 base?"] {
        let kernel = Fake { refuses, ..Fake::default() };
        let fault = take_back(&kernel, &mut Driver::new(3, 16, 0).io).unwrap_err();
        assert!(matches!(fault, Fault::Host { .. }), "{refuses}");
    }
}

#[test]
fn what_an_old_kernel_lacks_is_named() {
    check_features(u64::MAX).unwrap();
    let lacks = check_features(!LOG_ALL).unwrap_err();
    assert!(lacks.to_string().contains("0x4000000"), "{lacks}");
}

#[test]
fn each_mode_does_what_the_host_allows() {
    let ram = Driver::new(3, 16, 0).io.ram;
    assert!(Vhost::open(VhostMode::Off, &ram).unwrap().is_none());
    let there = File::open("/dev/vhost-net").is_ok();
    assert_eq!(Vhost::open(VhostMode::Auto, &ram).unwrap().is_some(), there);
    match Vhost::open(VhostMode::On, &ram) {
        Ok(vhost) => assert!(there && vhost.is_some()),
        Err(error) => assert!(!there && error.to_string().contains("modprobe vhost_net"), "{error}"),
    }
}

/// Where the kernel has vhost-net: a whole conversation over it, with its log.
#[test]
fn the_kernel_moves_frames_and_logs_what_it_writes() {
    use crate::virtio::VirtioDevice;
    use crate::virtio::driver::{BUFFERS, Offer};
    use crate::virtio::net::{HEADER, MacAddress, Net, NetParts, Tap, VHOST_CALLS};

    if File::open("/dev/vhost-net").is_err() {
        eprintln!("Not run: there is no /dev/vhost-net");
        return;
    }
    in_namespace(|| {
        let tap = Tap::open("godwit0").unwrap();
        ip("addr add 192.0.2.1/24 dev godwit0");
        let mut driver = Driver::new(3, 16, RING_FEATURES & !(1 << VIRTIO_RING_F_EVENT_IDX));
        let vhost = Vhost::open(VhostMode::On, &driver.io.ram).unwrap();
        let mac = MacAddress::unicast([0x52, 0x54, 0, 0, 0, 1]).unwrap();
        let mut net = Net::new(mac, NetParts { port: Box::new(tap), vhost }).unwrap();
        let buffers: Vec<_> = (0..16).map(|number| BUFFERS + number * 4096).collect();
        for &place in &buffers {
            driver.offer(RECEIVE, &[Offer::Write(place, 2048)]);
        }
        net.start(&mut driver.io).unwrap();
        driver.io.queues[RECEIVE].kick();
        net.log_dirty(&mut driver.io, true).unwrap();
        driver.put(2 * BUFFERS, &[&[0; HEADER][..], &ARP_REQUEST].concat());
        let length = u32::try_from(HEADER + ARP_REQUEST.len()).unwrap();
        driver.offer(TRANSMIT, &[Offer::Read(2 * BUFFERS, length)]);
        driver.io.queues[TRANSMIT].kick();
        let reply = wait_for(|| {
            let received = driver.used(RECEIVE);
            received.into_iter().map(|(head, _)| buffers[head as usize]).find(|&place| {
                let frame = driver.get(place + HEADER as u64, 42);
                frame[12..14] == [8, 6] && frame[20..22] == [0, 2]
            })
        });
        net.on_source(&mut driver.io, VHOST_CALLS).unwrap();
        assert!(driver.interrupted());
        net.stop(&mut driver.io, std::time::Duration::ZERO).unwrap();
        assert_eq!(driver.io.queues[TRANSMIT].state().next_avail, 1);
        assert_eq!(driver.io.queues[TRANSMIT].state().next_used, 1);
        assert!(driver.io.queues[RECEIVE].state().next_used >= 1);
        let mut written = Vec::new();
        net.harvest_dirty(&mut |page| written.push(page.0));
        let used_rings = [RECEIVE, TRANSMIT].map(|queue| driver.io.queues[queue].state().used_ring & !4095);
        for page in [reply, used_rings[0], used_rings[1]] {
            assert!(written.contains(&page), "{page:#x} in {written:x?}");
        }
        assert!(!written.contains(&(2 * BUFFERS)), "what the kernel only read");
        net.log_dirty(&mut driver.io, false).unwrap();
        assert_eq!(driver.used(TRANSMIT), [(0, 0)]);
        // It goes on where it stopped.
        net.start(&mut driver.io).unwrap();
        driver.offer(TRANSMIT, &[Offer::Read(2 * BUFFERS, length)]);
        driver.io.queues[TRANSMIT].kick();
        wait_for(|| (driver.used(TRANSMIT).len() == 1).then_some(()));
        net.stop(&mut driver.io, std::time::Duration::ZERO).unwrap();
    });
}

fn wait_for<T>(mut ready: impl FnMut() -> Option<T>) -> T {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(std::time::Instant::now() < end, "nothing came for 20 s");
        std::thread::yield_now();
    }
}
