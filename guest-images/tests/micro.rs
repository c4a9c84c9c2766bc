//! The micro guest under QEMU: on KVM where the machine has it, emulated elsewhere.

#[cfg(test)]
mod qemu;

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::path::{Path, PathBuf};

    use guest_images::Images;
    use guest_images::micro::Line;

    use super::qemu::Guest;

    const MACHINE: &[&str] = &[
        "-M",
        "microvm,x-option-roms=off,rtc=on",
        "-accel",
        "kvm",
        "-accel",
        "tcg",
        "-cpu",
        "max,-arch-capabilities",
        "-m",
        "64",
    ];

    fn start(command_line: &str, more: &[&str]) -> Guest {
        let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../../guest-images");
        let micro = Images::open(&cache).unwrap().micro().unwrap();
        let kernel = ["-kernel", micro.to_str().unwrap(), "-append", command_line];
        Guest::start(&[MACHINE, &kernel, more].concat())
    }

    #[test]
    fn it_ticks_and_verifies_its_memory() {
        let mut guest = start("ws=4M tick=20 unknown=word", &[]);
        assert_eq!(Line::parse(&guest.line()), Line::Started);
        let Line::Ready { base, pages, tsc_khz } = Line::parse(&guest.line()) else { panic!("not ready") };
        assert_eq!((base, pages), (16 << 20, 1024));
        assert!(tsc_khz > 100_000, "{tsc_khz}");
        let mut last = None;
        for expected in 0..10 {
            let Line::Tick { sequence, progress } = Line::parse(&guest.line()) else { panic!("not a tick") };
            assert_eq!(sequence, expected);
            if let Some(before) = last {
                assert!(progress.microseconds >= before + 20_000, "{} after {before}", progress.microseconds);
            }
            last = Some(progress.microseconds);
        }
        guest.write("v");
        let verified = guest.until(|line| match Line::parse(line) {
            Line::Verified { bad, .. } => Some(bad),
            Line::Bad(what) => panic!("{what}"),
            _ => None,
        });
        assert_eq!(verified, 0);
        guest.write("q");
        let (bad, pages) = guest.until(|line| match Line::parse(line) {
            Line::End { bad, progress, .. } => Some((bad, progress.pages)),
            _ => None,
        });
        assert_eq!(bad, 0);
        assert!(pages > 0);
    }

    #[test]
    fn it_ends_by_itself_and_every_pattern_works() {
        for pattern in ["check", "counter", "same", "zero", "text", "random", "colour", "patch", "shift"] {
            let mut guest = start(&format!("ws=256k tick=0 passes=3 pattern={pattern} fill=text"), &[]);
            let end = guest.until(|line| match Line::parse(line) {
                Line::End { bad, passes, progress } => Some((bad, passes, progress.pages)),
                _ => None,
            });
            // The first pass of `check` looks at nothing, so the fill is no error.
            assert_eq!(end, (0, 3, 192), "{pattern}");
        }
    }

    #[test]
    fn it_keeps_to_its_rate() {
        let mut guest = start("ws=1M rate=500 tick=1000 pattern=counter", &[]);
        let pages = guest.until(|line| match Line::parse(line) {
            Line::Tick { sequence: 2, progress } => Some(progress.pages * 2_000_000 / progress.microseconds),
            _ => None,
        });
        assert!((800..=1100).contains(&pages), "{pages} pages in 2 s");
    }

    #[test]
    fn impossible_parameters_are_refused() {
        let refused = |line: &str| match Line::parse(line) {
            Line::Refused(why) => Some(why),
            _ => None,
        };
        let why = start("ws=64M", &[]).until(refused);
        assert_eq!(why, "the working set does not fit into the memory from 16 MiB on");
        assert_eq!(start("pattern=stripes", &[]).until(refused), "unknown pattern or fill");
        let why = start("ws=4k over", &[]).until(refused);
        assert_eq!(why, "over needs an initrd that is as large as the working set");
        assert_eq!(start("over content", &[]).until(refused), "over changes what content is to keep");
    }

    #[test]
    fn patterns_change_the_initrd_as_they_say() {
        let directory = tempfile::tempdir().unwrap();
        // Of `patch`, page 3 and pass 1 have the 64 bytes from (3 + 1) * 64 on; `shift` has the next page behind its stamp.
        let patched = |old: &[u8], new: &[u8]| {
            let differ: Vec<usize> = (0..4096).filter(|&at| old[3 * 4096 + at] != new[at]).collect();
            differ.len() > 48 && differ.iter().all(|at| (256..320).contains(at))
        };
        let coloured = |old: &[u8], new: &[u8]| {
            new.chunks(4).all(|word| *word == new[..4]) && new[..4] != old[3 * 4096..3 * 4096 + 4]
        };
        let shifted = |old: &[u8], new: &[u8]| new[8..] == old[4 * 4096 + 8..5 * 4096] && new[..4] == [3, 0, 0, 0];
        type Holds<'a> = &'a dyn Fn(&[u8], &[u8]) -> bool;
        let patterns: [(&str, Holds<'_>); 3] = [("patch", &patched), ("colour", &coloured), ("shift", &shifted)];
        for (pattern, holds) in patterns {
            let (socket, words, more) = initrd(&directory.path().join(pattern));
            let more: Vec<&str> = more.iter().map(String::as_str).collect();
            // A slice of all of these pages, or of two of them, every 8 s or 0.5 s: the fourth page stays for a while.
            let mut guest = start(&format!("over ws=20k rate=4 tick=20 pattern={pattern}"), &more);
            guest.until(|line| {
                matches!(Line::parse(line), Line::Tick { progress, .. } if progress.pages >= 4).then_some(())
            });
            let page = memory(&socket, initrd_address(&socket) + 3 * 4096, 4096);
            assert!(holds(&words, &page), "{pattern}: {:?}", &page[..320]);
            drop(guest);
        }
    }

    /// The bytes of a guest's memory.
    fn memory(socket: &Path, at: u64, length: usize) -> Vec<u8> {
        // The stub's answers have at most 4096 characters.
        let digits: String =
            (0..length).step_by(1024).map(|part| debug(socket, &format!("m{:x},400", at + part as u64))).collect();
        (0..length).map(|byte| u8::from_str_radix(&digits[2 * byte..2 * byte + 2], 16).unwrap()).collect()
    }

    /// An initrd in `folder` in which each word holds its own place, so that one of them tells where QEMU put them all; with
    /// the options that have QEMU load it and listen to a debugger at the socket.
    fn initrd(folder: &Path) -> (PathBuf, Vec<u8>, [String; 4]) {
        std::fs::create_dir_all(folder).unwrap();
        let (socket, initrd) = (folder.join("gdb"), folder.join("initrd"));
        let words: Vec<u8> = (0..1u32 << 18).flat_map(|word| (word * 4).to_le_bytes()).collect();
        std::fs::write(&initrd, &words).unwrap();
        let debugger = format!("unix:{},server=on,wait=off", socket.display());
        let options = ["-gdb".to_owned(), debugger, "-initrd".to_owned(), initrd.display().to_string()];
        (socket, words, options)
    }

    #[test]
    fn a_changed_page_and_a_changed_initrd_are_found() {
        let directory = tempfile::tempdir().unwrap();
        let (socket, _, more) = initrd(directory.path());
        let more: Vec<&str> = more.iter().map(String::as_str).collect();
        let mut guest = start("ws=64k tick=0 rate=1 content", &more);
        guest.until(|line| matches!(Line::parse(line), Line::Ready { .. }).then_some(()));
        // With rate=1 the first slice (all 16 pages) is written at once, and the next one more than a second later.
        let mut passes_before = 0;
        while passes_before == 0 {
            guest.write("v");
            passes_before = guest.until(|line| match Line::parse(line) {
                Line::Verified { bad: 0, passes, .. } => Some(passes),
                _ => None,
            });
        }
        // The generation of page 2, and a byte of the initrd that the sum looks at: both by QEMU's debugger stub.
        let initrd_at = initrd_address(&socket);
        assert_eq!(debug(&socket, &format!("M{:x},1:77", (16 << 20) + 2 * 4096 + 4)), "OK");
        assert_eq!(debug(&socket, &format!("M{initrd_at:x},1:77")), "OK");
        guest.write("v");
        let mut found = Vec::new();
        let bad = guest.until(|line| match Line::parse(line) {
            Line::Verified { bad, .. } => Some(bad),
            Line::Bad(what) => {
                found.push(what);
                None
            }
            _ => None,
        });
        found.sort();
        assert_eq!(found[0], "content");
        assert!(found[1].starts_with("page=2 generation=") && found[1].ends_with("found_page=2 found_generation=119"));
        assert_eq!(bad, 2);
    }

    /// Where the initrd begins, by what stands half a MiB before the end of the memory.
    fn initrd_address(socket: &Path) -> u64 {
        let within = (64 << 20) - (1 << 19);
        let answer = u32::from_str_radix(&debug(socket, &format!("m{within:x},4")), 16).unwrap();
        within - u64::from(answer.swap_bytes())
    }

    /// One exchange with QEMU's stub for gdb, which stops the guest meanwhile ("Remote Protocol" in gdb's manual).
    fn debug(socket: &Path, packet: &str) -> String {
        let mut stub = UnixStream::connect(socket).unwrap();
        let answer = exchange(&mut stub, packet);
        assert_eq!(exchange(&mut stub, "D"), "OK");
        answer
    }

    fn exchange(stub: &mut UnixStream, packet: &str) -> String {
        let sum = packet.bytes().fold(0u8, u8::wrapping_add);
        write!(stub, "${packet}#{sum:02x}").unwrap();
        loop {
            let answer = read_packet(stub);
            stub.write_all(b"+").unwrap();
            // That the guest has stopped is told whenever it happens.
            if !answer.starts_with('T') {
                return answer;
            }
        }
    }

    fn read_packet(stub: &mut UnixStream) -> String {
        let mut packet = Vec::new();
        let mut byte = [0];
        while !packet.ends_with(b"#") {
            stub.read_exact(&mut byte).unwrap();
            packet.push(byte[0]);
        }
        // The sum; a Unix socket damages nothing.
        stub.read_exact(&mut [0; 2]).unwrap();
        let packet = String::from_utf8(packet).unwrap();
        packet.trim_start_matches('+').trim_matches(['$', '#']).to_owned()
    }
}
