//! The frame of the scenarios: one that passes, fails, hangs or leaves something behind is told as that, and the machine
//! is clean afterwards. The bodies are shell scripts, so that each can misbehave as it likes.
//!
//! One test only: the frame ends everything that descends from the process that uses it.

#![expect(clippy::tests_outside_test_module, clippy::unwrap_used, reason = "this whole file is a test module")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use godwit_tests::scenario::runner::{Setup, run};
use godwit_tests::scenario::{Needs, Scenario};
use godwit_tests::tally::Tally;

/// Called as `SCRIPT body NAME GODWIT IMAGES WORK`.
const BODIES: &str = r#"#!/bin/sh
case $2 in
    passes) test "$3" = /the/godwit && test "$4" = /the/images && test "$TMPDIR" = "$5/tmp" ;;
    fails) echo the reason; exit 1 ;;
    hangs) sleep 4321 & setsid sleep 4321 & wait ;;
    leaves-a-process) setsid sleep 4321 & ;;
    leaves-a-file) echo > "$TMPDIR/file" ;;
esac
"#;

fn scenario(name: &'static str) -> Scenario {
    Scenario { name, about: "", needs: Needs::Kvm, timeout: Duration::from_secs(2), run: |_| Ok(()) }
}

fn sleepers() -> usize {
    let output = Command::new("/bin/busybox").args(["pgrep", "-f", "sleep 432[1]"]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().lines().count()
}

#[test]
fn every_way_to_end_is_told_and_cleared() {
    let folder = tempfile::tempdir().unwrap();
    let binary = folder.path().join("bodies");
    fs::write(&binary, BODIES).unwrap();
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
    let setup = Setup { binary: &binary, godwit: Path::new("/the/godwit"), images: Path::new("/the/images") };

    let list = ["passes", "fails", "hangs", "leaves-a-process", "leaves-a-file"].map(scenario);
    let start = Instant::now();
    let mut printed = Vec::new();
    let tally = run(&list.iter().collect::<Vec<_>>(), &setup, &mut printed).unwrap();
    let printed = String::from_utf8(printed).unwrap();

    assert_eq!(tally, Tally { passed: 1, failed: 4 }, "{printed}");
    assert!(printed.ends_with("\n1 passed, 4 failed\n"), "{printed}");
    let told = |name: &str, words: &str| {
        let part = printed.split("FAIL  ").find(|part| part.starts_with(name)).unwrap_or_default();
        assert!(part.contains(words), "{name} should say {words:?}:\n{printed}");
    };
    assert!(printed.starts_with("ok    passes"), "{printed}");
    told("fails", "the reason");
    told("hangs", "It was killed because its 2 s were over");
    told("leaves-a-process", "(sleep)");
    told("leaves-a-file", "tmp/file");
    assert_eq!(sleepers(), 0, "all that was left was killed");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}
