//! What is refused, what is accepted, and what a target may override.

use super::*;
use crate::layout::{COMMAND_LINE_SIZE, HUGE_PAGE_SIZE};

fn machine() -> MachineConfig {
    MachineConfig {
        version: MACHINE_VERSION,
        name: "m".into(),
        uuid: Uuid::nil(),
        cpus: Cpus { count: 4, topology: None },
        memory: Memory { bytes: 256 << 20, huge_pages: false },
        boot: Boot {
            kernel: "/boot/vmlinux".into(),
            initramfs: None,
            command_line: "console=ttyS0".into(),
            entry: EntryKind::Auto,
        },
        disks: vec![disk("root", "/d/root.img"), disk("data", "/d/data.img")],
        nics: vec![nic("net0", "tap0", 0), nic("net1", "tap1", 1)],
        rng: true,
        balloon: Some(Balloon::default()),
        serial: Serial::Terminal,
        dirty: DirtyTracking::Log,
    }
}

fn disk(id: &str, path: &str) -> Disk {
    let (cache, limits) = (DiskCache::default(), DiskLimits::default());
    Disk {
        id: id.into(),
        place: file(path),
        read_only: false,
        cache,
        queues: 1,
        timeout_ms: None,
        limits,
        places: Places::default(),
    }
}

fn file(path: &str) -> DiskPlace {
    DiskPlace::File(path.into())
}

fn nic(id: &str, tap: &str, index: u8) -> Nic {
    Nic { id: id.into(), tap: Tap::Existing(tap.into()), mac: Mac::derived(Uuid::nil(), index), vhost: Vhost::Auto }
}

fn check(change: impl FnOnce(&mut MachineConfig)) -> Result<(), ConfigError> {
    let mut machine = machine();
    change(&mut machine);
    machine.validate()
}

fn topology(sockets: u32, cores: u32, threads: u32) -> Option<Topology> {
    Some(Topology { sockets, cores, threads })
}

#[test]
fn a_sound_machine_is_accepted_and_survives_json() {
    let machine = machine();
    machine.validate().unwrap();
    let json = serde_json::to_string(&machine).unwrap();
    assert_eq!(serde_json::from_str::<MachineConfig>(&json).unwrap(), machine);
    assert_eq!(machine.virtio_ids(), ["root", "data", "net0", "net1", "rng0", "balloon0"]);
}

#[test]
fn a_short_description_gets_its_defaults() {
    let json = r#"{"version":1,"name":"m","uuid":"00000000-0000-0000-0000-000000000000","cpus":{"count":1},
        "memory":{"bytes":134217728},"boot":{"kernel":"/k"}}"#;
    let machine: MachineConfig = serde_json::from_str(json).unwrap();
    machine.validate().unwrap();
    assert_eq!(machine.serial, Serial::Off);
    assert_eq!(machine.cpus.topology(), Topology { sockets: 1, cores: 1, threads: 1 });
}

#[test]
fn unknown_fields_and_values_are_refused_in_every_place() {
    let good = serde_json::to_value(machine()).unwrap();
    for place in ["", "/cpus", "/memory", "/boot", "/disks/0", "/nics/0", "/balloon"] {
        let mut value = good.clone();
        let object = value.pointer_mut(place).unwrap().as_object_mut().unwrap();
        object.insert("surprise".into(), 1.into());
        let error = serde_json::from_value::<MachineConfig>(value).unwrap_err().to_string();
        assert!(error.contains("surprise"), "{place}: {error}");
    }
    let mut value = good;
    *value.pointer_mut("/nics/0/mac").unwrap() = "01:00:00:00:00:00".into();
    assert!(serde_json::from_value::<MachineConfig>(value).unwrap_err().to_string().contains("01:00:00"));
}

#[test]
fn bad_processors_are_refused() {
    for count in [0, 33, 1000, u32::MAX] {
        assert_eq!(check(|m| m.cpus.count = count), Err(ConfigError::Vcpus { count, most: MAX_VCPUS }));
    }
    let with = |count, topology| check(|m| m.cpus = Cpus { count, topology });
    for good in [topology(1, 4, 1), topology(1, 2, 2), topology(2, 2, 1), topology(4, 1, 1), topology(2, 1, 2)] {
        with(4, good).unwrap();
    }
    with(6, topology(1, 3, 2)).unwrap();
    for bad in [topology(1, 3, 1), topology(0, 4, 1), topology(u32::MAX, u32::MAX, 2), topology(0, 0, 0)] {
        assert!(matches!(with(4, bad), Err(ConfigError::TopologyCount { .. })), "{bad:?}");
    }
    assert!(matches!(with(6, topology(2, 3, 1)), Err(ConfigError::TopologyShape { .. })));
    assert!(matches!(with(4, topology(1, 1, 4)), Err(ConfigError::TopologyShape { .. })));
}

#[test]
fn bad_memory_is_refused() {
    for bytes in [0, 4096, MIN_MEMORY - 4096, MAX_MEMORY + 4096, u64::MAX] {
        assert_eq!(check(|m| m.memory.bytes = bytes), Err(ConfigError::MemoryRange { bytes }));
    }
    let bytes = MIN_MEMORY + 1;
    let error = check(|m| m.memory.bytes = bytes).unwrap_err();
    assert_eq!(error, ConfigError::MemoryPages { bytes, page: 4096 });
    assert!(error.to_string().ends_with("33554432 would be"), "{error}");
    let memory = Memory { bytes: MIN_MEMORY + 4096, huge_pages: true };
    assert!(matches!(check(|m| m.memory = memory), Err(ConfigError::MemoryPages { page: HUGE_PAGE_SIZE, .. })));
    check(|m| m.memory.bytes = MIN_MEMORY).unwrap();
}

#[test]
fn bad_names_are_refused() {
    for name in ["", "a b", "a/b", "ä", &"x".repeat(65)] {
        assert_eq!(check(|m| m.name = name.into()), Err(ConfigError::Name { name: name.into() }));
    }
    for id in ["", "a.b", "a/b", "\u{1}", &"x".repeat(21)] {
        assert_eq!(check(|m| m.disks[0].id = id.into()), Err(ConfigError::Id { id: id.into() }));
    }
    for id in ["data", "net0", RNG_ID, BALLOON_ID, SERIAL_ID] {
        assert_eq!(check(|m| m.disks[0].id = id.into()), Err(ConfigError::DuplicateId { id: id.into() }));
    }
}

#[test]
fn bad_devices_are_refused() {
    let many = |m: &mut MachineConfig| m.disks = (0..18).map(|n| disk(&format!("d{n}"), &format!("/d/{n}"))).collect();
    assert_eq!(check(many), Err(ConfigError::TooManyDevices { count: 22 }));
    assert!(matches!(check(|m| m.disks[1].place = file("/d/root.img")), Err(ConfigError::SharedDisk { .. })));
    let both_read_only = |m: &mut MachineConfig| {
        m.disks.iter_mut().for_each(|disk| *disk = Disk { place: file("/d/same"), read_only: true, ..disk.clone() });
    };
    check(both_read_only).unwrap();
    for queues in [0, 33] {
        let error = ConfigError::DiskQueues { id: "root".into(), queues };
        assert_eq!(check(|m| m.disks[0].queues = queues), Err(error));
    }
    let existing = |name: &str| Tap::Existing(name.into());
    for name in ["", "a b", "tap%d", "a/b", "sixteen-chars-xx"] {
        assert_eq!(check(|m| m.nics[0].tap = existing(name)), Err(ConfigError::TapName { name: name.into() }));
    }
    let tap = Tap::Create("tap1".into());
    assert_eq!(check(|m| m.nics[0].tap = tap), Err(ConfigError::DuplicateTap { name: "tap1".into() }));
    assert!(matches!(check(|m| m.nics[0].mac = m.nics[1].mac), Err(ConfigError::DuplicateMac { .. })));
}

#[test]
fn bad_paths_and_command_lines_are_refused() {
    let empty = |error: Result<(), ConfigError>| matches!(error, Err(ConfigError::EmptyPath { .. }));
    assert!(empty(check(|m| m.boot.kernel = PathBuf::new())));
    assert!(empty(check(|m| m.boot.initramfs = Some(PathBuf::new()))));
    assert!(empty(check(|m| m.disks[0].place = file(""))));
    assert!(empty(check(|m| m.serial = Serial::File(PathBuf::new()))));
    assert!(empty(check(|m| m.serial = Serial::Socket(PathBuf::new()))));
    check(|m| m.boot.command_line = "x".repeat(COMMAND_LINE_SIZE - 1)).unwrap();
    for line in ["x".repeat(COMMAND_LINE_SIZE), "a\0b".into()] {
        let length = line.len();
        assert_eq!(check(|m| m.boot.command_line = line), Err(ConfigError::CommandLine { length }));
    }
}

#[test]
fn bad_rings_and_versions_are_refused() {
    for entries in [0, 512, 1000, 131_072] {
        let ring = DirtyTracking::Ring { entries };
        assert_eq!(check(|m| m.dirty = ring), Err(ConfigError::RingEntries { entries }));
    }
    check(|m| m.dirty = DirtyTracking::Ring { entries: DEFAULT_RING_ENTRIES }).unwrap();
    assert_eq!(check(|m| m.version = 2), Err(ConfigError::Version { found: 2 }));
}

#[test]
fn the_host_sets_limits() {
    let host = HostLimits { memory: 256 << 20, vcpus: 4, dirty_ring_bytes: 1 << 20 };
    let ring = MachineConfig { dirty: DirtyTracking::Ring { entries: 65_536 }, ..machine() };
    ring.validate_for(host).unwrap();
    let error = machine().validate_for(HostLimits { memory: (256 << 20) - 1, ..host }).unwrap_err();
    assert_eq!(error, ConfigError::MemoryBeyondHost { bytes: 256 << 20, host: (256 << 20) - 1 });
    let error = machine().validate_for(HostLimits { vcpus: 3, ..host }).unwrap_err();
    assert_eq!(error, ConfigError::Vcpus { count: 4, most: 3 });
    let error = ring.validate_for(HostLimits { dirty_ring_bytes: 0, ..host }).unwrap_err();
    assert_eq!(error, ConfigError::RingBeyondHost { entries: 65_536 });
}

#[test]
fn memory_of_the_host_is_read() {
    assert_eq!(mem_total("MemTotal:       24648636 kB\nMemFree: 1 kB\n"), Some(24_648_636 * 1024));
    for odd in ["", "MemTotal: many kB", "MemTotal: 99999999999999999999 kB", "MemTotal: 18446744073709551615 kB"] {
        assert_eq!(mem_total(odd), None, "{odd}");
    }
}

#[test]
fn a_target_overrides_what_is_the_hosts_and_nothing_else() {
    let json = r#"{"disks":{"data":{"nbd":"nbd://e/data"}},"taps":{"net1":{"create":"tap9"}},"vhost":"off","serial":{"file":"/l"},
        "huge_pages":true,"dirty":{"ring":{"entries":1024}}}"#;
    let resources: HostResources = serde_json::from_str(json).unwrap();
    let changed = machine().with_host_resources(&resources).unwrap();
    let mut expected = machine();
    expected.disks[1].place = DiskPlace::Nbd(ExportUri("nbd://e/data".parse().unwrap()));
    expected.nics[1].tap = Tap::Create("tap9".into());
    expected.nics.iter_mut().for_each(|nic| nic.vhost = Vhost::Off);
    expected.serial = Serial::File("/l".into());
    expected.memory.huge_pages = true;
    expected.dirty = DirtyTracking::Ring { entries: 1024 };
    assert_eq!(changed, expected);
    assert!(serde_json::from_str::<HostResources>(r#"{"vcpus":3}"#).is_err());
}

#[test]
fn a_target_cannot_name_devices_that_are_not_there() {
    let disks = BTreeMap::from([("swap".to_owned(), file("/s"))]);
    let error = machine().with_host_resources(&HostResources { disks, ..HostResources::default() }).unwrap_err();
    assert_eq!(error.to_string(), r#"The machine has no disk named "swap"; it has root, data"#);
    let taps = BTreeMap::from([("net9".to_owned(), Tap::Create("t".into()))]);
    let resources = HostResources { taps, ..HostResources::default() };
    let error = MachineConfig { nics: vec![], ..machine() }.with_host_resources(&resources).unwrap_err();
    assert_eq!(error.to_string(), r#"The machine has no network card named "net9"; it has none"#);
}

#[test]
fn addresses_of_cards_are_read_and_written() {
    let mac: Mac = "52:54:00:ab:CD:ef".parse().unwrap();
    assert_eq!(mac.to_string(), "52:54:00:ab:cd:ef");
    for odd in ["", "52:54:00:ab:cd", "52:54:00:ab:cd:ef:00", "53:54:00:ab:cd:ef", "5:54:00:ab:cd:ef", "+2:54:0:0:0:00"]
    {
        assert!(odd.parse::<Mac>().is_err(), "{odd}");
    }
    let (first, second) = (Mac::derived(Uuid::max(), 0), Mac::derived(Uuid::max(), 1));
    assert_ne!(first, second);
    assert_eq!(first.0[0] & 3, 2, "locally administered and unicast");
}
