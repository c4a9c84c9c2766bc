//! A measurement of the dirty rate, in steps between the service's other work.
//!
//! Whatever takes the machine away from the loop, or the guest from running, ends it first: it has the dirty log, and what
//! it found would not be true.

use super::requests::not_here;
use super::{Holding, Service};
use crate::dirty_rate::{MeasureError, Measurement, Step};
use control::{ApiError, JobId, JobStarted, MeasureDirtyRate, MeasurementState, MeasurementStatus, Reply};
use migration::in_words;
use std::time::Instant;

impl Service {
    pub(super) fn measure_dirty_rate(&mut self, request: &MeasureDirtyRate) -> Result<Reply, ApiError> {
        let periods = MeasureDirtyRate::PERIOD_MS;
        if !periods.contains(&request.period_ms) {
            let reason = format!("{} is not from {} to {}", request.period_ms, periods.start(), periods.end());
            return Err(ApiError::InvalidValue { field: "period_ms", reason });
        }
        if self.measurement.is_some() {
            return Err(ApiError::Busy { what: "measurements of the dirty rate" });
        }
        let Holding::Here(machine) = &self.holding else { return Err(not_here()) };
        let job = JobId::random().map_err(|error| ApiError::failed(&error))?;
        let begun = Measurement::begin(machine, request.period()).map_err(|error| ApiError::failed(&error))?;
        self.measurement = Some(begun);
        self.board.begin_measurement(MeasurementStatus {
            job,
            state: MeasurementState::Active,
            period_ms: request.period().into(),
            found: None,
            error: None,
        });
        Ok(Reply::Started(JobStarted { job }))
    }

    /// When the measurement under way wants to go on.
    pub(super) fn measures_at(&self) -> Option<Instant> {
        self.measurement.as_ref().map(Measurement::due)
    }

    /// Goes on with the measurement, if it is time.
    pub(super) fn go_on_measuring(&mut self) {
        if self.measures_at().is_some_and(|at| at <= Instant::now())
            && let Some(measurement) = self.measurement.take()
            && let Holding::Here(machine) = &self.holding
        {
            match measurement.step(machine) {
                Ok(Step::Unfinished(measurement)) => self.measurement = Some(measurement),
                Ok(Step::Finished(found)) => self.board.end_measurement(Ok(found)),
                Err(error) => self.board.end_measurement(Err(words(&error))),
            }
        }
    }

    /// Ends the measurement, if there is one, because of `why`.
    pub(super) fn end_measurement(&mut self, why: &str) {
        if let Some(measurement) = self.measurement.take() {
            if let Holding::Here(machine) = &self.holding {
                measurement.abandon(machine);
            }
            self.board.end_measurement(Err(why.to_owned()));
        }
    }
}

fn words(error: &MeasureError) -> String {
    tracing::warn!(error = in_words(error), "the dirty rate could not be measured");
    in_words(error)
}
