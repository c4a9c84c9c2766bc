//! What Prometheus is told: the board's figures as metrics.

use super::board::Board;
use control::{
    DiskCounters, Family, Label, MetricKind, MetricName, Metrics, Millis, NicCounters, Phase, Sample, Value,
};
use std::time::Duration;

/// A counter of a device: its metric, what it means, and where it is.
type Column<T> = (&'static str, &'static str, fn(&T) -> Value);

const DISK: [Column<DiskCounters>; 8] = [
    ("godwit_disk_reads_total", "Reads that succeeded", |disk| Value::Integer(disk.reads)),
    ("godwit_disk_read_bytes_total", "Bytes read", |disk| Value::Integer(disk.read_bytes)),
    ("godwit_disk_read_seconds_total", "Time that reads took", |disk| seconds(disk.read_time_ms)),
    ("godwit_disk_writes_total", "Writes that succeeded", |disk| Value::Integer(disk.writes)),
    ("godwit_disk_written_bytes_total", "Bytes written", |disk| Value::Integer(disk.written_bytes)),
    ("godwit_disk_write_seconds_total", "Time that writes took", |disk| seconds(disk.write_time_ms)),
    ("godwit_disk_flushes_total", "Flushes that succeeded", |disk| Value::Integer(disk.flushes)),
    ("godwit_disk_errors_total", "Requests that failed", |disk| Value::Integer(disk.errors)),
];

const NIC: [Column<NicCounters>; 5] = [
    ("godwit_nic_received_packets_total", "Packets to the guest", |nic| Value::Integer(nic.received_packets)),
    ("godwit_nic_received_bytes_total", "Bytes to the guest", |nic| Value::Integer(nic.received_bytes)),
    ("godwit_nic_sent_packets_total", "Packets from the guest", |nic| Value::Integer(nic.sent_packets)),
    ("godwit_nic_sent_bytes_total", "Bytes from the guest", |nic| Value::Integer(nic.sent_bytes)),
    ("godwit_nic_dropped_packets_total", "Packets dropped, both ways", |nic| Value::Integer(nic.dropped_packets)),
];

fn seconds(time: Millis) -> Value {
    Value::Float(Duration::from(time).as_secs_f64())
}

/// All metrics.
pub(super) fn of(board: &Board) -> Metrics {
    let vm = board.vm();
    let mut metrics = Metrics::default();
    let mut gauge = |name, help, value: u64| {
        metrics.push(MetricName::new(name), MetricKind::Gauge, help, Value::Integer(value));
    };
    gauge("godwit_vcpus", "Number of vCPUs", vm.vcpus.into());
    gauge("godwit_memory_bytes", "Guest memory", vm.memory_bytes);
    gauge("godwit_running", "1 while the guest runs", u64::from(matches!(vm.phase, Phase::Running)));
    gauge("godwit_migrating", "1 while a migration is under way", u64::from(vm.phase == Phase::Migrating));
    if let Some(balloon) = board.balloon() {
        gauge("godwit_balloon_target_bytes", "Memory that the balloon is asked to hold", balloon.target_bytes);
        gauge("godwit_balloon_actual_bytes", "Memory that the balloon holds", balloon.actual_bytes);
    }
    if let Some(migration) = board.migration() {
        gauge("godwit_migration_rounds", "Rounds of the last migration", migration.rounds.len() as u64);
        gauge("godwit_migration_sent_bytes", "Bytes sent by the last migration", migration.progress.bytes_sent);
        gauge("godwit_migration_remaining_bytes", "Bytes left to send", migration.progress.remaining_bytes);
    }
    let disks: Vec<_> = board.disks().disks.into_iter().map(|disk| (disk.id, disk.counters)).collect();
    metrics.families.extend(families("disk", &DISK, &disks));
    let nics = board.nics().nics.into_iter();
    let counted: Vec<_> = nics.filter_map(|nic| nic.counters.map(|counters| (nic.id, counters))).collect();
    metrics.families.extend(families("nic", &NIC, &counted));
    metrics
}

/// One family for each column, with a sample for each device; none without devices.
fn families<T>(label: &'static str, columns: &[Column<T>], devices: &[(String, T)]) -> Vec<Family> {
    let family = |(name, help, value): &Column<T>| Family {
        name: MetricName::new(name),
        help,
        kind: MetricKind::Counter,
        samples: devices
            .iter()
            .map(|(id, counters)| Sample {
                labels: vec![Label { name: MetricName::new(label), value: id.clone() }],
                value: value(counters),
            })
            .collect(),
    };
    if devices.is_empty() { Vec::new() } else { columns.iter().map(family).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use control::Events;

    #[test]
    fn each_device_has_a_sample_in_each_family() {
        let counters = |reads| DiskCounters { reads, flushes: 3, ..DiskCounters::default() };
        let disks = [("blk0".to_owned(), counters(7)), ("blk1".to_owned(), counters(0))];
        let text = Metrics { families: families("disk", &DISK, &disks) }.render();
        assert!(
            text.contains("godwit_disk_reads_total{disk=\"blk0\"} 7\ngodwit_disk_reads_total{disk=\"blk1\"} 0\n"),
            "{text}"
        );
        assert!(text.contains("godwit_disk_flushes_total{disk=\"blk1\"} 3\n"), "{text}");
        let nic =
            NicCounters { received_packets: 1, received_bytes: 2, sent_packets: 3, sent_bytes: 4, dropped_packets: 5 };
        let text = Metrics { families: families("nic", &NIC, &[("net0".to_owned(), nic)]) }.render();
        let values: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
        assert!(values.iter().zip(["1", "2", "3", "4", "5"]).all(|(line, value)| line.ends_with(value)), "{text}");
    }

    #[test]
    fn what_is_not_there_has_no_metrics() {
        let text = of(&Board::new(Phase::Receiving, Events::default())).render();
        assert!(text.contains("godwit_running 0\n") && !text.contains("disk") && !text.contains("nic"), "{text}");
    }
}
