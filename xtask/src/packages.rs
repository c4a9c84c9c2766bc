//! The Debian packages that tasks need: found missing, named, and installed before the task begins.
//!
//! Rust and a C linker are taken for granted, because without them there is no `cargo xtask`.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use godwit_tests::place::Accelerator;
use godwit_tests::scenarios::nbd;
use guest_images::{debian, emulator, kernel, micro, tiny};

/// What a nested lab is made of beside QEMU: the shell and the network tools inside, mke2fs for its root, ldd, and setpriv
/// around QEMU.
const LAB: &[&str] = &["busybox-static", "iproute2", "e2fsprogs", "libc-bin", "util-linux"];

/// Packages of `cargo xtask lab`.
pub(crate) fn for_lab() -> Vec<&'static str> {
    [emulator::PACKAGES, to_emulate(&Accelerator::candidates()), LAB, kernel::PACKAGES].concat()
}

/// Packages of `cargo xtask test`.
pub(crate) fn for_test() -> Vec<&'static str> {
    [
        emulator::PACKAGES,
        to_emulate(&Accelerator::candidates()),
        LAB,
        kernel::PACKAGES,
        tiny::PACKAGES,
        micro::PACKAGES,
        debian::PACKAGES,
        nbd::PACKAGES,
        &["curl", "iputils-ping", "openssh-client"],
    ]
    .concat()
}

/// Packages of `cargo xtask bench migrate`: QEMU, the micro guest's tools, links between namespaces, and a stream to compare
/// with.
pub(crate) fn for_migration_bench() -> Vec<&'static str> {
    [emulator::PACKAGES, micro::PACKAGES, &["iperf3", "iproute2", "util-linux"]].concat()
}

/// What the emulator of a lab is built with, where there is no way but to emulate it.
fn to_emulate(candidates: &[Accelerator]) -> &'static [&'static str] {
    if candidates == [Accelerator::Tcg] { emulator::BUILD_PACKAGES } else { &[] }
}

/// Installs those that are missing, and says which before it does.
pub(crate) fn ensure(wanted: &[&str]) -> Result<()> {
    let missing = missing(wanted)?;
    if !missing.is_empty() {
        let list = missing.iter().copied().collect::<Vec<_>>().join(" ");
        eprintln!("Installing Debian packages: {list}");
        update()?;
        let install = ["install", "-y", "--no-install-recommends"];
        let installed = apt_get(&[&install[..], &missing.into_iter().collect::<Vec<_>>()].concat());
        return installed.with_context(|| format!("Install these Debian packages by hand: {list}"));
    }
    if !knows_packages() {
        eprintln!("Updating apt's package lists, from which the guest images are made");
        update()?;
    }
    Ok(())
}

fn missing<'a>(wanted: &[&'a str]) -> Result<BTreeSet<&'a str>> {
    let mut command = Command::new("dpkg-query");
    command.args(["--show", "--showformat", "${binary:Package} ${db:Status-Status}\n"]).args(wanted);
    let output = command.output().context("Cannot run dpkg-query; these tasks need Debian or a relative of it")?;
    // It fails when it does not know one of them, and still lists the others.
    Ok(not_installed(wanted, &String::from_utf8_lossy(&output.stdout)))
}

fn not_installed<'a>(wanted: &[&'a str], listing: &str) -> BTreeSet<&'a str> {
    let installed = listing.lines().filter_map(|line| line.strip_suffix(" installed"));
    // A package of several architectures is listed as `name:amd64`.
    let installed: BTreeSet<&str> = installed.map(|name| name.split(':').next().unwrap_or(name)).collect();
    wanted.iter().copied().filter(|name| !installed.contains(name)).collect()
}

/// Whether apt has package lists at all; a fresh machine may have none.
fn knows_packages() -> bool {
    let mut show = Command::new("apt-cache");
    show.args(["show", "--no-all-versions", "linux-image-cloud-amd64"]).stdout(Stdio::null()).stderr(Stdio::null());
    show.status().is_ok_and(|status| status.success())
}

fn update() -> Result<()> {
    apt_get(&["update"])
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let mut command = if is_root() {
        Command::new("apt-get")
    } else {
        ensure!(has_sudo(), "This needs root, and there is no sudo: apt-get {}", arguments.join(" "));
        let mut sudo = Command::new("sudo");
        sudo.args(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
        sudo
    };
    // Results alone belong on standard output.
    command.arg("-q").args(arguments).env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
    let status = command.stdout(std::io::stderr()).status().context("Cannot run apt-get")?;
    if !status.success() {
        bail!("apt-get {} failed ({status})", arguments.join(" "));
    }
    Ok(())
}

fn has_sudo() -> bool {
    Command::new("sudo").arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|it| it.success())
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[cfg(test)]
mod tests {
    use godwit_tests::place::Virtualization;

    use super::*;

    #[test]
    fn only_installed_packages_count() {
        let listing = "libc-bin installed\nzlib1g:amd64 installed\nqemu-system-x86 config-files\n";
        let missing = not_installed(&["libc-bin", "zlib1g", "qemu-system-x86", "iproute2"], listing);
        assert_eq!(missing.into_iter().collect::<Vec<_>>(), ["iproute2", "qemu-system-x86"]);
    }

    #[test]
    fn compilers_come_only_where_a_lab_must_be_emulated() {
        assert!(to_emulate(&[Accelerator::Tcg]).contains(&"gcc"));
        assert!(to_emulate(&[Accelerator::Kvm(Virtualization::Svm), Accelerator::Tcg]).is_empty());
    }

    #[test]
    fn an_unknown_package_is_missing() {
        let missing = missing(&["dpkg", "godwit-no-such-package"]).unwrap();
        assert_eq!(missing.into_iter().collect::<Vec<_>>(), ["godwit-no-such-package"]);
    }
}
