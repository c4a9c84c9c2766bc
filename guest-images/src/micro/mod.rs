//! The `micro` guest: a kernel of some kilobytes that dirties memory and tells the time.
//!
//! Assembled from `micro.s`, `start.s` and `words.s` in this folder; called through [`crate::Images::micro`] by tests and benches, which run the
//! same file on Godwit, QEMU (`-M microvm,x-option-roms=off`) and others. It needs no interrupt, no paging and no
//! device but COM1, so it runs wherever a VMM enters PVH, also where KVM emulates every instruction.
//!
//! Parameters on the command line, separated by spaces; numbers may end in `k`, `M` or `G` (powers of 1024):
//!
//! | parameter | meaning | default |
//! | --- | --- | --- |
//! | `ws=SIZE` | working set, from 16 MiB on (or behind an initrd that lies there) | `16M` |
//! | `rate=N` | pages to write per second; 0: as many as possible | `0` |
//! | `pattern=` | `check`, `counter`, `same` (write a word per page; `same` changes nothing), `patch` (64 bytes), `zero`, `text`, `random`, `colour` (one word all over), `shift` (what the next page holds; whole pages) | `check` |
//! | `fill=` | one of these as the content before the first pass | none |
//! | `tick=MS` | milliseconds between tick lines; 0: none | `100` |
//! | `passes=N` | end after N walks through the working set; 0: never | `0` |
//! | `over` | the working set is the beginning of the initrd, whose content is then its own before the first pass | off |
//! | `content` | keep a sum over the initrd and compare it whenever pages are verified | off |
//! | `khz=N` | frequency of the TSC | from kvmclock, or 1 GHz |
//!
//! With `check` each page holds its number, the pass that wrote it and a mix of both at its two ends, and is verified
//! before the next pass writes it. `random` has few different pages, because the guest would take long to make many: content
//! that no compressor and no search for duplicates can shorten is an initrd of random bytes with `over`, and `shift` keeps it
//! that way. The host may write `v` (verify everything now) and `q` (verify, then power off).
//! With `ws=0 tick=0` the guest halts after its first lines. [`Line`] reads what it prints.

mod output;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::cache::{Cache, Key};
use crate::command;
pub use output::{Line, Progress};

/// Debian packages whose tools this recipe calls; the C linker that Rust uses needs them too.
pub const PACKAGES: &[&str] = &[BINUTILS];

const BINUTILS: &str = "binutils";
/// Assembled as one file, in this order.
const SOURCES: [&str; 3] = [include_str!("micro.s"), include_str!("start.s"), include_str!("words.s")];
const LINKER_SCRIPT: &str = include_str!("micro.ld");
const LINKER_FLAGS: &[&str] =
    &["-n", "-static", "--build-id=none", "-z", "noexecstack", "--no-warn-rwx-segments", "-s"];

/// Assembles and links the guest; the answer is an ELF64 file with a PVH note.
pub(crate) fn make(cache: &Cache) -> Result<PathBuf> {
    let key = SOURCES.iter().chain(LINKER_FLAGS).fold(Key::new().with(LINKER_SCRIPT), Key::with);
    let entry = cache.get("micro", "elf", key, |into| {
        let [source, script, object] = ["micro.s", "micro.ld", "micro.o"].map(|name| into.join(name));
        fs::write(&source, SOURCES.concat())?;
        fs::write(&script, LINKER_SCRIPT)?;
        command::run(Command::new("as").arg("--64").arg("-o").arg(&object).arg(&source), BINUTILS)?;
        let mut link = Command::new("ld");
        link.args(LINKER_FLAGS).arg("-T").arg(&script).arg("-o").arg(into.join("micro.elf")).arg(&object);
        command::run(&mut link, BINUTILS)?;
        [source, script, object].iter().try_for_each(|path| Ok(fs::remove_file(path)?))
    })?;
    Ok(entry.join("micro.elf"))
}
