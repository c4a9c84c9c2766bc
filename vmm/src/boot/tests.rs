//! Kernels made by hand: what is refused, where the parts land, and that both entries really run on the host's KVM.

use super::entry::{set_firmware_state, set_registers};
use super::*;
use crate::kvm::KvmHost;
use crate::layout::{BOOT_PARAMS, PVH_START_INFO};
use crate::memory::{GuestMemory, Slots};
use kvm_ioctls::VcpuExit;
use linux_loader::bootparam::boot_params;
use linux_loader::start_info::hvm_start_info;
use tempfile::TempDir;
use vm_memory::ByteValued;

const MEMORY: u64 = 64 << 20;
const LOAD_AT: u64 = 0x20_0000;
const RSDP: Gpa = crate::layout::ACPI_TABLES;

/// An ELF kernel of one segment with `code`, and a PVH note if `pvh`.
fn elf_file(code: &[u8], pvh: bool) -> Vec<u8> {
    let (headers, code_at) = (64, 0x1000);
    let mut note = [4_u32, 4, 18].map(u32::to_le_bytes).concat();
    note.extend(b"Xen\0");
    note.extend(u32::try_from(LOAD_AT).unwrap().to_le_bytes());
    let mut file = vec![0; code_at];
    file[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    put(&mut file, 0x10, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(&mut file, 0x18, &LOAD_AT.to_le_bytes());
    put(&mut file, 0x20, &64_u64.to_le_bytes());
    put(&mut file, 0x34, &[64, 0, 56, 0, if pvh { 2 } else { 1 }, 0]);
    let mut segment = |index: usize, kind: u32, offset: usize, address: u64, bytes: usize, in_memory: u64| {
        let at = headers + index * 56;
        put(&mut file, at, &kind.to_le_bytes());
        for (field, value) in [(8, offset as u64), (24, address), (32, bytes as u64), (40, in_memory)] {
            put(&mut file, at + field, &value.to_le_bytes());
        }
    };
    segment(0, 1, code_at, LOAD_AT, code.len(), 0x1_0000);
    segment(1, 4, 0x200, 0, note.len(), note.len() as u64);
    put(&mut file, 0x200, &note);
    file.extend(code);
    file
}

/// A bzImage of 2 setup sectors whose 64-bit entry is `code`.
fn bzimage_file(code: &[u8]) -> Vec<u8> {
    let mut header = setup_header {
        setup_sects: 2,
        boot_flag: 0xaa55,
        jump: 0x6aeb,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x020f,
        loadflags: 1,
        code32_start: 0x10_0000,
        initrd_addr_max: 0x7fff_ffff,
        xloadflags: 1,
        cmdline_size: 2047,
        pref_address: 0x100_0000,
        init_size: 0x10_0000,
        ..Default::default()
    };
    let mut payload = vec![0; 0x200];
    payload.extend(code);
    payload.resize(payload.len().next_multiple_of(16), 0);
    header.syssize = u32::try_from(payload.len() / 16).unwrap();
    let mut file = vec![0; 3 * 512];
    put(&mut file, 0x1f1, header.as_slice());
    file.extend(payload);
    file
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn boot(&self, kernel: &[u8], initramfs: Option<u64>) -> Boot {
        let path = self.0.path().join("kernel");
        std::fs::write(&path, kernel).unwrap();
        let initramfs = initramfs.map(|bytes| {
            let path = self.0.path().join("initramfs");
            let file = File::create(&path).unwrap();
            file.set_len(bytes).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, b"start", 0).unwrap();
            path
        });
        Boot { kernel: path, initramfs, command_line: "console=ttyS0".into(), entry: EntryKind::Auto }
    }
}

fn load_into(memory: &GuestMemory, boot: &Boot) -> Result<Entry, BootError> {
    load(memory.ram(), boot, RSDP)
}

fn refusal(kernel: &[u8]) -> BootError {
    let files = Files::new();
    let memory = GuestMemory::create(MEMORY, false).unwrap();
    load_into(&memory, &files.boot(kernel, None)).unwrap_err()
}

/// Runs a kernel until it writes a byte to a port, and returns both.
fn run(boot: &Boot) -> (u16, u8) {
    let host = KvmHost::open().unwrap();
    let vm = host.create_vm().unwrap();
    let memory = GuestMemory::create(MEMORY, false).unwrap();
    let _slots = Slots::new(vm.clone(), memory.clone()).unwrap();
    let entry = load_into(&memory, boot).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid2(host.supported_cpuid().unwrap()).unwrap();
    set_firmware_state(&vcpu).unwrap();
    set_registers(&vcpu, &entry).unwrap();
    match vcpu.run().unwrap() {
        VcpuExit::IoOut(port, data) => (port, data[0]),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_pvh_kernel_runs() {
    // mov eax, [ebx]; mov dx, 0x3f8; out dx, al: the low byte of the magic number of hvm_start_info.
    let code = [0x8b, 0x03, 0x66, 0xba, 0xf8, 0x03, 0xee];
    let files = Files::new();
    assert_eq!(run(&files.boot(&elf_file(&code, true), None)), (0x3f8, 0x78));
}

#[test]
fn a_64_bit_kernel_runs() {
    // mov rax, 1 << 32; shr rax, 28; mov al, [rsi + rax + 0x1ee]; mov dx, 0x3f8; out dx, al: reads 0x55 of the header's
    // boot flag at 0x1fe, and only if the registers have 64 bits.
    let code = [
        0x48, 0xb8, 0, 0, 0, 0, 1, 0, 0, 0, 0x48, 0xc1, 0xe8, 28, 0x8a, 0x84, 0x06, 0xee, 0x01, 0, 0, 0x66, 0xba, 0xf8,
        0x03, 0xee,
    ];
    let files = Files::new();
    assert_eq!(run(&files.boot(&elf_file(&code, false), None)), (0x3f8, 0x55));
    assert_eq!(run(&files.boot(&bzimage_file(&code), None)), (0x3f8, 0x55));
}

#[test]
fn every_part_lands_where_the_guest_is_told() {
    let files = Files::new();
    let memory = GuestMemory::create(MEMORY, false).unwrap();
    let ram = memory.ram();
    let entry = load_into(&memory, &files.boot(&elf_file(b"code", true), Some(0x1801))).unwrap();
    assert_eq!(entry, Entry::Pvh32 { eip: 0x20_0000, start_info: 0x6000 });
    let info: hvm_start_info = ram.read_obj(PVH_START_INFO).unwrap();
    assert_eq!((info.nr_modules, info.rsdp_paddr), (1, RSDP.0));
    let initramfs = GuestAddress(MEMORY - 0x2000);
    assert_eq!(ram.read_obj::<u64>(GuestAddress(info.modlist_paddr)).unwrap(), initramfs.0);
    assert_eq!(ram.read_obj::<[u8; 5]>(initramfs).unwrap(), *b"start");
    assert_eq!(ram.read_obj::<[u8; 14]>(GuestAddress(info.cmdline_paddr)).unwrap(), *b"console=ttyS0\0");
    assert_eq!(ram.read_obj::<[u8; 4]>(GuestAddress(LOAD_AT)).unwrap(), *b"code");
}

#[test]
fn a_bzimage_gets_its_header_back_filled_in() {
    let files = Files::new();
    let memory = GuestMemory::create(MEMORY, false).unwrap();
    let entry = load_into(&memory, &files.boot(&bzimage_file(b"code"), Some(0x1000))).unwrap();
    assert_eq!(entry, Entry::Long64 { rip: 0x10_0200, boot_params: BOOT_PARAMS.0 });
    let params: boot_params = memory.ram().read_obj(BOOT_PARAMS).unwrap();
    let header = params.hdr;
    assert_eq!({ header.syssize }, 0x21);
    assert_eq!(u64::from(header.cmd_line_ptr), COMMAND_LINE.0);
    assert_eq!(u64::from(header.ramdisk_image), MEMORY - 0x1000);
    assert_eq!(({ header.ramdisk_size }, header.type_of_loader), (0x1000, 0xff));
}

#[test]
fn the_entry_can_be_chosen_where_the_kernel_has_it() {
    let files = Files::new();
    let memory = GuestMemory::create(MEMORY, false).unwrap();
    let with = |kernel: &[u8], entry| load_into(&memory, &Boot { entry, ..files.boot(kernel, None) });
    let (both, long_only) = (elf_file(b"code", true), elf_file(b"code", false));
    assert!(matches!(with(&both, EntryKind::Auto), Ok(Entry::Pvh32 { .. })));
    assert!(matches!(with(&both, EntryKind::Long64), Ok(Entry::Long64 { rip: LOAD_AT, .. })));
    assert!(matches!(with(&long_only, EntryKind::Auto), Ok(Entry::Long64 { .. })));
    for kernel in [long_only, bzimage_file(b"code")] {
        assert!(matches!(with(&kernel, EntryKind::Pvh), Err(BootError::NoEntry { entry: "PVH", .. })));
    }
}

#[test]
fn missing_files_are_named() {
    let files = Files::new();
    let memory = GuestMemory::create(MEMORY, false).unwrap();
    let good = files.boot(&elf_file(b"code", true), None);
    let nowhere = PathBuf::from("/nonexistent/file");
    let error = load_into(&memory, &Boot { kernel: nowhere.clone(), ..good.clone() }).unwrap_err();
    assert_eq!(error.to_string(), "Could not open the kernel /nonexistent/file");
    let error = load_into(&memory, &Boot { initramfs: Some(nowhere), ..good.clone() }).unwrap_err();
    assert_eq!(error.to_string(), "Could not open the initramfs /nonexistent/file");
    let error = load_into(&memory, &Boot { kernel: "/tmp".into(), ..good.clone() }).unwrap_err();
    assert!(matches!(error, BootError::Open { .. }), "{error}");
    let error = load_into(&memory, &Boot { initramfs: Some("/dev/null".into()), ..good }).unwrap_err();
    assert!(matches!(error, BootError::Empty { what: "initramfs", .. }), "{error}");
}

#[test]
fn truncated_kernels_are_told_at_every_length() {
    for whole in [elf_file(&[0x90; 64], true), bzimage_file(&[0x90; 64])] {
        for length in (1..whole.len()).step_by(7) {
            let error = refusal(&whole[..length]);
            let plain = matches!(error, BootError::Truncated { .. } | BootError::NotAKernel { .. });
            assert!(plain, "{length}: {error:?}");
        }
        assert!(matches!(refusal(&whole[..whole.len() - 1]), BootError::Truncated { .. }));
    }
}

#[test]
fn kernels_of_other_machines_are_named() {
    let with = |at: usize, value: u8| {
        let mut file = elf_file(b"code", true);
        file[at] = value;
        refusal(&file).to_string()
    };
    for (machine, name) in
        [(3, "32-bit x86"), (40, "32-bit ARM"), (183, "64-bit ARM"), (243, "RISC-V"), (8, "machine 8")]
    {
        let words = with(0x12, machine);
        assert!(words.contains(name) && words.contains("/kernel"), "{words}");
    }
    assert!(with(4, 1).contains("not of 64 bits"));
    assert!(with(5, 2).contains("big-endian"));
    let mut arm = vec![0; 0x300];
    put(&mut arm, 0x38, b"ARM\x64");
    assert!(matches!(refusal(&arm), BootError::Architecture { .. }));
}

#[test]
fn what_is_no_kernel_is_told() {
    for (content, words) in [
        (&b"\x1f\x8b\x08rest"[..], "compressed with gzip"),
        (b"\x28\xb5\x2f\xfdrest", "compressed with zstd"),
        (b"\xfd7zXZ\0", "compressed with xz"),
        (b"#!/bin/sh", "neither ELF nor bzImage"),
    ] {
        let error = refusal(content).to_string();
        assert!(error.contains(words), "{error}");
    }
    assert!(matches!(refusal(b""), BootError::Empty { what: "kernel", .. }));
}

#[test]
fn damaged_headers_are_refused() {
    let with = |at: usize, bytes: &[u8]| {
        let mut file = elf_file(b"code", true);
        put(&mut file, at, bytes);
        refusal(&file)
    };
    assert!(matches!(with(0x36, &[55]), BootError::Damaged { .. }), "size of a program header");
    assert!(matches!(with(0x38, &[0xff, 0xff]), BootError::Damaged { .. }), "their number");
    assert!(matches!(with(0x38, &[0]), BootError::Damaged { .. }), "nothing to load");
    assert!(matches!(with(0x20, &u64::MAX.to_le_bytes()), BootError::Truncated { .. }), "their offset");
    let segment = 64;
    assert!(matches!(with(segment + 24, &0x1000_u64.to_le_bytes()), BootError::TooLow { address: 0x1000, .. }));
    assert!(matches!(with(segment + 40, &1_u64.to_le_bytes()), BootError::Damaged { .. }), "smaller in memory");
    assert!(matches!(with(segment + 40, &u64::MAX.to_le_bytes()), BootError::Damaged { .. }), "end of addresses");
    assert!(matches!(with(segment + 40, &MEMORY.to_le_bytes()), BootError::KernelTooBig { .. }));
    let mut old = bzimage_file(b"code");
    put(&mut old, 0x236, &[0, 0]);
    assert!(matches!(refusal(&old), BootError::NoEntry { entry: "64-bit", .. }));
}

#[test]
fn too_little_memory_is_told_with_numbers() {
    let files = Files::new();
    let memory = GuestMemory::create(MEMORY, false).unwrap();
    let error = load_into(&memory, &files.boot(&elf_file(b"code", true), Some(63 << 20))).unwrap_err();
    assert_eq!(
        error.to_string(),
        "The initramfs of 63 MiB does not fit in 64 MiB of memory beside the kernel: give the machine more memory"
    );
    let small = GuestMemory::create(16 << 20, false).unwrap();
    let error = load_into(&small, &files.boot(&bzimage_file(b"code"), None)).unwrap_err();
    assert!(error.to_string().contains("needs memory up to 17 MiB, the machine has 16 MiB there"), "{error}");
}

#[test]
fn the_kernel_limits_the_command_line() {
    let files = Files::new();
    let memory = GuestMemory::create(MEMORY, false).unwrap();
    let with = |kernel: &[u8], length| {
        load_into(&memory, &Boot { command_line: "x".repeat(length), ..files.boot(kernel, None) })
    };
    with(&bzimage_file(b"code"), 2047).unwrap();
    assert!(matches!(with(&bzimage_file(b"code"), 2048), Err(BootError::CommandLine { length: 2048, most: 2047 })));
    with(&elf_file(b"code", true), 0xffff).unwrap();
    assert!(matches!(with(&elf_file(b"code", true), 0x1_0000), Err(BootError::CommandLine { .. })));
}
