//! How a guest ends: what the vCPU threads and the power devices report, the sentence for people and the exit status of
//! `godwit run`. Status 2 (usage) belongs to the command line, and 1 is that of every error: a KVM that cannot run the
//! guest is one.

use std::fmt::{self, Display, Formatter};
use thiserror::Error;

/// Why the guest does not go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestEnd {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reboot,
    /// A vCPU met a fault while handling a double fault, which resets a real machine.
    TripleFault,
    /// The guest's kernel reported that it panicked.
    Panic,
    /// KVM cannot go on with the guest.
    KvmFailure(KvmFailure),
}

impl GuestEnd {
    /// The exit status of the process whose guest ended like this: each way in which a guest ends by itself has its own.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::PowerOff => 0,
            Self::Reboot => 20,
            Self::TripleFault => 21,
            Self::Panic => 22,
            Self::KvmFailure(_) => 1,
        }
    }
}

impl Display for GuestEnd {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("The guest powered off"),
            Self::Reboot => f.write_str("The guest asked for a reboot"),
            Self::TripleFault => f.write_str("The guest stopped by a triple fault"),
            Self::Panic => f.write_str("The guest's kernel panicked"),
            Self::KvmFailure(failure) => Display::fmt(failure, f),
        }
    }
}

/// What KVM said when it gave up a vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum KvmFailure {
    /// KVM_EXIT_INTERNAL_ERROR.
    #[error("{}", internal_error_sentence(*suberror, *rip, instruction, data, *virtualizes))]
    InternalError {
        /// The kind of internal error; 1 is an instruction that KVM cannot emulate.
        suberror: u32,
        /// Where the vCPU was, if KVM still told.
        rip: Option<u64>,
        /// The bytes at that place as KVM read them; empty if it gave none. At most 15.
        instruction: Vec<u8>,
        /// The other words that KVM gave. At most 16.
        data: Vec<u64>,
        /// Whether the host's CPU has SVM or VMX.
        virtualizes: bool,
    },
    /// KVM_EXIT_FAIL_ENTRY.
    #[error("The CPU refused to enter the guest: hardware reason {reason:#x} on host CPU {cpu}")]
    FailEntry {
        /// The hardware's reason.
        reason: u64,
        /// The host CPU it happened on.
        cpu: u32,
    },
    /// An exit that this VMM never asked KVM for.
    #[error("KVM left the guest for a reason that is not expected here: {exit}")]
    UnexpectedExit {
        /// The reason's name or number.
        exit: String,
    },
    /// KVM_RUN itself failed.
    #[error("KVM could not run the guest: {}", std::io::Error::from_raw_os_error(*errno))]
    Run {
        /// The error number.
        errno: i32,
    },
    /// The dirty ring was full and could not be emptied.
    #[error("A vCPU's dirty ring was full and could not be emptied: {reason}")]
    RingFull {
        /// What went wrong.
        reason: String,
    },
    /// A vCPU's thread panicked, in a device or in the VMM.
    #[error("The thread of a vCPU panicked, which is a bug in godwit")]
    ThreadPanicked,
}

/// The suberror of an instruction that KVM cannot emulate (Linux Documentation/virt/kvm/api.rst, KVM_EXIT_INTERNAL_ERROR).
pub(super) const SUBERROR_EMULATION: u32 = 1;

fn internal_error_sentence(
    suberror: u32,
    rip: Option<u64>,
    instruction: &[u8],
    data: &[u64],
    virtualizes: bool,
) -> String {
    let mut sentence = format!("KVM internal error, suberror {suberror}");
    if let Some(rip) = rip {
        sentence += &format!(", at instruction {rip:#x}");
    }
    if !instruction.is_empty() {
        let bytes: Vec<String> = instruction.iter().map(|byte| format!("{byte:02x}")).collect();
        sentence += &format!(" (bytes {})", bytes.join(" "));
    } else if !data.is_empty() {
        sentence += &format!(" (data {data:x?})");
    }
    if suberror == SUBERROR_EMULATION {
        sentence += if virtualizes {
            ": KVM cannot emulate this instruction; the guest may have jumped out of its memory"
        } else {
            ": this KVM emulates instructions in software (the CPU has neither svm nor vmx) and cannot run this \
             guest. Run it in the nested lab instead: cargo xtask lab"
        };
    }
    sentence
}

#[cfg(test)]
mod tests {
    use super::*;

    fn emulation(virtualizes: bool) -> GuestEnd {
        GuestEnd::KvmFailure(KvmFailure::InternalError {
            suberror: 1,
            rip: Some(0x1000),
            instruction: vec![0x0f, 0xc7],
            data: vec![],
            virtualizes,
        })
    }

    #[test]
    fn each_end_of_a_guests_own_has_its_status() {
        let ends = [GuestEnd::PowerOff, GuestEnd::Reboot, GuestEnd::TripleFault, GuestEnd::Panic, emulation(false)];
        let statuses: Vec<u8> = ends.iter().map(GuestEnd::exit_status).collect();
        assert_eq!(statuses, [0, 20, 21, 22, 1]);
    }

    #[test]
    fn an_instruction_that_software_kvm_lacks_names_the_lab() {
        assert_eq!(
            emulation(false).to_string(),
            "KVM internal error, suberror 1, at instruction 0x1000 (bytes 0f c7): this KVM emulates instructions in \
             software (the CPU has neither svm nor vmx) and cannot run this guest. Run it in the nested lab instead: \
             cargo xtask lab"
        );
        assert!(!emulation(true).to_string().contains("lab"));
    }

    #[test]
    fn other_failures_name_their_values() {
        let internal = KvmFailure::InternalError {
            suberror: 3,
            rip: None,
            instruction: vec![],
            data: vec![0x20],
            virtualizes: true,
        };
        assert_eq!(internal.to_string(), "KVM internal error, suberror 3 (data [20])");
        assert!(KvmFailure::FailEntry { reason: 0x21, cpu: 1 }.to_string().contains("0x21 on host CPU 1"));
        assert!(KvmFailure::Run { errno: 14 }.to_string().contains("Bad address"));
    }
}
