//! The fake guest and the fake host, and the world that both live in: who runs the guest, who has the disk. It cries out
//! as soon as something happens that must never happen.

use crate::guest::{
    Claim, Claims, Description, DiskPages, GuestPages, HostError, Offer, Refusal, SourceGuest, TargetHost,
};
use crate::ledger::DirtyLedger;
use crate::region::{PAGE_SIZE, PageIndex, PageRun, RamRegion, Region, RegionId};
use crate::source::{MemoryPolicy, Plan};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use thiserror::Error;
use uuid::Uuid;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress, VolatileSlice,
};

pub(crate) const REGIONS: [Region; 3] = [
    Region::Ram(RamRegion { start: GuestAddress(0), pages: 600 }),
    Region::Ram(RamRegion { start: GuestAddress(1 << 32), pages: 70 }),
    DISK,
];

const DISK: Region = Region::Disk { pages: 90 };

/// Where the bytes of the disk are, which is memory here, too; but nobody reaches it so.
const DISK_AT: GuestAddress = GuestAddress(1 << 40);

/// The first page of region 0 that nobody has touched when the guest starts; from there on it is all hole.
pub(crate) const HOLE: u64 = 560;

pub(crate) const STATE: &[u8] = b"the state of vCPUs and devices";

#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0} was made to fail")]
pub(crate) struct Planned(&'static str);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holder {
    Source,
    Nobody,
    Target,
}

/// What is true of the guest as a whole.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) runs_at_source: bool,
    pub(crate) runs_at_target: bool,
    pub(crate) disk: Holder,
    pub(crate) given_away: bool,
    pub(crate) logging: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct World(Arc<Mutex<Facts>>);

impl World {
    pub(crate) fn new() -> Self {
        let facts = Facts {
            runs_at_source: true,
            runs_at_target: false,
            disk: Holder::Source,
            given_away: false,
            logging: false,
        };
        Self(Arc::new(Mutex::new(facts)))
    }

    pub(crate) fn facts(&self) -> MutexGuard<'_, Facts> {
        self.0.lock().unwrap()
    }
}

pub(crate) fn memory() -> GuestMemoryMmap<()> {
    let start = |region: &Region| match region {
        Region::Ram(ram) => ram.start,
        Region::Disk { .. } => DISK_AT,
    };
    let ranges = REGIONS.map(|region| (start(&region), usize::try_from(region.pages()).unwrap() * PAGE_SIZE));
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

fn slice(memory: &GuestMemoryMmap<()>, run: PageRun) -> VolatileSlice<'_> {
    let region = memory.iter().nth(run.region.0.into()).unwrap();
    region.get_slice(MemoryRegionAddress(run.first.0 * PAGE_SIZE as u64), run.bytes()).unwrap()
}

/// Every byte of a memory and of the disk, for comparison.
pub(crate) fn content(memory: &GuestMemoryMmap<()>) -> Vec<u8> {
    let mut all = Vec::new();
    for region in memory.iter() {
        let mut bytes = vec![0; usize::try_from(region.len()).unwrap()];
        region.read_slice(&mut bytes, MemoryRegionAddress(0)).unwrap();
        all.extend(bytes);
    }
    all
}

/// The memory of a guest that writes to it whenever the engine looks at it.
#[derive(Debug, Clone)]
pub(crate) struct GuestSide {
    world: World,
    memory: Arc<GuestMemoryMmap<()>>,
    fails: Option<&'static str>,
    busy: u32,
    random: Arc<Mutex<u64>>,
    changed: Arc<Mutex<DirtyLedger>>,
    backed: Arc<Mutex<DirtyLedger>>,
    slowness: Arc<Mutex<Slowness>>,
    regions: usize,
}

/// What is taken from a guest: of its second vCPU, which does all of its work.
#[derive(Debug, Default)]
pub(crate) struct Slowness {
    pub(crate) share: f64,
    /// A part of a page that it may write.
    credit: f64,
    taken: Duration,
}

/// A guest that writes to its memory whenever the engine looks at it.
#[derive(Debug)]
pub(crate) struct FakeGuest {
    pub(crate) world: World,
    pub(crate) memory: Arc<GuestMemoryMmap<()>>,
    pub(crate) vm: Uuid,
    pub(crate) fails: Option<&'static str>,
    /// Pages that it writes each time the engine looks at its memory.
    pub(crate) busy: u32,
    pub(crate) machine: Vec<u8>,
    pub(crate) state: Vec<u8>,
    pub(crate) calls: Vec<&'static str>,
    pub(crate) random: Arc<Mutex<u64>>,
    pub(crate) changed: Arc<Mutex<DirtyLedger>>,
    pub(crate) backed: Arc<Mutex<DirtyLedger>>,
    pub(crate) slowness: Arc<Mutex<Slowness>>,
    /// What moves.
    pub(crate) regions: Vec<Region>,
}

fn ledger() -> Arc<Mutex<DirtyLedger>> {
    Arc::new(Mutex::new(DirtyLedger::new(&REGIONS.map(|region| region.pages()))))
}

impl FakeGuest {
    pub(crate) fn new(world: &World) -> Self {
        let guest = Self {
            world: world.clone(),
            memory: Arc::new(memory()),
            vm: Uuid::from_u128(42),
            fails: None,
            busy: 2,
            machine: b"{\"vcpus\":1}".to_vec(),
            state: STATE.to_vec(),
            calls: Vec::new(),
            random: Arc::new(Mutex::new(7)),
            changed: ledger(),
            backed: ledger(),
            slowness: Arc::default(),
            regions: REGIONS.to_vec(),
        };
        for (region, pages) in [(0, HOLE), (1, REGIONS[1].pages()), (2, DISK.pages() / 2)] {
            for page in 0..pages {
                let value = if page % 5 == 3 { 0 } else { page + 1 };
                guest.write(region, page, value);
            }
        }
        guest
    }

    /// A guest with a disk that moves with it, unless the plan is to pass its memory.
    pub(crate) fn with_plan(world: &World, plan: &Plan) -> Self {
        let guest = Self::new(world);
        if plan.memory == MemoryPolicy::Copy {
            return guest;
        }
        (0..DISK.pages()).for_each(|page| guest.write(2, page, 0));
        Self { regions: REGIONS[..2].to_vec(), ..guest }
    }

    /// The guest writes one page: zero all over, or a value in two places.
    pub(crate) fn write(&self, region: u16, page: u64, value: u64) {
        self.memory().write(region, page, value);
    }

    fn may(&mut self, call: &'static str) -> Result<MutexGuard<'_, Facts>, Planned> {
        self.calls.push(call);
        if self.fails == Some(call) { Err(Planned(call)) } else { Ok(self.world.facts()) }
    }
}

impl GuestSide {
    fn write(&self, region: u16, page: u64, value: u64) {
        let at = PageRun { region: RegionId(region), first: PageIndex(page), pages: 1 };
        let slice = slice(&self.memory, at);
        slice.copy_from(&[0_u8; PAGE_SIZE]);
        slice.write_obj(value, 8).unwrap();
        slice.write_obj(value, PAGE_SIZE - 8).unwrap();
        self.backed.lock().unwrap().mark(at.region, page);
        if self.world.facts().logging {
            self.changed.lock().unwrap().mark(at.region, page);
        }
    }

    fn next_random(&self, below: u64) -> u64 {
        // xorshift64 of Marsaglia, 2003.
        let mut random = self.random.lock().unwrap();
        let mut x = *random;
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        *random = x;
        x % below
    }

    /// How many of so many pages it may write.
    fn allowed(&self, pages: u32) -> u32 {
        let mut slowness = self.slowness.lock().unwrap();
        slowness.credit += f64::from(pages) * (1.0 - slowness.share);
        let share = slowness.share;
        slowness.taken += Duration::from_micros(100).mul_f64(share);
        let whole = (0..pages).take_while(|page| f64::from(*page) + 1.0 <= slowness.credit).count();
        let whole = u32::try_from(whole).unwrap();
        slowness.credit -= f64::from(whole);
        whole
    }

    /// The guest does some of its own work.
    fn work(&self, pages: u32) {
        for _ in 0..self.allowed(pages) {
            let region = match self.next_random(8) {
                0 if self.regions > 2 => 2,
                0..=1 => 1,
                _ => 0,
            };
            let page = self.next_random(REGIONS[usize::from(region)].pages());
            let value = if self.next_random(3) == 0 { 0 } else { self.next_random(1 << 40) };
            self.write(region, page, value);
        }
    }
}

impl GuestPages for GuestSide {
    type Error = Planned;
    type Handle = Arc<GuestMemoryMmap<()>>;

    fn handle(&self) -> Result<Self::Handle, Planned> {
        if self.fails == Some("handle") { Err(Planned("handle")) } else { Ok(Arc::clone(&self.memory)) }
    }

    fn slice(&self, run: PageRun) -> Result<VolatileSlice<'_>, Planned> {
        if self.fails == Some("slice") {
            return Err(Planned("slice"));
        }
        assert_ne!(run.region, RegionId(2), "a disk is no memory");
        if self.world.facts().runs_at_source {
            self.work(self.busy);
        }
        Ok(slice(&self.memory, run))
    }

    fn disk(&self, region: RegionId) -> Option<&dyn DiskPages> {
        (region == RegionId(2)).then_some(self as &dyn DiskPages)
    }

    fn leading_hole(&self, run: PageRun) -> u32 {
        let backed = self.backed.lock().unwrap();
        let hole = (run.first.0..).take(run.pages as usize).take_while(|&page| !backed.is_dirty(run.region, page));
        u32::try_from(hole.count()).unwrap()
    }
}

/// The bytes of the disk from a page on.
fn on_disk(memory: &GuestMemoryMmap<()>, first: PageIndex, bytes: usize) -> VolatileSlice<'_> {
    slice(memory, PageRun { region: RegionId(2), first, pages: u32::try_from(bytes / PAGE_SIZE).unwrap() })
}

impl DiskPages for GuestSide {
    fn is_blank(&self) -> bool {
        unreachable!("nothing comes to the source")
    }

    fn read(&self, first: PageIndex, into: &mut [u8]) -> Result<(), HostError> {
        if self.fails == Some("read") {
            return Err(Planned("read").into());
        }
        if self.world.facts().runs_at_source {
            self.work(self.busy);
        }
        on_disk(&self.memory, first, into.len()).copy_to(into);
        Ok(())
    }

    fn write(&self, _first: PageIndex, _from: &[u8]) -> Result<(), HostError> {
        unreachable!("the source's disk is the guest's")
    }

    fn clear(&self, _first: PageIndex, _pages: u32) -> Result<(), HostError> {
        unreachable!("the source's disk is the guest's")
    }
}

impl SourceGuest for FakeGuest {
    type Error = Planned;
    type Memory = GuestSide;

    fn memory(&self) -> GuestSide {
        GuestSide {
            world: self.world.clone(),
            memory: Arc::clone(&self.memory),
            fails: self.fails,
            busy: self.busy,
            random: Arc::clone(&self.random),
            changed: Arc::clone(&self.changed),
            backed: Arc::clone(&self.backed),
            slowness: Arc::clone(&self.slowness),
            regions: self.regions.len(),
        }
    }

    fn describe(&self) -> Result<Description, Planned> {
        if self.fails == Some("describe") {
            return Err(Planned("describe"));
        }
        Ok(Description { vm: self.vm, regions: self.regions.clone(), machine: self.machine.clone() })
    }

    fn start_dirty_log(&mut self) -> Result<(), Planned> {
        self.may("start_dirty_log")?.logging = true;
        Ok(())
    }

    fn harvest_dirty(&mut self, into: &mut DirtyLedger) -> Result<(), Planned> {
        drop(self.may("harvest_dirty")?);
        let mut changed = self.changed.lock().unwrap();
        while let Some(run) = changed.take_run(u32::MAX) {
            assert!(into.put_back(run));
        }
        Ok(())
    }

    fn written_by_vcpu(&self) -> Option<Vec<u64>> {
        Some(vec![0, 100])
    }

    fn throttle(&mut self, shares: &[f64]) -> Result<(), Planned> {
        drop(self.may("throttle")?);
        assert!(shares.len() == 2 && shares[0] == 0.0, "{shares:?}: the first vCPU writes nothing");
        self.slowness.lock().unwrap().share = shares[1];
        Ok(())
    }

    fn unthrottle(&mut self) -> Result<(), Planned> {
        drop(self.may("unthrottle")?);
        self.slowness.lock().unwrap().share = 0.0;
        Ok(())
    }

    fn time_taken(&self) -> Vec<Duration> {
        vec![Duration::ZERO, self.slowness.lock().unwrap().taken]
    }

    fn stop_dirty_log(&mut self) -> Result<(), Planned> {
        self.may("stop_dirty_log")?.logging = false;
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Planned> {
        self.memory().work(self.busy);
        self.may("pause")?.runs_at_source = false;
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>, Planned> {
        assert!(!self.may("save")?.runs_at_source, "the state of a running guest is none");
        self.memory().work(self.busy.min(1)); // as KVM does, with the clock page
        Ok(self.state.clone())
    }

    fn release(&mut self) -> Result<(), Planned> {
        let mut facts = self.may("release")?;
        assert!(!facts.runs_at_source, "a running guest needs its disk");
        facts.disk = Holder::Nobody;
        Ok(())
    }

    fn reacquire(&mut self) -> Result<(), Planned> {
        let mut facts = self.may("reacquire")?;
        if facts.disk == Holder::Target {
            return Err(Planned("reacquire"));
        }
        facts.disk = Holder::Source;
        Ok(())
    }

    fn record_given_away(&mut self, _session: Uuid) -> Result<(), Planned> {
        self.may("record_given_away")?.given_away = true;
        Ok(())
    }

    fn record_kept(&mut self, _session: Uuid) -> Result<(), Planned> {
        self.may("record_kept")?.given_away = false;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Planned> {
        let mut facts = self.may("resume")?;
        assert!(!facts.runs_at_target, "the guest would run twice");
        assert_eq!(facts.disk, Holder::Source, "the guest would run without its disk");
        facts.runs_at_source = true;
        Ok(())
    }
}

/// A host that a guest can come to.
#[derive(Debug)]
pub(crate) struct FakeHost {
    pub(crate) world: World,
    pub(crate) memory: Arc<GuestMemoryMmap<()>>,
    /// Whether that is the source's.
    pub(crate) passed: bool,
    pub(crate) fails: Option<&'static str>,
    pub(crate) refusal: Option<&'static str>,
    pub(crate) regions: Vec<Region>,
    pub(crate) state: Option<Vec<u8>>,
    pub(crate) prepared: bool,
    pub(crate) abandoned: Option<String>,
    pub(crate) touched: Arc<Mutex<DirtyLedger>>,
    /// Whether the disk has what is not durable.
    pub(crate) unsettled: Arc<AtomicBool>,
    /// Whether there is nothing on the disk before.
    pub(crate) is_blank: bool,
}

impl FakeHost {
    pub(crate) fn new(world: &World) -> Self {
        Self {
            world: world.clone(),
            memory: Arc::new(memory()),
            passed: false,
            fails: None,
            refusal: None,
            regions: REGIONS.to_vec(),
            state: None,
            prepared: false,
            abandoned: None,
            touched: ledger(),
            unsettled: Arc::default(),
            is_blank: true,
        }
    }

    pub(crate) fn expecting(world: &World, guest: &FakeGuest) -> Self {
        Self { regions: guest.regions.clone(), ..Self::new(world) }
    }

    pub(crate) fn refusing(world: &World) -> Self {
        Self { refusal: Some("a guest runs here already"), ..Self::new(world) }
    }

    /// Puts bytes on the disk.
    pub(crate) fn fill_disk(&self, first: PageIndex, bytes: &[u8]) {
        on_disk(&self.memory, first, bytes.len()).copy_from(bytes);
    }

    /// The memory, as the engine gets it.
    pub(crate) fn side(&self) -> HostSide {
        let (world, memory) = (self.world.clone(), Arc::clone(&self.memory));
        let (touched, unsettled) = (Arc::clone(&self.touched), Arc::clone(&self.unsettled));
        HostSide { world, memory, passed: self.passed, fails: self.fails, touched, unsettled, is_blank: self.is_blank }
    }

    fn may(&self, call: &'static str) -> Result<MutexGuard<'_, Facts>, Planned> {
        if self.fails == Some(call) { Err(Planned(call)) } else { Ok(self.world.facts()) }
    }
}

/// The memory of the machine that a host has built.
#[derive(Debug, Clone)]
pub(crate) struct HostSide {
    world: World,
    memory: Arc<GuestMemoryMmap<()>>,
    passed: bool,
    fails: Option<&'static str>,
    touched: Arc<Mutex<DirtyLedger>>,
    unsettled: Arc<AtomicBool>,
    is_blank: bool,
}

impl GuestPages for HostSide {
    type Error = Planned;
    type Handle = Arc<GuestMemoryMmap<()>>;

    fn handle(&self) -> Result<Self::Handle, Planned> {
        unreachable!("a target passes no memory")
    }

    fn slice(&self, run: PageRun) -> Result<VolatileSlice<'_>, Planned> {
        if self.fails == Some("slice") {
            return Err(Planned("slice"));
        }
        let runs_at_source = self.world.facts().runs_at_source;
        assert!(!self.passed || !runs_at_source, "the target touches memory in which the guest runs");
        assert_ne!(run.region, RegionId(2), "a disk is no memory");
        self.touched.lock().unwrap().put_back(run);
        Ok(slice(&self.memory, run))
    }

    fn disk(&self, region: RegionId) -> Option<&dyn DiskPages> {
        (region == RegionId(2)).then_some(self as &dyn DiskPages)
    }

    fn leading_hole(&self, _run: PageRun) -> u32 {
        0
    }
}

impl DiskPages for HostSide {
    fn is_blank(&self) -> bool {
        self.is_blank
    }

    fn read(&self, first: PageIndex, into: &mut [u8]) -> Result<(), HostError> {
        on_disk(&self.memory, first, into.len()).copy_to(into);
        Ok(())
    }

    fn write(&self, first: PageIndex, from: &[u8]) -> Result<(), HostError> {
        if self.fails == Some("write") {
            return Err(Planned("write").into());
        }
        self.unsettled.store(true, Ordering::Relaxed);
        on_disk(&self.memory, first, from.len()).copy_from(from);
        Ok(())
    }

    fn clear(&self, first: PageIndex, pages: u32) -> Result<(), HostError> {
        self.unsettled.store(true, Ordering::Relaxed);
        let zeros = vec![0_u8; pages as usize * PAGE_SIZE];
        on_disk(&self.memory, first, zeros.len()).copy_from(&zeros);
        Ok(())
    }
}

impl TargetHost for FakeHost {
    type Error = Planned;
    type Memory = HostSide;

    fn prepare(&mut self, _offer: &Offer<'_>, passed: Option<Arc<GuestMemoryMmap<()>>>) -> Result<HostSide, Refusal> {
        self.prepared = true;
        if let Some(reason) = self.refusal {
            return Err(Refusal::new(reason));
        }
        if let Some(memory) = passed {
            (self.memory, self.passed) = (memory, true);
        }
        Ok(self.side())
    }

    fn regions(&self) -> Vec<Region> {
        self.regions.clone()
    }

    fn settle(&mut self) -> Result<(), Planned> {
        drop(self.may("settle")?);
        self.unsettled.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), Planned> {
        let mut facts = self.may("restore")?;
        if facts.disk == Holder::Source {
            // The source has given up since, and the guest may run there again.
            return Err(Planned("taking the disk"));
        }
        assert!(!facts.runs_at_source, "the guest runs without its disk");
        assert!(!self.unsettled.load(Ordering::Relaxed), "what came of the disk is not durable");
        facts.disk = Holder::Target;
        drop(facts);
        self.state = Some(state.to_vec());
        Ok(())
    }

    fn run(&mut self) -> Result<(), Planned> {
        let mut facts = self.may("run")?;
        assert!(!facts.runs_at_source, "the guest would run twice");
        assert_eq!(facts.disk, Holder::Target, "the guest would run without its disk");
        facts.runs_at_target = true;
        Ok(())
    }

    fn abandon(&mut self, reason: &str) {
        let mut facts = self.world.facts();
        assert!(self.prepared && !facts.runs_at_target, "there is nothing to abandon");
        if facts.disk == Holder::Target {
            facts.disk = Holder::Nobody;
        }
        drop(facts);
        self.abandoned = Some(reason.to_owned());
    }
}

/// A record of claims that lives as long as the test.
#[derive(Debug)]
pub(crate) struct MemoryClaims {
    pub(crate) identity: Uuid,
    pub(crate) stand: Mutex<HashMap<Uuid, Claim>>,
    /// How many claims fail from now on, and whether they stand all the same.
    pub(crate) fails: Mutex<(u32, bool)>,
}

impl Default for MemoryClaims {
    fn default() -> Self {
        Self { identity: Uuid::from_u128(99), stand: Mutex::default(), fails: Mutex::default() }
    }
}

impl Claims for MemoryClaims {
    type Error = Planned;

    fn identity(&self) -> Uuid {
        self.identity
    }

    fn claim(&self, session: Uuid, claim: Claim) -> Result<Claim, Planned> {
        let (failures, stands_anyway) = &mut *self.fails.lock().unwrap();
        let fail = *failures > 0 && claim == Claim::Mine;
        let mut stand = self.stand.lock().unwrap();
        if fail {
            *failures -= 1;
            if *stands_anyway {
                stand.entry(session).or_insert(claim);
            }
            return Err(Planned("claim"));
        }
        Ok(*stand.entry(session).or_insert(claim))
    }
}
