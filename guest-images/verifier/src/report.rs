//! The lines between the verifier and whoever reads its console.
//!
//! Each is one JSON object with a `type`. A kernel message may land in the middle of one; a reader that cannot parse a
//! line asks again.

use serde::{Deserialize, Serialize};

use crate::clock::ClockReport;
use crate::disk::DiskReport;
use crate::fault::Faults;
use crate::kernel_log::KernelLogReport;
use crate::memory::MemoryReport;
use crate::net::NetReport;

/// A line of the verifier.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Line {
    /// All modes run.
    Ready {
        /// The monotonic clock in microseconds.
        us: u64,
    },
    /// A sign of life.
    Tick {
        /// Its number, from 0 on.
        seq: u64,
        /// The monotonic clock in microseconds.
        us: u64,
    },
    /// The answer to `report` and `quit`, and the last line.
    Report(Box<Report>),
    /// A command that is none.
    Unknown {
        /// What was read.
        command: String,
    },
}

impl Line {
    /// Reads a line of the console; `None` for what other programs print.
    pub fn parse(line: &str) -> Option<Self> {
        serde_json::from_str(line.trim()).ok()
    }
}

/// What the verifier found since it started.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Whether nothing was wrong.
    pub ok: bool,
    /// The working set.
    pub memory: MemoryReport,
    /// The clocks.
    pub clock: ClockReport,
    /// The disk, if there is one.
    pub disk: Option<DiskReport>,
    /// The sequence server, if there is one.
    pub net: Option<NetReport>,
    /// The kernel log, if it is read.
    pub dmesg: Option<KernelLogReport>,
    /// Modes that did not answer.
    pub silent: Vec<String>,
}

impl Report {
    /// Settles `ok` by all the rest.
    pub fn judged(mut self) -> Self {
        let Self { ok: _, memory, clock, disk, net, dmesg, silent } = &self;
        let faults = [
            Some(&memory.faults),
            disk.as_ref().map(|disk| &disk.faults),
            net.as_ref().map(|net| &net.faults),
            dmesg.as_ref().map(|dmesg| &dmesg.during),
        ];
        let ok = faults.into_iter().flatten().all(Faults::none) && clock.steps_back == 0 && silent.is_empty();
        self.ok = ok;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault() -> Faults {
        Faults { count: 1, first: vec!["x".to_owned()] }
    }

    #[test]
    fn any_fault_of_any_mode_spoils_the_report() {
        let good = || Report {
            disk: Some(DiskReport::default()),
            net: Some(NetReport::default()),
            dmesg: Some(KernelLogReport { before: fault(), ..KernelLogReport::default() }),
            ..Report::default()
        };
        assert!(good().judged().ok);
        assert!(Report::default().judged().ok);
        let spoils: [fn(&mut Report); 6] = [
            |report| report.memory.faults = fault(),
            |report| report.clock.steps_back = 1,
            |report| report.disk.as_mut().unwrap().faults = fault(),
            |report| report.net.as_mut().unwrap().faults = fault(),
            |report| report.dmesg.as_mut().unwrap().during = fault(),
            |report| report.silent = vec!["clock-0".to_owned()],
        ];
        for spoil in spoils {
            let mut report = good();
            spoil(&mut report);
            assert!(!report.judged().ok);
        }
    }

    #[test]
    fn lines_survive_the_console() {
        let lines = [
            (Line::Ready { us: 5 }, r#"{"type":"ready","us":5}"#),
            (Line::Tick { seq: 1, us: 6 }, r#"{"type":"tick","seq":1,"us":6}"#),
            (Line::Unknown { command: "x".to_owned() }, r#"{"type":"unknown","command":"x"}"#),
        ];
        for (line, text) in lines {
            assert_eq!(serde_json::to_string(&line).unwrap(), text);
            assert_eq!(Line::parse(&format!("{text}\r\n")), Some(line));
        }
        let report = Line::Report(Box::new(Report::default().judged()));
        let text = serde_json::to_string(&report).unwrap();
        assert!(text.starts_with(r#"{"type":"report","ok":true,"memory":{"pages":0"#), "{text}");
        assert_eq!(Line::parse(&text), Some(report));
        assert_eq!(Line::parse("[    3.4] Linux"), None);
    }
}
