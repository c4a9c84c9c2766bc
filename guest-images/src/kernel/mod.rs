//! The `kernel` recipe: Debian's cloud kernel, unpacked and never installed.
//!
//! Gives the bzImage as packaged, the ELF `vmlinux` inside it, and the modules by name. Called through
//! [`crate::Images::kernel`]; the other recipes and the lab build on it.

pub mod bzimage;
pub mod modules;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::apt::{Candidate, Sources};
use crate::cache::{Cache, Key};
use modules::{Index, Module};

/// The meta package that always depends on the newest kernel image.
const META_PACKAGE: &str = "linux-image-cloud-amd64";
const IMAGE_PREFIX: &str = "linux-image-";
/// Debian packages whose tools this recipe calls; every Debian machine has them.
pub const PACKAGES: &[&str] = crate::apt::PACKAGES;
/// Everything that shapes an entry besides the package; count up when this recipe changes.
const REVISION: &str = "1";
const INDEX: &str = "modules.index";

/// A kernel in the cache.
#[derive(Clone, Debug)]
pub struct Kernel {
    directory: PathBuf,
    release: String,
    version: String,
}

impl Kernel {
    pub(crate) fn fetch(cache: &Cache) -> Result<Self> {
        let meta = Sources::own().candidate(META_PACKAGE)?;
        let image = meta
            .exact_dependency(IMAGE_PREFIX)
            .with_context(|| format!("{META_PACKAGE} {} depends on no kernel image", meta.version))?;
        let release = image.package.trim_start_matches(IMAGE_PREFIX).to_owned();
        let key = Key::new().with(REVISION).with(&image.package).with(&image.version);
        let directory = cache.get("kernel", &release, key, |into| build(&image, &release, into))?;
        Ok(Self { directory, release, version: image.version })
    }

    /// The bzImage.
    pub fn bzimage(&self) -> PathBuf {
        self.directory.join("vmlinuz")
    }

    /// The ELF kernel that was packed in the bzImage. It boots by PVH and by the 64-bit protocol.
    pub fn vmlinux(&self) -> PathBuf {
        self.directory.join("vmlinux")
    }

    /// What `uname -r` says in it, like `6.1.0-56-cloud-amd64`.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The Debian version of the package, like `6.1.192-2`.
    pub fn package_version(&self) -> &str {
        &self.version
    }

    /// The tree that belongs at `/lib/modules/RELEASE` of an installed system.
    pub fn modules_tree(&self) -> PathBuf {
        self.directory.join("modules")
    }

    /// The named modules and all that they depend on, in an order in which `insmod` takes them. Names may be written
    /// with `-` or `_`; what this kernel has built in is left out.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<Module>> {
        let path = self.directory.join(INDEX);
        let text = fs::read_to_string(&path).with_context(|| format!("Cannot read {}", path.display()))?;
        Ok(Index::from_text(&text)?.ordered(names, &self.modules_tree())?)
    }
}

fn build(image: &Candidate, release: &str, into: &Path) -> Result<()> {
    let unpacked = tempfile::tempdir_in(into).context("Cannot make a temporary directory")?;
    Sources::own().unpack(image, unpacked.path())?;
    let vmlinuz = into.join("vmlinuz");
    fs::rename(unpacked.path().join(format!("boot/vmlinuz-{release}")), &vmlinuz)
        .with_context(|| format!("The package {} has no boot/vmlinuz-{release}", image.package))?;
    fs::write(into.join("vmlinux"), bzimage::vmlinux(&fs::read(&vmlinuz)?)?)?;
    let tree = into.join("modules");
    // A merged-/usr package of a later Debian release has its modules below /usr/lib.
    let places = ["lib/modules", "usr/lib/modules"].map(|place| unpacked.path().join(place).join(release));
    let packed = places.iter().find(|place| place.is_dir());
    let packed = packed.with_context(|| format!("The package {} has no modules", image.package))?;
    fs::rename(packed, &tree)?;
    let mut index = Index::default();
    index.add_built_in(&fs::read_to_string(tree.join("modules.builtin"))?);
    let count = add_all(&tree, &tree, &mut index)?;
    ensure!(count > 0, "The package {} has no uncompressed modules (.ko)", image.package);
    fs::write(into.join(INDEX), index.to_text())?;
    Ok(())
}

/// Indexes every module below `directory` and counts them.
fn add_all(directory: &Path, root: &Path, index: &mut Index) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() && !path.is_symlink() {
            count += add_all(&path, root, index)?;
        } else if path.extension().is_some_and(|extension| extension == "ko") {
            let inner = path.strip_prefix(root).expect("entries lie below the directory that was read");
            let inner = inner.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
            index.add(inner, &fs::read(&path)?)?;
            count += 1;
        }
    }
    Ok(count)
}
