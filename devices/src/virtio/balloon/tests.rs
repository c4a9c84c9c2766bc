use super::*;
use crate::virtio::driver::{BUFFERS, Driver, Offer, RAM, scribbles};
use crate::virtio::{QueueSavedV1, Virtq};
use ::saved::SavedState;
use proptest::proptest;
use std::sync::atomic::Ordering;

const PARTS: BalloonParts = BalloonParts {
    ram_bytes: RAM,
    statistics_every: Duration::from_millis(5),
    deflate_on_oom: true,
    free_page_reporting: true,
};
/// A page that tests fill and discard, and its number.
const PLACE: u64 = 4 << 20;
const NUMBER: u32 = 1024;

struct Bench {
    balloon: Balloon,
    driver: Driver,
}

fn bench() -> Bench {
    let driver = Driver::new(5, 16, 1 << 32);
    driver.put(PLACE, &[7; 8 * 4096]);
    driver.clean();
    Bench { balloon: Balloon::new(PARTS).unwrap(), driver }
}

impl Bench {
    fn process(&mut self, queue: usize) -> Result<Progress, Fault> {
        self.balloon.process(&mut self.driver.io, queue)
    }

    fn inflate(&mut self, numbers: &[u32]) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.driver.put(BUFFERS, &bytes);
        self.driver.offer(INFLATE, &[Offer::Read(BUFFERS, u32::try_from(bytes.len()).unwrap())]);
        self.driver.clean();
        assert_eq!(self.process(INFLATE).unwrap(), Progress::Idle);
        assert_eq!(self.driver.used(INFLATE).len(), 1);
    }

    /// Which of the eight pages at [`PLACE`] are gone; those and no others must be marked.
    fn gone(&self) -> Vec<u64> {
        let gone = (0..8).filter(|page| self.driver.get(PLACE + page * PAGE, 4096) == [0; 4096]);
        let gone: Vec<_> = gone.collect();
        let marked: Vec<_> = (0..8).filter(|page| self.driver.is_dirty(PLACE + page * PAGE)).collect();
        assert_eq!(gone, marked);
        gone
    }

    fn config(&self) -> [u8; 8] {
        let mut config = [0; 8];
        self.balloon.read_config(0, &mut config);
        config
    }
}

#[test]
fn pages_in_the_balloon_are_discarded() {
    let mut bench = bench();
    bench.inflate(&[NUMBER + 5, NUMBER + 1, NUMBER + 2, NUMBER + 2]);
    assert_eq!(bench.gone(), [1, 2, 5]);
    assert!(bench.driver.interrupted());
    bench.driver.offer(DEFLATE, &[Offer::Read(BUFFERS, 16)]);
    bench.process(DEFLATE).unwrap();
    assert_eq!(bench.driver.used(DEFLATE), [(0, 0)]);
}

#[test]
fn hostile_page_numbers_are_passed_over() {
    let mut bench = bench();
    bench.inflate(&[u32::MAX, u32::MAX - 1, u32::try_from(RAM / PAGE).unwrap(), 1 << 31, NUMBER + 7]);
    assert_eq!(bench.gone(), [7]);
    // Not a whole number.
    bench.driver.offer(INFLATE, &[Offer::Read(BUFFERS, 3)]);
    bench.process(INFLATE).unwrap();
    // Not readable at all.
    bench.driver.offer(INFLATE, &[Offer::Write(BUFFERS, 4)]);
    bench.process(INFLATE).unwrap();
    assert_eq!(bench.driver.used(INFLATE).len(), 2);
    assert_eq!(bench.gone(), [7]);
}

#[test]
fn one_chain_takes_a_bounded_time() {
    let mut bench = bench();
    // All of memory as one chain of page numbers, of which only the first ones count.
    let numbers = vec![NUMBER + 1; MOST_PAGES].into_iter().chain([NUMBER + 2]);
    let bytes: Vec<u8> = numbers.flat_map(u32::to_le_bytes).collect();
    bench.driver.put(BUFFERS, &bytes);
    bench.driver.offer(INFLATE, &[Offer::Read(BUFFERS, u32::try_from(RAM - BUFFERS).unwrap())]);
    bench.driver.clean();
    bench.process(INFLATE).unwrap();
    assert_eq!(bench.gone(), [1]);
}

#[test]
fn reported_ranges_are_discarded_in_both_places_of_the_queue() {
    for queue in [REPORTING_WITHOUT_GAP, REPORTING] {
        let mut bench = bench();
        // Two whole pages; a part of two; a page outside of a part.
        let ranges =
            [Offer::Write(PLACE, 0x2000), Offer::Write(PLACE + 0x3800, 0x1000), Offer::Write(PLACE + 0x4fff, 0x1001)];
        bench.driver.offer(queue, &ranges);
        bench.driver.clean();
        bench.process(queue).unwrap();
        assert_eq!(bench.driver.used(queue), [(0, 0)]);
        assert_eq!(bench.gone(), [0, 1, 5]);
    }
}

#[test]
fn broken_rings_are_faults() {
    for queue in 0..QUEUE_SIZES.len() {
        let mut bench = bench();
        bench.driver.descriptor(queue, 0, RAM - 1, 2, 0, 0);
        bench.driver.make_available(queue, 0);
        assert!(matches!(bench.process(queue), Err(Fault::Ring(_))), "queue {queue}");
    }
}

proptest! {
    #[test]
    fn no_rings_upset_the_device(scribble in scribbles()) {
        let mut bench = bench();
        for queue in 0..QUEUE_SIZES.len() {
            bench.driver.scribble(queue, &scribble);
            let _ = bench.process(queue);
        }
        let _ = bench.balloon.on_source(&mut bench.driver.io, STATISTICS_DUE);
        bench.balloon.stop(&mut bench.driver.io, Duration::ZERO).unwrap();
    }
}

#[test]
fn the_target_reaches_the_driver_and_its_answer_comes_back() {
    let mut bench = bench();
    let io = &mut bench.driver.io;
    bench.balloon.set_target(io, 5 * PAGE + 1).unwrap();
    assert!(bench.driver.interrupted());
    assert_eq!(bench.config(), [5, 0, 0, 0, 0, 0, 0, 0]);
    // The driver writes `actual`, in one piece or byte by byte, and nothing else.
    bench.balloon.write_config(&mut bench.driver.io, 4, &[3, 1, 0, 0]);
    bench.balloon.write_config(&mut bench.driver.io, 3, &[9, 4]);
    bench.balloon.write_config(&mut bench.driver.io, 7, &[0, 9, 9]);
    bench.balloon.write_config(&mut bench.driver.io, u64::MAX, &[9]);
    assert_eq!(bench.config(), [5, 0, 0, 0, 4, 1, 0, 0]);
    assert_eq!((bench.balloon.target_bytes(), bench.balloon.actual_bytes()), (5 * PAGE, 260 * PAGE));
    bench.balloon.reset();
    assert_eq!((bench.balloon.target_bytes(), bench.balloon.actual_bytes()), (5 * PAGE, 0));
}

#[test]
fn a_target_larger_than_memory_is_refused() {
    let mut bench = bench();
    let refusal = bench.balloon.set_target(&mut bench.driver.io, RAM + 1).unwrap_err();
    assert_eq!(refusal.to_string(), "A balloon of 8388609 bytes is larger than the guest's memory of 8388608 bytes");
    assert!(!bench.driver.interrupted());
    bench.balloon.set_target(&mut bench.driver.io, RAM).unwrap();
}

#[test]
fn a_target_set_while_no_driver_listened_is_told_at_start() {
    let mut bench = bench();
    bench.driver.io.interrupt.set_live(false);
    bench.balloon.set_target(&mut bench.driver.io, PAGE).unwrap();
    bench.driver.io.interrupt.set_live(true);
    assert!(!bench.driver.interrupted());
    bench.balloon.start(&mut bench.driver.io).unwrap();
    assert!(bench.driver.interrupted());
}

fn tell(bench: &mut Bench, free: u64) -> u32 {
    bench.driver.put(BUFFERS, &[&4_u16.to_le_bytes()[..], &free.to_le_bytes()].concat());
    let head = bench.driver.offer(STATISTICS, &[Offer::Read(BUFFERS, 10)]);
    bench.process(STATISTICS).unwrap();
    head.into()
}

#[test]
fn statistics_are_asked_for_again_and_again() {
    let mut bench = bench();
    bench.balloon.start(&mut bench.driver.io).unwrap();
    assert_eq!(bench.balloon.statistics().told(), None);
    for free in [1000, 2000] {
        let head = tell(&mut bench, free);
        assert_eq!(bench.balloon.statistics().value(Statistic::Free), Some(free));
        assert_eq!(bench.driver.used(STATISTICS), [], "the buffer is kept until it is time to ask");
        bench.balloon.on_source(&mut bench.driver.io, STATISTICS_DUE).unwrap();
        assert_eq!(bench.driver.used(STATISTICS), [(head, 0)]);
        assert!(bench.driver.interrupted());
        bench.balloon.on_source(&mut bench.driver.io, STATISTICS_DUE).unwrap();
        assert_eq!(bench.driver.used(STATISTICS), [], "nothing to ask with");
    }
    assert!(bench.balloon.timer.is_armed().unwrap());
}

#[test]
fn without_an_interval_nobody_is_asked() {
    let mut bench = bench();
    bench.balloon.statistics_every = Duration::ZERO;
    bench.balloon.start(&mut bench.driver.io).unwrap();
    assert!(!bench.balloon.timer.is_armed().unwrap());
}

#[test]
fn two_buffers_for_statistics_are_one_too_many() {
    let mut bench = bench();
    let first = tell(&mut bench, 1);
    tell(&mut bench, 2);
    assert_eq!(bench.driver.used(STATISTICS), [(first, 0)]);
    assert_eq!(bench.balloon.statistics().value(Statistic::Free), Some(2));
}

#[test]
fn a_kept_buffer_survives_a_move() {
    let mut bench = bench();
    tell(&mut bench, 1000);
    let stop = |bench: &mut Bench| {
        bench.balloon.stop(&mut bench.driver.io, Duration::ZERO).unwrap();
        bench.driver.io.queues.get(STATISTICS).map(Virtq::state).unwrap().next_avail
    };
    assert_eq!(stop(&mut bench), 0);
    assert_eq!(stop(&mut bench), 0, "put back once");
    bench.balloon = Balloon::new(PARTS).unwrap();
    bench.process(STATISTICS).unwrap();
    assert_eq!(bench.balloon.statistics().value(Statistic::Free), Some(1000));
    bench.driver.hold.store(true, Ordering::Release);
    bench.balloon.on_source(&mut bench.driver.io, STATISTICS_DUE).unwrap();
    assert_eq!(bench.driver.used(STATISTICS), [(0, 0)]);
}

fn saved() -> BalloonSavedV1 {
    let queue = QueueSavedV1 {
        size: 128,
        ready: true,
        descriptors: 0x1000,
        available: 0x2000,
        used: 0x3000,
        next_available: 7,
        next_used: 7,
        event_index: true,
    };
    let transport = MmioSavedV1 {
        device_status: 15,
        device_features_select: 1,
        driver_features_select: 1,
        driver_features: 1 << 32,
        queue_select: 4,
        interrupt_status: 1,
        config_generation: 3,
        queues: vec![queue],
    };
    BalloonSavedV1 { transport, target_pages: 512, actual_pages: 300 }
}

#[test]
fn what_was_saved_comes_back() {
    let (balloon, transport) = Balloon::restore("balloon0", saved(), PARTS).unwrap();
    assert_eq!(balloon.save(transport), saved());
    assert_eq!((balloon.target_bytes(), balloon.actual_bytes()), (512 * PAGE, 300 * PAGE));
}

#[test]
fn an_impossible_target_is_refused() {
    let saved = BalloonSavedV1 { target_pages: u32::MAX, ..saved() };
    let refusal = Balloon::restore("balloon0", saved, PARTS).unwrap_err();
    assert_eq!(refusal.to_string(), "The saved target in pages of device balloon0 cannot be 0xffffffff");
}

/// The bytes of the first released version: a change here is a break of the format.
#[test]
fn golden_section() {
    let mut state = SavedState::new();
    state.put("balloon0", &saved()).unwrap();
    let golden = b"GWSTATE1\x01\x00\x00\x00\x08\x00balloon0\x0e\x00virtio-balloon\
        \x01\x00\x1c\x00\x00\x00\x0f\x01\x01\x80\x80\x80\x80\x10\x04\x01\x03\x01\x80\x01\x01\x80 \x80@\x80`\x07\x07\x01\x80\x04\xac\x02";
    assert_eq!(state.encode(), golden);
    let mut back = SavedState::decode(golden).unwrap();
    assert_eq!(back.take::<BalloonSavedV1>("balloon0").unwrap(), saved());
}

#[test]
fn only_what_is_wanted_is_offered() {
    for (deflate_on_oom, free_page_reporting) in [(false, false), (false, true), (true, false), (true, true)] {
        let features = Balloon::new(BalloonParts { deflate_on_oom, free_page_reporting, ..PARTS }).unwrap().features();
        assert_eq!(features & DEFLATE_ON_OOM != 0, deflate_on_oom);
        assert_eq!(features & PAGE_REPORTING != 0, free_page_reporting);
        assert!(features & STATS_VQ != 0);
    }
}
