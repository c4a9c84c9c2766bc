use super::*;
use clap::CommandFactory;
use vmm::config::DiskPlace;

#[test]
fn the_help_of_a_command_is_what_the_list_of_commands_says() {
    let about = |command: &clap::Command| command.get_about().map(ToString::to_string);
    let (list, mut full) = (CommandLine::command(), CommandLine::command());
    full.build();
    for command in list.get_subcommands() {
        let full = full.find_subcommand(command.get_name()).unwrap();
        assert_eq!(about(command), about(full), "{}", command.get_name());
    }
}

fn run(options: &[&str]) -> Run {
    let command_line = ["godwit", "run", "--kernel", "/k"].iter().chain(options);
    match CommandLine::try_parse_from(command_line).unwrap().command {
        Command::Run(run) => *run,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_definition_is_consistent() {
    CommandLine::command().debug_assert();
}

#[test]
fn a_machine_is_described_by_options() {
    let machine = run(&[
        "--memory=1G",
        "--vcpus=4",
        "--disk=path=/a",
        "--disk=path=b,id=data,readonly",
        "--net=create=gw0,vhost=off",
        "--balloon=on,free-page-reporting",
        "--dirty=ring:4096",
        "--topology=1x2x2",
        "--serial=file:/s",
    ])
    .machine(Uuid::from_u128(7))
    .unwrap();
    assert_eq!(machine.memory.bytes, 1 << 30);
    assert_eq!(machine.disks[0].id, "blk0");
    assert_eq!((machine.disks[1].id.as_str(), machine.disks[1].read_only), ("data", true));
    // The target of a move may be in another folder.
    assert_eq!(machine.disks[1].place, DiskPlace::File(std::env::current_dir().unwrap().join("b")));
    assert_eq!(machine.nics[0].tap, Tap::Create("gw0".into()));
    assert_eq!(machine.nics[0].mac, Mac::derived(machine.uuid, 0));
    assert!(machine.balloon.unwrap().free_page_reporting);
    assert_eq!(machine.dirty, DirtyTracking::Ring { entries: 4096 });
    assert_eq!(machine.cpus.topology().threads, 2);
    assert_eq!(machine.serial, Serial::File("/s".into()));
    assert!(machine.rng);
}

#[test]
fn wrong_settings_name_what_they_take() {
    for (options, part) in [
        (&["--disk=id=a"][..], "--disk needs path=FILE"),
        (&["--disk=path=/a,size=3"], "does not know \"size\"; it takes path, nbd, base, remote"),
        (&["--net=mac=52:00:00:00:00:01"], "--net needs tap=NAME"),
        (&["--net=tap=a,vhost=maybe"], "none of auto, on, off"),
        (&["--balloon=on,fast"], "does not know \"fast\""),
    ] {
        let error = run(options).machine(Uuid::nil()).unwrap_err();
        assert!(error.contains(part), "{options:?}: {error}");
    }
    for bad in ["--serial=tty", "--dirty=bitmap", "--topology=4", "--topology=1x2xa", "--memory=lots", "--uuid=7"] {
        let error = CommandLine::try_parse_from(["godwit", "run", "--kernel=/k", bad]).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{bad}");
    }
}

#[test]
fn a_target_names_its_own_resources() {
    let command_line =
        ["godwit", "receive", "unix:/r", "--disk=id=data,path=/d", "--net=id=net0,tap=t0", "--serial=off"];
    let Command::Receive(receive) = CommandLine::try_parse_from(command_line).unwrap().command else { panic!() };
    let resources = receive.resources().unwrap();
    assert_eq!(resources.disks["data"], DiskPlace::File("/d".into()));
    assert_eq!(resources.taps["net0"], Tap::Existing("t0".into()));
    assert_eq!(resources.serial, Some(Serial::Off));
}
