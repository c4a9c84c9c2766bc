//! The verifier's command line.
//!
//! Read by hand: a guest of 64 MiB keeps the program in memory, and a full parser would be most of it.

use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use crate::memory::Rate;

/// What `--help` prints.
pub const HELP: &str = "\
verifier: works a guest and proves that nothing was lost
  --memory SIZE     working set that is rewritten and verified (default 16M)
  --cold SIZE       memory that is written once and verified by reports (default 0)
  --rate N          pages to rewrite per second, all threads together; 0: as many as possible (default 2000)
  --threads N       threads that share the working set (default 1)
  --disk PATH       device or file to write to (default: none)
  --disk-size SIZE  how much of it to use (default 16M, at most 16G)
  --port N          TCP port of the sequence server (default: none)
  --clock-ms N      period of the clock probes (default 1)
  --kmsg PATH       the kernel log; `none`: do not read it (default /dev/kmsg)
  --tick-ms N       period of the tick lines; 0: none (default 100)
  --seconds N       report and end after so many seconds (default: when `quit` is read)
Commands on standard input: report, quit. Sizes may end in k, M or G.
";

const DISK_LIMIT: u64 = 16 << 30;
const MEMORY_LIMIT: u64 = 1 << 40;
const THREAD_LIMIT: u64 = 256;

/// Why the command line is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum OptionsError {
    /// An option that does not exist.
    #[error("Unknown option {0:?}; `verifier --help` lists all")]
    Unknown(String),
    /// The last option has no value.
    #[error("The option {0} needs a value")]
    NoValue(String),
    /// The value does not fit.
    #[error("The option {option} takes {wanted}, not {value:?}")]
    Value {
        /// The option.
        option: String,
        /// What it takes.
        wanted: String,
        /// What it was given.
        value: String,
    },
}

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of the working set.
    pub memory: u64,
    /// Bytes that are written once.
    pub cold: u64,
    /// Pages per second of all threads together.
    pub rate: Rate,
    /// Threads that share the working set.
    pub threads: u32,
    /// The disk, and how many bytes of it to use.
    pub disk: Option<PathBuf>,
    /// How much of the disk to use.
    pub disk_size: u64,
    /// The port of the sequence server.
    pub port: Option<u16>,
    /// The period of the clock probes.
    pub clock: Duration,
    /// The kernel log.
    pub kernel_log: Option<PathBuf>,
    /// The period of the ticks.
    pub tick: Option<Duration>,
    /// When to end.
    pub end: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            memory: 16 << 20,
            cold: 0,
            rate: Rate::PagesPerSecond(2000),
            threads: 1,
            disk: None,
            disk_size: 16 << 20,
            port: None,
            clock: Duration::from_millis(1),
            kernel_log: Some(PathBuf::from("/dev/kmsg")),
            tick: Some(Duration::from_millis(100)),
            end: None,
        }
    }
}

impl Options {
    /// Reads the words behind the program's name; `None` when they ask for help.
    pub fn parse(words: impl IntoIterator<Item = String>) -> Result<Option<Self>, OptionsError> {
        let mut options = Self::default();
        let mut words = words.into_iter();
        while let Some(option) = words.next() {
            if matches!(&*option, "--help" | "-h") {
                return Ok(None);
            }
            if !HELP.contains(&format!("  {option} ")) {
                return Err(OptionsError::Unknown(option));
            }
            let value = words.next().ok_or_else(|| OptionsError::NoValue(option.clone()))?;
            options.set(&option, &value)?;
        }
        Ok(Some(options))
    }

    fn set(&mut self, option: &str, value: &str) -> Result<(), OptionsError> {
        let number = |limit: u64| number(option, value, limit);
        match option {
            "--memory" => self.memory = number(MEMORY_LIMIT)?,
            "--cold" => self.cold = number(MEMORY_LIMIT)?,
            "--rate" => {
                let rate = narrow(number(u64::from(u32::MAX))?);
                self.rate = if rate == 0 { Rate::Unlimited } else { Rate::PagesPerSecond(rate) };
            }
            "--threads" => self.threads = narrow(number(THREAD_LIMIT)?.max(1)),
            "--disk" => self.disk = Some(PathBuf::from(value)),
            "--disk-size" => self.disk_size = number(DISK_LIMIT)?,
            "--port" => self.port = Some(u16::try_from(number(u64::from(u16::MAX))?).expect("the limit was u16::MAX")),
            "--clock-ms" => self.clock = Duration::from_millis(number(60_000)?),
            "--kmsg" => self.kernel_log = (value != "none").then(|| PathBuf::from(value)),
            "--tick-ms" => {
                let period = Duration::from_millis(number(60_000)?);
                self.tick = (!period.is_zero()).then_some(period);
            }
            "--seconds" => self.end = Some(Duration::from_secs(number(1_000_000)?)),
            _ => return Err(OptionsError::Unknown(option.to_owned())),
        }
        Ok(())
    }
}

fn narrow(number: u64) -> u32 {
    u32::try_from(number).expect("the caller's limit is within u32")
}

/// A number, perhaps with k, M or G.
fn number(option: &str, value: &str, limit: u64) -> Result<u64, OptionsError> {
    let digits = value.trim_end_matches(['k', 'M', 'G']);
    let unit = match &value[digits.len()..] {
        "" => Some(1),
        "k" => Some(1 << 10),
        "M" => Some(1 << 20),
        "G" => Some(1 << 30),
        _ => None,
    };
    let product = unit.and_then(|unit: u64| digits.parse::<u64>().ok()?.checked_mul(unit));
    product.filter(|&number| number <= limit).ok_or_else(|| OptionsError::Value {
        option: option.to_owned(),
        wanted: format!("a number up to {limit}"),
        value: value.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Option<Options>, OptionsError> {
        Options::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn every_option_is_read() {
        let all = "--memory 1G --cold 2M --rate 0 --threads 4 --disk /dev/vdb --disk-size 32M --port 7000 --clock-ms 5 \
            --kmsg none --tick-ms 0 --seconds 3";
        let options = parse(all).unwrap().unwrap();
        assert_eq!((options.memory, options.cold, options.threads), (1 << 30, 2 << 20, 4));
        assert!(matches!(options.rate, Rate::Unlimited));
        assert_eq!((options.disk, options.disk_size, options.port), (Some("/dev/vdb".into()), 32 << 20, Some(7000)));
        assert_eq!((options.clock, options.kernel_log), (Duration::from_millis(5), None));
        assert_eq!((options.tick, options.end), (None, Some(Duration::from_secs(3))));
    }

    #[test]
    fn help_and_defaults_agree() {
        assert!(parse("--memory 1 --help").unwrap().is_none());
        let options = parse("").unwrap().unwrap();
        assert_eq!((options.memory, options.tick), (16 << 20, Some(Duration::from_millis(100))));
        // What the help names is an option, and has a value.
        for option in HELP.lines().filter_map(|line| line.trim().split(' ').next()).filter(|o| o.starts_with("--")) {
            assert_eq!(parse(option).unwrap_err(), OptionsError::NoValue(option.to_owned()));
        }
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        assert_eq!(parse("--frog 1").unwrap_err(), OptionsError::Unknown("--frog".to_owned()));
        assert_eq!(parse("7").unwrap_err(), OptionsError::Unknown("7".to_owned()));
        for line in ["--memory 1X", "--memory -1", "--memory kM", "--memory 99999999999G", "--port 65536", "--rate 1MM"]
        {
            assert!(matches!(parse(line), Err(OptionsError::Value { .. })), "{line}");
        }
        let text = parse("--port x").unwrap_err().to_string();
        assert_eq!(text, "The option --port takes a number up to 65535, not \"x\"");
    }
}
