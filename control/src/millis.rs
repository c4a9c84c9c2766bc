//! A length of time as the API writes it: a JSON number of milliseconds with up to three decimals.
//!
//! Microseconds are the unit inside, so that a value survives being written and read, and can be compared.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::time::Duration;

/// Above this, a microsecond no longer has a place in a JSON number with 53 bits of precision.
const MICROS_MAX: u64 = 1 << 53;

/// A length of time, exact to the microsecond, written as milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Millis {
    micros: u64,
}

impl From<Duration> for Millis {
    fn from(duration: Duration) -> Self {
        let micros = u64::try_from(duration.as_micros()).unwrap_or(MICROS_MAX);
        Self { micros: micros.min(MICROS_MAX) }
    }
}

impl From<Millis> for Duration {
    fn from(millis: Millis) -> Self {
        Self::from_micros(millis.micros)
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03} ms", self.micros / 1000, self.micros % 1000)
    }
}

impl Serialize for Millis {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(Duration::from(*self).as_nanos() as f64 / 1e6)
    }
}

impl<'de> Deserialize<'de> for Millis {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let millis = f64::deserialize(deserializer)?;
        // Half a microsecond more, because the conversion cuts off and 0.1 + 0.2 lies just below 0.3.
        Duration::try_from_secs_f64(millis / 1e3)
            .map(|duration| Self::from(duration + Duration::from_nanos(500)))
            .map_err(|error| serde::de::Error::custom(format!("{millis} is not a length of time: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn written_as_milliseconds() {
        let downtime = Millis::from(Duration::from_micros(17_250));
        assert_eq!(serde_json::to_string(&downtime).unwrap(), "17.25");
        assert_eq!(downtime.to_string(), "17.250 ms");
        assert_eq!(serde_json::from_str::<Millis>("17").unwrap(), Millis::from(Duration::from_millis(17)));
    }

    #[test]
    fn what_is_no_length_of_time_is_refused() {
        assert!(serde_json::from_str::<Millis>("-1").unwrap_err().to_string().contains("-1 is not a length of time"));
        assert!(serde_json::from_str::<Millis>("1e300").is_err());
        assert!(serde_json::from_str::<Millis>("\"5\"").is_err());
        assert_eq!(Millis::from(Duration::MAX), Millis { micros: MICROS_MAX });
    }

    proptest! {
        #[test]
        fn survives_json(micros in 0..1_u64 << 50) {
            let before = Millis { micros };
            let after: Millis = serde_json::from_str(&serde_json::to_string(&before).unwrap()).unwrap();
            prop_assert_eq!(before, after);
        }
    }
}
