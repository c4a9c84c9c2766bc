//! Guests of a few instructions, made here byte by byte: an ELF64 file with a PVH note around 32-bit code.
//!
//! Called by scenarios that need a guest to do one exact thing, right or wrong. The code runs as PVH enters it: 32-bit
//! protected mode, flat segments, no paging, no interrupts.

use std::fs;
use std::path::Path;

use anyhow::Result;

/// Where the code is loaded and entered.
const ENTRY: u32 = 0x10_0000;
/// Bytes of the ELF header and of one program header (System V ABI, AMD64).
const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// `XEN_ELFNOTE_PHYS32_ENTRY`, xen/include/public/elfnote.h.
const PHYS32_ENTRY: u32 = 18;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const COM1: u16 = 0x3f8;

/// A program, one instruction after the other.
#[derive(Debug, Default)]
pub(super) struct Program(Vec<u8>);

impl Program {
    /// Appends machine code.
    pub(super) fn code(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn port(self, port: u16) -> Self {
        let [low, high] = port.to_le_bytes();
        self.code(&[0x66, 0xba, low, high]) // mov dx, port
    }

    /// Writes a byte to an I/O port.
    pub(super) fn out_byte(self, port: u16, value: u8) -> Self {
        self.port(port).code(&[0xb0, value, 0xee]) // mov al, value; out dx, al
    }

    /// Writes a word to an I/O port.
    pub(super) fn out_word(self, port: u16, value: u16) -> Self {
        let [low, high] = value.to_le_bytes();
        self.port(port).code(&[0x66, 0xb8, low, high, 0x66, 0xef]) // mov ax, value; out dx, ax
    }

    /// Writes a line to the console.
    pub(super) fn say(self, line: &str) -> Self {
        line.bytes().chain([b'\n']).fold(self, |program, byte| program.out_byte(COM1, byte))
    }

    /// Writes 32 bits to an address.
    pub(super) fn store(self, address: u32, value: u32) -> Self {
        self.code(&[0xc7, 0x05]).code(&address.to_le_bytes()).code(&value.to_le_bytes()) // mov dword [address], value
    }

    /// Reads an address until one of the bits of `mask` is set in its lowest byte.
    pub(super) fn await_bits(self, address: u32, mask: u8) -> Self {
        // mov eax, [address]; test al, mask; jz back to the first
        self.code(&[0xa1]).code(&address.to_le_bytes()).code(&[0xa8, mask, 0x74, 0xf7])
    }

    /// Writes a line to the console again and again, since nobody may listen yet.
    pub(super) fn repeat(self, line: &str) -> Self {
        let start = self.0.len();
        // mov ecx, 2^15; loop to itself; jmp to the line
        let program = self.say(line).code(&[0xb9, 0, 0x80, 0, 0, 0xe2, 0xfe, 0xe9]);
        let back = u32::try_from(program.0.len() + 4 - start).expect("programs are short").wrapping_neg();
        program.code(&back.to_le_bytes())
    }

    /// Halts for ever, and writes the file.
    pub(super) fn write(self, path: &Path) -> Result<()> {
        let code = self.code(&[0xf4, 0xeb, 0xfd]).0; // hlt; jmp back to it
        let note = [&words(&[4, 4, PHYS32_ENTRY])[..], b"Xen\0", &ENTRY.to_le_bytes()].concat();
        let note_at = ELF_HEADER + 2 * PROGRAM_HEADER;
        let code_at = note_at + note.len();
        let headers = [
            elf_header(),
            program_header(PT_NOTE, note_at, 0, note.len()),
            program_header(PT_LOAD, code_at, u64::from(ENTRY), code.len()),
        ];
        Ok(fs::write(path, [headers.concat(), note, code].concat())?)
    }
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn elf_header() -> Vec<u8> {
    let mut header = vec![0; ELF_HEADER];
    header[..7].copy_from_slice(b"\x7fELF\x02\x01\x01"); // 64 bits, little endian, version 1
    header[16] = 2; // e_type: executable
    header[18] = 62; // e_machine: x86-64
    header[20] = 1; // e_version
    header[24..28].copy_from_slice(&ENTRY.to_le_bytes()); // e_entry
    header[32] = 64; // e_phoff
    header[52] = 64; // e_ehsize
    header[54] = 56; // e_phentsize
    header[56] = 2; // e_phnum
    header
}

/// An ELF header for another processor (`e_machine`), and nothing behind it.
pub(super) fn foreign_kernel(machine: u8) -> Vec<u8> {
    let mut header = elf_header();
    header[18] = machine;
    header
}

fn program_header(kind: u32, at: usize, address: u64, length: usize) -> Vec<u8> {
    let (at, length) = (at as u64, length as u64);
    let longs = [at, address, address, length, length, 4].map(u64::to_le_bytes).concat();
    [words(&[kind, 7]), longs].concat()
}
