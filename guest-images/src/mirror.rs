//! Where this machine gets its Debian from.
//!
//! Called by the recipes that need more of it than packages that apt has on offer: mmdebstrap reads neither
//! `/etc/apt/sources.list*` nor `/etc/apt/apt.conf*`, and a suite may not stand in them. So what is needed of them is taken
//! from apt itself, whatever syntax they are written in.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::command;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// apt's settings about how to reach a mirror, as opposed to what to do with it.
const OPTIONS: &[&str] = &["Acquire::http", "Acquire::https", "Acquire::Retries", "Acquire::Check-"];

/// The release of Debian that this machine runs, like `bookworm`.
pub(crate) fn codename() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("Cannot read /etc/os-release")?;
    let codename = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    codename.map(str::to_owned).context("/etc/os-release has no VERSION_CODENAME; this recipe needs Debian")
}

/// The Debian archive as this machine sees it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mirror {
    pub(crate) codename: String,
    /// `deb` lines.
    pub(crate) sources: String,
    /// Lines of an apt.conf.
    pub(crate) options: Vec<String>,
}

impl Mirror {
    pub(crate) fn of_this_machine() -> Result<Self> {
        let codename = codename()?;
        let fields = "$(ORIGIN)|$(CODENAME)|$(COMPONENT)|$(REPO_URI)";
        let targets = command::run(
            Command::new("apt-get").args(["indextargets", "--format", fields, "Created-By: Packages"]),
            "apt",
        )?;
        let settings = command::run(Command::new("apt-config").arg("dump"), "apt")?;
        let mirror = Self::from_apt(&codename, &targets, &settings);
        ensure!(
            !mirror.sources.is_empty(),
            "apt has no package lists of Debian {codename}; run `apt-get update` (or add its `main` to the sources)"
        );
        Ok(mirror)
    }

    /// The `deb` line of this release's backports, from where the release itself comes.
    pub(crate) fn backports(&self) -> Result<String> {
        self.suite(&format!("{}-backports", self.codename))
    }

    /// The `deb` and `deb-src` lines of a suite, from where this release comes.
    pub(crate) fn with_source(&self, suite: &str) -> Result<String> {
        let packages = self.suite(suite)?;
        let source = packages.replacen("deb ", "deb-src ", 1);
        Ok(packages + &source)
    }

    fn suite(&self, suite: &str) -> Result<String> {
        let release = format!(" {} main", self.codename);
        let line = self.sources.lines().find(|line| line.ends_with(&release));
        let line = line.with_context(|| format!("apt has no package lists of Debian {}", self.codename))?;
        Ok(format!("{} {suite} main\n", line.trim_end_matches(&release)))
    }

    fn from_apt(codename: &str, targets: &str, settings: &str) -> Self {
        let mut sources = BTreeSet::new();
        for target in targets.lines() {
            let [origin, suite, component, uri] = target.split('|').collect::<Vec<_>>()[..] else { continue };
            if matches!(origin, "Debian" | "Debian Backports") && suite.starts_with(codename) && component == "main" {
                sources.insert(format!("deb [signed-by={KEYRING}] {uri} {suite} {component}\n"));
            }
        }
        let wanted = |line: &&str| OPTIONS.iter().any(|option| line.starts_with(option));
        let options = settings.lines().filter(wanted).filter(|line| !line.ends_with(" \"\";"));
        Self {
            codename: codename.to_owned(),
            sources: sources.into_iter().collect(),
            options: options.map(|line| line.trim_end_matches(';').to_owned()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_debian_main_of_this_release_is_taken() {
        let targets = "Debian|bookworm|main|http://mirror.test/debian/\nDebian|bookworm-security|main|http://s.test/\n\
            Debian|bookworm|non-free|http://mirror.test/debian/\nDebian|trixie|main|http://mirror.test/debian/\n\
            Docker|bookworm|main|http://docker.test/\nnonsense\nDebian|bookworm|main|http://mirror.test/debian/\n";
        let settings = "APT \"\";\nAcquire::http \"\";\nAcquire::http::Proxy \"http://p:1\";\nAcquire::Check-Date \"false\";\n\
            Acquire::cdrom::mount \"/media\";\n";
        let mirror = Mirror::from_apt("bookworm", targets, settings);
        let line = |uri, suite| format!("deb [signed-by={KEYRING}] {uri} {suite} main\n");
        let expected = line("http://mirror.test/debian/", "bookworm") + &line("http://s.test/", "bookworm-security");
        assert_eq!(mirror.sources, expected);
        let backports = line("http://mirror.test/debian/", "bookworm-backports");
        assert_eq!(mirror.backports().unwrap(), backports);
        let trixie = line("http://mirror.test/debian/", "trixie");
        assert_eq!(mirror.with_source("trixie").unwrap(), format!("{trixie}{}", trixie.replace("deb [", "deb-src [")));
        let only_security = Mirror::from_apt("bookworm", "Debian|bookworm-security|main|http://s.test/\n", "");
        assert!(only_security.backports().is_err());
        assert_eq!(mirror.options, ["Acquire::http::Proxy \"http://p:1\"", "Acquire::Check-Date \"false\""]);
    }

    #[test]
    fn this_machine_has_a_debian_mirror() {
        let mirror = Mirror::of_this_machine().unwrap();
        assert!(mirror.sources.starts_with("deb ["), "{mirror:?}");
    }
}
