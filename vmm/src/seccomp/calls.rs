//! The lists of system calls, by what they are needed for; [`ThreadKind`](super::ThreadKind) puts them together.
//!
//! Numbers of ioctls are those of linux/kvm.h, linux/vhost.h, linux/if_tun.h, asm/ioctls.h and linux/sockios.h. In doubt
//! a call that a library may make on some path is permitted: a filter that ends a sound guest protects nobody.

use libc::{
    SYS_accept4, SYS_access, SYS_bind, SYS_brk, SYS_chmod, SYS_clock_gettime, SYS_clock_nanosleep, SYS_clone,
    SYS_clone3, SYS_close, SYS_connect, SYS_dup, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_wait,
    SYS_eventfd2, SYS_exit, SYS_exit_group, SYS_faccessat, SYS_fallocate, SYS_fchmod, SYS_fcntl, SYS_fdatasync,
    SYS_flock, SYS_fstat, SYS_fstatfs, SYS_fsync, SYS_ftruncate, SYS_futex, SYS_getcwd, SYS_getdents64, SYS_getegid,
    SYS_geteuid, SYS_getgid, SYS_getpeername, SYS_getpid, SYS_getrandom, SYS_getsockname, SYS_getsockopt, SYS_gettid,
    SYS_gettimeofday, SYS_getuid, SYS_io_uring_enter, SYS_io_uring_register, SYS_io_uring_setup, SYS_ioctl, SYS_listen,
    SYS_lseek, SYS_lstat, SYS_madvise, SYS_membarrier, SYS_memfd_create, SYS_mkdir, SYS_mkdirat, SYS_mmap,
    SYS_mprotect, SYS_mremap, SYS_munmap, SYS_nanosleep, SYS_newfstatat, SYS_open, SYS_openat, SYS_poll, SYS_ppoll,
    SYS_prctl, SYS_pread64, SYS_preadv, SYS_prlimit64, SYS_pwrite64, SYS_pwritev, SYS_read, SYS_readlink,
    SYS_readlinkat, SYS_readv, SYS_recvfrom, SYS_recvmsg, SYS_rename, SYS_renameat, SYS_renameat2, SYS_restart_syscall,
    SYS_rseq, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sched_getaffinity, SYS_sched_yield,
    SYS_seccomp, SYS_sendmmsg, SYS_sendmsg, SYS_sendto, SYS_set_robust_list, SYS_set_tid_address, SYS_setsockopt,
    SYS_shutdown, SYS_sigaltstack, SYS_socket, SYS_socketpair, SYS_stat, SYS_statx, SYS_tgkill, SYS_time,
    SYS_timerfd_create, SYS_timerfd_gettime, SYS_timerfd_settime, SYS_uname, SYS_unlink, SYS_unlinkat, SYS_write,
    SYS_writev,
};
use seccompiler::{SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};
use std::collections::BTreeMap;

/// Calls of one vCPU's descriptor, by number (linux/kvm.h; type 0xae): what running, saving and restoring it needs.
/// KVM_RUN is first, since a filter tries them in order.
const KVM_OF_VCPU: &[u64] = &[
    0x80, // KVM_RUN
    0xad, // KVM_KVMCLOCK_CTRL
    0x81, 0x82, // registers
    0x83, 0x84, 0xcc, 0xcd, // special registers, old and new
    0x88, 0x89, // MSRs
    0x8c, 0x8d, // FPU
    0x8e, 0x8f, // local APIC
    0x90, 0x91, // CPUID
    0x98, 0x99, // multiprocessing state
    0x9f, 0xa0, // events
    0xa1, 0xa2, // debug registers; TSC frequency
    0xa3, // TSC frequency
    0xa4, 0xa5, 0xcf, // XSAVE area
    0xa6, 0xa7, // XCRs
    0xbe, 0xbf, // nested state
    0xe1, 0xe2, 0xe3, // attributes: the TSC's offset
];

/// Calls of the VM's descriptor that a vCPU thread makes.
const KVM_BY_VCPU: &[u64] = &[
    0x03, // KVM_CHECK_EXTENSION
    0xc7, // KVM_RESET_DIRTY_RINGS, when its dirty ring is full
    0x46, 0x49, // memory regions: the log goes off when a ring ran over
];

/// The type of all KVM ioctls, and of all vhost ioctls (`KVMIO`, `VHOST_VIRTIO`).
const KVM: u64 = 0xae;
const VHOST: u64 = 0xaf;

/// How terminals are asked and set; the second of each is what newer C libraries use (asm/ioctls.h).
const TERMINAL_MODES: &[u64] = &[libc::TCGETS, 0x802c_542a, libc::TCSETS, 0x402c_542b, libc::TIOCGWINSZ];

/// Flags of `clone` that make a thread, and those that make namespaces (linux/sched.h).
const CLONE_THREAD: u64 = 0x0001_0000;
const CLONE_NAMESPACES: u64 = 0x7e02_0000;

/// Calls that are permitted, some of them only with certain arguments.
#[derive(Debug, Clone, Default)]
pub(super) struct Permits(BTreeMap<i64, Vec<SeccompRule>>);

impl Permits {
    pub(super) fn into_rules(self) -> BTreeMap<i64, Vec<SeccompRule>> {
        self.0
    }

    /// And these calls, whatever their arguments.
    fn calls(mut self, calls: &[i64]) -> Self {
        self.0.extend(calls.iter().map(|call| (*call, Vec::new())));
        self
    }

    /// And this call, with an argument that meets a condition.
    fn call_if(self, call: i64, condition: SeccompCondition) -> Self {
        let rule = SeccompRule::new(vec![condition]).expect("a rule of one condition is a rule");
        self.rule(call, rule)
    }

    fn rule(mut self, call: i64, rule: SeccompRule) -> Self {
        match self.0.get_mut(&call) {
            None => drop(self.0.insert(call, vec![rule])),
            // Permitted with any argument already.
            Some(rules) if rules.is_empty() || rules.contains(&rule) => {}
            Some(rules) => rules.push(rule),
        }
        self
    }

    /// And all that `other` permits.
    pub(super) fn and(self, other: Self) -> Self {
        other.0.into_iter().fold(self, |all, (call, rules)| {
            if rules.is_empty() {
                return all.calls(&[call]);
            }
            rules.into_iter().fold(all, |all, rule| all.rule(call, rule))
        })
    }

    fn ioctls(self, numbers: &[u64]) -> Self {
        numbers.iter().fold(self, |all, number| all.call_if(SYS_ioctl, equal(1, *number)))
    }

    /// And all ioctls of a type, which is the second byte of the number.
    fn ioctls_of_type(self, kind: u64) -> Self {
        self.call_if(SYS_ioctl, masked(1, 0xff00, kind << 8))
    }

    fn kvm(self, numbers: &[u64]) -> Self {
        numbers.iter().fold(self, |all, number| all.call_if(SYS_ioctl, masked(1, 0xffff, KVM << 8 | number)))
    }
}

impl Permits {
    /// What the Rust standard library, the C library, the log and handlers of signals need in any thread.
    fn of_any_thread() -> Self {
        let pid = u64::from(std::process::id());
        Self::default()
            .calls(&[SYS_futex, SYS_sched_yield, SYS_restart_syscall, SYS_membarrier])
            .calls(&[SYS_clock_gettime, SYS_gettimeofday, SYS_time, SYS_clock_nanosleep, SYS_nanosleep])
            .calls(&[SYS_munmap, SYS_mremap, SYS_madvise, SYS_brk])
            // A thread's first and last moments; an arena's size comes of the number of CPUs.
            .calls(&[SYS_rseq, SYS_set_robust_list, SYS_set_tid_address, SYS_sigaltstack, SYS_sched_getaffinity])
            .calls(&[SYS_exit, SYS_exit_group])
            .calls(&[SYS_gettid, SYS_getpid, SYS_rt_sigreturn, SYS_rt_sigprocmask])
            .calls(&[SYS_read, SYS_readv, SYS_write, SYS_writev, SYS_close, SYS_fcntl, SYS_poll, SYS_ppoll])
            .calls(&[SYS_getrandom])
            .call_if(SYS_prctl, equal(0, prctl(libc::PR_SET_NAME)))
            .call_if(SYS_prctl, equal(0, prctl(libc::PR_GET_NAME)))
            .call_if(SYS_prctl, equal(0, prctl(libc::PR_SET_VMA)))
            // A signal to this process alone: vCPUs are kicked by one, and a panic that aborts is one.
            .call_if(SYS_tgkill, equal(0, pid))
            .call_if(SYS_rt_sigaction, equal(0, libc::SIGABRT.unsigned_abs().into()))
            // `send`: the handler of SIGTERM, on whichever thread it runs, tells the thread of signals so.
            .call_if(SYS_sendto, quad(4, 0))
            // The terminal is given back as it was when a forbidden call ends the process.
            .ioctls(TERMINAL_MODES)
    }

    /// Memory that holds no code.
    fn plain_mappings(self) -> Self {
        let no_code = || masked(2, libc::PROT_EXEC.unsigned_abs().into(), 0);
        self.call_if(SYS_mmap, no_code()).call_if(SYS_mprotect, no_code())
    }

    /// Memory, which [`executable_mappings`](Self::executable_mappings) makes plain.
    fn mappings(self) -> Self {
        self.calls(&[SYS_mmap, SYS_mprotect])
    }

    /// Threads of this process, but neither processes nor namespaces.
    fn threads(self) -> Self {
        let thread = masked(0, CLONE_THREAD | CLONE_NAMESPACES, CLONE_THREAD);
        self.call_if(SYS_clone, thread).calls(&[SYS_clone3, SYS_prlimit64])
    }

    /// Threads that put filters of their own on.
    fn confined_threads(self) -> Self {
        self.threads().call_if(SYS_prctl, equal(0, prctl(libc::PR_SET_NO_NEW_PRIVS))).calls(&[SYS_seccomp])
    }

    /// A device that a driver starts or stops, on a vCPU's thread, a worker's or a leader's.
    fn device_start(self) -> Self {
        self.ioctls_of_type(VHOST).ioctls(&[libc::TUNSETOFFLOAD]).calls(&[
            SYS_timerfd_settime,
            SYS_timerfd_gettime,
            SYS_fsync,
            SYS_fdatasync,
        ])
    }

    pub(super) fn vcpu() -> Self {
        // KVM_RUN is the first ioctl to be compared.
        Self::default().kvm(KVM_OF_VCPU).kvm(KVM_BY_VCPU).and(Self::of_any_thread()).plain_mappings().device_start()
    }

    /// What a worker does beside memory.
    fn device_work() -> Self {
        Self::of_any_thread()
            .device_start()
            .calls(&[SYS_epoll_wait, SYS_epoll_pwait, SYS_epoll_ctl, SYS_eventfd2])
            .calls(&[
                SYS_pread64,
                SYS_preadv,
                SYS_pwrite64,
                SYS_pwritev,
                SYS_lseek,
                SYS_fallocate,
                SYS_fstat,
                SYS_statx,
                SYS_sendmsg,
                SYS_recvfrom,
                SYS_io_uring_enter,
                // A connection that is made again.
                SYS_epoll_create1,
                SYS_timerfd_create,
            ])
            // And one that is broken off.
            .call_if(SYS_setsockopt, equal(2, libc::SO_LINGER.unsigned_abs().into()))
    }

    /// Rings of io_uring, which disks' channels on files are.
    fn disk_channels(self) -> Self {
        self.calls(&[SYS_io_uring_setup, SYS_io_uring_register])
    }

    /// Sockets that clients connect to.
    fn clients(self) -> Self {
        self.calls(&[SYS_epoll_wait, SYS_epoll_pwait, SYS_epoll_ctl])
            .calls(&[SYS_accept4, SYS_recvfrom, SYS_recvmsg, SYS_sendto, SYS_sendmsg, SYS_shutdown, SYS_getsockopt])
            .ioctls(&[libc::FIONBIO])
    }

    pub(super) fn worker() -> Self {
        Self::device_work().plain_mappings()
    }

    /// Names' addresses are in files, or asked for.
    pub(super) fn dialler() -> Self {
        Self::of_any_thread()
            .mappings()
            .dialling()
            .calls(&[SYS_open, SYS_openat, SYS_stat, SYS_newfstatat, SYS_fstat, SYS_lseek, SYS_uname, SYS_access])
            .calls(&[SYS_recvfrom, SYS_recvmsg, SYS_sendto, SYS_sendmsg, SYS_shutdown])
            .calls(&[SYS_setsockopt, SYS_getsockopt, SYS_getsockname, SYS_getpeername])
            .ioctls(&[libc::FIONBIO, libc::FIONREAD])
    }

    /// Clients are strangers, and each has a thread and a channel.
    pub(super) fn disk_server() -> Self {
        Self::device_work().plain_mappings().clients().confined_threads().disk_channels().calls(&[
            SYS_setsockopt,
            SYS_getsockname,
            SYS_getpeername,
            SYS_unlink,
            SYS_unlinkat,
        ])
    }

    /// The map of what is there goes when all is.
    pub(super) fn disk_puller() -> Self {
        Self::device_work().plain_mappings().calls(&[SYS_unlink, SYS_unlinkat])
    }

    pub(super) fn console() -> Self {
        // Its socket's file goes at the end.
        let file = [SYS_lstat, SYS_newfstatat, SYS_statx, SYS_unlink, SYS_unlinkat];
        Self::of_any_thread().plain_mappings().clients().calls(&[SYS_eventfd2, SYS_lseek]).calls(&file)
    }

    pub(super) fn throttle() -> Self {
        Self::of_any_thread().plain_mappings()
    }

    pub(super) fn signals() -> Self {
        Self::of_any_thread().plain_mappings().calls(&[SYS_recvfrom, SYS_recvmsg])
    }

    pub(super) fn api() -> Self {
        Self::of_any_thread().plain_mappings().threads().clients().calls(&[
            SYS_setsockopt,
            SYS_getsockname,
            SYS_getpeername,
        ])
    }

    /// Leading a machine: its state, its memory, what it holds of its host, and the ownership record.
    fn leading() -> Self {
        Self::device_work()
            .clients()
            .mappings()
            .ioctls_of_type(KVM)
            .calls(&[SYS_open, SYS_openat, SYS_stat, SYS_lstat, SYS_newfstatat, SYS_access])
            .calls(&[SYS_faccessat, SYS_readlink, SYS_readlinkat, SYS_getcwd, SYS_getdents64, SYS_flock, SYS_dup])
            .calls(&[SYS_mkdir, SYS_mkdirat, SYS_rename, SYS_renameat, SYS_renameat2, SYS_unlink, SYS_unlinkat])
            .calls(&[SYS_fchmod, SYS_chmod, SYS_ftruncate])
            .calls(&[SYS_uname, SYS_getuid, SYS_geteuid, SYS_getgid, SYS_getegid])
            .calls(&[SYS_setsockopt, SYS_getsockname, SYS_getpeername])
            .ioctls(&[libc::TIOCOUTQ, libc::FIONREAD])
    }

    /// Sockets to other hosts. Routes and names' addresses are asked for by netlink too.
    fn dialling(self) -> Self {
        [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK]
            .into_iter()
            .fold(self, |all, family| all.call_if(SYS_socket, equal(0, family.unsigned_abs().into())))
            .calls(&[SYS_connect, SYS_bind, SYS_sendmmsg])
    }

    /// Making a machine: VM, memory, taps, threads and their filters.
    fn building(self) -> Self {
        self.confined_threads()
            // The signal that kicks vCPUs; see `vcpu::kick`.
            .call_if(SYS_rt_sigaction, equal(0, libc::SIGRTMIN().unsigned_abs().into()))
            .calls(&[SYS_memfd_create, SYS_fstatfs])
            .disk_channels()
            // The servers of disks, too.
            .dialling()
            .ioctls(&[libc::SIOCGIFINDEX, libc::SIOCGIFFLAGS, libc::SIOCSIFFLAGS])
            .ioctls(&[libc::TUNSETIFF, libc::TUNSETVNETHDRSZ, libc::TUNGETFEATURES])
    }

    pub(super) fn migrate_source() -> Self {
        Self::leading()
            .dialling()
            .confined_threads()
            .and(Self::disk_server())
            .and(Self::disk_puller())
            .calls(&[SYS_listen])
    }

    pub(super) fn migrate_target() -> Self {
        Self::leading().building().and(Self::disk_puller())
    }

    /// The door of a target's streams, too: it lets links in, and starts a thread for each.
    pub(super) fn migrate_stream() -> Self {
        // What moves may be a disk.
        Self::device_work()
            .plain_mappings()
            .clients()
            .confined_threads()
            .calls(&[SYS_lseek, SYS_setsockopt, SYS_getsockname, SYS_getpeername])
            .ioctls(&[libc::TIOCOUTQ])
    }

    pub(super) fn service() -> Self {
        Self::migrate_source().and(Self::migrate_target()).calls(&[SYS_socketpair])
    }

    /// `clone3`, whose flags lie in memory that a filter does not read.
    pub(super) fn unseen_clones() -> Self {
        Self::default().calls(&[SYS_clone3])
    }

    /// Memory that may hold code.
    pub(super) fn executable_mappings() -> Self {
        let code = || {
            let bit = libc::PROT_EXEC.unsigned_abs().into();
            masked(2, bit, bit)
        };
        Self::default().call_if(SYS_mmap, code()).call_if(SYS_mprotect, code())
    }
}

/// The low half of the argument `index` is `value`; the kernel takes no more of it.
fn equal(index: u8, value: u64) -> SeccompCondition {
    condition(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

/// The whole argument `index` is `value`.
fn quad(index: u8, value: u64) -> SeccompCondition {
    condition(index, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, value)
}

/// Of the low half of the argument `index`, the bits of `mask` are those of `value`.
fn masked(index: u8, mask: u64, value: u64) -> SeccompCondition {
    condition(index, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask), value)
}

fn condition(index: u8, length: SeccompCmpArgLen, operator: SeccompCmpOp, value: u64) -> SeccompCondition {
    SeccompCondition::new(index, length, operator, value).expect("system calls have six arguments")
}

fn prctl(option: libc::c_int) -> u64 {
    option.unsigned_abs().into()
}
