//! What the filters answer, asked of an interpreter of their programs, and what a forbidden call does to a process.

use super::*;
use crate::vcpu::test_guest::{COUNT, LONG, TestGuest};
use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, SYS_clone,
    SYS_clone3, SYS_execve, SYS_futex, SYS_ioctl, SYS_kill, SYS_mmap, SYS_openat, SYS_sendto, SYS_socket, SYS_tgkill,
    SYS_write,
};
use std::process::Command;
use std::time::{Duration, Instant};

/// The kernel takes no longer programs (`BPF_MAXINSNS`, linux/bpf_common.h).
const LONGEST: usize = 4096;

const KVM_CREATE_VM: u64 = 0xae01;
const KVM_RUN: u64 = 0xae80;
const TIOCSTI: u64 = 0x5412;
const NAMESPACE_OF_USERS: u64 = 0x1000_0000;
const THREAD: u64 = 0x0001_0000;

/// The kernel's answer to a call, by `struct seccomp_data` (linux/seccomp.h).
fn answer(program: &BpfProgram, call: i64, arguments: [u64; 6]) -> u32 {
    let mut data = vec![u32::try_from(call).unwrap(), 0xc000_003e, 0, 0];
    for argument in arguments {
        data.push(u32::try_from(argument & 0xffff_ffff).unwrap());
        data.push(u32::try_from(argument >> 32).unwrap());
    }
    let (mut at, mut value) = (0, 0);
    loop {
        let step = &program[at];
        at += 1;
        let k = step.k;
        let jump = |holds: bool| usize::from(if holds { step.jt } else { step.jf });
        match u32::from(step.code) {
            code if code == BPF_LD | BPF_W | BPF_ABS => value = data[k as usize / 4],
            code if code == BPF_ALU | BPF_AND | BPF_K => value &= k,
            code if code == BPF_JMP | BPF_JA => at += k as usize,
            code if code == BPF_JMP | BPF_JEQ | BPF_K => at += jump(value == k),
            code if code == BPF_JMP | BPF_JGT | BPF_K => at += jump(value > k),
            code if code == BPF_JMP | BPF_JGE | BPF_K => at += jump(value >= k),
            code if code == BPF_RET | BPF_K => return k,
            code => panic!("an instruction that filters do not have: {code:#x}"),
        }
    }
}

fn permits(kind: ThreadKind, call: i64, arguments: [u64; 6]) -> bool {
    answer(&Programs::compile(kind).permits, call, arguments) == libc::SECCOMP_RET_ALLOW
}

fn first(value: u64) -> [u64; 6] {
    [value, 0, 0, 0, 0, 0]
}

fn second(value: u64) -> [u64; 6] {
    [3, value, 0, 0, 0, 0]
}

#[test]
fn every_program_is_one_that_the_kernel_takes() {
    for kind in ThreadKind::ALL {
        let Programs { permits, declines } = Programs::compile(kind);
        assert!(permits.len() < LONGEST / 4, "{kind:?} takes {} instructions", permits.len());
        assert!(declines.is_none_or(|declines| declines.len() < LONGEST / 4));
    }
}

#[test]
fn no_thread_runs_programs_or_signals_others() {
    for kind in ThreadKind::ALL {
        for call in [SYS_execve, SYS_kill, libc::SYS_ptrace, libc::SYS_unshare, libc::SYS_setns, libc::SYS_bpf] {
            assert!(!permits(kind, call, [0; 6]), "{kind:?} makes call {call}");
        }
        assert!(!permits(kind, SYS_ioctl, second(TIOCSTI)), "{kind:?} types into the terminal");
        assert!(!permits(kind, SYS_clone, first(THREAD | NAMESPACE_OF_USERS)), "{kind:?} makes namespaces");
        assert!(!permits(kind, SYS_clone, first(0)), "{kind:?} forks");
        assert!(!permits(kind, 0x4000_0001, [0; 6]), "{kind:?} makes calls of x32");
        assert!(!permits(kind, SYS_tgkill, first(1)), "{kind:?} signals process 1");
        assert!(permits(kind, SYS_tgkill, first(std::process::id().into())), "{kind:?} cannot abort");
        assert!(permits(kind, SYS_futex, [0; 6]) && permits(kind, SYS_write, [0; 6]));
        assert!(permits(kind, SYS_sendto, [3, 0, 1, 0, 0, 0]), "{kind:?} cannot handle SIGTERM");
    }
}

#[test]
fn a_program_of_another_architecture_ends() {
    let program = Programs::compile(ThreadKind::Vcpu).permits;
    assert_eq!(program[1].k, 0xc000_003e);
    assert_eq!(program[2].k, libc::SECCOMP_RET_KILL_PROCESS);
}

#[test]
fn arguments_decide() {
    use ThreadKind::{
        Api, Dialler, DiskPuller, DiskServer, MigrateSource, MigrateStream, MigrateTarget, Service, Signals, Vcpu,
        Worker,
    };
    assert!(permits(Vcpu, SYS_ioctl, second(KVM_RUN)));
    assert!(!permits(Vcpu, SYS_ioctl, second(KVM_CREATE_VM)));
    assert!(permits(MigrateTarget, SYS_ioctl, second(KVM_CREATE_VM)));
    assert!(!permits(Worker, SYS_ioctl, second(KVM_RUN)));
    for kind in [Vcpu, Worker, Api, MigrateStream, Signals, DiskServer] {
        assert!(permits(kind, SYS_mmap, [0, 4096, 3, 0, 0, 0]));
        assert!(!permits(kind, SYS_mmap, [0, 4096, 5, 0, 0, 0]), "{kind:?} maps code");
        assert!(!permits(kind, SYS_openat, [0; 6]), "{kind:?} opens files");
        assert!(!permits(kind, SYS_socket, first(2)), "{kind:?} calls other hosts");
    }
    for family in [1, 2, 10, 16] {
        assert!(permits(MigrateSource, SYS_socket, first(family)));
    }
    assert!(!permits(MigrateSource, SYS_socket, first(17)), "packet sockets");
    assert!(permits(MigrateTarget, SYS_socket, first(2)), "the servers of disks");
    for kind in [Vcpu, Worker, Api, MigrateStream, Signals, Dialler, DiskPuller] {
        assert!(!permits(kind, libc::SYS_io_uring_setup, [0; 6]), "{kind:?} makes rings");
    }
    for kind in [Worker, Service, DiskServer] {
        assert!(permits(kind, libc::SYS_io_uring_enter, [0; 6]));
    }
    assert!(permits(Service, SYS_clone, first(THREAD | 0x100)));
    assert!(permits(MigrateSource, SYS_clone, first(THREAD)));
    assert!(!permits(Vcpu, SYS_clone, first(THREAD)));
    for kind in [MigrateSource, MigrateStream, Service] {
        assert!(!permits(kind, SYS_clone, first(THREAD | NAMESPACE_OF_USERS)), "{kind:?} opens namespaces");
    }
}

#[test]
fn what_libraries_do_without_is_declined() {
    let declined = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs();
    for kind in [ThreadKind::MigrateSource, ThreadKind::MigrateTarget, ThreadKind::Service] {
        let declines = Programs::compile(kind).declines.unwrap();
        assert_eq!(answer(&declines, SYS_clone3, [0; 6]), declined);
        assert_eq!(answer(&declines, SYS_mmap, [0, 4096, 5, 0, 0, 0]), declined);
        assert_eq!(answer(&declines, SYS_mmap, [0, 4096, 3, 0, 0, 0]), libc::SECCOMP_RET_ALLOW);
        assert_eq!(answer(&declines, SYS_execve, [0; 6]), libc::SECCOMP_RET_ALLOW, "the other filter's affair");
    }
    assert_eq!(answer(&Programs::compile(ThreadKind::Api).declines.unwrap(), SYS_clone3, [0; 6]), declined);
}

/// A thread has its parent's filter too: what a kind permits, those that start threads of this kind must permit.
#[test]
fn parents_permit_what_their_children_do() {
    use ThreadKind::{
        Console, Dialler, DiskPuller, DiskServer, MigrateSource, MigrateStream, MigrateTarget, Service, Throttle, Vcpu,
        Worker,
    };
    let heirs = [
        (Service, [Vcpu, Worker, MigrateSource, Dialler, DiskPuller].as_slice()),
        (MigrateTarget, &[Vcpu, Worker, MigrateStream, Dialler, DiskPuller]),
        (DiskServer, &[DiskServer, Worker]),
        (MigrateSource, &[MigrateStream, Throttle, DiskServer]),
        // The console's pump runs on its own thread from the start; whoever drops the line does its work.
        (Service, &[Console, Throttle]),
    ];
    let words = [0, 1, 2, 3, 6, 10, 15, 16, 38, 0x5401, 0x5402, 0x5413, 0x5421, 0x4004_54d0, THREAD, 0x5356_4d41];
    let ioctls = (0..=0xff).flat_map(|number| [0xae00 | number, 0xaf00 | number]);
    let words: Vec<u64> = words.into_iter().chain([u64::from(std::process::id())]).chain(ioctls).collect();
    for (parent, children) in heirs {
        let parent_program = Programs::compile(parent).permits;
        for child in children {
            let program = Programs::compile(*child).permits;
            for call in 0..512 {
                for word in &words {
                    for arguments in [first(*word), second(*word), [0, 0, *word, 0, 0, 0]] {
                        let allowed = |program| answer(program, call, arguments) == libc::SECCOMP_RET_ALLOW;
                        assert!(
                            !allowed(&program) || allowed(&parent_program),
                            "{child:?} makes call {call} with {arguments:x?}, and {parent:?} does not"
                        );
                    }
                }
            }
        }
    }
}

/// The kind of thread that a child of this test's process is to work on.
const KIND: &str = "GODWIT_TEST_THREAD_KIND";

/// The kind of thread that this process was started for, if it is such a child; it is confined from here on.
fn kind_of_child() -> Option<ThreadKind> {
    let kind = ThreadKind::ALL[std::env::var(KIND).ok()?.parse::<usize>().unwrap()];
    switch_on().unwrap();
    Some(kind)
}

/// Runs a test of this module alone, in a process that is started for a kind of thread.
fn run_in_child(test: &str, kind: ThreadKind) -> std::process::Output {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "--nocapture", &format!("seccomp::tests::{test}")]);
    child.env(KIND, (kind as usize).to_string()).output().unwrap()
}

/// Run by the next test in a process of its own; alone it does nothing.
#[test]
fn child_that_makes_a_forbidden_call() {
    let Some(kind) = kind_of_child() else { return };
    let thread = std::thread::Builder::new().name("breaks-out".to_owned()).spawn(move || {
        enter(kind);
        std::os::unix::fs::chroot("/")
    });
    // Where the call came back, the test's process ends in good order, which its parent takes for a failure.
    let _ = thread.unwrap().join();
}

#[test]
fn a_forbidden_call_ends_the_process_and_is_named() {
    for kind in ThreadKind::ALL {
        let child = run_in_child("child_that_makes_a_forbidden_call", kind);
        let words = String::from_utf8_lossy(&child.stderr);
        assert_eq!(child.status.code(), Some(FORBIDDEN_STATUS.into()), "{kind:?}: {words}");
        assert!(words.contains("godwit: thread breaks-out made the forbidden system call "), "{kind:?}: {words}");
    }
}

/// Run by the next test in a process of its own; alone it does nothing.
#[test]
fn child_that_fills_and_empties_its_heaps() {
    let Some(kind) = kind_of_child() else { return };
    // All at once: each thread has an arena of its own then.
    let threads = 16;
    let begin = std::sync::Barrier::new(threads);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                enter(kind);
                begin.wait();
                let blocks: Vec<_> = (0..64).map(|_| vec![1_u8; 64 << 10]).collect();
                begin.wait();
                blocks.into_iter().rev().for_each(drop);
            });
        }
    });
}

#[test]
fn the_heap_asks_for_nothing_forbidden() {
    for kind in ThreadKind::ALL {
        let child = run_in_child("child_that_fills_and_empties_its_heaps", kind);
        let words = String::from_utf8_lossy(&child.stderr);
        assert!(child.status.success(), "{kind:?}: {} {words}", child.status);
    }
}

/// Run by the next test in a process of its own; alone it does nothing.
#[test]
fn child_that_throttles_its_guest() {
    let Some(kind) = kind_of_child() else { return };
    let guest = TestGuest::with(COUNT, 2);
    let mover = std::thread::spawn(move || {
        enter(kind);
        guest.vcpus.run();
        guest.vcpus.throttle(&[0.5, 0.9]).unwrap();
        let begun = Instant::now();
        while guest.vcpus.time_taken().iter().any(|taken| *taken < Duration::from_millis(20)) {
            assert!(begun.elapsed() < LONG, "nothing is taken away");
            std::thread::sleep(Duration::from_millis(1));
        }
        guest.vcpus.throttle(&[0.0; 2]).unwrap();
        guest.vcpus.park(LONG).unwrap();
    });
    mover.join().unwrap();
}

#[test]
fn who_leads_a_machine_may_throttle_its_vcpus() {
    for kind in [ThreadKind::MigrateSource, ThreadKind::Service] {
        let child = run_in_child("child_that_throttles_its_guest", kind);
        let words = String::from_utf8_lossy(&child.stderr);
        assert!(child.status.success(), "{kind:?}: {} {words}", child.status);
    }
}

#[test]
fn a_process_that_is_not_confined_is_left_alone() {
    enter(ThreadKind::Signals);
    assert!(Command::new("/bin/true").status().unwrap().success());
}
