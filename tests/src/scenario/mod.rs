//! The frame of the end-to-end scenarios: what one is, what it is given, and how a list of them is run.
//!
//! A scenario is a function that runs in a process of its own, with its own folder for temporary files. The
//! runner ([`runner`]) gives it a time limit, looks for leftovers afterwards ([`leftovers`]), and tells. The scenarios
//! themselves are in [`crate::scenarios`].

pub(crate) mod leftovers;
pub mod runner;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// Where a scenario can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// On this host: Debian's programs, and no guest.
    Host,
    /// Wherever `/dev/kvm` opens: micro guests only, at the speed of this host.
    Kvm,
    /// Where stock Linux guests run: on this host if it can, else in a lab.
    LinuxGuests,
    /// As `LinuxGuests`, with the disk of the `debian` image, which takes minutes to make the first time.
    Debian,
    /// In a lab always: joins hosts by a network with delay, or changes the machine in other ways.
    Lab,
}

/// One end-to-end check.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    /// Unique; words joined by `-`.
    pub name: &'static str,
    /// One sentence: what holds when it passes.
    pub about: &'static str,
    /// Where it can run.
    pub needs: Needs,
    /// It is killed when it takes longer.
    pub timeout: Duration,
    /// Returns when everything held; the first thing that did not is the error.
    pub run: fn(&Context) -> Result<()>,
}

/// What a scenario works with.
#[derive(Debug, Clone)]
pub struct Context {
    /// The `godwit` binary.
    pub godwit: PathBuf,
    /// The folder of guest images.
    pub images: PathBuf,
    /// A folder of its own. Sockets in it must be gone at the end; other files may stay.
    pub work: PathBuf,
}

/// Name of the folder, beside that of the images, with disks that are too big to be copied along.
pub const DISKS: &str = "disks";

impl Context {
    /// Path of a disk; what a scenario writes to it must not outlive a lab, so on a host it takes a copy.
    pub fn disk(&self, name: &str) -> PathBuf {
        self.images.with_file_name(DISKS).join(name)
    }

    /// The same with another `godwit`, which is this one in a world of its own: a shell script that makes it, and whose
    /// last words are the command that godwit and its arguments follow.
    pub fn within(&self, name: &str, world: &str) -> Result<Self> {
        let wrapper = self.work.join(name);
        let script = format!("#!/bin/sh\nset -e\n{world} {} \"$@\"\n", self.godwit.display());
        fs::write(&wrapper, script)?;
        fs::set_permissions(&wrapper, Permissions::from_mode(0o755))?;
        Ok(Self { godwit: wrapper, ..self.clone() })
    }
}

/// Finds a scenario by its whole name.
pub fn named<'a>(list: &'a [Scenario], name: &str) -> Result<&'a Scenario> {
    list.iter().find(|scenario| scenario.name == name).with_context(|| format!("There is no scenario {name:?}"))
}

/// The scenarios whose name contains one of the filters; all of them without filters.
pub fn select<'a>(list: &'a [Scenario], filters: &[String]) -> Vec<&'a Scenario> {
    let wanted = |scenario: &&Scenario| filters.is_empty() || filters.iter().any(|part| scenario.name.contains(part));
    list.iter().filter(wanted).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scenario(name: &'static str) -> Scenario {
        Scenario { name, about: "", needs: Needs::Kvm, timeout: Duration::ZERO, run: |_| Ok(()) }
    }

    #[test]
    fn filters_are_parts_of_names() {
        let list = [scenario("boot-tiny"), scenario("boot-debian"), scenario("migrate-live")];
        let names = |filters: &[&str]| {
            let filters: Vec<String> = filters.iter().map(ToString::to_string).collect();
            select(&list, &filters).iter().map(|scenario| scenario.name).collect::<Vec<_>>()
        };
        assert_eq!(names(&[]).len(), 3);
        assert_eq!(names(&["boot"]), ["boot-tiny", "boot-debian"]);
        assert_eq!(names(&["live", "debian"]), ["boot-debian", "migrate-live"]);
        assert!(names(&["moon"]).is_empty());
        assert_eq!(named(&list, "boot").unwrap_err().to_string(), "There is no scenario \"boot\"");
    }
}
