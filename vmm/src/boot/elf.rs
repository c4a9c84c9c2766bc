//! ELF kernels (vmlinux): checks the headers, finds the PVH entry, and lets linux-loader load the segments.
//!
//! The checks come first and by hand, because linux-loader does not look at the class, the machine and the file's length.

use super::{BootError, Image, Kernel};
use devices::GuestRam;
use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::ByteValued;

// System V ABI, chapter 4, and its AMD64 supplement.
const CLASS: usize = 4;
const CLASS_64: u8 = 2;
const DATA: usize = 5;
const LITTLE_ENDIAN: u8 = 1;
const EM_386: u16 = 3;
const EM_ARM: u16 = 40;
const EM_X86_64: u16 = 62;
const EM_AARCH64: u16 = 183;
const EM_RISCV: u16 = 243;
/// Program headers that are read at most; a kernel has about five.
const MAX_HEADERS: u16 = 128;
/// Bytes of notes that are looked through at most; a kernel has less than 1 KiB.
const MAX_NOTES: u64 = 64 << 10;
/// XEN_ELFNOTE_PHYS32_ENTRY, xen/include/public/elfnote.h: the 32-bit entry of PVH.
const PHYS32_ENTRY: u32 = 18;

pub(super) fn load(ram: &GuestRam, image: &mut Image) -> Result<Kernel, BootError> {
    let mut header = Elf64_Ehdr::default();
    image.read_at(0, header.as_mut_slice())?;
    check_machine(image, &header)?;
    let segments = program_headers(image, &header)?;
    let (mut end, mut pvh) = (0, None);
    for segment in &segments {
        match segment.p_type {
            PT_LOAD if segment.p_memsz > 0 => end = end.max(check_segment(image, segment)?),
            PT_NOTE => pvh = pvh.or(pvh_entry(image, segment)?),
            _ => {}
        }
    }
    if end == 0 {
        return Err(image.damaged("no segment of it is to be loaded"));
    }
    image.fits(ram, end)?;
    Elf::load(ram, None, &mut image.file, None).map_err(|source| image.load_error(source))?;
    Ok(Kernel { end, long64: Some(header.e_entry), pvh, header: None })
}

fn check_machine(image: &Image, header: &Elf64_Ehdr) -> Result<(), BootError> {
    let architecture = |found: String| Err(BootError::Architecture { path: image.path.clone(), found });
    if header.e_ident[DATA] != LITTLE_ENDIAN {
        return architecture("a big-endian processor".into());
    }
    match (header.e_machine, header.e_ident[CLASS]) {
        (EM_X86_64, CLASS_64) => Ok(()),
        (EM_X86_64, _) => Err(image.damaged("it is for x86-64, but not of 64 bits")),
        (EM_386, _) => architecture("32-bit x86".into()),
        (EM_ARM, _) => architecture("32-bit ARM".into()),
        (EM_AARCH64, _) => architecture("64-bit ARM".into()),
        (EM_RISCV, _) => architecture("RISC-V".into()),
        (other, _) => architecture(format!("ELF machine {other}")),
    }
}

fn program_headers(image: &mut Image, header: &Elf64_Ehdr) -> Result<Vec<Elf64_Phdr>, BootError> {
    let size = size_of::<Elf64_Phdr>();
    if usize::from(header.e_phentsize) != size || header.e_phnum > MAX_HEADERS {
        return Err(image.damaged("its program headers are impossible"));
    }
    (0..u64::from(header.e_phnum))
        .map(|index| {
            let mut segment = Elf64_Phdr::default();
            let offset = header.e_phoff.saturating_add(index * size as u64);
            image.read_at(offset, segment.as_mut_slice())?;
            Ok(segment)
        })
        .collect()
}

/// Checks a segment that is to be loaded and returns its end in memory.
fn check_segment(image: &Image, segment: &Elf64_Phdr) -> Result<u64, BootError> {
    let Elf64_Phdr { p_offset, p_paddr, p_filesz, p_memsz, .. } = *segment;
    if p_filesz > p_memsz {
        return Err(image.damaged("a segment is larger in the file than in memory"));
    }
    image.needs(p_offset.saturating_add(p_filesz))?;
    image.above_boot_data(p_paddr)?;
    p_paddr.checked_add(p_memsz).ok_or_else(|| image.damaged("a segment passes the end of the address space"))
}

fn pvh_entry(image: &mut Image, segment: &Elf64_Phdr) -> Result<Option<u32>, BootError> {
    if segment.p_filesz > MAX_NOTES {
        return Ok(None);
    }
    let mut notes = vec![0; usize::try_from(segment.p_filesz).expect("at most MAX_NOTES")];
    image.read_at(segment.p_offset, &mut notes)?;
    Ok(find_pvh_note(&notes))
}

/// Walks notes of {name size, description size, type, name, description}, each part padded to 4 bytes.
fn find_pvh_note(mut notes: &[u8]) -> Option<u32> {
    loop {
        let (header, rest) = notes.split_at_checked(12)?;
        let word = |at: usize| header[at..].first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
        let (name_size, description_size, kind) = (word(0)?, word(4)?, word(8)?);
        let (name, rest) = rest.split_at_checked(padded(name_size)?)?;
        let description = rest.get(..usize::try_from(description_size).ok()?)?;
        if kind == PHYS32_ENTRY && name_size == 4 && name == b"Xen\0" {
            return Some(u32::from_le_bytes(*description.first_chunk()?));
        }
        notes = rest.get(padded(description_size)?..)?;
    }
}

fn padded(size: u32) -> Option<usize> {
    usize::try_from(size.checked_next_multiple_of(4)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(name: &[u8], kind: u32, description: &[u8]) -> Vec<u8> {
        let mut bytes = vec![];
        for word in [name.len(), description.len()] {
            bytes.extend(u32::try_from(word).unwrap().to_le_bytes());
        }
        bytes.extend(kind.to_le_bytes());
        for part in [name, description] {
            bytes.extend(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    #[test]
    fn the_note_is_found_among_others() {
        let notes = [
            note(b"GNU\0", 3, &[7; 20]),
            note(b"Xen\0", 6, b"linux\0"),
            note(b"GNU\0", 18, &[9; 4]),
            note(b"Xen\0", 18, &0x12_3456_u32.to_le_bytes()),
        ];
        assert_eq!(find_pvh_note(&notes.concat()), Some(0x12_3456));
        assert_eq!(find_pvh_note(&note(b"Xen\0", 18, &0x1000_u64.to_le_bytes())), Some(0x1000));
        assert_eq!(find_pvh_note(&notes[..3].concat()), None);
    }

    #[test]
    fn broken_notes_end_the_search() {
        let whole = note(b"Xen\0", 18, &[1; 4]);
        for length in 0..whole.len() {
            assert_eq!(find_pvh_note(&whole[..length]), None, "{length}");
        }
        assert_eq!(find_pvh_note(&note(b"Xen\0", 18, &[1; 3])), None);
        assert_eq!(find_pvh_note(&[0xff; 64]), None);
    }
}
