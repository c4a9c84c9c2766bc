//! Answers for people: short lines, with units; and for programs: JSON.

use control::{BalloonInfo, DiskList, MigrationStatus, NicList, VmInfo};
use indicatif::HumanBytes;
use serde::Serialize;

/// Prints one JSON value on a line.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<u8> {
    println!("{}", serde_json::to_string(value)?);
    Ok(0)
}

pub(crate) fn vm(vm: &VmInfo) {
    println!("{} ({}) is {}", vm.name, vm.id, vm.phase);
    println!("  vCPUs      {}", vm.vcpus);
    println!("  memory     {}", HumanBytes(vm.memory_bytes));
    println!("  disks      {}", list(&vm.disks));
    println!("  NICs       {}", list(&vm.nics));
    println!("  process    {}, up {}", vm.pid, vm.uptime_ms);
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

pub(crate) fn migration(migration: &MigrationStatus) {
    let MigrationStatus { peer, mode, state, progress, rounds, downtime_ms, total_ms, error, .. } = migration;
    println!("last migration: {} with {peer}, {}", word(mode), word(state));
    println!("  rounds     {}", rounds.len());
    println!("  moved      {} in {total_ms}", HumanBytes(progress.bytes_sent));
    if let Some(downtime) = downtime_ms {
        println!("  downtime   {downtime}");
    }
    if let Some(error) = error {
        println!("  error      {error}");
    }
}

/// The name that a value has in JSON.
pub(crate) fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word.replace('_', " "),
        Ok(other) => other.to_string(),
        Err(error) => error.to_string(),
    }
}

pub(crate) fn disks(list: &DiskList) {
    for disk in &list.disks {
        let access = if disk.read_only { ", read-only" } else { "" };
        println!("{}  {}  {}{access}", disk.id, disk.path, HumanBytes(disk.bytes));
    }
}

pub(crate) fn nics(list: &NicList) {
    for nic in &list.nics {
        println!("{}  {}  {}  {}", nic.id, nic.tap, nic.mac, word(&nic.backend));
    }
}

pub(crate) fn balloon(balloon: &BalloonInfo) {
    println!("holds {} of {} asked for", HumanBytes(balloon.actual_bytes), HumanBytes(balloon.target_bytes));
    for (name, value) in &balloon.statistics {
        println!("  {name}  {value}");
    }
}
