//! What `--disk` takes: where a disk is, and how the guest and the host use it.

use super::whole;
use crate::values::{Settings, rate, time};
use std::num::NonZeroU16;
use std::path::Path;
use vmm::config::{Disk, DiskCache, DiskLimits, DiskPlace, ExportUri, Layer, Places};

/// All that it takes.
const KEYS: &str = "path, nbd, base, remote, local@HOST, id, readonly, cache, queues, timeout, bps, iops";
/// What it needs.
const NEEDED: &str = "--disk needs path=FILE for a raw file, nbd=URI for an export of an NBD server, path=FILE and base=URI for a \
                      file to which an export comes while it is used, or remote=URI and local@HOST=FILE for a disk with \
                      several places";
/// How a key begins that names a host's file.
const LOCAL: &str = "local@";

/// The disk that `text` describes to the host of this name, whose id is `id` if it has none of its own.
pub(super) fn disk(id: &str, text: &str, vcpus: u32, host: &str) -> Result<Disk, String> {
    let mut settings = Settings::parse("--disk", text)?;
    let places = places(&mut settings)?;
    let place = match nearest(&places, host)? {
        None => place(&mut settings)?,
        Some(place) if settings.take("path").or_else(|| settings.take("nbd")).is_none() => place,
        Some(_) => return Err(format!("--disk {text:?} says twice where the disk is")),
    };
    let cache = match settings.take("cache").as_deref() {
        None | Some("writeback") => DiskCache::Writeback,
        Some("writethrough") => DiskCache::Writethrough,
        Some("none") => DiskCache::None,
        Some(other) => return Err(format!("--disk cache={other:?} is none of writeback, writethrough, none")),
    };
    let bytes_per_second = settings.take("bps").map(|text| rate(&text)).transpose()?;
    let requests_per_second = settings.number("iops")?;
    let disk = Disk {
        id: settings.take("id").unwrap_or_else(|| id.to_owned()),
        read_only: settings.flag("readonly")?,
        cache,
        queues: settings.number("queues")?.map_or_else(|| default_queues(&place, vcpus), NonZeroU16::get),
        timeout_ms: settings.take("timeout").map(|text| time(&text)).transpose()?,
        limits: DiskLimits { bytes_per_second, requests_per_second },
        places,
        place,
    };
    settings.finish(KEYS).map(|()| disk)
}

/// Where a disk is, in one place.
pub(super) fn place(settings: &mut Settings) -> Result<DiskPlace, String> {
    match (settings.take("path"), settings.take("nbd"), settings.take("base")) {
        (Some(path), None, None) => Ok(DiskPlace::File(whole(Path::new(&path)))),
        (Some(path), None, Some(base)) => {
            Ok(DiskPlace::Layered(Layer { file: whole(Path::new(&path)), base: export(base)?, lent: false }))
        }
        (None, Some(uri), None) => Ok(DiskPlace::Nbd(export(uri)?)),
        _ => Err(NEEDED.to_owned()),
    }
}

fn places(settings: &mut Settings) -> Result<Places, String> {
    let remote = settings.take("remote").map(export).transpose()?;
    let local = settings.take_all(LOCAL).into_iter().map(|(host, file)| (host, whole(Path::new(&file)))).collect();
    Ok(Places { remote, local })
}

/// The nearest of several places, if there are several.
fn nearest(places: &Places, host: &str) -> Result<Option<DiskPlace>, String> {
    match places.nearest(host) {
        None if !places.is_empty() => Err(format!(
            "--disk has no place for this host, which is called {host:?}: add remote=URI or {LOCAL}{host}=FILE"
        )),
        nearest => Ok(nearest),
    }
}

fn export(uri: String) -> Result<ExportUri, String> {
    ExportUri::try_from(uri).map_err(|error| error.to_string())
}

/// A queue for each vCPU, but no more than a host's disk keeps busy. Servers that take several connections are the fewer.
fn default_queues(place: &DiskPlace, vcpus: u32) -> u16 {
    match place {
        DiskPlace::File(_) => u16::try_from(vcpus.clamp(1, 4)).expect("4 at most"),
        DiskPlace::Nbd(_) | DiskPlace::Layered(_) => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_place_is_the_hosts_own_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = format!("id=data,remote=nbd://a/data,local@b={},local@c=/no/such/file", file.path().display());
        let place = |host| disk("blk0", &text, 1, host).unwrap().place;
        assert_eq!(place("b"), DiskPlace::File(file.path().into()));
        for host in ["a", "c"] {
            assert_eq!(place(host).to_string(), "nbd://a/data");
        }
        let places = disk("blk0", &text, 1, "a").unwrap().places;
        assert_eq!(places.local["c"], Path::new("/no/such/file"));
        let error = disk("blk0", "local@b=/b", 1, "a").unwrap_err();
        assert!(error.contains("which is called \"a\"") && error.contains("local@a=FILE"), "{error}");
        assert!(disk("blk0", &format!("{text},path=/a"), 1, "b").unwrap_err().contains("says twice"));
    }

    #[test]
    fn a_file_may_lie_over_an_export() {
        let place = |text: &str| disk("blk0", text, 4, "a").map(|disk| (disk.place.to_string(), disk.queues));
        assert_eq!(place("path=/d,base=nbd://b/data"), Ok(("/d over nbd://b/data".to_owned(), 1)));
        assert_eq!(place("path=/d"), Ok(("/d".to_owned(), 4)));
        for text in ["base=nbd://b/data", "nbd=nbd://b/data,base=nbd://b/data", "path=/d,nbd=nbd://b/data"] {
            assert!(place(text).unwrap_err().contains("--disk needs path=FILE"), "{text}");
        }
    }
}
