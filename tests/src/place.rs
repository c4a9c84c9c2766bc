//! Where Linux guests can run: on this host, or in a nested lab. Found out by trying, never by assuming.
//!
//! Asked by `xtask` and by whoever ships scenarios. A KVM may open, answer version 12 and still be unable to run a stock
//! kernel: without the processor's own virtualization it emulates every instruction, and its emulator lacks some. So
//! three things must hold for the host: `/dev/kvm` makes a machine, the processor has SVM or VMX, and a trial boot, where
//! the caller has one, succeeds.

use std::fmt;
use std::fs;

use anyhow::{Context, Result, bail, ensure};
use kvm_ioctls::Kvm;

/// Overrides the choice: `host` or `lab`.
pub const PLACE_VARIABLE: &str = "GODWIT_PLACE";

/// The one version of KVM's interface (Linux Documentation/virt/kvm/api.rst, KVM_GET_API_VERSION).
const KVM_API_VERSION: i32 = 12;

/// Where to run what needs Linux guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// On this machine's own KVM.
    Host,
    /// In a nested lab.
    Lab,
}

/// A place, and why it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The place.
    pub place: Place,
    /// The reason in words.
    pub reason: String,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match self.place {
            Place::Host => "on this host",
            Place::Lab => "in the nested lab",
        };
        write!(f, "Linux guests run {place}: {}", self.reason)
    }
}

impl Choice {
    /// Decides. `trial` boots a stock guest on this host and is called only where everything else speaks for it.
    pub fn make(trial: impl FnOnce() -> Result<()>) -> Result<Self> {
        match std::env::var(PLACE_VARIABLE) {
            Ok(asked) => asked_for(&asked),
            Err(_) => Ok(judge(kvm_works(), virtualization(), trial)),
        }
    }
}

fn asked_for(asked: &str) -> Result<Choice> {
    let place = match asked {
        "host" => Place::Host,
        "lab" => Place::Lab,
        other => bail!("{PLACE_VARIABLE} is {other:?}; it must be `host` or `lab`"),
    };
    Ok(Choice { place, reason: format!("{PLACE_VARIABLE}={asked}") })
}

fn judge(kvm: Result<()>, virtualization: Option<Virtualization>, trial: impl FnOnce() -> Result<()>) -> Choice {
    let lab = |reason| Choice { place: Place::Lab, reason };
    if let Err(error) = kvm {
        return lab(format!("{error:#}"));
    }
    let Some(virtualization) = virtualization else {
        return lab("/dev/kvm works, but the processor shows neither svm nor vmx, so this KVM emulates".to_owned());
    };
    match trial() {
        Ok(()) => {
            Choice { place: Place::Host, reason: format!("/dev/kvm works and the processor has {virtualization}") }
        }
        Err(error) => lab(format!("a stock guest does not run on this KVM: {error:#}")),
    }
}

/// Whether `/dev/kvm` opens, speaks the version, and makes a virtual machine; says why not.
pub fn kvm_works() -> Result<()> {
    let kvm = Kvm::new().context("/dev/kvm cannot be opened")?;
    let version = kvm.get_api_version();
    ensure!(version == KVM_API_VERSION, "/dev/kvm speaks version {version}, not {KVM_API_VERSION}");
    kvm.create_vm().context("/dev/kvm makes no virtual machine")?;
    Ok(())
}

/// The processor's own virtualization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Virtualization {
    /// AMD's.
    Svm,
    /// Intel's.
    Vmx,
}

impl Virtualization {
    /// The kernel module that drives it.
    pub fn module(self) -> &'static str {
        match self {
            Self::Svm => "kvm-amd",
            Self::Vmx => "kvm-intel",
        }
    }
}

impl fmt::Display for Virtualization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Svm => "svm",
            Self::Vmx => "vmx",
        })
    }
}

/// What this machine's processor has of it.
pub fn virtualization() -> Option<Virtualization> {
    flags_of(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
}

fn flags_of(cpuinfo: &str) -> Option<Virtualization> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    let has = |flag| flags.split_whitespace().any(|found| found == flag);
    if has("svm") { Some(Virtualization::Svm) } else { has("vmx").then_some(Virtualization::Vmx) }
}

/// How QEMU runs a lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// On this machine's KVM, which can nest.
    Kvm(Virtualization),
    /// By software emulation, of SVM too: everywhere.
    Tcg,
}

impl Accelerator {
    /// The accelerators to try for a lab, best first.
    pub fn candidates() -> Vec<Self> {
        let nesting = |module: &str| {
            let parameter = format!("/sys/module/{}/parameters/nested", module.replace('-', "_"));
            fs::read_to_string(parameter).is_ok_and(|value| matches!(value.trim(), "1" | "Y"))
        };
        let native = virtualization().filter(|found| nesting(found.module()) && kvm_works().is_ok());
        native.map(Self::Kvm).into_iter().chain([Self::Tcg]).collect()
    }

    /// The virtualization that the lab's processor has.
    pub fn virtualization(self) -> Virtualization {
        match self {
            Self::Kvm(virtualization) => virtualization,
            Self::Tcg => Virtualization::Svm,
        }
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kvm(virtualization) => write!(f, "KVM with {virtualization}"),
            Self::Tcg => f.write_str("software emulation"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails() -> Result<()> {
        bail!("suberror 1")
    }

    #[test]
    fn the_host_needs_kvm_and_flag_and_a_boot() {
        let svm = Some(Virtualization::Svm);
        let cases = [
            (judge(Ok(()), svm, || Ok(())), Place::Host, "has svm"),
            (judge(Ok(()), svm, fails), Place::Lab, "suberror 1"),
            (judge(Ok(()), None, || panic!("nothing to try")), Place::Lab, "neither svm nor vmx"),
            (judge(fails(), svm, || panic!("nothing to try")), Place::Lab, "suberror 1"),
        ];
        for (choice, place, reason) in cases {
            assert_eq!(choice.place, place, "{choice}");
            assert!(choice.reason.contains(reason), "{choice}");
        }
    }

    #[test]
    fn the_variable_is_obeyed_or_refused() {
        assert_eq!(asked_for("host").unwrap().place, Place::Host);
        assert_eq!(asked_for("lab").unwrap().place, Place::Lab);
        assert!(asked_for("moon").unwrap_err().to_string().contains("\"moon\""));
    }

    #[test]
    fn flags_are_whole_words() {
        assert_eq!(flags_of("flags\t\t: fpu svm_lock avx\n"), None);
        assert_eq!(flags_of("model\t: svm\nflags\t\t: fpu svm avx\n"), Some(Virtualization::Svm));
        assert_eq!(flags_of("flags\t\t: fpu vmx\n"), Some(Virtualization::Vmx));
    }
}
