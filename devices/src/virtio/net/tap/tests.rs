use super::*;
use std::io::{Read, Write};
use std::process::Command;
use std::thread;

/// 52:54:00:00:00:01 at 192.0.2.2 asks everyone who has 192.0.2.1.
pub(in crate::virtio::net) const ARP_REQUEST: [u8; 42] = [
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 0, 0, 1, 8, 6, // Ethernet
    0, 1, 8, 0, 6, 4, 0, 1, // a request of ARP for IPv4 over Ethernet
    0x52, 0x54, 0, 0, 0, 1, 192, 0, 2, 2, // from
    0, 0, 0, 0, 0, 0, 192, 0, 2, 1, // to
];

/// Runs `body` in a network namespace of its own, where this process may make taps; says so if the host refuses.
pub(in crate::virtio::net) fn in_namespace(body: impl FnOnce() + Send + 'static) {
    let inside = || {
        // SAFETY: moves only this thread, which ends with `body`, into a new namespace.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 || File::open(TUN_PATH).is_err() {
            eprintln!("Not run: making a tap needs root and {TUN_PATH}");
            return;
        }
        body();
    };
    thread::Builder::new().name("namespace".into()).spawn(inside).unwrap().join().unwrap();
}

pub(in crate::virtio::net) fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn impossible_names_are_refused() {
    for name in ["", ".", "..", "sixteen-letters-", "a/b", "a:1", "tap%d", "my tap", "täp", "a\0b"] {
        assert!(matches!(Tap::open(name), Err(TapError::BadName { .. })), "{name:?}");
    }
}

#[test]
fn errors_name_the_value_and_the_remedy() {
    let source = || io::Error::from_raw_os_error(libc::EPERM);
    let denied = TapError::NoPermission { name: "tap7".into(), source: source() };
    assert_eq!(
        denied.to_string(),
        "No permission to open tap tap7: run as root, or have root make it with \
         `ip tuntap add dev tap7 mode tap user NAME`"
    );
    let absent = TapError::NoDriver { name: "tap7".into(), source: source() };
    assert!(absent.to_string().contains("modprobe tun"), "{absent}");
}

#[test]
fn a_created_tap_is_up_and_vanishes() {
    in_namespace(|| {
        let tap = Tap::open("godwit0").unwrap();
        assert_eq!(tap.name(), "godwit0");
        assert!(ip("-o link show dev godwit0").contains(",UP"));
        assert!(tap.offloads().contains(Offloads::CHECKSUM | Offloads::TSO4));
        drop(tap);
        assert!(!ip("-o link").contains("godwit0"));
    });
}

#[test]
fn a_taken_tap_is_refused_by_name() {
    in_namespace(|| {
        let _tap = Tap::open("godwit0").unwrap();
        let error = Tap::open("godwit0").unwrap_err();
        assert!(matches!(error, TapError::Taken { .. }), "{error:?}");
        assert!(error.to_string().contains("godwit0"), "{error}");
    });
}

#[test]
fn a_tap_that_is_there_stays() {
    in_namespace(|| {
        ip("tuntap add dev mine mode tap");
        drop(Tap::open("mine").unwrap());
        assert!(!ip("-o link show dev mine").contains(",UP"), "its administrator left it down");
    });
}

#[test]
fn other_kinds_of_device_are_refused() {
    in_namespace(|| {
        ip("tuntap add dev tunnel mode tun");
        for name in ["lo", "tunnel"] {
            assert!(matches!(Tap::open(name), Err(TapError::NotTap { .. })), "{name}");
        }
    });
}

#[test]
fn frames_cross_with_a_header() {
    in_namespace(|| {
        let tap = Tap::open("godwit0").unwrap();
        ip("addr add 192.0.2.1/24 dev godwit0");
        tap.file().write_all(&[&[0; HEADER][..], &ARP_REQUEST].concat()).unwrap();
        let mut frame = [0; 2048];
        loop {
            match tap.file().read(&mut frame) {
                // An ARP reply, among the host's own IPv6 chatter.
                Ok(length) if frame[HEADER + 12..HEADER + 14] == [8, 6] => {
                    assert_eq!(length, HEADER + 42);
                    assert_eq!(frame[HEADER + 20..HEADER + 22], [0, 2]);
                    break;
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
        }
    });
}
