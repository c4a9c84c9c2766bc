//! Kernel modules by name, in an order in which `insmod` accepts them.
//!
//! Called by the kernel recipe (which writes the index once per kernel) and through [`super::Kernel::modules`] by every
//! recipe and by the lab harness. A Debian kernel package has no `modules.dep`; it is made on the machine that installs
//! it. So the dependencies are read from the `.modinfo` section of the modules themselves: a list of NUL-terminated
//! `key=value` strings, of which `depends=` names the modules that must be loaded before (Linux scripts/mod/modpost.c).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use thiserror::Error;

const ELF_MAGIC: &[u8] = b"\x7fELF";
/// Offsets in the ELF64 file and section headers (ELF-64 object file format, version 1.5, figures 2 and 4).
const E_SHOFF: usize = 0x28;
const E_SHENTSIZE: usize = 0x3a;
const E_SHNUM: usize = 0x3c;
const E_SHSTRNDX: usize = 0x3e;
const SH_NAME: usize = 0x00;
const SH_OFFSET: usize = 0x18;
const SH_SIZE: usize = 0x20;
const MODINFO: &[u8] = b".modinfo\0";

/// Why a module cannot be had.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ModuleError {
    /// Not an ELF64 file, or a damaged one, or one without `.modinfo`.
    #[error("{0} is not an uncompressed kernel module with a .modinfo section")]
    NotAModule(PathBuf),
    /// Neither a module nor built in.
    #[error("This kernel has no module {0:?}, neither as a file nor built in")]
    Unknown(String),
    /// The index file of the cache was changed by someone.
    #[error("Line {0:?} of the module index is malformed; remove the kernel's directory from the image cache")]
    Index(String),
}

/// One module to load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Name as `lsmod` shows it: with underscores.
    pub name: String,
    /// The `.ko` file on this machine.
    pub path: PathBuf,
}

/// All modules of one kernel.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Index {
    loadable: BTreeMap<String, Entry>,
    built_in: BTreeSet<String>,
}

#[derive(Debug, PartialEq, Eq)]
struct Entry {
    path: String,
    depends: Vec<String>,
}

impl Index {
    /// Notes a module file; `path` is what [`Index::ordered`] will answer, relative to the modules' root.
    pub(crate) fn add(&mut self, path: &str, content: &[u8]) -> Result<(), ModuleError> {
        let depends = dependencies(content).ok_or_else(|| ModuleError::NotAModule(path.into()))?;
        self.loadable.insert(name_of(path), Entry { path: path.to_owned(), depends });
        Ok(())
    }

    /// Notes what the kernel has built in: the lines of `modules.builtin`.
    pub(crate) fn add_built_in(&mut self, list: &str) {
        self.built_in.extend(list.lines().map(name_of));
    }

    /// The modules and all they depend on, each once, dependencies first. What is built in needs no loading and is
    /// left out.
    pub(crate) fn ordered(&self, names: &[&str], root: &Path) -> Result<Vec<Module>, ModuleError> {
        let (mut order, mut seen) = (Vec::new(), BTreeSet::new());
        for name in names {
            self.visit(&name.replace('-', "_"), root, &mut seen, &mut order)?;
        }
        Ok(order)
    }

    fn visit(
        &self,
        name: &str,
        root: &Path,
        seen: &mut BTreeSet<String>,
        order: &mut Vec<Module>,
    ) -> Result<(), ModuleError> {
        if self.built_in.contains(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let entry = self.loadable.get(name).ok_or_else(|| ModuleError::Unknown(name.to_owned()))?;
        for needed in &entry.depends {
            self.visit(needed, root, seen, order)?;
        }
        order.push(Module { name: name.to_owned(), path: root.join(&entry.path) });
        Ok(())
    }

    /// The index as text: one line per module, `path TAB dependency,dependency`, or `TAB name` for a built-in one.
    pub(crate) fn to_text(&self) -> String {
        let loadable = self.loadable.values().map(|entry| format!("{}\t{}\n", entry.path, entry.depends.join(",")));
        let built_in = self.built_in.iter().map(|name| format!("\t{name}\n"));
        loadable.chain(built_in).collect()
    }

    pub(crate) fn from_text(text: &str) -> Result<Self, ModuleError> {
        let mut index = Self::default();
        for line in text.lines() {
            let (path, rest) = line.split_once('\t').ok_or_else(|| ModuleError::Index(line.to_owned()))?;
            if path.is_empty() {
                index.built_in.insert(rest.to_owned());
            } else {
                let entry = Entry { path: path.to_owned(), depends: names_in(rest) };
                index.loadable.insert(name_of(path), entry);
            }
        }
        Ok(index)
    }
}

/// `kernel/drivers/char/hw_random/virtio-rng.ko` is the module `virtio_rng`.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.strip_suffix(".ko").unwrap_or(file).replace('-', "_")
}

fn names_in(list: &str) -> Vec<String> {
    list.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

/// The `depends=` entry of a module file; `None` when the file is not a module.
fn dependencies(module: &[u8]) -> Option<Vec<String>> {
    let section = modinfo(module)?;
    let mut strings = section.split(|&byte| byte == 0).filter_map(|entry| std::str::from_utf8(entry).ok());
    let depends = strings.find_map(|entry| entry.strip_prefix("depends="));
    Some(depends.map(names_in).unwrap_or_default())
}

fn modinfo(module: &[u8]) -> Option<&[u8]> {
    if !module.starts_with(ELF_MAGIC) {
        return None;
    }
    let table = long(module, E_SHOFF)?;
    let (entry_size, count) = (short(module, E_SHENTSIZE)?, short(module, E_SHNUM)?);
    let section = |number: usize| -> Option<(usize, &[u8])> {
        let at = table.checked_add(number * entry_size)?;
        let header = module.get(at..at.checked_add(entry_size)?)?;
        let start = long(header, SH_OFFSET)?;
        let name = u32::from_le_bytes(header.get(SH_NAME..SH_NAME + 4)?.try_into().ok()?);
        // Sections without bytes in the file (.bss) may point past its end.
        let content = module.get(start..start.checked_add(long(header, SH_SIZE)?)?).unwrap_or_default();
        Some((usize::try_from(name).ok()?, content))
    };
    let (_, names) = section(short(module, E_SHSTRNDX)?)?;
    (0..count)
        .filter_map(section)
        .find(|(name, _)| names.get(*name..).is_some_and(|n| n.starts_with(MODINFO)))
        .map(|(_, content)| content)
}

fn long(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?)).ok()
}

fn short(bytes: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The smallest ELF64 file with section names and a `.modinfo`.
    fn module(modinfo: &str) -> Vec<u8> {
        let mut elf = vec![0; 64];
        elf[..4].copy_from_slice(ELF_MAGIC);
        let names_at = elf.len();
        elf.extend(b"\0.modinfo\0");
        let modinfo_at = elf.len();
        elf.extend(modinfo.as_bytes());
        let table = elf.len();
        let header = |name: u32, at: usize, size: usize| {
            let mut header = vec![0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[SH_OFFSET..SH_OFFSET + 8].copy_from_slice(&(at as u64).to_le_bytes());
            header[SH_SIZE..SH_SIZE + 8].copy_from_slice(&(size as u64).to_le_bytes());
            header
        };
        elf.extend(header(0, names_at, 10));
        elf.extend(header(1, modinfo_at, modinfo.len()));
        elf[E_SHOFF..E_SHOFF + 8].copy_from_slice(&(table as u64).to_le_bytes());
        elf[E_SHENTSIZE..E_SHENTSIZE + 2].copy_from_slice(&64u16.to_le_bytes());
        elf[E_SHNUM..E_SHNUM + 2].copy_from_slice(&2u16.to_le_bytes());
        elf
    }

    fn sample() -> Index {
        let mut index = Index::default();
        index.add("drivers/virtio/virtio.ko", &module("license=GPL\0depends=\0")).unwrap();
        index.add("drivers/virtio/virtio_ring.ko", &module("license=GPL\0depends=virtio\0")).unwrap();
        index.add("hw_random/virtio-rng.ko", &module("depends=virtio,virtio-ring,rng-core\0name=x\0")).unwrap();
        index.add("net/free.ko", &module("license=GPL\0")).unwrap();
        index.add_built_in("kernel/drivers/char/rng-core.ko\n");
        index
    }

    fn names(modules: &[Module]) -> Vec<&str> {
        modules.iter().map(|module| module.name.as_str()).collect()
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let order = sample().ordered(&["virtio-rng", "virtio_ring", "free", "rng_core"], Path::new("/m")).unwrap();
        assert_eq!(names(&order), ["virtio", "virtio_ring", "virtio_rng", "free"]);
        assert_eq!(order[2].path, Path::new("/m/hw_random/virtio-rng.ko"));
    }

    #[test]
    fn an_unknown_module_is_named() {
        let refused = sample().ordered(&["nvme"], Path::new("/m")).unwrap_err();
        assert_eq!(refused, ModuleError::Unknown("nvme".to_owned()));
    }

    #[test]
    fn the_index_survives_its_file() {
        assert_eq!(Index::from_text(&sample().to_text()).unwrap(), sample());
        assert_eq!(Index::from_text("nonsense").unwrap_err(), ModuleError::Index("nonsense".to_owned()));
    }

    #[test]
    fn a_ring_of_dependencies_ends() {
        let mut index = Index::default();
        index.add("a.ko", &module("depends=b\0")).unwrap();
        index.add("b.ko", &module("depends=a\0")).unwrap();
        assert_eq!(names(&index.ordered(&["a"], Path::new("")).unwrap()), ["b", "a"]);
    }

    #[test]
    fn what_is_no_module_is_refused() {
        let whole = module("depends=x\0");
        for end in 0..whole.len() {
            Index::default().add("x.ko", &whole[..end]).unwrap_err();
        }
        let xz = b"\xfd7zXZ\0\0\x04";
        assert_eq!(Index::default().add("x.ko", xz).unwrap_err(), ModuleError::NotAModule("x.ko".into()));
    }
}
