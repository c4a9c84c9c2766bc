//! Disks over NBD, with Debian's programs at the other end: their clients at `disk serve`, and this client at their servers.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use block::{Access, Backend, NbdBackend, NbdOptions, NbdUri, conformance};
use control::{MigrationMode, Phase};
use rustix::process::{Pid, Signal, kill_process};

use crate::godwit::{Godwit, call};
use crate::scenario::{Context, Needs, Scenario};
use crate::traveller::Traveller;

/// Debian packages with the peers.
pub const PACKAGES: &[&str] = &["fio", "libnbd-bin", "nbd-server", "nbdkit", "openssl", "qemu-utils"];

/// See its `about`.
pub(super) const SERVER: Scenario = Scenario {
    name: "nbd-server",
    about: "Debian's nbdinfo, nbdcopy, qemu-img, qemu-io and fio use what disk serve serves, in the open and by TLS",
    needs: Needs::Host,
    timeout: Duration::from_secs(180),
    run: server,
};

/// See its `about`.
pub(super) const CLIENT: Scenario = Scenario {
    name: "nbd-client",
    about: "A disk on Debian's qemu-nbd, nbdkit and nbd-server keeps its bytes: with delays, small blocks and limits too",
    needs: Needs::Host,
    timeout: Duration::from_secs(300),
    run: client,
};

/// See its `about`.
pub(super) const KILLED: Scenario = Scenario {
    name: "nbd-killed",
    about: "A disk outlives its server: killed again and again, of each kind, and no write is lost or out of order",
    needs: Needs::Host,
    timeout: Duration::from_secs(180),
    run: killed,
};

/// See its `about`.
pub(super) const LINUX: Scenario = Scenario {
    name: "nbd-linux",
    about: "Linux whose disk is far is moved to where it is, reads it there, and moves back; its server is killed and started",
    needs: Needs::LinuxGuests,
    timeout: Duration::from_secs(240),
    run: linux,
};

/// See its `about`.
pub(super) const REFUSED: Scenario = Scenario {
    name: "nbd-refused",
    about: "Servers, exports and disks that cannot be used are refused in a sentence with the value and the remedy",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(60),
    run: refused,
};

const SOON: Duration = Duration::from_secs(20);
const LENGTH: u64 = 4 << 20;

/// A server in a folder of the scenario, killed when dropped.
pub(super) struct Server {
    child: Child,
    socket: PathBuf,
    /// Where a server that goes into the background writes its process id.
    pid: Option<PathBuf>,
}

impl Server {
    fn start(program: &str, arguments: &[&str], socket: &Path) -> Result<Self> {
        Self::start_with(program, arguments, socket, None)
    }

    fn start_with(program: &str, arguments: &[&str], socket: &Path, pid: Option<PathBuf>) -> Result<Self> {
        println!("{program} {}", arguments.join(" "));
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).process_group(0);
        let child = command.spawn().with_context(|| format!("Cannot start {program}"))?;
        let mut server = Self { child, socket: socket.to_owned(), pid };
        let deadline = Instant::now() + SOON;
        while std::os::unix::net::UnixStream::connect(socket).is_err() {
            if let Some(status) = server.child.try_wait()?
                && server.pid.is_none()
            {
                bail!("{program} ended at once ({status})");
            }
            ensure!(Instant::now() < deadline, "{program} does not listen at {}", socket.display());
            sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    /// The server as the client knows it.
    pub(super) fn uri(&self, export: &str) -> Result<NbdUri> {
        Ok(format!("nbd+unix:///{export}?socket={}", self.socket.display()).parse()?)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let pid = self.pid.as_ref().and_then(|file| fs::read_to_string(file).ok()?.trim().parse().ok());
        if let Some(pid) = pid.and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
        let _ = fs::remove_file(&self.socket);
    }
}

/// `disk serve`, which tells where its exports are.
pub(super) struct Serving {
    child: Child,
    uris: Vec<String>,
}

impl Serving {
    pub(super) fn start(context: &Context, arguments: &[&str], exports: usize) -> Result<Self> {
        println!("godwit disk serve {}", arguments.join(" "));
        let mut command = Command::new(&context.godwit);
        command.args(["disk", "serve"]).args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
        let mut child = command.spawn().context("Cannot start godwit")?;
        let output = child.stdout.take().context("Its output is piped")?;
        let lines: Vec<String> = BufReader::new(output).lines().take(exports).collect::<Result<_, _>>()?;
        ensure!(lines.len() == exports, "It told of {lines:?} only");
        Ok(Self { child, uris: lines })
    }

    pub(super) fn end(mut self) -> Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "disk serve ended with {status}");
        Ok(())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Debian's nbdkit with a file, of which so many bits come in a second.
pub(super) fn serve_slowly(work: &Path, file: &str, rate: &str) -> Result<Server> {
    let socket = work.join("slow.sock");
    let (place, rate) = (socket.display().to_string(), format!("rate={rate}"));
    Server::start("nbdkit", &["--foreground", "--unix", &place, "--filter=rate", "file", file, &rate], &socket)
}

/// Runs a program to its end, which must be a good one; what it wrote.
fn run(program: &str, arguments: &[&str]) -> Result<String> {
    println!("{program} {}", arguments.join(" "));
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("Cannot start {program}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{text}{}", String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{program} failed ({})", output.status);
    Ok(text)
}

/// A file with a pattern, a hole, and a pattern.
fn image(path: &Path) -> Result<Vec<u8>> {
    let length = usize::try_from(LENGTH)?;
    let mut bytes: Vec<u8> = (0..length).map(|at| u8::try_from(at / 512 % 251 + 1)).collect::<Result<_, _>>()?;
    bytes[1 << 20..3 << 20].fill(0);
    let file = File::create(path)?;
    file.set_len(LENGTH)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes[..1 << 20], 0)?;
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes[3 << 20..], 3 << 20)?;
    Ok(bytes)
}

fn server(context: &Context) -> Result<()> {
    let path = |name: &str| context.work.join(name).display().to_string();
    let bytes = image(&context.work.join("disk.raw"))?;
    let (data, socket) = (format!("data={}", path("disk.raw")), format!("unix:{}", path("nbd.sock")));
    let new = format!("new={}", path("new.raw"));
    let arguments = [&data, &new, "--create=8M", "--listen", &socket, "--listen=tcp://127.0.0.1:0"];
    let serving = Serving::start(context, &arguments, 4)?;
    let (unix, tcp) = (serving.uris[0].clone(), serving.uris[2].clone());
    ensure!(unix == format!("nbd+unix:///data?socket={}", path("nbd.sock")) && tcp.starts_with("nbd://127.0.0.1:"));
    let (told, listed) = call(context, &["disk", "exports", &tcp])?;
    told.expect(0, "")?;
    ensure!(listed == "data\nnew\n", "{listed}");

    let info = run("nbdinfo", &[&tcp])?;
    for fact in
        ["export-size: 4194304", "is_read_only: false", "can_multi_conn: true", "can_zero: true", "can_fua: true"]
    {
        ensure!(info.contains(fact), "nbdinfo does not tell {fact:?}");
    }
    ensure!(run("nbdinfo", &["--list", &unix])?.contains("export=\"new\""));
    let map = run("nbdinfo", &["--map", "--totals", &unix])?;
    ensure!(map.contains("2097152  50.0%   3 hole,zero") && map.contains("2097152  50.0%   0 data"), "{map}");

    run("nbdcopy", &[&tcp, &path("copy.raw")])?;
    ensure!(fs::read(context.work.join("copy.raw"))? == bytes, "nbdcopy read something else");
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &unix, &serving.uris[1]])?;
    ensure!(fs::read(context.work.join("new.raw"))?.starts_with(&bytes), "qemu-img wrote something else");
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &unix, &path("copy.raw")])?;
    let commands = ["write -P 0x5a 4096 8192", "flush", "read -P 0x5a 4096 8192", "discard 1M 64k", "write -z 0 4096"];
    let mut qemu_io: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
    qemu_io.extend(["-f", "raw", &unix]);
    run("qemu-io", &qemu_io)?;
    let after = fs::read(context.work.join("disk.raw"))?;
    ensure!(after[..4096] == [0; 4096] && after[4096..12288] == [0x5a; 8192], "qemu-io's writes are not there");
    let job = ["--name=v", "--ioengine=nbd", "--rw=randrw", "--bs=4k", "--iodepth=32", "--size=8M"];
    let verify = ["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"];
    run("fio", &[&job[..], &verify[..], &[&format!("--uri={}", serving.uris[1])]].concat())?;
    serving.end()?;

    certificates(&context.work)?;
    let secret = ["--listen=tcp://127.0.0.1:0", "--read-only", "--tls-certificates", &path("")];
    let serving = Serving::start(context, &[&[&data[..]], &secret[..]].concat(), 1)?;
    let plain = serving.uris[0].replace("nbds://", "nbd://").split('?').next().unwrap_or_default().to_owned();
    ensure!(run("nbdinfo", &[&plain]).is_err(), "a client without TLS is served");
    let by_tls = format!("{}?tls-certificates={}", plain.replace("nbd://127.0.0.1", "nbds://localhost"), path(""));
    ensure!(run("nbdinfo", &[&by_tls])?.contains("is_read_only: true"));
    let (told, listed) = call(context, &["disk", "exports", &by_tls])?;
    told.expect(0, "")?;
    ensure!(listed == "data\n", "{listed}");
    serving.end()
}

/// An authority, a server and a client, as GnuTLS's users name their files.
fn certificates(folder: &Path) -> Result<()> {
    let path = |name: &str| folder.join(name).display().to_string();
    let (authority, authority_key, names) = (path("ca-cert.pem"), path("ca-key.pem"), path("names"));
    let new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    let made = ["-subj", "/CN=authority", "-days", "2", "-keyout", &authority_key, "-out", &authority];
    run("openssl", &[&["req", "-x509"], &new_key[..], &made].concat())?;
    fs::write(&names, "subjectAltName=DNS:localhost\n")?;
    for party in ["server", "client"] {
        let [certificate, key, request] = ["cert", "key", "req"].map(|part| path(&format!("{party}-{part}.pem")));
        let asked = ["-subj", "/CN=localhost", "-keyout", &key, "-out", &request];
        run("openssl", &[&["req", "-new"], &new_key[..], &asked].concat())?;
        let by = ["-CA", &authority, "-CAkey", &authority_key, "-CAcreateserial", "-extfile", &names, "-days", "2"];
        run("openssl", &[&["x509", "-req", "-in", &request, "-out", &certificate], &by[..]].concat())?;
    }
    Ok(())
}

fn open(uri: &NbdUri) -> Result<NbdBackend> {
    Ok(NbdBackend::open(uri, NbdOptions::new(Access::ReadWrite))?)
}

fn client(context: &Context) -> Result<()> {
    let path = |name: &str| context.work.join(name).display().to_string();
    let socket = context.work.join("nbd.sock");
    let (place, raw, qcow) = (socket.display().to_string(), path("disk.raw"), path("disk.qcow2"));
    image(&context.work.join("disk.raw"))?;
    run("qemu-img", &["convert", "-O", "qcow2", &raw, &qcow])?;
    let length = LENGTH.to_string();
    let config = path("nbd-server.conf");
    fs::write(
        &config,
        format!("[generic]\nunixsock = {place}\n[data]\nexportname = {raw}\nflush = true\nfua = true\n"),
    )?;
    let qemu = ["--persistent", "--shared=8", "--discard=unmap", "--cache=writeback", "--socket", &place];
    let nbdkit = ["--foreground", "--unix", &place];
    let servers: [(&str, Vec<&str>); 7] = [
        ("qemu-nbd", [&qemu[..], &["--format=raw", &raw]].concat()),
        ("qemu-nbd", [&qemu[..], &["--format=qcow2", &qcow]].concat()),
        ("nbdkit", [&nbdkit[..], &["file", &raw]].concat()),
        ("nbdkit", [&nbdkit[..], &["memory", &length]].concat()),
        ("nbdkit", [&nbdkit[..], &["--filter=delay", "memory", &length, "rdelay=2ms", "wdelay=3ms"]].concat()),
        ("nbdkit", [&nbdkit[..], &["--filter=rate", "memory", &length, "rate=400M"]].concat()),
        (
            "nbdkit",
            [
                &nbdkit[..],
                &[
                    "--filter=blocksize-policy",
                    "memory",
                    &length,
                    "blocksize-maximum=64k",
                    "blocksize-minimum=512",
                    "blocksize-error-policy=error",
                ],
            ]
            .concat(),
        ),
    ];
    for (program, arguments) in servers {
        let server = Server::start(program, &arguments, &socket)?;
        holds(&server.uri("")?)?;
    }
    // It stays in the foreground for one client only.
    let pid = path("nbd-server.pid");
    let background = ["-C", &config, "-p", &pid];
    let server = Server::start_with("nbd-server", &background, &socket, Some(pid.clone().into()))?;
    holds(&server.uri("data")?)?;
    drop(server);
    faulty(&socket)
}

fn holds(uri: &NbdUri) -> Result<()> {
    let disk = open(uri)?;
    println!("  {:?}", disk.geometry());
    conformance::holds(&disk);
    Ok(())
}

fn linux(context: &Context) -> Result<()> {
    let socket = context.work.join("nbd.sock");
    let image = context.work.join("disk.img");
    File::create(&image)?.set_len(32 << 20)?;
    let godwit = context.godwit.display().to_string();
    let (listen, data) = (format!("--listen=unix:{}", socket.display()), format!("data={}", image.display()));
    let serve = ["disk", "serve", &listen, &data];
    let mut server = Server::start(&godwit, &serve, &socket)?;
    let disk = format!("nbd={},queues=2", server.uri("data")?);
    let verifier = "--memory 4M --rate 500 --threads 2 --disk /dev/vda --disk-size 4M --tick-ms 50";
    let machine = ["--memory=160M", "--disk", &disk, "--vcpus=2"];
    let mut traveller = Traveller::set_out(context, &machine, "", verifier)?;
    let (far, near) = (format!("id=blk0,nbd={}", server.uri("data")?), format!("id=blk0,path={}", image.display()));
    let ways = [(MigrationMode::Live, &far), (MigrationMode::Live, &near), (MigrationMode::Stop, &far)];
    for (mode, place) in ways.into_iter().chain([(MigrationMode::Stop, &near), (MigrationMode::Live, &far)]) {
        drop(server);
        sleep(Duration::from_millis(300));
        server = Server::start(&godwit, &serve, &socket)?;
        let moved = traveller.travel(context, mode, &["--disk", place])?;
        println!("{mode:?} to {place}: total {}, downtime {:?}", moved.status.total_ms, moved.status.downtime_ms);
        traveller.prove()?;
    }
    traveller.arrive()
}

fn refused(context: &Context) -> Result<()> {
    let path = |name: &str| context.work.join(name).display().to_string();
    image(&context.work.join("disk.raw"))?;
    let (kernel, data) = (context.images.join("micro.elf").display().to_string(), format!("data={}", path("disk.raw")));
    let refuses = |arguments: &[&str], status: i32, part: &str| {
        println!("godwit {}", arguments.join(" "));
        let (ended, _) = call(context, arguments)?;
        println!("{}", ended.words.trim_end());
        ended.expect(status, part)
    };
    let boot = |place: &str, status, part: &str| {
        let disk = format!("--disk=nbd={place}");
        refuses(&["run", "--serial=off", "--kernel", &kernel, &disk], status, part)
    };
    let at = |export: &str| format!("nbd+unix:///{export}?socket={}", path("nbd.sock"));
    boot(&at("data"), 1, "Could not reach the NBD server at")?;
    boot("nbd://no-such-host.invalid/data", 1, "Could not reach the NBD server at no-such-host.invalid:10809")?;
    boot("nbds://localhost/data?tls-certificates=/no/such/folder", 1, "/no/such/folder/ca-cert.pem")?;
    let listen = format!("--listen=unix:{}", path("nbd.sock"));
    let serving = Serving::start(context, &[&data, &listen, "--read-only"], 1)?;
    boot(&at("date"), 1, r#"has no export "date"; it has "data""#)?;
    boot(&at("data"), 1, "is read-only; attach the disk with readonly")?;
    let socket = path("single.sock");
    let single = ["--foreground", "--unix", &socket, "--filter=multi-conn", "memory", "4M", "multi-conn-mode=disable"];
    let server = Server::start("nbdkit", &single, Path::new(&socket))?;
    boot(&format!("{},queues=2", server.uri("")?), 1, "takes 1 connections: give it queues=1")?;
    drop(server);
    let readable = format!("--disk=nbd={},readonly", at("data"));
    let guest = Godwit::run(context, "guest", &["--kernel", &kernel, "--memory=64M", &readable])?;
    guest.await_phase(Phase::Running)?;
    guest.end()?;

    refuses(&["disk", "serve", &data, &listen, "--read-only"], 1, "Something listens at")?;
    refuses(&["disk", "serve", &path("none.raw")], 1, "none.raw does not exist; create it first")?;
    refuses(&["disk", "serve", &data, &data], 2, r#"Two disks would be the export "data""#)?;
    refuses(&["disk", "serve", &data, "--tls-certificates=/no/such/folder"], 1, "server-cert.pem")?;
    let file = format!("--listen=unix:{}", path("disk.raw"));
    refuses(&["disk", "serve", &data, &file, "--read-only"], 1, "is no socket; remove it, or choose another path")?;
    refuses(&["disk", "exports", "http://localhost"], 2, "write nbd://host/export")?;
    serving.end()?;
    let serving = Serving::start(context, &[&data, &listen], 1)?;
    let local = format!("--disk=path={}", path("disk.raw"));
    let guest = Godwit::run(context, "local", &["--kernel", &kernel, "--memory=64M", &local])?;
    guest.await_phase(Phase::Running)?;
    boot(&at("data"), 1, "disk.raw is locked by another writer")?;
    guest.end()?;
    serving.end()
}

/// Errors of the server reach who asked, and nothing else breaks.
fn faulty(socket: &Path) -> Result<()> {
    let place = socket.display().to_string();
    let arguments = [
        "--foreground",
        "--unix",
        &place,
        "--filter=error",
        "memory",
        "4M",
        "error-pwrite-rate=100%",
        "error-pwrite=ENOSPC",
    ];
    let server = Server::start("nbdkit", &arguments, socket)?;
    let disk = open(&server.uri("")?)?;
    let mut one = block::Blocking::open(&disk)?;
    let refused = one.write(0, &[1; 512], block::Durability::Cached).expect_err("every write fails");
    ensure!(refused.kind() == std::io::ErrorKind::StorageFull, "{refused}");
    let mut bytes = [1; 512];
    one.read(0, &mut bytes)?;
    ensure!(bytes == [0; 512]);
    Ok(())
}

fn killed(context: &Context) -> Result<()> {
    let path = |name: &str| context.work.join(name).display().to_string();
    let socket = context.work.join("nbd.sock");
    let (place, raw) = (socket.display().to_string(), path("disk.raw"));
    let godwit = context.godwit.display().to_string();
    let (listen, data) = (format!("--listen=unix:{place}"), format!("={raw}"));
    let servers: [(&str, Vec<&str>); 3] = [
        ("qemu-nbd", vec!["--persistent", "--shared=8", "--format=raw", "--socket", &place, &raw]),
        ("nbdkit", vec!["--foreground", "--unix", &place, "file", &raw]),
        (&godwit, vec!["disk", "serve", &listen, &data]),
    ];
    for (program, arguments) in servers {
        image(&context.work.join("disk.raw"))?;
        let first = Server::start(program, &arguments, &socket)?;
        let disk = open(&first.uri("")?)?;
        let (over, mut kills) = (AtomicBool::new(false), 0);
        std::thread::scope(|scope| -> Result<()> {
            let killer = scope.spawn(|| -> Result<u32> {
                let (mut server, mut kills) = (first, 0);
                while !over.load(Ordering::Relaxed) {
                    sleep(Duration::from_millis(60));
                    drop(server);
                    kills += 1;
                    sleep(Duration::from_millis(20));
                    server = Server::start(program, &arguments, &socket)?;
                }
                Ok(kills)
            });
            // The suite panics if a byte is not what it was.
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                for _ in 0..4 {
                    conformance::keeps_its_bytes(&disk);
                }
            }));
            over.store(true, Ordering::Relaxed);
            kills = killer.join().map_err(|_| anyhow::anyhow!("The killer panicked"))??;
            ensure!(outcome.is_ok(), "A byte is not what it was");
            Ok(())
        })?;
        println!("{program}: killed {kills} times");
        ensure!(kills >= 2, "It was over before the server was killed twice");
    }
    Ok(())
}
