//! The `tiny` image with the verifier in it, under QEMU's emulator.

#[cfg(test)]
#[path = "../../tests/qemu/mod.rs"]
mod qemu;

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::path::Path;
    use std::time::Duration;

    use guest_images::{Images, tiny};
    use verifier::net::Client;
    use verifier::report::{Line, Report};

    use super::qemu::Guest;

    /// The machine has no timer that Linux could measure the TSC with; QEMU's emulator counts nanoseconds.
    const MACHINE: &[&str] = &["-M", "microvm,rtc=on", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "112"];
    const TSC: &str = "tsc_early_khz=1000000";

    fn boot(parameters: &str, more: &[&str]) -> Guest {
        let images = Images::open(&Path::new(env!("CARGO_TARGET_TMPDIR")).join("../../guest-images")).unwrap();
        let image = images.tiny(Path::new(env!("CARGO_BIN_EXE_verifier"))).unwrap();
        let (kernel, initramfs) = (image.kernel.bzimage(), image.initramfs);
        let command_line = format!("{} {TSC} {parameters}", tiny::COMMAND_LINE);
        let boot =
            ["-kernel", kernel.to_str().unwrap(), "-initrd", initramfs.to_str().unwrap(), "-append", &command_line];
        let mut guest = Guest::start(&[MACHINE, &boot, more].concat());
        let uptime = guest.until(|line| line.split_once("godwit-guest: init ")?.1.trim().parse::<f64>().ok());
        assert!(uptime > 0.0);
        guest
    }

    fn report(guest: &mut Guest) -> Report {
        guest.until(|line| match Line::parse(line) {
            Some(Line::Report(report)) => Some(*report),
            _ => None,
        })
    }

    #[test]
    fn every_mode_works_in_a_guest() {
        let disk = tempfile::NamedTempFile::new().unwrap();
        disk.as_file().set_len(1 << 20).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let drive = format!("file={},format=raw,if=none,id=d", disk.path().display());
        let network = format!("user,id=n,hostfwd=tcp:127.0.0.1:{port}-:7000");
        let mut guest = boot(
            "godwit.poweroff godwit.net=10.0.2.15/24,10.0.2.2 \
            godwit.run=\"verifier --memory 1M --threads 2 --rate 500 --disk /dev/vda --port 7000 --tick-ms 50\"",
            &[
                "-drive",
                &drive,
                "-device",
                "virtio-blk-device,drive=d",
                "-netdev",
                &network,
                "-device",
                "virtio-net-device,netdev=n",
            ],
        );
        guest.until(|line| matches!(Line::parse(line), Some(Line::Ready { .. })).then_some(()));
        let mut client = Client::connect(("127.0.0.1", port), Duration::from_secs(60)).unwrap();
        (0..20).for_each(|_| client.exchange(100).unwrap());
        guest.until(|line| matches!(Line::parse(line), Some(Line::Tick { seq: 20, .. })).then_some(()));
        guest.write("report\n");
        let found = report(&mut guest);
        assert_eq!(found.net.as_ref().unwrap().words, 2000);
        assert_eq!(found.disk.as_ref().unwrap().blocks, 256);
        assert!(found.disk.as_ref().unwrap().direct);
        assert!(found.memory.written > 0 && found.clock.samples > 100, "{found:?}");
        assert!(found.dmesg.is_some());
        guest.write("quit\n");
        // An emulated CPU may be late, so the kernel may complain; nothing else may be wrong.
        let last = report(&mut guest);
        assert!(last.memory.faults.none() && last.disk.unwrap().faults.none() && last.silent.is_empty());
        assert_eq!(last.clock.steps_back, 0);
        let status = guest.until(|line| Some(line.split_once("godwit-guest: exit ")?.1.trim().to_owned()));
        assert_eq!(status, if last.ok { "0" } else { "1" });
    }

    #[test]
    fn the_power_button_powers_off() {
        let mut guest = boot("godwit.run=\"echo up; sleep 1000\"", &[]);
        guest.until(|line| (line.trim() == "up").then_some(()));
        // QEMU's own monitor, behind the escape character of `-nographic`.
        guest.write("\u{1}csystem_powerdown\n");
        guest.until(|line| line.contains("godwit-guest: power button").then_some(()));
    }

    #[test]
    fn a_shell_waits_where_no_command_is_given() {
        let mut guest = boot("", &[]);
        // The shell may not have started to read yet; the terminal keeps what was typed.
        guest.write("echo $((40 + 2)) modules=$(lsmod | grep -c virtio_)\n");
        let answer = guest.until(|line| line.trim().strip_prefix("42 modules=")?.parse::<u32>().ok());
        assert!(answer >= 5, "{answer}");
    }
}
