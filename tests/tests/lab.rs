//! The lab keeps its promises: it boots, runs commands and tells the truth about them, ends what hangs, and leaves
//! nothing behind. Labs are booted one at a time: this test may run on two cores.

#![expect(clippy::tests_outside_test_module, clippy::unwrap_used, reason = "this whole file is a test module")]

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use godwit_tests::lab::wire::{End, WindowSize};
use godwit_tests::lab::{Event, Lab};
use godwit_tests::network::{Link, fastest_ping};
use rustix::process::{Pid, Signal, kill_process};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The QEMU processes of labs that were started by this process.
fn machines() -> Vec<u32> {
    let own = std::process::id();
    let stats = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let (pid, rest) = stat.split_once(" (")?;
        let parent: u32 = rest.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()?;
        (parent == own && rest.starts_with("qemu")).then(|| pid.parse().unwrap())
    });
    stats.collect()
}

#[test]
fn a_lab_runs_commands_and_leaves_nothing() {
    let _alone = alone();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), "brought along").unwrap();
    let disk = tempfile::NamedTempFile::new().unwrap();
    fs::write(disk.path(), [b"disk".to_vec(), vec![0; 1 << 20]].concat()).unwrap();
    let lab = Lab::builder().file(file.path(), "/lab/deep/file").disk(disk.path(), "/lab/disk").boot().unwrap();
    eprintln!("The lab was up after {:.2} s, by {}", lab.boot_time().as_secs_f64(), lab.accelerator());
    assert_eq!(machines().len(), 1);

    assert_eq!(lab.problems(), [] as [String; 0]);
    assert!(lab.has_kvm(), "{}", lab.console_tail(100));
    commands_tell_the_truth(&lab);
    a_hanging_command_is_killed(&lab);
    a_dropped_command_is_killed(&lab);
    a_terminal_is_a_terminal(&lab);
    let file = lab.run(&["cat", "/lab/deep/file"]).unwrap().checked().unwrap();
    assert_eq!(file.text(), "brought along");
    let head = lab.run(&["/bin/sh", "-c", "head -c4 /lab/disk; echo new > /lab/disk; sync"]).unwrap().checked();
    assert_eq!(head.unwrap().text(), "disk");
    assert!(fs::read(disk.path()).unwrap().starts_with(b"disk"), "writes of the lab do not reach the image");

    lab.power_off().unwrap();
    assert_eq!(machines(), [] as [u32; 0]);
}

fn commands_tell_the_truth(lab: &Lab) {
    let script = "cat; echo to-errors >&2; echo $NAME in $PWD; exit 3";
    let command = lab.command(&["/bin/sh", "-c", script]).env("NAME", "value").cwd("/lab").input("from input\n");
    let output = command.run().unwrap();
    assert_eq!(output.end, End::Exited(3), "{output}");
    assert_eq!(output.text(), "from input\nvalue in /lab\n");
    assert_eq!(output.stderr, b"to-errors\n");
    assert!(output.checked().unwrap_err().to_string().contains("status 3"));

    let signalled = lab.run(&["/bin/sh", "-c", "kill -TERM $$"]).unwrap();
    assert_eq!(signalled.end, End::Signalled(15));
    let absent = lab.run(&["/no/such/program"]).unwrap();
    assert!(matches!(&absent.end, End::NotStarted(reason) if reason.contains("/no/such/program")), "{absent}");
    let large = lab.run(&["/bin/sh", "-c", "head -c 8000000 /dev/zero | tr '\\0' x"]).unwrap();
    assert_eq!(large.stdout.len(), 8_000_000);
    assert!(large.stdout.iter().all(|byte| *byte == b'x'));
}

fn a_hanging_command_is_killed(lab: &Lab) {
    let start = Instant::now();
    let script = "echo begun; sleep 1234 & sleep 1234";
    let output = lab.command(&["/bin/sh", "-c", script]).timeout(Duration::from_secs(1)).run().unwrap();
    assert_eq!(output.end, End::TimedOut);
    assert_eq!(output.text(), "begun\n", "what it wrote before is kept");
    assert!(start.elapsed() < Duration::from_secs(100), "{:?}", start.elapsed());
    no_sleepers(lab);
}

fn a_dropped_command_is_killed(lab: &Lab) {
    let mut running = lab.spawn(&["/bin/sh", "-c", "echo begun; exec sleep 1234"]).unwrap();
    let begun = running.event(Duration::from_secs(10)).unwrap();
    assert_eq!(begun, Some(Event::Stdout(b"begun\n".to_vec())));
    drop(running);
    no_sleepers(lab);
}

fn no_sleepers(lab: &Lab) {
    let script = "for try in 1 2 3 4 5; do pgrep -f 'sleep 123[4]' || exit 0; sleep 0.2; done; exit 1";
    lab.run(&["/bin/sh", "-c", script]).unwrap().checked().unwrap();
}

fn a_terminal_is_a_terminal(lab: &Lab) {
    let size = WindowSize { rows: 33, columns: 77 };
    let output = lab.command(&["/bin/sh", "-c", "tty; stty size"]).terminal(size).run().unwrap();
    assert_eq!(output.text(), "/dev/pts/0\r\n33 77\r\n", "{output}");
}

#[test]
fn hosts_have_the_delay_that_was_asked_for() {
    let _alone = alone();
    let lab = Lab::builder().boot().unwrap();
    let link = Link { rtt: Duration::from_millis(16), rate: Some("1gbit".parse().unwrap()), loss: Default::default() };
    let hosts = lab.hosts(2, &link).unwrap();
    let target = hosts[1].name().address().to_string();
    let output = hosts[0].run(&["ping", "-q", "-c", "20", "-i", "0.1", &target]).unwrap().checked().unwrap();
    let text = output.text();
    eprintln!("{}", text.trim());
    let fastest = fastest_ping(&text).unwrap();
    assert!((Duration::from_millis(16)..=Duration::from_millis(20)).contains(&fastest), "{text}");
    assert!(lab.hosts(0, &link).is_err());
}

#[test]
fn commands_learn_that_their_lab_is_gone() {
    let _alone = alone();
    let lab = Lab::builder().boot().unwrap();
    let running = lab.spawn(&["sleep", "1234"]).unwrap();
    let machine = i32::try_from(machines()[0]).ok().and_then(Pid::from_raw).unwrap();
    kill_process(machine, Signal::KILL).unwrap();
    assert!(running.wait().unwrap_err().to_string().starts_with("The lab went away"));
    assert_eq!(lab.run(&["true"]).unwrap_err().to_string(), "The lab is gone");
    drop(lab);
    assert_eq!(machines(), [] as [u32; 0]);
}

#[test]
fn a_lab_dies_with_its_harness() {
    const DIE: &str = "GODWIT_TEST_DIE";
    if std::env::var_os(DIE).is_some() {
        let _lab = Lab::builder().boot().unwrap();
        println!("machine {}", machines()[0]);
        std::process::abort();
    }
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut harness = Command::new(std::env::current_exe().unwrap());
    harness.args(["--exact", "--nocapture", "a_lab_dies_with_its_harness"]).env(DIE, "1").env("TMPDIR", folder.path());
    let output = harness.output().unwrap();
    assert_eq!(output.status.signal(), Some(6), "it died by abort");
    let text = String::from_utf8(output.stdout).unwrap();
    let machine = text.split_once("machine ").unwrap().1.lines().next().unwrap();
    let running = || fs::read_to_string(format!("/proc/{machine}/cmdline")).is_ok_and(|line| line.contains("qemu"));
    let start = Instant::now();
    while running() && start.elapsed() < Duration::from_secs(30) {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(!running(), "QEMU outlives its harness");
}

#[test]
fn a_lab_that_does_not_come_up_is_an_error_with_its_last_lines() {
    let _alone = alone();
    let moment = Duration::from_millis(300);
    let late = Lab::builder().boot_timeout(moment).boot().unwrap_err();
    assert!(late.to_string().starts_with("The lab did not start within 300ms; its last lines:"), "{late:#}");
    let killed = Lab::builder().lifetime(moment).boot().unwrap_err();
    assert!(killed.to_string().starts_with("The lab ended before it was up; its last lines:"), "{killed:#}");
    let refused = Lab::builder().disk("/nonexistent/image", "/lab/disk").boot().unwrap_err();
    assert!(refused.to_string().contains("'/nonexistent/image'"), "QEMU's own complaint is shown: {refused:#}");
    let small = Lab::builder().memory_mib(1).boot().unwrap_err();
    assert_eq!(small.to_string(), "A lab of 1 MiB does not boot; it needs at least 256 MiB");
    assert_eq!(Lab::builder().cpus(0).boot().unwrap_err().to_string(), "A lab needs at least one processor");
    assert_eq!(machines(), [] as [u32; 0]);
}
