//! Migrations to targets that cannot take the guest, and strangers at a target's door: the reason reaches whoever asked,
//! the guest goes on where it was, and the right target gets it afterwards.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use control::{MigrationMode, PeerAddress, Phase, Request};

use super::bad_input::changed_world;
use crate::console::Console;
use crate::godwit::{Godwit, call};
use crate::scenario::{Context, Needs, Scenario};

/// See its `about`.
pub(super) const TARGETS: Scenario = Scenario {
    name: "bad-targets",
    about: "A target that is not there, not a Godwit, of another version, or without memory or disk costs the guest nothing",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(60),
    run: targets,
};

/// See its `about`.
pub(super) const SOURCES: Scenario = Scenario {
    name: "bad-sources",
    about: "A waiting Godwit answers sources of another version in words, survives strangers, and goes on waiting",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(30),
    run: sources,
};

const SOON: Duration = Duration::from_secs(10);
/// Kinds of frames (`migration::wire`).
const HELLO: u16 = 1;
const ACCEPT: u16 = 2;
const REFUSE: u16 = 3;
const ABORT: u16 = 13;
const HEADER_BYTES: usize = 16;

/// A frame as a Godwit of that version of the protocol would send it.
fn frame(version: u16, kind: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).expect("bodies here are short");
    let mut frame = [&b"GWMG"[..], &version.to_le_bytes(), &kind.to_le_bytes(), &length.to_le_bytes()].concat();
    let checksum = crc32c(&[&frame, body].concat());
    frame.extend(checksum.to_le_bytes());
    frame.extend(body);
    frame
}

/// CRC-32C, bit by bit (RFC 3720, B.4).
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0x82f6_3b78 } else { sum >> 1 })
    })
}

struct Source {
    godwit: Godwit,
    console: Console,
}

impl Source {
    /// Tries to move the guest to `address`, which must fail with `parts`, after which the guest goes on here.
    fn cannot_go(&mut self, context: &Context, address: &str, parts: &[&str]) -> Result<()> {
        let api = self.godwit.folder().join("api.sock").display().to_string();
        for mode in ["live", "stop"] {
            println!("godwit migrate --mode {mode} --to {address}");
            let (ended, told) = call(context, &["migrate", "--api", &api, "--mode", mode, "--to", address])?;
            println!("{}{}", told, ended.words.trim_end());
            ensure!(told.starts_with(&format!("{mode} migration failed after ")), "{told}");
            ensure!(!told.contains(", 0.000 ms"), "It took no time to fail: {told}");
            parts.iter().try_for_each(|part| ended.expect(1, part))?;
            ensure!(self.godwit.vm()?.phase == Phase::Running, "The guest does not run after a failed migration");
            self.console.pending();
            self.console.expect("tick", SOON)?;
        }
        Ok(())
    }
}

fn targets(context: &Context) -> Result<()> {
    let (disk, kept) = (context.work.join("disk"), context.work.join("kept"));
    File::create(&disk)?.set_len(1 << 20)?;
    fs::hard_link(&disk, &kept)?;
    let kernel = context.images.join("micro.elf").display().to_string();
    let option = format!("path={},id=data", disk.display());
    let machine = ["--kernel", &kernel, "--cmdline=ws=16M rate=1000 tick=20", "--memory=96M", "--disk", &option];
    let godwit = Godwit::run(context, "source", &machine)?;
    let mut source = Source { console: godwit.console()?, godwit };
    source.console.expect("tick", SOON)?;

    source.cannot_go(
        context,
        "unix:/nonexistent/in.sock",
        &["start `godwit receive unix:/nonexistent/in.sock` there"],
    )?;
    source.cannot_go(context, "tcp://127.0.0.1:1", &["No Godwit can be reached at tcp://127.0.0.1:1", "refused"])?;
    source.cannot_go(context, "tcp://no-such-host.invalid:1", &["no-such-host.invalid:1 is not known"])?;
    strangers(context, &mut source)?;
    without_memory(context, &mut source)?;
    without_disk(context, &mut source, &disk)?;

    let resource = format!("id=data,path={}", kept.display());
    let target = Godwit::receive(context, "target", &["--disk", &resource])?;
    let mut console = target.console()?;
    source.godwit.migrate(&target, MigrationMode::Live, SOON)?;
    console.expect("tick", SOON)?;
    console.say("q")?;
    console.expect("end bad=0", SOON)?;
    target.finish(SOON)?.expect(0, "The guest powered off")
}

/// Targets that are something else.
fn strangers(context: &Context, source: &mut Source) -> Result<()> {
    let words = frame(9, REFUSE, b"I speak version 9; update godwit");
    let cases: [(&str, Vec<u8>, &[&str]); 4] = [
        (
            "web-server",
            b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n".to_vec(),
            &["does not speak Godwit's migration protocol", "give the address of a `godwit receive`"],
        ),
        ("silent", Vec::new(), &["The link to the target failed"]),
        ("later-version", frame(9, ACCEPT, &[0; 16]), &["speaks version 9", "same version of godwit at both ends"]),
        ("later-version-in-words", words, &["The target refused the guest: I speak version 9; update godwit"]),
    ];
    for (name, answer, parts) in cases {
        let path = context.work.join(name);
        let listener = UnixListener::bind(&path)?;
        let stranger = thread::spawn(move || -> std::io::Result<()> {
            // One link for each mode.
            for _ in 0..2 {
                let (mut link, _) = listener.accept()?;
                link.read_exact(&mut [0; HEADER_BYTES])?;
                link.write_all(&answer)?;
                link.shutdown(std::net::Shutdown::Write)?;
                // The source may hang up with words of its own unread.
                let _ = link.read_to_end(&mut Vec::new());
            }
            Ok(())
        });
        source.cannot_go(context, &PeerAddress::Unix(path.clone()).to_string(), parts)?;
        stranger.join().ok().context("The stranger panicked")??;
        fs::remove_file(path)?;
    }
    Ok(())
}

/// A target whose host has less memory than the guest.
fn without_memory(context: &Context, source: &mut Source) -> Result<()> {
    fs::write(context.work.join("meminfo"), "MemTotal: 65536 kB\n")?;
    let small = changed_world(context, "small-host", "mount --bind $WORK/meminfo /proc/meminfo\nexec")?;
    let target = Godwit::receive(&small, "small", &[])?;
    let parts = [
        "The target refused the guest",
        "The host has 64 MiB of memory, the machine asks for 96 MiB: give the machine less",
    ];
    source.cannot_go(context, &target.address().to_string(), &parts)?;
    still_waits(target)
}

/// A target without the file that the source's disk is.
fn without_disk(context: &Context, source: &mut Source, disk: &Path) -> Result<()> {
    let target = Godwit::receive(context, "diskless", &[])?;
    fs::remove_file(disk)?;
    let sentence = format!("Disk {} does not exist", disk.display());
    source.cannot_go(context, &target.address().to_string(), &["The target refused the guest", &sentence])?;
    still_waits(target)
}

fn still_waits(target: Godwit) -> Result<()> {
    target.await_phase(Phase::Receiving)?;
    target.client().call(&Request::Kill)?;
    target.finish(SOON)?.expect(0, "no guest has arrived; waiting for the next")
}

fn sources(context: &Context) -> Result<()> {
    let target = Godwit::receive(context, "target", &[])?;
    let socket = target.folder().join("in.sock");
    let later = answer_to(&socket, &frame(9, HELLO, &[0; 64]))?;
    println!("{}", String::from_utf8_lossy(&later));
    let body = later.get(HEADER_BYTES..).context("The answer is no frame")?;
    ensure!(
        later.starts_with(b"GWMG") && [REFUSE, ABORT].contains(&u16::from(later[6])),
        "A later version is not refused in words"
    );
    ensure!(String::from_utf8_lossy(body).contains("speaks version 9"), "The refusal does not name the version");
    let mut damaged = frame(4, HELLO, &[0; 64]);
    damaged[20] ^= 1;
    let endless = [&b"GWMG\x03\0\x01\0"[..], &u32::MAX.to_le_bytes(), &[0; 4]].concat();
    for nonsense in [&b"GET / HTTP/1.1\r\n\r\n"[..], &damaged, &endless, b"GW", b""] {
        answer_to(&socket, nonsense)?;
        ensure!(target.vm()?.phase == Phase::Receiving, "{nonsense:?} disturbed the target");
    }
    still_waits(target)
}

/// Says something to a target and nothing more; what it answers.
fn answer_to(socket: &Path, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut link = UnixStream::connect(socket)?;
    link.set_read_timeout(Some(SOON))?;
    link.write_all(bytes)?;
    link.shutdown(std::net::Shutdown::Write)?;
    let mut answer = Vec::new();
    match link.read_to_end(&mut answer) {
        Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => Err(error.into()),
        _ => Ok(answer),
    }
}
