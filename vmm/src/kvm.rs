//! The host's KVM: opens /dev/kvm, asks what it can do, and makes VMs.
//!
//! Called once per process by the machine's assembly. Invariant: a [`KvmHost`] exists only where every capability that
//! the rest of the crate takes for granted is there, so that nobody else needs to ask.

use crate::cpuid::ARCH_CAPABILITIES;
use crate::layout;
use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_XSAVE2,
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY,
    MsrList, Msrs, kvm_msr_entry, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use thiserror::Error;
use vmm_sys_util::errno;

/// CPUID leaf 1, ECX: the TSC deadline timer.
const CPUID_TSC_DEADLINE: u32 = 1 << 24;
/// The device file of KVM.
pub const KVM_DEVICE: &str = "/dev/kvm";

/// What the crate cannot do without, by the name in Documentation/virt/kvm/api.rst.
const REQUIRED: [(Cap, &str); 16] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Why the host's KVM cannot be used.
#[derive(Debug, Error)]
pub enum KvmError {
    /// The device file does not exist.
    #[error("{} is not there: {remedy}", path.display())]
    Missing {
        /// The device file.
        path: PathBuf,
        /// What to do.
        remedy: &'static str,
    },
    /// The user may not open the device file.
    #[error("No permission to open {}: add the user to the group kvm, or run as root", path.display())]
    Permission {
        /// The device file.
        path: PathBuf,
    },
    /// The device file cannot be opened for another reason.
    #[error("Could not open {}", path.display())]
    Open {
        /// The device file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: errno::Error,
    },
    /// The file is something else, or a KVM from before 2007.
    #[error("{} speaks KVM API version {found}, not {KVM_API_VERSION}", path.display())]
    ApiVersion {
        /// The device file.
        path: PathBuf,
        /// What it answered; negative for a file that is not KVM.
        found: i32,
    },
    /// KVM lacks a capability.
    #[error("The host's KVM lacks {name}: a Linux kernel of 5.10 or newer is needed")]
    Capability {
        /// The name of the capability.
        name: &'static str,
    },
    /// KVM refused an operation.
    #[error("KVM could not {action}")]
    Refused {
        /// What was asked of it.
        action: &'static str,
        /// What it said.
        #[source]
        source: errno::Error,
    },
}

impl KvmError {
    fn refused(action: &'static str) -> impl FnOnce(errno::Error) -> Self {
        move |source| Self::Refused { action, source }
    }
}

/// What differs from one usable KVM to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// The most vCPUs that one VM can have.
    pub max_vcpus: u32,
    /// The dirty log can be cleared apart from reading it, and starts all ones (Linux 5.5).
    pub manual_dirty_log: bool,
    /// The largest dirty ring in bytes; 0 where KVM has none with acquire/release ordering (Linux 6.1).
    pub dirty_ring_bytes: u32,
    /// The local APIC timer has its TSC deadline mode.
    pub tsc_deadline: bool,
    /// The guest's TSC can have another frequency than the host's.
    pub tsc_control: bool,
    /// Bytes of the XSAVE area; 0 where only KVM_GET_XSAVE's fixed 4 KiB exist.
    pub xsave2_bytes: u32,
}

/// An open KVM that can do all that this crate needs.
#[derive(Debug)]
pub struct KvmHost {
    kvm: Kvm,
    capabilities: Capabilities,
    arch_capabilities: u64,
    cpuid: OnceLock<Result<CpuId, errno::Error>>,
}

impl KvmHost {
    /// Opens [`KVM_DEVICE`].
    ///
    /// # Errors
    /// [`KvmError`] with the remedy.
    pub fn open() -> Result<Self, KvmError> {
        Self::open_at(Path::new(KVM_DEVICE))
    }

    /// Opens the KVM behind a device file.
    ///
    /// # Errors
    /// [`KvmError`] with the remedy.
    pub fn open_at(path: &Path) -> Result<Self, KvmError> {
        let kvm = open_device(path)?;
        let found = kvm.get_api_version();
        if u32::try_from(found) != Ok(KVM_API_VERSION) {
            return Err(KvmError::ApiVersion { path: path.into(), found });
        }
        if let Some(&(_, name)) = REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(KvmError::Capability { name });
        }
        let (capabilities, arch_capabilities) = (Capabilities::of(&kvm), arch_capabilities(&kvm));
        Ok(Self { kvm, capabilities, arch_capabilities, cpuid: OnceLock::new() })
    }

    /// What this KVM can do beyond the necessary.
    #[must_use]
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// IA32_ARCH_CAPABILITIES as KVM gives it to new guests; 0 where there is none.
    #[must_use]
    pub fn arch_capabilities(&self) -> u64 {
        self.arch_capabilities
    }

    /// The system file descriptor, for the calls that are not wrapped here.
    #[must_use]
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The CPUID leaves that KVM supports on this host. It is asked once; who comes meanwhile waits. KVM reads most leaves
    /// from the CPU anew, which on a host that is itself a guest takes half a millisecond.
    ///
    /// # Errors
    /// [`KvmError::Refused`].
    pub fn supported_cpuid(&self) -> Result<&CpuId, KvmError> {
        let cpuid = self.cpuid.get_or_init(|| self.ask_cpuid());
        cpuid.as_ref().map_err(|source| KvmError::refused("tell the CPUID it supports")(*source))
    }

    fn ask_cpuid(&self) -> Result<CpuId, errno::Error> {
        let mut cpuid = self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        // KVM tells the deadline timer only by a capability (Documentation/virt/kvm/api.rst, KVM_GET_SUPPORTED_CPUID).
        for leaf in cpuid.as_mut_slice().iter_mut().filter(|leaf| leaf.function == 1 && self.capabilities.tsc_deadline)
        {
            leaf.ecx |= CPUID_TSC_DEADLINE;
        }
        Ok(cpuid)
    }

    /// The registers that KVM knows how to save.
    ///
    /// # Errors
    /// [`KvmError::Refused`].
    pub fn msr_list(&self) -> Result<MsrList, KvmError> {
        self.kvm.get_msr_index_list().map_err(KvmError::refused("list its MSRs"))
    }

    /// Makes a VM without memory and vCPUs, with interrupt controllers and timer in the kernel.
    ///
    /// # Errors
    /// [`KvmError::Refused`].
    pub fn create_vm(&self) -> Result<Arc<VmFd>, KvmError> {
        let vm = self.create_vm_without_chips()?;
        self.create_chips(&vm)?;
        Ok(vm)
    }

    /// Makes a VM without memory, chips and vCPUs. Who wants a fast start gives it memory next and chips after that:
    /// the chips begin a slow grace period in the kernel (`call_srcu`), which a new memory slot then waits for, 6 to 12 ms.
    ///
    /// # Errors
    /// [`KvmError::Refused`].
    pub fn create_vm_without_chips(&self) -> Result<Arc<VmFd>, KvmError> {
        let vm = retry_interrupted(|| self.kvm.create_vm()).map_err(KvmError::refused("create a VM"))?;
        let tss = usize::try_from(layout::KVM_TSS.0).expect("addresses have 64 bits on x86-64");
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP.0)
            .map_err(KvmError::refused("place its identity map page"))?;
        vm.set_tss_address(tss).map_err(KvmError::refused("place its task state pages"))?;
        Ok(Arc::new(vm))
    }

    /// Makes the interrupt controllers and the timer of a VM. Must come before its first vCPU.
    ///
    /// # Errors
    /// [`KvmError::Refused`].
    pub fn create_chips(&self, vm: &VmFd) -> Result<(), KvmError> {
        vm.create_irq_chip().map_err(KvmError::refused("create the interrupt controllers"))?;
        // The dummy speaker port lets the guest calibrate its TSC by PIT channel 2 without an exit to us.
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(KvmError::refused("create the timer"))
    }
}

fn arch_capabilities(kvm: &Kvm) -> u64 {
    let register = kvm_msr_entry { index: ARCH_CAPABILITIES, ..Default::default() };
    let mut table = Msrs::from_entries(&[register]).expect("a table of one register is not too long");
    // A KVM on a processor without the register does not know it.
    if kvm.get_msrs(&mut table).is_ok_and(|read| read == 1) { table.as_slice()[0].data } else { 0 }
}

impl Capabilities {
    fn of(kvm: &Kvm) -> Self {
        let value = |cap: u32| u32::try_from(kvm.check_extension_raw(cap.into())).unwrap_or(0);
        let manual = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        Self {
            max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
            manual_dirty_log: value(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) & manual == manual,
            dirty_ring_bytes: value(KVM_CAP_DIRTY_LOG_RING_ACQ_REL),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            tsc_control: kvm.check_extension(Cap::TscControl),
            xsave2_bytes: value(KVM_CAP_XSAVE2),
        }
    }
}

fn open_device(path: &Path) -> Result<Kvm, KvmError> {
    use std::os::unix::ffi::OsStrExt;
    let name = std::ffi::CString::new(path.as_os_str().as_bytes())
        .map_err(|_| KvmError::Missing { path: path.into(), remedy: "the path holds a zero byte" })?;
    Kvm::new_with_path(name).map_err(|source| match source.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing { path: path.into(), remedy: missing_remedy() },
        libc::EACCES | libc::EPERM => KvmError::Permission { path: path.into() },
        _ => KvmError::Open { path: path.into(), source },
    })
}

fn missing_remedy() -> &'static str {
    if virtualization_flag(&cpuinfo()) {
        "load the module kvm_intel or kvm_amd"
    } else {
        "the CPU shows neither VMX nor SVM, so switch virtualization on in the firmware, or nested virtualization if \
         this host is a virtual machine"
    }
}

/// KVM_CREATE_VM fails with EINTR when a signal comes while it allocates; it is then asked again.
fn retry_interrupted<T>(mut ask: impl FnMut() -> Result<T, errno::Error>) -> Result<T, errno::Error> {
    loop {
        match ask() {
            Err(error) if error.errno() == libc::EINTR => {}
            answer => return answer,
        }
    }
}

/// Whether this KVM probably emulates the guest's instructions, because the CPU offers it no virtualization: then an
/// internal error of KVM means that its emulator met an instruction it does not know.
#[must_use]
pub fn likely_emulates() -> bool {
    !virtualization_flag(&cpuinfo())
}

fn cpuinfo() -> String {
    std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()
}

fn virtualization_flag(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    flags.split_whitespace().any(|flag| matches!(flag, "vmx" | "svm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_told_with_a_remedy() {
        let error = KvmHost::open_at(Path::new("/nonexistent/kvm")).unwrap_err();
        assert!(matches!(error, KvmError::Missing { .. }));
        let words = error.to_string();
        assert!(words.starts_with("/nonexistent/kvm is not there: "), "{words}");
    }

    #[test]
    fn a_file_that_is_not_kvm_is_refused() {
        let error = KvmHost::open_at(Path::new("/dev/null")).unwrap_err();
        assert!(matches!(error, KvmError::ApiVersion { found: -1, .. }), "{error}");
    }

    #[test]
    fn a_directory_is_refused_by_the_host() {
        let error = KvmHost::open_at(Path::new("/tmp")).unwrap_err();
        assert!(matches!(error, KvmError::Open { .. }), "{error}");
    }

    #[test]
    fn permission_names_the_group() {
        assert!(KvmError::Permission { path: KVM_DEVICE.into() }.to_string().contains("group kvm"));
    }

    #[test]
    fn flags_are_whole_words_of_the_flags_line() {
        assert!(virtualization_flag("model name: x\nflags\t\t: fpu vmx sse\n"));
        assert!(virtualization_flag("flags : svm"));
        assert!(!virtualization_flag("flags : svm_lock vmxon\nvmx flags : vnmi\n"));
        assert!(!virtualization_flag(""));
    }

    #[test]
    fn a_vm_is_made() {
        let host = KvmHost::open().unwrap();
        assert!(host.capabilities().max_vcpus >= 32);
        assert!(!host.supported_cpuid().unwrap().as_slice().is_empty());
        assert!(std::ptr::eq(host.supported_cpuid().unwrap(), host.supported_cpuid().unwrap()), "KVM is asked once");
        assert!(!host.msr_list().unwrap().as_slice().is_empty());
        host.create_vm().unwrap();
        let vm = host.create_vm_without_chips().unwrap();
        host.create_chips(&vm).unwrap();
        assert!(matches!(host.create_chips(&vm), Err(KvmError::Refused { .. })), "chips are made once");
    }

    #[test]
    fn interrupted_calls_are_repeated() {
        let mut left = 3;
        let answer = retry_interrupted(|| {
            left -= 1;
            if left > 0 { Err(errno::Error::new(libc::EINTR)) } else { Ok(7) }
        });
        assert_eq!(answer, Ok(7));
    }
}
