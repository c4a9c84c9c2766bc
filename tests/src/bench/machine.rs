//! The machine that a figure was measured on, in words.

use std::fs;

/// Processor, number of CPUs, memory and kernel of this machine.
pub fn describe() -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let (cpuinfo, meminfo) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
    let cpus = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let model = value(&cpuinfo, "model name").unwrap_or("unknown processor");
    let kib: u64 = value(&meminfo, "MemTotal").and_then(|text| text.strip_suffix(" kB")?.parse().ok()).unwrap_or(0);
    format!("{model}, {cpus} CPUs, {} MiB, Linux {}", kib >> 10, read("/proc/sys/kernel/osrelease").trim())
}

/// The value of the first line `name : value`.
fn value<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        (found.trim() == name).then(|| value.trim())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_counts() {
        let text = "processor\t: 0\nmodel name\t: A\nmodel name\t: B\n";
        assert_eq!(value(text, "model name"), Some("A"));
        assert_eq!(value(text, "flags"), None);
        assert!(describe().contains("CPUs"));
    }
}
