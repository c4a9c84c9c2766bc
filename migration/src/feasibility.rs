//! Goals that contradict each other, found before anything is sent: pure arithmetic on what is known then.
//!
//! A cap and a deadline together say how many bytes can go at most. What must go is known for certain only without codecs:
//! all memory that the host backs. What codecs will save is not; so with them a sample of the memory is asked, and what it
//! says of zero pages and compression is taken for all of it. A migration is refused only if not even that fits. Whether
//! the guest writes more meanwhile is left to the rounds, which see it.

use std::num::NonZeroU64;
use std::time::Duration;
use thiserror::Error;

/// What has to go over the link at the least.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Memory that the host backs, in bytes.
    pub backed: u64,
    /// What is left of it on the link, in bytes.
    pub least: u64,
    /// How that is known.
    pub basis: Basis,
}

/// How it is known what has to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Basis {
    /// Without codecs all of it goes as it is.
    NoCodecs,
    /// By what a sample of the memory holds.
    Sample,
}

/// Goals that cannot hold together.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum Contradiction {
    /// There is not enough time for the bytes.
    #[error(
        "A deadline of {} s at a bandwidth of {}/s carries {} at most; {}: allow more of either",
        deadline.as_secs_f64(), Bytes(bandwidth.get()), Bytes(*carried), need(load)
    )]
    TooManyBytes {
        /// The deadline.
        deadline: Duration,
        /// The cap, in bytes a second.
        bandwidth: NonZeroU64,
        /// What that allows, in bytes.
        carried: u64,
        /// What has to go.
        load: Load,
    },
    /// The migration would be given up before it is due.
    #[error(
        "A timeout of {} s gives the migration up before its deadline of {} s: leave one of them out",
        timeout.as_secs_f64(), deadline.as_secs_f64()
    )]
    TimeoutFirst {
        /// When it is given up.
        timeout: Duration,
        /// When it should be complete.
        deadline: Duration,
    },
}

fn need(load: &Load) -> String {
    let Load { backed, least, basis } = load;
    let backed = Bytes(*backed);
    match basis {
        Basis::NoCodecs => {
            format!("the host backs {backed} of the guest's memory, and without codecs all of it must go")
        }
        Basis::Sample => {
            let least = Bytes(*least);
            format!(
                "the host backs {backed} of the guest's memory, of which {least} must go at the least, by a sample of what \
                 it holds and what the codecs may save"
            )
        }
    }
}

/// Bytes, for people.
struct Bytes(u64);

impl std::fmt::Display for Bytes {
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            bytes @ 0..0x10_0000 => write!(f, "{:.1} KiB", bytes as f64 / 1024.0),
            bytes => write!(f, "{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        }
    }
}

/// Checks goals against each other. `load` says what has to go; it is asked only where it matters.
///
/// # Errors
/// [`Contradiction`] with the arithmetic, or why the load is not known.
pub fn check<E: From<Contradiction>>(
    deadline: Option<Duration>,
    timeout: Option<Duration>,
    bandwidth: Option<NonZeroU64>,
    load: impl FnOnce() -> Result<Load, E>,
) -> Result<(), E> {
    let Some(deadline) = deadline else { return Ok(()) };
    if let Some(timeout) = timeout.filter(|timeout| *timeout < deadline) {
        return Err(Contradiction::TimeoutFirst { timeout, deadline }.into());
    }
    let Some(bandwidth) = bandwidth else { return Ok(()) };
    let carried = u128::from(bandwidth.get()) * deadline.as_millis() / 1000;
    let (carried, load) = (u64::try_from(carried).unwrap_or(u64::MAX), load()?);
    if load.least > carried {
        return Err(Contradiction::TooManyBytes { deadline, bandwidth, carried, load }.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn checked(deadline: u64, timeout: Option<u64>, bandwidth: u64, load: Load) -> Result<(), Contradiction> {
        let seconds = Duration::from_secs;
        check(Some(seconds(deadline)), timeout.map(seconds), NonZeroU64::new(bandwidth), || Ok(load))
    }

    #[test]
    fn bytes_that_do_not_fit_are_refused_with_the_arithmetic() {
        let load = Load { backed: 512 * MIB, least: 512 * MIB, basis: Basis::NoCodecs };
        assert_eq!(
            checked(5, None, 10 * MIB, load).unwrap_err().to_string(),
            "A deadline of 5 s at a bandwidth of 10.0 MiB/s carries 50.0 MiB at most; the host backs 512.0 MiB of the \
             guest's memory, and without codecs all of it must go: allow more of either"
        );
        let sampled = Load { least: 51 * MIB, basis: Basis::Sample, ..load };
        let words = checked(5, None, 10 * MIB, sampled).unwrap_err().to_string();
        assert!(words.contains("512.0 MiB of the guest's memory, of which 51.0 MiB must go at the least"), "{words}");
        checked(5, None, 10 * MIB, Load { least: 50 * MIB, ..sampled }).unwrap();
        checked(u64::MAX / 1000, None, u64::MAX, load).unwrap();
        let words = checked(1, None, 1000, load).unwrap_err().to_string();
        assert!(words.contains("1.0 KiB at most"), "{words}");
    }

    #[test]
    fn only_what_contradicts_is_looked_at() {
        let never = || -> Result<Load, Contradiction> { panic!("nobody needs to know") };
        check(None, Some(Duration::ZERO), Some(NonZeroU64::MIN), never).unwrap();
        check(Some(Duration::from_secs(1)), None, None, never).unwrap();
        let timeout = check(Some(Duration::from_secs(6)), Some(Duration::from_secs(5)), None, never);
        assert_eq!(
            timeout.unwrap_err().to_string(),
            "A timeout of 5 s gives the migration up before its deadline of 6 s: leave one of them out"
        );
    }
}
