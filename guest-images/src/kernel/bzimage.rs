//! Takes the ELF `vmlinux` out of a bzImage.
//!
//! Called by the kernel recipe. A VMM that loads the ELF file spares the guest its own decompression. The input comes
//! from a signed package, but it is still a file: every offset in it is checked, and the output is bounded.
//!
//! Layout: Linux Documentation/arch/x86/boot.rst (`setup_sects`, `payload_offset`, `payload_length`). Debian packs the
//! payload as an LZ4 legacy frame (lz4_Frame_format.md, "Legacy frame"), followed by the unpacked size as the kernel's
//! build adds it for every format that has no size of its own (scripts/Makefile.lib, `size_append`).

use thiserror::Error;

const BOOT_MAGIC_AT: usize = 0x202;
const BOOT_MAGIC: &[u8] = b"HdrS";
const PROTOCOL_VERSION_AT: usize = 0x206;
/// The first boot protocol with a payload field.
const PROTOCOL_WITH_PAYLOAD: u16 = 0x0208;
const SETUP_SECTORS_AT: usize = 0x1f1;
const PAYLOAD_OFFSET_AT: usize = 0x248;
const PAYLOAD_LENGTH_AT: usize = 0x24c;
const SECTOR: usize = 512;

const LZ4_LEGACY_MAGIC: u32 = 0x184c_2102;
/// Every block of a legacy frame but the last unpacks to this many bytes.
const LZ4_LEGACY_BLOCK: usize = 8 << 20;
const ELF_MAGIC: &[u8] = b"\x7fELF";
/// No kernel comes near it; a damaged size field does.
const VMLINUX_LIMIT: usize = 512 << 20;

/// Why no vmlinux came out.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BzImageError {
    /// The boot header is absent.
    #[error("Not a bzImage: no boot header at 0x202")]
    NoHeader,
    /// The file is older than boot protocol 2.08.
    #[error("Boot protocol {0:#06x} knows no payload; 0x0208 or newer is needed")]
    OldProtocol(u16),
    /// The file ends within what its header announces.
    #[error("The bzImage ends before its payload does ({have} of {need} bytes)")]
    Truncated {
        /// Bytes that are there.
        have: usize,
        /// Bytes that the header announces.
        need: usize,
    },
    /// Compressed by something other than LZ4.
    #[error(
        "The kernel's payload begins with {0:#010x}; only the LZ4 legacy format ({LZ4_LEGACY_MAGIC:#010x}) is read"
    )]
    Compression(u32),
    /// An LZ4 block does not unpack.
    #[error("LZ4 block {index} of the payload is damaged: {reason}")]
    Block {
        /// Number of the block.
        index: usize,
        /// What the decoder said.
        reason: String,
    },
    /// The payload is not as long as its own size field says.
    #[error("The payload unpacks to {have} bytes instead of {need}")]
    Size {
        /// Bytes that came out.
        have: usize,
        /// Bytes that the payload announces.
        need: usize,
    },
    /// Something else was packed.
    #[error("The payload is not an ELF file")]
    NotElf,
}

/// Unpacks the ELF kernel inside a bzImage.
pub fn vmlinux(bzimage: &[u8]) -> Result<Vec<u8>, BzImageError> {
    let payload = payload(bzimage)?;
    let magic = word(payload, 0)?;
    if magic != LZ4_LEGACY_MAGIC {
        return Err(BzImageError::Compression(magic));
    }
    let blocks_end = payload.len().saturating_sub(4);
    let size = as_size(word(payload, blocks_end)?);
    if size > VMLINUX_LIMIT {
        return Err(BzImageError::Size { have: VMLINUX_LIMIT, need: size });
    }
    let unpacked = unpack_blocks(&payload[4..blocks_end.max(4)], size)?;
    if !unpacked.starts_with(ELF_MAGIC) {
        return Err(BzImageError::NotElf);
    }
    Ok(unpacked)
}

fn payload(bzimage: &[u8]) -> Result<&[u8], BzImageError> {
    let header = |at: usize, length: usize| bzimage.get(at..at + length).ok_or(BzImageError::NoHeader);
    if header(BOOT_MAGIC_AT, BOOT_MAGIC.len())? != BOOT_MAGIC {
        return Err(BzImageError::NoHeader);
    }
    let version = header(PROTOCOL_VERSION_AT, 2)?;
    let version = u16::from_le_bytes([version[0], version[1]]);
    if version < PROTOCOL_WITH_PAYLOAD {
        return Err(BzImageError::OldProtocol(version));
    }
    // 0 means 4, says the boot protocol.
    let sectors = match header(SETUP_SECTORS_AT, 1)?[0] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let offset = as_size(word(bzimage, PAYLOAD_OFFSET_AT)?);
    let length = as_size(word(bzimage, PAYLOAD_LENGTH_AT)?);
    let start = (sectors + 1) * SECTOR + offset;
    let end = start + length;
    bzimage.get(start..end).ok_or(BzImageError::Truncated { have: bzimage.len(), need: end })
}

fn unpack_blocks(mut blocks: &[u8], size: usize) -> Result<Vec<u8>, BzImageError> {
    let mut out = vec![0; size];
    let (mut filled, mut index) = (0, 0);
    while !blocks.is_empty() {
        let packed = as_size(word(blocks, 0)?);
        let need = 4 + packed;
        let block = blocks.get(4..need).ok_or(BzImageError::Truncated { have: blocks.len(), need })?;
        let room = (size - filled).min(LZ4_LEGACY_BLOCK);
        filled += lz4_flex::block::decompress_into(block, &mut out[filled..filled + room])
            .map_err(|error| BzImageError::Block { index, reason: error.to_string() })?;
        blocks = &blocks[need..];
        index += 1;
    }
    if filled != size {
        return Err(BzImageError::Size { have: filled, need: size });
    }
    Ok(out)
}

fn word(bytes: &[u8], at: usize) -> Result<u32, BzImageError> {
    let truncated = BzImageError::Truncated { have: bytes.len(), need: at + 4 };
    let field = bytes.get(at..at + 4).ok_or(truncated)?;
    Ok(u32::from_le_bytes(field.try_into().expect("a slice of 4 bytes is an array of 4")))
}

/// Sizes of a bzImage have 32 bits; this code runs on 64-bit hosts only.
fn as_size(field: u32) -> usize {
    usize::try_from(field).expect("usize has at least 32 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage with one setup sector around the given payload.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 2 * SECTOR];
        image[SETUP_SECTORS_AT] = 1;
        image[BOOT_MAGIC_AT..BOOT_MAGIC_AT + 4].copy_from_slice(BOOT_MAGIC);
        image[PROTOCOL_VERSION_AT..PROTOCOL_VERSION_AT + 2].copy_from_slice(&0x020fu16.to_le_bytes());
        image[PAYLOAD_OFFSET_AT..PAYLOAD_OFFSET_AT + 4].copy_from_slice(&16u32.to_le_bytes());
        let length = u32::try_from(payload.len()).unwrap();
        image[PAYLOAD_LENGTH_AT..PAYLOAD_LENGTH_AT + 4].copy_from_slice(&length.to_le_bytes());
        image.extend([0xcc; 16]);
        image.extend(payload);
        image
    }

    fn lz4_payload(content: &[u8]) -> Vec<u8> {
        let mut payload = LZ4_LEGACY_MAGIC.to_le_bytes().to_vec();
        for block in content.chunks(LZ4_LEGACY_BLOCK) {
            let packed = lz4_flex::block::compress(block);
            payload.extend(u32::try_from(packed.len()).unwrap().to_le_bytes());
            payload.extend(packed);
        }
        payload.extend(u32::try_from(content.len()).unwrap().to_le_bytes());
        payload
    }

    fn elf(bytes: usize) -> Vec<u8> {
        let mut content: Vec<u8> = (0..=250).flat_map(|byte| [byte; 999]).cycle().take(bytes).collect();
        content[..4].copy_from_slice(ELF_MAGIC);
        content
    }

    #[test]
    fn a_kernel_of_several_blocks_comes_out_whole() {
        let kernel = elf(2 * LZ4_LEGACY_BLOCK + 12345);
        assert_eq!(vmlinux(&bzimage(&lz4_payload(&kernel))).unwrap(), kernel);
    }

    #[test]
    fn other_files_are_refused() {
        assert_eq!(vmlinux(b"").unwrap_err(), BzImageError::NoHeader);
        assert_eq!(vmlinux(&[0; 4096]).unwrap_err(), BzImageError::NoHeader);
        let mut old = bzimage(&lz4_payload(&elf(100)));
        old[PROTOCOL_VERSION_AT] = 7;
        assert_eq!(vmlinux(&old).unwrap_err(), BzImageError::OldProtocol(0x0207));
        let zstd = bzimage(&0xfd2f_b528u32.to_le_bytes());
        assert_eq!(vmlinux(&zstd).unwrap_err(), BzImageError::Compression(0xfd2f_b528));
        assert_eq!(vmlinux(&bzimage(&lz4_payload(&[1; 100]))).unwrap_err(), BzImageError::NotElf);
    }

    #[test]
    fn every_truncation_is_an_error() {
        let whole = bzimage(&lz4_payload(&elf(300)));
        for end in 0..whole.len() {
            vmlinux(&whole[..end]).unwrap_err();
        }
    }

    #[test]
    fn damaged_sizes_are_errors() {
        let mut payload = lz4_payload(&elf(300));
        let end = payload.len();
        payload[end - 4..].copy_from_slice(&301u32.to_le_bytes());
        assert_eq!(vmlinux(&bzimage(&payload)).unwrap_err(), BzImageError::Size { have: 300, need: 301 });
        payload[end - 4..].copy_from_slice(&299u32.to_le_bytes());
        assert!(matches!(vmlinux(&bzimage(&payload)), Err(BzImageError::Block { index: 0, .. })));
        payload[end - 4..].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(vmlinux(&bzimage(&payload)), Err(BzImageError::Size { .. })));
        payload[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        payload[end - 4..].copy_from_slice(&300u32.to_le_bytes());
        assert!(matches!(vmlinux(&bzimage(&payload)), Err(BzImageError::Truncated { .. })));
    }
}
