//! Wrong options, files, host resources, requests and targets: each is answered by a sentence that names the value and
//! the remedy and by the right exit status, and leaves nothing behind.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use control::Phase;

use super::api::Curl;
use super::handmade::foreign_kernel;
use crate::godwit::{Godwit, call};
use crate::scenario::{Context, Needs, Scenario};

/// See its `about`.
pub(super) const MACHINES: Scenario = Scenario {
    name: "bad-machines",
    about: "Impossible machines, kernels, options and sockets are refused in a sentence with the value and the remedy",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(60),
    run: machines,
};

/// See its `about`.
pub(super) const HOSTS: Scenario = Scenario {
    name: "bad-hosts",
    about: "A host without KVM, memory, disks or taps is told what it lacks",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(60),
    run: hosts,
};

/// See its `about`.
pub(super) const REQUESTS: Scenario = Scenario {
    name: "bad-requests",
    about: "Malformed and untimely requests to the control API get their status, code and sentence; the guest runs on",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(30),
    run: requests,
};

const SOON: Duration = Duration::from_secs(10);
const USAGE: i32 = 2;
const ERROR: i32 = 1;

/// Runs godwit, which must refuse.
fn refused(context: &Context, arguments: &[&str], status: i32, parts: &[&str]) -> Result<()> {
    println!("godwit {}", arguments.join(" "));
    let (ended, _) = call(context, arguments)?;
    println!("{}", ended.words.trim_end());
    ensure!(!ended.words.contains("panicked"), "It panicked: {}", ended.words);
    parts.iter().try_for_each(|part| ended.expect(status, part))
}

fn micro(context: &Context) -> String {
    context.images.join("micro.elf").display().to_string()
}

/// Runs godwit with the micro guest, which must be refused.
fn refused_machine(context: &Context, options: &[&str], status: i32, parts: &[&str]) -> Result<()> {
    refused(context, &[&["run", "--serial=off", "--kernel", &micro(context)], options].concat(), status, parts)
}

fn machines(context: &Context) -> Result<()> {
    let numbers: [(&[&str], &[&str]); 17] = [
        (&["--memory=0"], &["0 bytes of memory", "give it 32 MiB to"]),
        (&["--memory=33554433"], &["33554433", "multiple of the page size 4096; 33554432 would be"]),
        (&["--memory=100000G"], &["give it 32 MiB to 524288 MiB"]),
        (&["--memory=lots"], &["lots"]),
        (&["--vcpus=0"], &["0 vCPUs: give it 1 to 32"]),
        (&["--vcpus=1000"], &["1000 vCPUs: give it 1 to 32"]),
        (&["--dirty=bitmap"], &["bitmap", "log, ring, ring:ENTRIES"]),
        (&["--dirty=ring:1000"], &["1000 entries", "power of two from 1024 to 65536"]),
        (&["--boot=fast"], &["fast", "auto, pvh, long64"]),
        (&["--disk=path=/d,colour=blue"], &["colour", "it takes path, nbd, base, remote, local@HOST, id"]),
        (&["--disk=id=data"], &["--disk needs path=FILE"]),
        (&["--disk=path=/d,cache=fast"], &["fast", "none of writeback, writethrough, none"]),
        (&["--disk=path=/d,queues=0"], &["queues=", "no such number"]),
        (&["--disk=path=/d,queues=33"], &["33 queues: give it 1 to 32"]),
        (&["--disk=nbd=http://a/b"], &["http://a/b", "write nbd://host/export"]),
        (&["--net=tap=name-of-a-tap-that-is-too-long"], &["name-of-a-tap-that-is-too-long", "1 to 15 characters"]),
        (&["--log=vmm=loud"], &["vmm=loud", "is not a filter"]),
    ];
    for (options, parts) in numbers {
        refused_machine(context, options, USAGE, parts)?;
    }
    refused(context, &["fly"], USAGE, &["fly"])?;
    for streams in ["0", "65", "many"] {
        let parts = [&*format!("{streams} streams: give it 1 to 64")];
        refused(context, &["migrate", "--to=unix:/x", &format!("--streams={streams}")], USAGE, &parts)?;
    }
    for budget in ["0", "-1", "NaN", "much"] {
        let parts = [&*format!("{budget:?} is no number of processors"), "0.5 or 2"];
        refused(context, &["migrate", "--to=unix:/x", &format!("--cpu-budget={budget}")], USAGE, &parts)?;
    }
    refused(context, &["run"], USAGE, &["--kernel"])?;
    let parts = ["\"gzip\" is no list of codecs", "zero, rle, delta, dedup, lz4, zstd"];
    refused(context, &["migrate", "--to=unix:/x", "--codec=gzip"], USAGE, &parts)?;
    refused(context, &["migrate", "--to=unix:/x", "--codec=zstd:12"], USAGE, &["zstd has no level \"12\""])?;
    kernels(context)?;
    sockets(context)
}

fn kernels(context: &Context) -> Result<()> {
    let file = |name: &str, bytes: &[u8]| -> Result<String> {
        let path = context.work.join(name);
        fs::write(&path, bytes)?;
        Ok(path.display().to_string())
    };
    let whole = fs::read(context.images.join("micro.elf"))?;
    let cases = [
        ("/nonexistent/vmlinux".to_owned(), "Could not open the kernel /nonexistent/vmlinux"),
        (file("header", &whole[..100])?, "is truncated: it has 100 bytes"),
        (file("half", &whole[..whole.len() / 3])?, "is truncated"),
        (file("arm", &foreign_kernel(183))?, "is for 64-bit ARM; this machine is x86-64"),
        (file("text", &[b'x'; 4096])?, "is not a kernel that can be booted"),
        (file("empty", b"")?, "is empty"),
        (context.work.display().to_string(), "kernel"),
    ];
    for (path, part) in &cases {
        refused(context, &["run", "--serial=off", "--memory=64M", "--kernel", path], ERROR, &[part, path])?;
    }
    let initramfs = context.work.join("initramfs");
    File::create(&initramfs)?.set_len(100 << 20)?;
    let option = format!("--initramfs={}", initramfs.display());
    let parts = ["initramfs of 100 MiB does not fit in 64 MiB", "give the machine more memory"];
    refused_machine(context, &[&option, "--memory=64M"], ERROR, &parts)?;
    refused_machine(context, &["--initramfs=/nonexistent/initrd"], ERROR, &["/nonexistent/initrd", "No such file"])
}

fn sockets(context: &Context) -> Result<()> {
    let in_work = |name: &str| context.work.join(name).display().to_string();
    let api = |path: &str| format!("--api={path}");
    let long = in_work(&"x".repeat(120));
    refused_machine(context, &[&api(&long)], ERROR, &[&long, "at most 107; choose a shorter one"])?;
    fs::write(in_work("file"), "precious")?;
    refused_machine(
        context,
        &[&api(&in_work("file"))],
        ERROR,
        &["is not a socket; remove it, or choose another path"],
    )?;
    ensure!(fs::read(in_work("file"))? == b"precious", "A file was touched");
    refused_machine(context, &[&api(&in_work("none/api"))], ERROR, &["does not exist; create it first"])?;
    refused(context, &["status", "--api", &in_work("file")], ERROR, &["it is not a socket"])?;
    refused(context, &["status", "--api", &in_work("none")], ERROR, &["there is no such socket"])?;

    let first = start(context, "first", &[])?;
    first.await_phase(Phase::Running)?;
    let taken = first.folder().join("api.sock").display().to_string();
    refused_machine(context, &[&api(&taken)], ERROR, &[&taken, "in use by another process; choose another path"])?;
    let console = format!("--serial=unix:{}", first.folder().join("console.sock").display());
    refused(context, &["run", "--kernel", &micro(context), &console], ERROR, &["console.sock"])?;
    ensure!(first.vm()?.phase == Phase::Running, "The owner of the socket was disturbed");

    // A dead process leaves its sockets, and the next one takes them over.
    let folder = first.folder().to_owned();
    first.kill()?;
    ensure!(folder.join("api.sock").exists(), "A killed process has removed its socket");
    refused(context, &["status", "--api", &taken], ERROR, &["the process that made the socket has ended"])?;
    let successor = start(context, "first", &[])?;
    await_answer(&successor)?;
    successor.end()
}

/// Waits until a Godwit serves the socket that was there before it.
fn await_answer(godwit: &Godwit) -> Result<()> {
    for _ in 0..1000 {
        if godwit.vm().is_ok() {
            return Ok(());
        }
        sleep(Duration::from_millis(5));
    }
    bail!("A stale socket was not taken over: {}", godwit.words())
}

/// A micro guest that ticks.
fn start(context: &Context, name: &str, more: &[&str]) -> Result<Godwit> {
    let machine = ["--kernel", &micro(context), "--cmdline=ws=16M rate=1000 tick=20", "--memory=64M"];
    Godwit::run(context, name, &[&machine, more].concat())
}

/// A `godwit` whose mount namespace `change` makes.
pub(super) fn changed_world(context: &Context, name: &str, change: &str) -> Result<Context> {
    let alone = r#"[ "$ALONE" ] || ALONE=yes exec unshare --mount --propagation private "$0" "$@""#;
    context.within(name, &format!("{alone}\nWORK={}\n{change}", context.work.display()))
}

/// A /dev with random numbers and without KVM.
const NO_KVM: &str = "mount -t tmpfs none $WORK/dev
for device in null random urandom; do touch $WORK/dev/$device; mount --bind /dev/$device $WORK/dev/$device; done
mount --move $WORK/dev /dev
exec";

/// KVM for everybody, and a user that is nobody.
const NOBODY_WITH_KVM: &str = "mount -t tmpfs none $WORK/dev
mknod -m 666 $WORK/dev/kvm c 10 232
mount --bind $WORK/dev/kvm /dev/kvm
exec setpriv --reuid nobody --regid nogroup --clear-groups --no-new-privs";

/// A host with little memory.
const LITTLE_MEMORY: &str = "mount --bind $WORK/meminfo /proc/meminfo
exec";

/// A file system on which nothing can be written.
const READ_ONLY_DISK: &str = "mount --bind $WORK/disk $WORK/disk
mount -o remount,ro,bind $WORK/disk
exec";

fn hosts(context: &Context) -> Result<()> {
    fs::create_dir(context.work.join("dev"))?;
    fs::write(context.work.join("meminfo"), "MemTotal: 65536 kB\n")?;
    let without = changed_world(context, "without-kvm", NO_KVM)?;
    refused_machine(&without, &[], ERROR, &["/dev/kvm is not there"])?;
    nobody(context)?;
    let little = changed_world(context, "little-memory", LITTLE_MEMORY)?;
    let parts = ["The host has 64 MiB of memory, the machine asks for 512 MiB"];
    refused_machine(&little, &["--memory=512M"], USAGE, &parts)?;
    let target = format!("unix:{}", context.work.join("in.sock").display());
    let parts = ["No ownership record can be written in /proc/godwit; name another folder with --state-dir"];
    refused(context, &["receive", &target, "--serial=off", "--state-dir=/proc/godwit"], ERROR, &parts)?;
    disks(context)?;
    taps(context)
}

/// The user nobody may neither open KVM nor write root's disk.
fn nobody(context: &Context) -> Result<()> {
    fs::set_permissions(&context.work, Permissions::from_mode(0o755))?;
    let godwit = context.work.join("godwit");
    fs::copy(&context.godwit, &godwit)?;
    let (kernel, disk) = (context.work.join("micro.elf"), context.work.join("roots-disk"));
    fs::copy(context.images.join("micro.elf"), &kernel)?;
    File::create(&disk)?.set_len(1 << 20)?;
    let copied = Context { godwit, ..context.clone() };
    let machine = ["run", "--serial=off", "--kernel", &kernel.display().to_string()];
    let nobody = changed_world(&copied, "nobody", "exec setpriv --reuid nobody --regid nogroup --clear-groups")?;
    refused(
        &nobody,
        &machine,
        ERROR,
        &["No permission to open /dev/kvm: add the user to the group kvm, or run as root"],
    )?;
    let nobody = changed_world(&copied, "nobody-with-kvm", NOBODY_WITH_KVM)?;
    let disk = format!("--disk=path={}", disk.display());
    let parts = ["roots-disk may not be written; give write permission, or attach it read-only"];
    refused(&nobody, &[&machine[..], &[&disk]].concat(), ERROR, &parts)
}

fn disks(context: &Context) -> Result<()> {
    let path = context.work.join("disk");
    let option = format!("--disk=path={}", path.display());
    refused_machine(context, &[&option], ERROR, &["disk does not exist; create it first"])?;
    for length in [0, 1000] {
        File::create(&path)?.set_len(length)?;
        let sentence = format!("disk is {length} bytes long; it must be a multiple of 512");
        refused_machine(context, &[&option], ERROR, &[&sentence, "truncate -s"])?;
    }
    File::create(&path)?.set_len(1 << 20)?;
    let read_only = changed_world(context, "read-only", READ_ONLY_DISK)?;
    refused_machine(&read_only, &[&option], ERROR, &["disk may not be written", "attach it read-only"])?;
    let folder = format!("--disk=path={}", context.work.display());
    refused_machine(context, &[&folder], ERROR, &["is neither a file nor a block device"])?;

    let writer = start(context, "writer", &[&option])?;
    refused_machine(context, &[&option], ERROR, &["disk is locked by another writer"])?;
    writer.end()?;
    let twice = format!("{option},id=other");
    refused_machine(context, &[&option, &twice], USAGE, &["make both read-only or copy it"])
}

fn taps(context: &Context) -> Result<()> {
    refused_machine(context, &["--net=tap=gwbad0"], ERROR, &["There is no tap gwbad0", "create=gwbad0"])?;
    refused_machine(context, &["--net=create=lo"], ERROR, &["There is a network device lo already", "another name"])?;
    refused_machine(context, &["--net=tap=lo"], ERROR, &["lo is a network device, but not a tap", "another name"])?;
    let owner = start(context, "owner", &["--net=create=gwbad0"])?;
    let parts = ["Tap gwbad0 is taken by another process: end that process or choose another name"];
    refused_machine(context, &["--net=tap=gwbad0"], ERROR, &parts)?;
    owner.end()
}

/// Method, path, body; status, and parts of the answer.
type Case<'a> = (&'a str, &'a str, Option<&'a str>, u16, &'a [&'a str]);

fn requests(context: &Context) -> Result<()> {
    let godwit = start(context, "guest", &[])?;
    let mut curl = Curl::at(&godwit);
    let long = format!("{{\"to\":\"unix:/{}\"}}", "x".repeat(200));
    let cases: [Case<'_>; 14] = [
        ("GET", "/v2/vm", None, 404, &["no_such_path", "There is no /v2/vm; GET /v1/openapi.json lists what there is"]),
        ("DELETE", "/v1/vm", None, 405, &["method_not_allowed", "it takes GET"]),
        ("GET", "/v1/vm?verbose", None, 400, &["unexpected_query"]),
        ("POST", "/v1/vm/pause", Some("{}"), 400, &["unexpected_body", "/v1/vm/pause takes no body"]),
        ("POST", "/v1/migration", None, 400, &["invalid_body", "it is missing"]),
        ("POST", "/v1/migration", Some("{\"to\":"), 400, &["malformed_json", "line 1 column"]),
        ("POST", "/v1/migration", Some("{}"), 400, &["invalid_body", "missing field `to`"]),
        ("POST", "/v1/migration", Some(r#"{"to":"unix:/x","speed":9}"#), 400, &["invalid_body", "`speed`"]),
        (
            "POST",
            "/v1/migration",
            Some(r#"{"to":"ftp://x"}"#),
            400,
            &["ftp://x", "write tcp://HOST:PORT or unix:/PATH"],
        ),
        ("POST", "/v1/migration", Some(&long), 400, &["invalid_body"]),
        ("POST", "/v1/vm/stop", Some(r#"{"force_after_s":0}"#), 400, &["invalid_body"]),
        ("PUT", "/v1/balloon", Some(r#"{"target_bytes":0}"#), 404, &["no_such_device", "start it with --balloon on"]),
        ("DELETE", "/v1/migration", None, 409, &["wrong_phase", r#""phase":"running""#]),
        ("POST", "/v1/migration/resolve", Some(r#"{"owner":"target"}"#), 409, &["wrong_phase", r#""phase":"running""#]),
    ];
    for (method, path, body, status, parts) in cases {
        let answer = curl.expect(method, path, body, status)?;
        println!("{answer}");
        for part in parts {
            ensure!(answer.contains(part), "{method} {path} {body:?}: the answer {answer} does not have {part:?}");
        }
    }
    godwit.console()?.expect("tick", SOON)?;
    godwit.end()?;
    let waiting = Godwit::receive(context, "waiting", &[])?;
    let answer = Curl::at(&waiting).expect("POST", "/v1/vm/pause", None, 409)?;
    ensure!(answer.contains(r#""phase":"receiving""#), "{answer}");
    waiting.end()
}
