//! A whole Debian system whose disk is far, and comes to it while its server is killed.

use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use control::{DiskPolicy, Request, StartMigration, WithDisks};

use super::debian::{ANSWER_WITHIN, Network, answers, await_arrival, link_images, on_guest};
use super::disks::disk_of;
use super::nbd::Serving;
use super::readme;
use crate::godwit::Godwit;
use crate::scenario::{Context, Needs, Scenario};
use crate::traveller::host_tsc_parameter;

/// See its `about`.
pub(super) const COMES: Scenario = Scenario {
    name: "debian-comes",
    about: "Debian boots from NBD and moves under fio; its disk comes after it though its server is killed and started again",
    needs: Needs::Debian,
    timeout: Duration::from_secs(600),
    run: comes,
};

/// How long the whole disk may take.
const COMES_WITHIN: Duration = Duration::from_secs(240);

/// The bridge and taps of the README's Debian.
const LINKS: &str = "
ip link add gwbr type bridge forward_delay 0
ip address add 10.79.0.1/24 dev gwbr && ip link set gwbr up
for tap in gw0 gw1; do ip tuntap add $tap mode tap vnet_hdr && ip link set $tap master gwbr up; done
";

/// What works on the disk: each pass writes all of a file, and then reads and compares all of it.
const LOAD: &str = "systemd-run --unit=load --property=RemainAfterExit=yes fio --name=load --filename=/root/load --size=24M \
                    --rw=randwrite --bs=16k --direct=1 --ioengine=libaio --iodepth=8 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --loops=4";

fn comes(context: &Context) -> Result<()> {
    link_images(context)?;
    let start = Instant::now();
    let _network = Network;
    readme::run(context, &context.work, LINKS)?;
    let path = |name: &str| context.work.join(name).display().to_string();
    let (served, listen) = (format!("root={}", path("debian.img")), format!("--listen=unix:{}", path("nbd.sock")));
    let mut server = Serving::start(context, &[&served, &listen], 1)?;
    let words = format!("console=ttyS0 {} godwit.root=/dev/vda godwit.net=10.79.0.2/24", host_tsc_parameter());
    let disk = format!("nbd=nbd+unix:///root?socket={},queues=2", path("nbd.sock"));
    let machine = ["--memory=640M", "--vcpus=2", "--disk", &disk, "--net=tap=gw0", "--cmdline", &words];
    let (kernel, initramfs) = (path("vmlinux"), path("initramfs"));
    let far = Godwit::run(context, "far", &[&["--kernel", &kernel, "--initramfs", &initramfs], &machine[..]].concat())?;
    until("the guest is reached by ssh", ANSWER_WITHIN, || on_guest(context, "true").is_ok())?;
    on_guest(context, LOAD)?;
    println!("booted from NBD and loaded after {:.0} s", start.elapsed().as_secs_f32());

    let place = format!("id=blk0,path={}", path("near.img"));
    let near = Godwit::receive(context, "near", &["--net=id=net0,tap=gw1", "--disk", &place])?;
    let with_disks = WithDisks::All(DiskPolicy::After);
    far.client()
        .call(&Request::StartMigration(StartMigration { with_disks, ..StartMigration::new(near.address()) }))?;
    await_arrival(&far.client(), &near.client())?;
    far.finish(ANSWER_WITHIN)?.expect(0, "The guest has moved to")?;
    let (mut kills, mut at_last) = (0, u64::MAX);
    while let Some(missing) = disk_of(&near)?.missing_bytes {
        ensure!(start.elapsed() < COMES_WITHIN + ANSWER_WITHIN, "{missing} bytes do not come:\n{}", near.words());
        if kills < 2 && missing < at_last {
            drop(server);
            (kills, at_last) = (kills + 1, missing);
            println!("the server was killed when {missing} bytes were missing");
            sleep(Duration::from_millis(700));
            server = Serving::start(context, &[&served, &listen], 1)?;
        }
        sleep(Duration::from_millis(300));
    }
    println!("all is here after {:.0} s", start.elapsed().as_secs_f32());
    ensure!(kills > 0, "It was here before its server could be killed");
    server.end()?;
    answers()?;
    let state = || on_guest(context, "systemctl show load -P SubState -P Result");
    until("fio is done", COMES_WITHIN, || state().is_ok_and(|state| !state.contains("running")))?;
    let state = state()?;
    ensure!(state.contains("exited") && state.contains("success"), "fio ended so: {state}");
    near.client().call(&Request::Stop(control::Stop::default()))?;
    near.finish(ANSWER_WITHIN)?.expect(0, "The guest powered off")?;
    let check = Command::new("/usr/sbin/e2fsck").args(["-f", "-n", &path("near.img")]).output()?;
    let words = String::from_utf8_lossy(&check.stdout);
    ensure!(check.status.success(), "The file system is not sound ({}):\n{words}", check.status);
    Ok(())
}

fn until(what: &str, within: Duration, mut holds: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + within;
    while !holds() {
        ensure!(Instant::now() < deadline, "Not after {within:?}: {what}");
        sleep(Duration::from_secs(1));
    }
    Ok(())
}
