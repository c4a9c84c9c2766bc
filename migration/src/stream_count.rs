//! How many streams a migration gets where nobody says.
//!
//! Streams are agreed upon in the offer, before a byte of memory has moved, so the rule knows little: this host's
//! processors, whether both ends are on it, and the round trip of the connection. Neither the link's speed nor the target's
//! processors are known, nor how well pages pack.
//!
//! - Between two processes of one host receiving takes longer than sending, so that a second stream helps where there is a
//!   second processor, and more take the guest's: 2.
//! - Else half of the processors may encode, at most [`BUSY`] and no more than the budget: the other half is the guest's.
//! - Over a long way one lost packet halves the pace of its stream for many round trips: at least [`FAR`] streams.

use std::num::NonZeroU16;
use std::time::Duration;

/// The most streams for the sake of encoding: four cores pack as much as 10 Gbit/s take.
const BUSY: u16 = 4;

/// The most streams within one host.
const ONE_HOST: NonZeroU16 = NonZeroU16::new(2).expect("2 is not 0");

/// The least streams over a long way.
const FAR: u16 = 4;

/// The round trip of a long way.
const LONG: Duration = Duration::from_millis(8);

/// What is known when streams are agreed upon.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Known {
    /// Processors of this host.
    pub(crate) cpus: NonZeroU16,
    /// How many of them encoding may take.
    pub(crate) cpu_budget: f64,
    /// Whether both ends are on this host.
    pub(crate) same_host: bool,
    /// The round trip, where the link knows it.
    pub(crate) round_trip: Option<Duration>,
}

/// The number of streams.
pub(crate) fn stream_count(known: &Known) -> NonZeroU16 {
    let Known { cpus, cpu_budget, same_host, round_trip } = *known;
    if same_host {
        return cpus.min(ONE_HOST);
    }
    let affordable = (1..BUSY).take_while(|streams| f64::from(*streams) < cpu_budget).count();
    let affordable = u16::try_from(affordable).expect("it is less than BUSY") + 1;
    let busy = (cpus.get() / 2).min(affordable);
    let far = if round_trip.is_some_and(|time| time >= LONG) { FAR } else { 1 };
    NonZeroU16::new(busy.max(far)).unwrap_or(NonZeroU16::MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(cpus: u16, cpu_budget: f64, round_trip_ms: u64) -> u16 {
        let (cpus, round_trip) = (NonZeroU16::new(cpus).unwrap(), Some(Duration::from_millis(round_trip_ms)));
        stream_count(&Known { cpus, cpu_budget, same_host: false, round_trip }).get()
    }

    #[test]
    fn half_of_the_processors_encode_but_four_at_most() {
        assert_eq!([1, 2, 3, 4, 7, 8, 64].map(|cpus| count(cpus, f64::from(cpus), 0)), [1, 1, 1, 2, 3, 4, 4]);
    }

    #[test]
    fn the_budget_limits_them() {
        assert_eq!([0.1, 1.0, 1.5, 2.0, 3.0, 16.0].map(|budget| count(16, budget, 0)), [1, 1, 2, 2, 3, 4]);
    }

    #[test]
    fn a_long_way_takes_several_whatever_the_processors() {
        assert_eq!((count(1, 0.1, 7), count(1, 0.1, 8), count(2, 2.0, 64)), (1, 4, 4));
    }

    #[test]
    fn one_host_takes_two_and_an_unknown_way_one() {
        let known = Known { cpus: NonZeroU16::MAX, cpu_budget: 9.0, same_host: true, round_trip: Some(LONG) };
        assert_eq!(stream_count(&known).get(), 2);
        assert_eq!(stream_count(&Known { cpus: NonZeroU16::MIN, ..known }).get(), 1);
        assert_eq!(
            stream_count(&Known { cpus: NonZeroU16::MIN, same_host: false, round_trip: None, ..known }).get(),
            1
        );
    }
}
