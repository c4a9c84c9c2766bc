//! Moves of guests: the micro guest at this host's speed, and Linux with its work going on.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use control::{
    CodecChoice, MigrationMode, MigrationRole, MigrationStatus, MigrationStep, Phase, StartMigration, Streams,
};
use guest_images::micro::Line;
use verifier::net::Client;

use crate::bridge::Bridge;
use crate::console::Console;
use crate::godwit::{Godwit, call, copying};
use crate::scenario::{Context, Needs, Scenario};
use crate::traveller::Traveller;

/// How long an answer over the guest's TCP connection may take: the downtime, and TCP's patience with a lost packet.
const CONNECTION_PATIENCE: Duration = Duration::from_secs(30);

/// What the largest guest boots with: many more pages than it writes meanwhile.
const CONTENT_PAGES: usize = 16 << 10;

const CODECS: [&str; 9] =
    ["auto", "zero", "none", "rle", "delta", "dedup,lz4", "zstd", "rle,lz4", "rle,delta,dedup,zstd:3"];

const BOTH: [MigrationMode; 2] = [MigrationMode::Live, MigrationMode::Stop];

/// See its `about`.
pub(super) const MICRO: Scenario = Scenario {
    name: "migrate-micro",
    about: "The micro guest is moved 21 times, live and stopped, by Unix socket and TCP, over 1 to 64 streams, with each codec and dirty tracker; no page is wrong",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(120),
    run: |context| micro(context, 20),
};

/// See its `about`.
pub(super) const MICRO_TWO_REGIONS: Scenario = Scenario {
    name: "migrate-micro-above-the-gap",
    about: "A guest of 5 GiB, which has two memory regions, is moved live and stopped; what it booted with is sent once",
    needs: Needs::Kvm,
    timeout: Duration::from_secs(60),
    run: two_regions,
};

/// See its `about`.
pub(super) const LINUX: Scenario = Scenario {
    name: "migrate-linux",
    about: "Linux with 1 vCPU, disk and TCP connection is moved there and back 25 times, live and stopped in turn; nothing is lost",
    needs: Needs::LinuxGuests,
    timeout: Duration::from_secs(900),
    run: |context| linux(context, 1, 25),
};

/// See its `about`.
pub(super) const LINUX_SMP: Scenario = Scenario {
    name: "migrate-linux-smp",
    about: "Linux with 4 vCPUs, disk and TCP connection is moved there and back 25 times, live and stopped in turn; nothing is lost",
    needs: Needs::LinuxGuests,
    timeout: Duration::from_secs(900),
    run: |context| linux(context, 4, 25),
};

/// See its `about`.
pub(super) const PULSE: Scenario = Scenario {
    name: "pulse-linux",
    about: "Linux with 2 vCPUs, disk and balloon is saved, torn down and restored in place 10 times; nothing is lost",
    needs: Needs::LinuxGuests,
    timeout: Duration::from_secs(240),
    run: pulse,
};

fn micro(context: &Context, moves: usize) -> Result<()> {
    let kernel = context.work.join("kernel.elf");
    std::fs::copy(context.images.join("micro.elf"), &kernel)?;
    let kernel = kernel.display().to_string();
    let words = "ws=32M rate=20000 tick=20 pattern=check";
    let machine = ["--kernel", &kernel, "--cmdline", words, "--memory=128M"];
    let mut godwit = Godwit::run(context, "stop0", &machine)?;
    let mut console = godwit.console()?;
    for stop in 1..=moves {
        console.expect("tick", Duration::from_secs(20))?;
        let tracker = if stop % 4 < 2 { "--dirty=log" } else { "--dirty=ring" };
        let name = format!("stop{stop}");
        let target = match stop % 3 {
            0 => Godwit::receive(context, &name, &[tracker])?,
            1 => Godwit::receive_at(context, &name, "tcp://127.0.0.1:0", &[tracker])?,
            _ => Godwit::receive_at(context, &name, "tcp://[::1]:0", &[tracker])?,
        };
        let next = target.console()?;
        let (mode, streams) = (BOTH[stop % 2], Streams::try_from([1, 2, 5, 64][stop / 2 % 4])?);
        let codec = CODECS[stop % CODECS.len()].parse::<CodecChoice>()?;
        let congestion = (stop % 3 != 0).then(|| "reno".to_owned());
        let order = StartMigration { streams, congestion, codec, ..copying(&target, mode) };
        let status = godwit.migrate_as(order, &target, Duration::from_secs(30))?;
        println!(
            "move {stop}: {mode:?} over {} streams, codecs {codec}, {} rounds, downtime {:?}",
            streams,
            status.rounds.len(),
            status.downtime_ms
        );
        (godwit, console) = (target, next);
    }
    let target = told_alike(context, godwit)?;
    is_not_reset_without_a_kernel(&target, &kernel)?;
    let console = target.console()?;
    verify_micro(target, console)
}

/// A guest that cannot boot where it is goes on instead of being taken apart.
fn is_not_reset_without_a_kernel(godwit: &Godwit, kernel: &str) -> Result<()> {
    std::fs::remove_file(kernel)?;
    let refused = godwit.client().call(&control::Request::Reset).err().context("It was reset without a kernel")?;
    ensure!(refused.to_string().contains(kernel), "The refusal does not name {kernel}: {refused}");
    ensure!(godwit.vm()?.phase == Phase::Running, "The guest does not go on after a reset that was refused");
    Ok(())
}

/// Moves the guest by the command line, and compares what both ends tell of it.
fn told_alike(context: &Context, source: Godwit) -> Result<Godwit> {
    let target = Godwit::receive(context, "last", &[])?;
    let (api, to) = (source.folder().join("api.sock").display().to_string(), target.address().to_string());
    let how = ["--json", "--verify", "--memory=copy", "--api", &api, "--to", &to];
    let (ended, told) = call(context, &[&["migrate"], &how[..]].concat())?;
    ended.expect(0, "")?;
    print!("{told}");
    source.finish(Duration::from_secs(30))?.expect(0, "The guest has moved to")?;
    let there: MigrationStatus = serde_json::from_str(&told)?;
    let here = target.arrival()?;
    let alike = MigrationStatus { role: MigrationRole::Source, peer: there.peer.clone(), ..here.clone() };
    ensure!(here.role == MigrationRole::Target && alike == there, "The source tells {there:?}, the target {here:?}");
    let (downtime, part) = there.downtime_ms.zip(there.target_part).context("The downtime is not told")?;
    ensure!(part.restore_ms < downtime && part.start_ms < downtime && downtime < there.total_ms, "{there:?}");
    let steps: Vec<_> = there.steps.iter().map(|step| step.step).collect();
    use MigrationStep::{HandOver, LastPages, Negotiating, Pausing, Precopy, Restoring};
    ensure!(steps == [Negotiating, Precopy, Pausing, LastPages, Restoring, HandOver], "{steps:?}");
    ensure!(there.verified == Some(true) && there.switched.is_some(), "{there:?}");
    let api = target.folder().join("api.sock").display().to_string();
    let (_, people) = call(context, &["status", "--api", &api])?;
    print!("{people}");
    let words = [format!("downtime   {downtime}"), format!("{} to restore", part.restore_ms), "verified".to_owned()];
    ensure!(words.iter().all(|word| people.contains(word)), "{people}");
    Ok(target)
}

/// Lets the micro guest look at every page, and power off.
pub(super) fn verify_micro(godwit: Godwit, mut console: Console) -> Result<()> {
    console.say("q")?;
    let last = console.find("the guest's last word", Duration::from_secs(60), |line| {
        let word = Line::parse(&line.text);
        matches!(word, Line::End { .. } | Line::Bad(_)).then_some(word)
    })?;
    ensure!(matches!(last, Line::End { bad: 0, .. }), "The guest says {last:?}");
    godwit.finish(Duration::from_secs(10))?.expect(0, "The guest powered off")
}

fn two_regions(context: &Context) -> Result<()> {
    let kernel = context.images.join("micro.elf").display().to_string();
    let content = context.work.join("content");
    std::fs::write(&content, vec![0x5a; CONTENT_PAGES * 4096])?;
    let content = content.display().to_string();
    let words = "ws=16M rate=5000 tick=20 content";
    let machine = ["--kernel", &kernel, "--initramfs", &content, "--cmdline", words, "--memory=5G"];
    let mut godwit = Godwit::run(context, "stop0", &machine)?;
    godwit.await_phase(Phase::Running)?;
    for (stop, mode) in [(1, MigrationMode::Live), (2, MigrationMode::Stop)] {
        let target = Godwit::receive(context, &format!("stop{stop}"), &[])?;
        let status = godwit.migrate(&target, mode, Duration::from_secs(30))?;
        let again = status.rounds.first().map_or(0, |round| round.dirty_pages);
        ensure!(again < CONTENT_PAGES as u64, "After the first round {again} pages are to be sent again");
        godwit = target;
    }
    let mut console = godwit.console()?;
    console.expect("tick", Duration::from_secs(20))?;
    verify_micro(godwit, console)
}

fn linux(context: &Context, vcpus: u32, round_trips: usize) -> Result<()> {
    let bridge = Bridge::make("gwbr", "10.78.0.1/24")?;
    let disk = context.work.join("disk.img");
    std::fs::File::create(&disk)?.set_len(32 << 20)?;
    let disk = format!("path={}", disk.display());
    let vcpus_option = format!("--vcpus={vcpus}");
    let nic = format!("tap={},vhost=off", bridge.tap(0));
    let machine = ["--memory=160M", "--disk", &disk, &vcpus_option, "--net", &nic];
    let verifier =
        format!("--memory 4M --rate 500 --threads {vcpus} --disk /dev/vda --disk-size 2M --tick-ms 50 --port 7");
    let mut traveller = Traveller::set_out(context, &machine, "godwit.net=10.78.0.2/24", &verifier)?;
    let connected = Client::connect("10.78.0.2:7", CONNECTION_PATIENCE);
    let mut connection = connected.with_context(|| traveller.account())?;
    for trip in 0..round_trips {
        for (way, mode) in (if trip % 2 == 0 { BOTH } else { [BOTH[1], BOTH[0]] }).into_iter().enumerate() {
            let tap = format!("id=net0,tap={}", bridge.tap(way + 1));
            let moved = traveller.travel(context, mode, &["--net", &tap])?;
            connection.exchange(64).with_context(|| traveller.account())?;
            println!(
                "trip {trip}: {mode:?}, {} rounds, total {}, downtime {:?}, as the guest saw it {:?}",
                moved.status.rounds.len(),
                moved.status.total_ms,
                moved.status.downtime_ms,
                moved.guest_downtime
            );
            traveller.prove()?;
        }
    }
    traveller.arrive()
}

fn pulse(context: &Context) -> Result<()> {
    let disk = context.work.join("disk.img");
    std::fs::File::create(&disk)?.set_len(32 << 20)?;
    let disk = format!("path={}", disk.display());
    let machine = ["--memory=160M", "--disk", &disk, "--vcpus=2", "--balloon=on,free-page-reporting"];
    let verifier = "--memory 8M --rate 500 --threads 2 --disk /dev/vda --disk-size 8M --tick-ms 50";
    let mut traveller = Traveller::set_out(context, &machine, "", verifier)?;
    for _ in 0..10 {
        let times = std::num::NonZeroU32::MIN;
        let reply = traveller.godwit().client().call(&control::Request::Pulse(control::Pulse { times }))?;
        println!("{reply:?}");
        ensure!(traveller.godwit().vm()?.phase == Phase::Running, "The guest does not run after a pulse");
    }
    traveller.prove()?;
    traveller.arrive()
}
