//! Debian packages and their sources, fetched and checked by apt and unpacked beside the system, never installed.
//!
//! Called by the recipes. apt knows the mirrors and verifies the archive's signature down to the package's checksum, so
//! no host name and no key stand in this repository.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::command;

/// The Debian package of `apt-get` and `apt-cache`.
const APT: &str = "apt";
/// The Debian package of `dpkg-deb`.
const DPKG: &str = "dpkg";
/// The Debian package of `dpkg-source`, and of what unpacking a source takes: `patch`, `tar`, `xz`.
pub(crate) const DPKG_DEV: &str = "dpkg-dev";

/// Debian packages whose tools fetch and unpack others; every Debian machine has them.
pub(crate) const PACKAGES: &[&str] = &[APT, DPKG];

/// Where packages come from.
#[derive(Debug)]
pub(crate) struct Sources {
    options: Vec<String>,
    /// Holds the lists that the options name.
    _folder: Option<TempDir>,
}

impl Sources {
    /// The sources of this machine.
    pub(crate) fn own() -> Self {
        // apt would drop its privileges to a user who may not write to the folders here, and warn about that.
        Self { options: vec!["APT::Sandbox::User=root".to_owned()], _folder: None }
    }

    /// The sources in `lines` (sources.list(5)) and no others. Their package lists are fetched, and kept beside those of
    /// this machine for as long as this value lives.
    pub(crate) fn fetch(lines: &str) -> Result<Self> {
        let folder = tempfile::tempdir().context("Cannot make a temporary directory")?;
        let path = |name: &str| folder.path().join(name).display().to_string();
        fs::write(path("sources.list"), lines)?;
        fs::create_dir_all(path("cache/archives/partial"))?;
        fs::create_dir_all(path("lists/partial"))?;
        let mut options = Self::own().options;
        options.extend([
            format!("Dir::Etc::SourceList={}", path("sources.list")),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            format!("Dir::State::Lists={}", path("lists")),
            format!("Dir::Cache={}", path("cache")),
            "Acquire::Languages=none".to_owned(),
        ]);
        let sources = Self { options, _folder: Some(folder) };
        command::run(sources.command("apt-get").args(["-q", "update"]), APT)?;
        Ok(sources)
    }

    fn command(&self, tool: &str) -> Command {
        let mut command = Command::new(tool);
        command.args(self.options.iter().flat_map(|option| ["-o", option]));
        command
    }

    /// The version of a package that apt would install from here.
    pub(crate) fn candidate(&self, package: &str) -> Result<Candidate> {
        let record = command::run(self.command("apt-cache").args(["show", "--no-all-versions", package]), APT)
            .with_context(|| format!("apt does not know the package `{package}`; run `apt-get update` first"))?;
        Candidate::from_record(&record).with_context(|| format!("apt-cache shows nothing of use for `{package}`"))
    }

    /// Downloads a package and unpacks its files below `into`.
    pub(crate) fn unpack(&self, candidate: &Candidate, into: &Path) -> Result<()> {
        let Candidate { package, version, depends: _ } = candidate;
        let download = tempfile::tempdir().context("Cannot make a temporary directory")?;
        tracing::info!(package, version, "downloading");
        let mut get = self.command("apt-get");
        get.args(["-q", "download", &format!("{package}={version}")]).current_dir(download.path());
        command::run(&mut get, APT)
            .context("If the mirror has gone ahead of this machine's package lists, `apt-get update` helps")?;
        let Some(archive) = fs::read_dir(download.path())?.next() else {
            bail!("apt-get downloaded nothing for {package} {version}");
        };
        command::run(Command::new("dpkg-deb").arg("-x").arg(archive?.path()).arg(into), DPKG)?;
        Ok(())
    }

    /// Downloads the newest source of a package and unpacks it as the directory `into`, with Debian's patches applied.
    pub(crate) fn unpack_source(&self, package: &str, into: &Path) -> Result<()> {
        let download = tempfile::tempdir().context("Cannot make a temporary directory")?;
        tracing::info!(package, "downloading the source");
        let mut get = self.command("apt-get");
        get.args(["-q", "source", "--only-source", "--download-only", package]).current_dir(download.path());
        command::run(&mut get, APT)?;
        let files = fs::read_dir(download.path())?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        let description = files.iter().find(|path| path.extension().is_some_and(|kind| kind == "dsc"));
        let description = description.with_context(|| format!("apt-get downloaded no source of {package}"))?;
        // apt has compared the checksums with those of the archive's signed index.
        let mut unpack = Command::new("dpkg-source");
        unpack.args(["--no-check", "--extract"]).arg(description).arg(into);
        command::run(&mut unpack, DPKG_DEV)?;
        Ok(())
    }
}

/// A package in the version that apt would install.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) package: String,
    pub(crate) version: String,
    /// The `Depends:` field as it stands.
    depends: String,
}

impl Candidate {
    fn from_record(record: &str) -> Option<Self> {
        let field = |name: &str| record.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        Some(Self {
            package: field("Package:")?.to_owned(),
            version: field("Version:")?.to_owned(),
            depends: field("Depends:").unwrap_or_default().to_owned(),
        })
    }

    /// The direct dependency `PREFIX… (= VERSION)`: how a meta package names the real one.
    pub(crate) fn exact_dependency(&self, prefix: &str) -> Option<Self> {
        let mut dependencies = self.depends.split(',').map(str::trim);
        let (package, version) = dependencies.find(|name| name.starts_with(prefix))?.split_once(" (= ")?;
        let version = version.strip_suffix(')')?.to_owned();
        Some(Self { package: package.to_owned(), version, depends: String::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &str = "Package: linux-image-cloud-amd64\nSource: linux-signed\nVersion: 6.1.192-2\n\
        Depends: linux-base, linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\nDescription-en: x\n Package: fake\n";

    #[test]
    fn a_record_of_apt_is_read() {
        let candidate = Candidate::from_record(RECORD).unwrap();
        assert_eq!((&*candidate.package, &*candidate.version), ("linux-image-cloud-amd64", "6.1.192-2"));
        let image = candidate.exact_dependency("linux-image-").unwrap();
        assert_eq!((&*image.package, &*image.version), ("linux-image-6.1.0-56-cloud-amd64", "6.1.192-2"));
        assert_eq!(candidate.exact_dependency("linux-base"), None);
        assert_eq!(candidate.exact_dependency("nothing-"), None);
        assert_eq!(Candidate::from_record("Package: x\n"), None);
    }

    #[test]
    fn an_unknown_package_comes_with_the_remedy() {
        let error = Sources::own().candidate("godwit-no-such-package").unwrap_err().to_string();
        assert!(error.contains("`godwit-no-such-package`") && error.contains("apt-get update"), "{error}");
    }
}
