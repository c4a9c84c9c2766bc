//! Answers for people: short lines, with units; and for programs: JSON.

use control::{
    BalloonInfo, CpuTimes, DirtyRate, DiskBefore, DiskCounters, DiskInfo, DiskList, GuestCost, MeasurementCost,
    MemorySample, MemoryTransfer, MigrationStatus, Millis, NicCounters, NicInfo, NicList, RoundCodecs, RoundInfo,
    StepInfo, TargetPart, VmInfo,
};
use indicatif::HumanBytes;
use serde::Serialize;
use vmm::layout::PAGE_SIZE;

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

/// A migration that has just ended: the one line that matters, and where the time went.
pub(crate) fn ended_migration(migration: &MigrationStatus) {
    let MigrationStatus { mode, state, progress, total_ms, downtime_ms, error, .. } = migration;
    let (mode, state, bytes) = (word(mode), word(state), HumanBytes(progress.bytes_sent));
    let way = way(migration);
    match downtime_ms {
        Some(downtime) => {
            println!("{mode} migration {state}: {way}, {bytes}, {total_ms}, downtime {downtime}");
            details(migration);
            codecs(&migration.rounds);
        }
        None => println!("{mode} migration {state} after {way}, {bytes}, {total_ms}"),
    }
    if let Some(error) = error {
        eprintln!("godwit: {error}");
    }
}

/// How memory went.
fn way(migration: &MigrationStatus) -> String {
    match migration.memory {
        Some(MemoryTransfer::Passed) => "memory passed".to_owned(),
        Some(MemoryTransfer::Copied) | None => format!("{} rounds", migration.rounds.len()),
    }
}

/// The current migration, or the last one.
pub(crate) fn migration(migration: &MigrationStatus) {
    let MigrationStatus { peer, mode, state, progress, rounds, downtime_ms, total_ms, error, .. } = migration;
    println!("last migration: {} with {peer}, {}", word(mode), word(state));
    println!("  moved      {}, {}, {total_ms}", HumanBytes(progress.bytes_sent), way(migration));
    if let Some(downtime) = downtime_ms {
        println!("  downtime   {downtime}");
    }
    details(migration);
    for info in rounds {
        let RoundInfo { round, pages, zero_pages, bytes, duration_ms, kinds: _, dirty_pages: _, codec: _ } = info;
        println!(
            "  round {round:<4} {pages} pages, {zero_pages} of them zero, {} in {duration_ms}",
            HumanBytes(*bytes)
        );
    }
    codecs(rounds);
    if let Some(error) = error {
        println!("  error      {error}");
    }
}

/// What is known only at the end.
fn details(migration: &MigrationStatus) {
    let MigrationStatus {
        progress,
        steps,
        target_part,
        predicted_total_ms,
        switched,
        stalled_in_round,
        guest_cost,
        cpu,
        streams,
        ..
    } = migration;
    if let Some(TargetPart { restore_ms, start_ms }) = target_part {
        println!("  at target  {restore_ms} to restore, {start_ms} to start, both within the downtime");
    }
    if let Some(predicted) = progress.predicted_downtime_ms {
        let total = predicted_total_ms.map_or_else(String::new, |total| format!(", {total} in all"));
        let why = switched.map_or_else(String::new, |switched| format!(", {}", word(&switched)));
        let stall = stalled_in_round.map_or_else(String::new, |round| format!(", a stall seen in round {round}"));
        println!("  predicted  {predicted}{total}{why}{stall}");
    }
    if let Some(cost) = guest_cost {
        guest_cost_of(cost);
    }
    if let (Some(CpuTimes { source_ms: Some(source), target_ms: Some(target) }), Some(streams)) = (cpu, streams) {
        let over = if *streams == 1 { "1 connection".to_owned() } else { format!("{streams} connections") };
        println!("  CPU time   {source} at the source, {target} at the target, over {over}");
    }
    if !steps.is_empty() {
        let step = |step: &StepInfo| format!("{} {}", word(&step.step), step.duration_ms);
        println!("  steps      {}", steps.iter().map(step).collect::<Vec<_>>().join(", "));
    }
    if migration.verified == Some(true) {
        println!("  verified   all memory is equal at both ends");
    }
}

/// What the guest paid for its move while it ran.
fn guest_cost_of(cost: &GuestCost) {
    let GuestCost { log_ms, longest_log_ms, throttled_ms, throttled_percent, most_percent } = cost;
    println!("  dirty log  {log_ms}, the longest call {longest_log_ms}");
    if *most_percent > 0 {
        println!(
            "  throttled  {throttled_ms} of the vCPUs' time, {throttled_percent} % since it began, {most_percent} % at most"
        );
    }
}

/// What the pages of rounds went by, once for neighbours by the same.
fn codecs(rounds: &[RoundInfo]) {
    let choice = |round: &RoundInfo| round.codec.map(|codec| (codec.codecs, codec.why));
    for alike in rounds.chunk_by(|one, next| choice(one) == choice(next)) {
        if let Some(RoundInfo { round: first, codec: Some(codec), .. }) = alike.first() {
            let last = u32::try_from(alike.len()).map_or(*first, |count| first + count - 1);
            let which = if last == *first { format!("round {first}") } else { format!("rounds {first} to {last}") };
            let RoundCodecs { codecs, why, link_bytes_per_second } = codec;
            let link = link_bytes_per_second.map_or_else(String::new, |rate| format!(" ({}/s)", HumanBytes(rate)));
            println!("  codecs     {codecs} in {which}: {why}{link}");
        }
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
    for DiskInfo { id, place, bytes, missing_bytes, read_only, counters, before } in &list.disks {
        let access = if *read_only { ", read-only" } else { "" };
        println!("{id}  {place}  {}{access}", HumanBytes(*bytes));
        if let Some(missing) = missing_bytes {
            println!("  {} are not here yet, {}", HumanBytes(*missing), percent(*missing, *bytes));
        }
        let (mean_read, mean_write) = (counters.mean_read(), counters.mean_write());
        let DiskCounters { reads, read_bytes, writes, written_bytes, flushes, errors, .. } = counters;
        let (read, written) = (HumanBytes(*read_bytes), HumanBytes(*written_bytes));
        println!("  {reads} reads ({read}), {writes} writes ({written}), {flushes} flushes, {errors} errors");
        if mean_read.is_some() || mean_write.is_some() {
            println!("  on average {}", means(mean_read, mean_write));
        }
        if let Some(DiskBefore { place, mean_read_ms, mean_write_ms }) = before {
            println!("  before     {place}, {}", means(*mean_read_ms, *mean_write_ms));
        }
    }
}

fn means(read: Option<Millis>, write: Option<Millis>) -> String {
    let word = |what: &str, mean: Option<Millis>| {
        mean.map_or_else(|| format!("no {what}"), |mean| format!("{mean} for a {what}"))
    };
    format!("{}, {}", word("read", read), word("write", write))
}

pub(crate) fn nics(list: &NicList) {
    for NicInfo { id, tap, mac, backend, counters } in &list.nics {
        println!("{id}  {tap}  {mac}  {}", word(backend));
        match counters {
            Some(NicCounters { received_packets, received_bytes, sent_packets, sent_bytes, dropped_packets }) => {
                let (received, sent) = (HumanBytes(*received_bytes), HumanBytes(*sent_bytes));
                println!(
                    "  {received_packets} packets to the guest ({received}), {sent_packets} from it ({sent}), {dropped_packets} dropped"
                );
            }
            None => println!("  packets are not counted: the kernel carries them; see `ip -s link show {tap}`"),
        }
    }
}

pub(crate) fn balloon(balloon: &BalloonInfo) {
    println!("holds {} of {} asked for", HumanBytes(balloon.actual_bytes), HumanBytes(balloon.target_bytes));
    for (name, value) in &balloon.statistics {
        println!("  {name}  {value}");
    }
}

/// What a measurement found: how fast, how much, what the memory is like, and what it cost to know.
pub(crate) fn dirty_rate(found: &DirtyRate) {
    let DirtyRate { duration_ms, pages_per_second, bytes_per_second, working_set_pages, .. } = found;
    let rate = HumanBytes(*bytes_per_second);
    println!("dirtied      {pages_per_second} pages/s, {rate}/s, over {duration_ms}");
    if let Some(vcpus) = &found.vcpu_pages_per_second {
        println!("  by vCPU    {} pages/s", numbers(vcpus));
    }
    let pages = working_set_pages.last().copied().unwrap_or(0);
    println!("working set  {pages} pages, {}", HumanBytes(pages.saturating_mul(PAGE_SIZE)));
    println!("  grew       {}", numbers(working_set_pages));
    let sample = &found.sample;
    let MemorySample { pages, zero_pages, duplicate_pages, lz4_bytes, zstd_bytes } = sample;
    let data = sample.data_pages();
    println!("sample       {pages} pages, {} zero", percent(*zero_pages, *pages));
    if data > 0 {
        let ratio = |packed: u64| data as f64 * PAGE_SIZE as f64 / packed.max(1) as f64;
        let (lz4, zstd) = (ratio(*lz4_bytes), ratio(*zstd_bytes));
        let duplicate = percent(*duplicate_pages, data);
        println!("  the rest   {duplicate} duplicate, {lz4:.2} to 1 by LZ4, {zstd:.2} to 1 by Zstandard");
    }
    let MeasurementCost { protected_pages, log_ms, longest_log_ms, cpu_ms } = &found.cost;
    println!("cost         {protected_pages} pages write-protected again, {cpu_ms} of a host CPU");
    println!("  the log    {log_ms}, the longest call {longest_log_ms}");
}

fn numbers(list: &[u64]) -> String {
    list.iter().map(u64::to_string).collect::<Vec<_>>().join(" ")
}

fn percent(part: u64, of: u64) -> String {
    format!("{:.1} %", part as f64 * 100.0 / of.max(1) as f64)
}
