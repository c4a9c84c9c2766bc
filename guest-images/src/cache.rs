//! The directory where finished images stay.
//!
//! Every recipe goes through [`Cache::get`]. One entry is one directory named after the recipe, something readable and
//! a hash of everything that its content depends on: a changed recipe, package version or input is another name, and
//! so a new build. An entry appears by one rename of a finished directory: what is there is whole. A lock file per
//! recipe keeps two builders, in one process or several, from doing the same work; a recipe asks for its ingredients
//! *before* it enters `get`, so no builder ever holds two locks.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// What an entry's content depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key(u64);

impl Key {
    /// The FNV-1a offset basis and prime (64 bits). A cache of a developer's own machine needs no stronger hash.
    const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;

    pub(crate) fn new() -> Self {
        Self(Self::BASIS)
    }

    /// Adds one ingredient. Its length goes in too, so that `ab`, `c` differs from `a`, `bc`.
    pub(crate) fn with(self, ingredient: impl AsRef<[u8]>) -> Self {
        let ingredient = ingredient.as_ref();
        let length = (ingredient.len() as u64).to_le_bytes();
        let bytes = length.iter().chain(ingredient);
        Self(bytes.fold(self.0, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(Self::PRIME)))
    }
}

#[derive(Debug)]
pub(crate) struct Cache {
    directory: PathBuf,
}

impl Cache {
    pub(crate) fn open(directory: &Path) -> Result<Self> {
        let cannot = || format!("Cannot make the image cache {}", directory.display());
        fs::create_dir_all(directory).with_context(cannot)?;
        Ok(Self { directory: directory.canonicalize().with_context(cannot)? })
    }

    /// The directory of the entry, built by `build` (which fills the directory that it is given) when it is not there.
    pub(crate) fn get(
        &self,
        recipe: &str,
        label: &str,
        key: Key,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let entry = self.directory.join(format!("{recipe}-{label}-{:016x}", key.0));
        if entry.is_dir() {
            return Ok(entry);
        }
        let _lock = self.lock(recipe)?;
        if entry.is_dir() {
            return Ok(entry);
        }
        let unfinished = self.directory.join(format!(".{recipe}-unfinished"));
        remove_if_there(&unfinished)?;
        fs::create_dir(&unfinished).with_context(|| format!("Cannot make {}", unfinished.display()))?;
        tracing::info!(recipe, label, "building a guest image");
        let built = build(&unfinished).with_context(|| format!("Cannot build the guest image `{recipe}` ({label})"));
        if let Err(error) = built {
            // The build's own error matters more than what is left of it; the next build removes that first.
            if let Err(left) = remove_if_there(&unfinished) {
                tracing::warn!("{left:#}");
            }
            return Err(error);
        }
        fs::rename(&unfinished, &entry).with_context(|| format!("Cannot publish {}", entry.display()))?;
        Ok(entry)
    }

    /// Holds the recipe's lock until the file is dropped, or its holder dies.
    fn lock(&self, recipe: &str) -> Result<File> {
        let path = self.directory.join(format!(".{recipe}.lock"));
        let cannot = || format!("Cannot lock {}", path.display());
        let file = File::create(&path).with_context(cannot)?;
        file.lock().with_context(cannot)?;
        Ok(file)
    }
}

fn remove_if_there(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("Cannot remove the unfinished image {}", directory.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(&directory.path().join("deep/cache")).unwrap();
        (directory, cache)
    }

    #[test]
    fn an_entry_is_built_once_per_key() {
        let (_directory, cache) = cache();
        let key = Key::new().with("one");
        let build = |text: &'static str| move |path: &Path| Ok(fs::write(path.join("file"), text)?);
        let first = cache.get("thing", "v1", key, build("first")).unwrap();
        let again = cache.get("thing", "v1", key, build("second")).unwrap();
        assert_eq!(first, again);
        assert_eq!(fs::read_to_string(again.join("file")).unwrap(), "first");
        let other = cache.get("thing", "v1", key.with("two"), build("third")).unwrap();
        assert_eq!(fs::read_to_string(other.join("file")).unwrap(), "third");
    }

    #[test]
    fn a_failed_build_leaves_nothing_and_can_be_repeated() {
        let (_directory, cache) = cache();
        let key = Key::new();
        let failed = cache.get("thing", "v1", key, |path| {
            fs::write(path.join("half"), "")?;
            anyhow::bail!("no flour")
        });
        assert_eq!(format!("{:#}", failed.unwrap_err()), "Cannot build the guest image `thing` (v1): no flour");
        let entry = cache.get("thing", "v1", key, |_| Ok(())).unwrap();
        assert_eq!(fs::read_dir(entry).unwrap().count(), 0);
    }

    #[test]
    fn the_rest_of_a_killed_builder_is_removed() {
        let (_directory, cache) = cache();
        fs::create_dir(cache.directory.join(".thing-unfinished")).unwrap();
        fs::write(cache.directory.join(".thing-unfinished/old"), "").unwrap();
        let entry = cache.get("thing", "v1", Key::new(), |_| Ok(())).unwrap();
        assert_eq!(fs::read_dir(entry).unwrap().count(), 0);
    }

    #[test]
    fn two_builders_do_the_work_once() {
        let (_directory, cache) = cache();
        let built = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let build = |_: &Path| {
                        built.fetch_add(1, Ordering::Relaxed);
                        std::thread::sleep(Duration::from_millis(20));
                        Ok(())
                    };
                    cache.get("thing", "v1", Key::new(), build).unwrap();
                });
            }
        });
        assert_eq!(built.into_inner(), 1);
    }

    #[test]
    fn keys_tell_ingredients_apart() {
        let key = |parts: &[&str]| parts.iter().fold(Key::new(), |key, part| key.with(part)).0;
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
        assert_ne!(key(&["a"]), key(&["a", ""]));
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
    }

    #[test]
    fn a_cache_that_cannot_be_made_is_named() {
        let error = Cache::open(Path::new("/proc/no/cache")).unwrap_err();
        assert_eq!(error.to_string(), "Cannot make the image cache /proc/no/cache");
    }
}
