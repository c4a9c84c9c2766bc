//! Puts a kernel, its initramfs and its boot data into guest memory and says where the first vCPU enters it.
//!
//! The machine's assembly calls [`load`] for a guest that starts, never for one that arrives by migration; then
//! [`entry::set_registers`] on the boot vCPU and [`entry::set_firmware_state`] on each. Files may be anything: each thing
//! that is wrong with one is an error that names the file. Invariant: nothing of the kernel or its initramfs lies below
//! 1 MiB, so that nothing overlaps the boot data and the ACPI tables.

mod bzimage;
mod elf;
pub mod entry;
mod initramfs;
mod params;

use crate::config::{Boot, EntryKind};
use crate::layout::{COMMAND_LINE, COMMAND_LINE_SIZE, HIGH_MEMORY, MMIO_GAP_START};
use devices::{Gpa, GuestRam};
use linux_loader::bootparam::setup_header;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

/// How and where the boot vCPU enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// In long mode with paging (Documentation/arch/x86/boot.rst, 64-bit boot protocol).
    Long64 {
        /// First instruction.
        rip: u64,
        /// Address of `boot_params`.
        boot_params: u64,
    },
    /// In 32-bit protected mode without paging (Xen's docs/misc/pvh.pandoc).
    Pvh32 {
        /// First instruction.
        eip: u32,
        /// Address of `hvm_start_info`.
        start_info: u32,
    },
}

/// Why a guest cannot start from these files.
#[derive(Debug, Error)]
pub enum BootError {
    /// A file cannot be opened.
    #[error("Could not open the {what} {}", path.display())]
    Open {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A file cannot be read.
    #[error("Could not read the {what} {}", path.display())]
    Read {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A file has nothing in it, or is no regular file.
    #[error("The {what} {} is empty", path.display())]
    Empty {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// The kernel ends before its headers say so.
    #[error("The kernel {} is truncated: it has {found} bytes of at least {needed}; copy it again", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What its headers ask for.
        needed: u64,
        /// Its length.
        found: u64,
    },
    /// The file is no kernel.
    #[error("{} is not a kernel that can be booted: it is {found}; give an ELF vmlinux or a bzImage for x86-64", path.display())]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What it seems to be.
        found: &'static str,
    },
    /// The kernel is for another processor.
    #[error("The kernel {} is for {found}; this machine is x86-64: give a kernel that was built for it", path.display())]
    Architecture {
        /// The file.
        path: PathBuf,
        /// What it is for.
        found: String,
    },
    /// A header of the kernel contradicts itself.
    #[error("The kernel {} is damaged: {problem}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: &'static str,
    },
    /// The kernel cannot be entered in the way that was asked for.
    #[error("The kernel {} has no {entry} entry", path.display())]
    NoEntry {
        /// The file.
        path: PathBuf,
        /// The entry.
        entry: &'static str,
    },
    /// The kernel wants to lie where the boot data lies.
    #[error("The kernel {} wants to lie at {address:#x}; only memory from {:#x} on is free", path.display(), HIGH_MEMORY.0)]
    TooLow {
        /// The file.
        path: PathBuf,
        /// Where it wants to lie.
        address: u64,
    },
    /// The kernel is larger than the memory below the gap.
    #[error("The kernel {} needs memory up to {} MiB, the machine has {} MiB there: give it more memory", path.display(),
        mib(*end), mib(*memory))]
    KernelTooBig {
        /// The file.
        path: PathBuf,
        /// End of what it needs.
        end: u64,
        /// End of what there is.
        memory: u64,
    },
    /// The initramfs is larger than the memory that the kernel leaves.
    #[error("The initramfs of {} MiB does not fit in {} MiB of memory beside the kernel: give the machine more memory",
        mib(*bytes), memory >> 20)]
    InitramfsTooBig {
        /// Its length.
        bytes: u64,
        /// Memory below the gap.
        memory: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("The kernel command line has {length} bytes, the kernel takes {most}")]
    CommandLine {
        /// Its length.
        length: usize,
        /// What is possible.
        most: usize,
    },
    /// The loader refused the kernel for a reason that was not foreseen.
    #[error("Could not load the kernel {}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// What the loader said.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// The boot data does not fit into guest memory.
    #[error("Could not write boot data to guest memory")]
    Memory {
        /// What was wrong.
        #[source]
        source: GuestMemoryError,
    },
}

impl From<GuestMemoryError> for BootError {
    fn from(source: GuestMemoryError) -> Self {
        Self::Memory { source }
    }
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// A kernel in guest memory.
#[derive(Debug)]
struct Kernel {
    /// First address that the kernel does not need while it starts.
    end: u64,
    /// Its 64-bit entry, if it has one.
    long64: Option<u64>,
    /// Its PVH entry, if it has one.
    pvh: Option<u32>,
    /// The header of a bzImage.
    header: Option<setup_header>,
}

/// A piece of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Extent {
    start: Gpa,
    bytes: u64,
}

/// Loads everything that `boot` names into `ram` and describes it to the guest. `rsdp` is where the ACPI tables are.
///
/// # Errors
/// [`BootError`], naming the file that is at fault.
pub fn load(ram: &GuestRam, boot: &Boot, rsdp: Gpa) -> Result<Entry, BootError> {
    let Boot { kernel: path, initramfs, command_line, entry } = boot;
    let kernel = load_kernel(ram, path)?;
    let entry = choose(path, &kernel, *entry)?;
    let initramfs = initramfs.as_deref().map(|path| initramfs::load(ram, path, &kernel)).transpose()?;
    write_command_line(ram, command_line, &kernel)?;
    let memory = params::memory_map(ram);
    match entry {
        Entry::Long64 { .. } => params::write_boot_params(ram, &memory, kernel.header, initramfs, rsdp)?,
        Entry::Pvh32 { .. } => params::write_start_info(ram, &memory, initramfs, rsdp)?,
    }
    entry::write_tables(ram, &entry)?;
    Ok(entry)
}

/// End of the memory below the gap, where everything is loaded.
fn low_memory_end(ram: &GuestRam) -> u64 {
    let low = ram.iter().filter(|region| region.start_addr() < MMIO_GAP_START);
    low.map(|region| region.last_addr().0 + 1).max().unwrap_or(0)
}

fn load_kernel(ram: &GuestRam, path: &Path) -> Result<Kernel, BootError> {
    let mut file = Image::open("kernel", path)?;
    let mut start = [0; 0x206];
    let known = usize::try_from(file.bytes.min(start.len() as u64)).expect("bounded by the buffer");
    file.read_at(0, &mut start[..known])?;
    if start.starts_with(b"\x7fELF") {
        return elf::load(ram, &mut file);
    }
    if start[0x202..] == *b"HdrS" {
        return bzimage::load(ram, &mut file);
    }
    Err(file.not_a_kernel(&start[..known]))
}

fn choose(path: &Path, kernel: &Kernel, wanted: EntryKind) -> Result<Entry, BootError> {
    let long64 = kernel.long64.map(|rip| Entry::Long64 { rip, boot_params: crate::layout::BOOT_PARAMS.0 });
    let start_info = u32::try_from(crate::layout::PVH_START_INFO.0).expect("below 1 MiB");
    let pvh = kernel.pvh.map(|eip| Entry::Pvh32 { eip, start_info });
    let (found, entry) = match wanted {
        EntryKind::Auto => (pvh.or(long64), "64-bit"),
        EntryKind::Pvh => (pvh, "PVH"),
        EntryKind::Long64 => (long64, "64-bit"),
    };
    found.ok_or_else(|| BootError::NoEntry { path: path.into(), entry })
}

fn write_command_line(ram: &GuestRam, line: &str, kernel: &Kernel) -> Result<(), BootError> {
    let of_kernel = kernel.header.map_or(0, |header| usize::try_from(header.cmdline_size).unwrap_or(0));
    let most = if of_kernel == 0 { COMMAND_LINE_SIZE - 1 } else { of_kernel.min(COMMAND_LINE_SIZE - 1) };
    if line.len() > most {
        return Err(BootError::CommandLine { length: line.len(), most });
    }
    ram.write_slice(line.as_bytes(), COMMAND_LINE)?;
    Ok(ram.write_obj(0_u8, GuestAddress(COMMAND_LINE.0 + line.len() as u64))?)
}

/// An open file that a guest starts from.
#[derive(Debug)]
struct Image {
    what: &'static str,
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl Image {
    fn open(what: &'static str, path: &Path) -> Result<Self, BootError> {
        let opened = File::open(path).and_then(|file| file.metadata().map(|data| (file, data)));
        let (file, data) = opened.map_err(|source| BootError::Open { what, path: path.into(), source })?;
        if data.is_dir() {
            let source = io::Error::from(io::ErrorKind::IsADirectory);
            return Err(BootError::Open { what, path: path.into(), source });
        }
        if data.len() == 0 {
            return Err(BootError::Empty { what, path: path.into() });
        }
        Ok(Self { what, path: path.into(), file, bytes: data.len() })
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), BootError> {
        self.needs(offset.saturating_add(buffer.len() as u64))?;
        let read = self.file.seek(io::SeekFrom::Start(offset)).and_then(|_| self.file.read_exact(buffer));
        read.map_err(|source| BootError::Read { what: self.what, path: self.path.clone(), source })
    }

    /// Fails unless the file is at least `needed` bytes long.
    fn needs(&self, needed: u64) -> Result<(), BootError> {
        if needed > self.bytes {
            return Err(BootError::Truncated { path: self.path.clone(), needed, found: self.bytes });
        }
        Ok(())
    }

    fn load_error(&self, source: linux_loader::loader::Error) -> BootError {
        BootError::Load { path: self.path.clone(), source }
    }

    fn damaged(&self, problem: &'static str) -> BootError {
        BootError::Damaged { path: self.path.clone(), problem }
    }

    fn no_entry(&self, entry: &'static str) -> BootError {
        BootError::NoEntry { path: self.path.clone(), entry }
    }

    fn not_a_kernel(&self, start: &[u8]) -> BootError {
        let path = self.path.clone();
        let at = |offset: usize, magic: &[u8]| start.get(offset..).is_some_and(|rest| rest.starts_with(magic));
        let architecture = |found: &str| BootError::Architecture { path: self.path.clone(), found: found.into() };
        // Documentation/arch/arm64/booting.rst and Documentation/arch/riscv/boot-image-header.rst.
        if at(0x38, b"ARM\x64") {
            return architecture("64-bit ARM");
        }
        if at(0x38, b"RSC\x05") {
            return architecture("RISC-V");
        }
        let found = match start {
            [0x1f, 0x8b, ..] => "compressed with gzip, so unpack it first",
            [0x28, 0xb5, 0x2f, 0xfd, ..] => "compressed with zstd, so unpack it first",
            [0xfd, b'7', b'z', b'X', b'Z', ..] => "compressed with xz, so unpack it first",
            _ => "neither ELF nor bzImage",
        };
        BootError::NotAKernel { path, found }
    }

    /// Fails unless the guest has memory for the kernel up to `end`.
    fn fits(&self, ram: &GuestRam, end: u64) -> Result<(), BootError> {
        let memory = low_memory_end(ram);
        if end > memory {
            return Err(BootError::KernelTooBig { path: self.path.clone(), end, memory });
        }
        Ok(())
    }

    /// Fails unless the kernel's piece at `address` leaves the boot data alone.
    fn above_boot_data(&self, address: u64) -> Result<(), BootError> {
        if address < HIGH_MEMORY.0 {
            return Err(BootError::TooLow { path: self.path.clone(), address });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
