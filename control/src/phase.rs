//! What a VM is doing, and which request is admitted in which phase.
//!
//! ```text
//!  godwit run:      Starting -> Running <-> Paused -> Ended
//!  source:          Running | Paused -> Migrating -> MovedAway | Running | Paused | InDoubt
//!  godwit receive:  Starting -> Receiving -> Incoming -> Running | Paused | Receiving | InDoubt
//!  both:            InDoubt -> MovedAway | Running | Paused   (resolve)
//! ```
//!
//! [`admit`] is pure and lists every request in every phase. The server asks it before it calls the handler; a handler
//! whose phase can change in between asks it again under its own lock.

use crate::error::Code;
use crate::request::Request;
use serde::{Deserialize, Serialize};
use std::fmt;
use thiserror::Error;

/// What a VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The machine is being built, and no vCPU has run; or the place to wait for a guest is being prepared.
    Starting,
    /// The guest runs.
    Running,
    /// The guest stands still, with all of its state.
    Paused,
    /// Waits for a guest to arrive.
    Receiving,
    /// A guest arrives; it still belongs to the source.
    Incoming,
    /// The guest is being moved away; it still belongs to this end.
    Migrating,
    /// The hand-over's answer was lost; the guest stands still until it is known who owns it.
    InDoubt,
    /// The guest belongs to another Godwit; this one keeps the report, and its disks until the other has them.
    MovedAway,
    /// The guest has powered off, or was ended.
    Ended,
}

impl Phase {
    /// Each phase.
    pub const ALL: [Self; 9] = [
        Self::Starting,
        Self::Running,
        Self::Paused,
        Self::Receiving,
        Self::Incoming,
        Self::Migrating,
        Self::InDoubt,
        Self::MovedAway,
        Self::Ended,
    ];

    /// The phase's name in the API.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Receiving => "receiving",
            Self::Incoming => "incoming",
            Self::Migrating => "migrating",
            Self::InDoubt => "in_doubt",
            Self::MovedAway => "moved_away",
            Self::Ended => "ended",
        }
    }

    /// The second half of "Cannot …: …".
    const fn why_not(self) -> &'static str {
        match self {
            Self::Starting => "the guest is still starting; try again when it runs",
            Self::Running => "the guest runs and no migration is under way",
            Self::Paused => "the guest is paused and no migration is under way",
            Self::Receiving => "this Godwit waits for a guest and has none yet",
            Self::Incoming => "the guest is arriving and still belongs to the source; wait, or cancel the migration",
            Self::Migrating => "the guest is being migrated; wait, or cancel the migration first",
            Self::InDoubt => "the answer to the hand-over was lost; first settle who owns the guest (resolve)",
            Self::MovedAway => "the guest has moved away; ask the Godwit that it moved to",
            Self::Ended => "the guest has ended",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A request that makes sense, but not now. HTTP status 409.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct Refusal {
    /// The phase in which it came.
    pub phase: Phase,
    /// The reason for programs.
    pub code: Code,
    /// The reason for people.
    pub message: String,
}

impl Refusal {
    /// A refusal by the handler, for a reason that the phase alone does not show.
    #[must_use]
    pub fn new(phase: Phase, code: Code, message: impl Into<String>) -> Self {
        Self { phase, code, message: message.into() }
    }

    fn wrong_phase(phase: Phase, request: &Request) -> Self {
        let why = match (request, phase) {
            (Request::Stop(_) | Request::PowerButton, Phase::Paused) => {
                "the guest is paused and would not notice; resume it first"
            }
            (Request::MeasureDirtyRate(_), Phase::Paused) => "the guest is paused and writes nothing; resume it first",
            (_, phase) => phase.why_not(),
        };
        Self::new(phase, Code::WrongPhase, format!("Cannot {}: {why}", intent(request)))
    }
}

/// The first half of "Cannot …: …".
const fn intent(request: &Request) -> &'static str {
    match request {
        Request::ShowVm => "show the VM",
        Request::Pause => "pause the guest",
        Request::Resume => "resume the guest",
        Request::Stop(_) => "stop the guest",
        Request::Kill => "end the guest",
        Request::Reset => "reset the guest",
        Request::PowerButton => "press the power button",
        Request::ShowBalloon => "show the balloon",
        Request::SetBalloon(_) => "change the balloon",
        Request::ListDisks => "list the disks",
        Request::ResizeDisk(_) => "resize a disk",
        Request::ListNics => "list the network interfaces",
        Request::StartMigration(_) => "start a migration",
        Request::ShowMigration => "show the migration",
        Request::CancelMigration => "cancel a migration",
        Request::ResolveMigration(_) => "settle a migration",
        Request::MeasureDirtyRate(_) => "measure the dirty rate",
        Request::ShowDirtyRate => "show the dirty rate",
        Request::Pulse(_) => "pulse the machine",
    }
}

/// Whether `request` is admitted in `phase`.
///
/// # Errors
/// A [`Refusal`] with the phase and a sentence for people.
#[rustfmt::skip]
pub fn admit(phase: Phase, request: &Request) -> Result<(), Refusal> {
    use Phase::{Ended, InDoubt, Incoming, Migrating, MovedAway, Paused, Receiving, Running, Starting};
    let admitted = match request {
        // Questions about what does not change, or is kept after the guest has gone.
        Request::ShowVm | Request::ListDisks | Request::ListNics | Request::ShowMigration | Request::ShowDirtyRate => true,
        // Changes of a guest that is here and that nobody else leads. The first two are done already in one of the
        // phases; saying so is friendlier than refusing a repeated request.
        Request::Pause | Request::Resume | Request::Reset | Request::SetBalloon(_) | Request::ResizeDisk(_)
        | Request::StartMigration(_) | Request::Pulse(_) => match phase {
            Running | Paused => true,
            Starting | Receiving | Incoming | Migrating | InDoubt | MovedAway | Ended => false,
        },
        // Only a running guest notices its power button, or writes its memory. A migration has the dirty log for itself.
        Request::Stop(_) | Request::PowerButton | Request::MeasureDirtyRate(_) => match phase {
            Running => true,
            Starting | Paused | Receiving | Incoming | Migrating | InDoubt | MovedAway | Ended => false,
        },
        // Not while another thread owns the guest, and not while nobody knows who does: that could end the only copy. One
        // that has no guest any more may still serve its disks, or wait for them.
        Request::Kill => match phase {
            Starting | Running | Paused | Receiving | MovedAway | Ended => true,
            Incoming | Migrating | InDoubt => false,
        },
        // Needs a guest here that has a balloon; it may be on its way.
        Request::ShowBalloon => match phase {
            Running | Paused | Migrating | InDoubt => true,
            Starting | Receiving | Incoming | MovedAway | Ended => false,
        },
        Request::CancelMigration => match phase {
            Migrating | Incoming => true,
            Starting | Running | Paused | Receiving | InDoubt | MovedAway | Ended => false,
        },
        Request::ResolveMigration(_) => match phase {
            InDoubt => true,
            Starting | Running | Paused | Receiving | Incoming | Migrating | MovedAway | Ended => false,
        },
    };
    if admitted { Ok(()) } else { Err(Refusal::wrong_phase(phase, request)) }
}

/// Whether the VM was started for a test, with requests that no user needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TestRequests {
    /// They are refused.
    #[default]
    Refused,
    /// They are admitted.
    Admitted,
}

impl TestRequests {
    /// Whether `request` is admitted under this rule.
    ///
    /// # Errors
    /// A [`Refusal`] if `request` is for tests and those are refused.
    pub fn admit(self, phase: Phase, request: &Request) -> Result<(), Refusal> {
        match (self, request) {
            (Self::Refused, Request::Pulse(_)) => Err(Refusal::new(
                phase,
                Code::TestRequestsRefused,
                format!("Cannot {}: this VM was started without test requests", intent(request)),
            )),
            (Self::Refused | Self::Admitted, _) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::samples;
    use proptest::prelude::*;

    /// One line per request of [`samples`], one column per phase of [`Phase::ALL`].
    const TABLE: [(&str, &str); 19] = [
        //                   S R P R I M D A E
        ("ShowVm", "+ + + + + + + + +"),
        ("Pause", "- + + - - - - - -"),
        ("Resume", "- + + - - - - - -"),
        ("Stop", "- + - - - - - - -"),
        ("Kill", "+ + + + - - - + +"),
        ("Reset", "- + + - - - - - -"),
        ("PowerButton", "- + - - - - - - -"),
        ("ShowBalloon", "- + + - - + + - -"),
        ("SetBalloon", "- + + - - - - - -"),
        ("ListDisks", "+ + + + + + + + +"),
        ("ResizeDisk", "- + + - - - - - -"),
        ("ListNics", "+ + + + + + + + +"),
        ("StartMigration", "- + + - - - - - -"),
        ("ShowMigration", "+ + + + + + + + +"),
        ("CancelMigration", "- - - - + + - - -"),
        ("ResolveMigration", "- - - - - - + - -"),
        ("MeasureDirtyRate", "- + - - - - - - -"),
        ("ShowDirtyRate", "+ + + + + + + + +"),
        ("Pulse", "- + + - - - - - -"),
    ];

    #[test]
    fn every_request_in_every_phase() {
        let requests = samples();
        assert_eq!(requests.len(), TABLE.len());
        for (request, (name, row)) in requests.iter().zip(TABLE) {
            assert!(format!("{request:?}").starts_with(name), "{request:?} is not {name}");
            let row: Vec<_> = row.split(' ').collect();
            assert_eq!(row.len(), Phase::ALL.len(), "{name}");
            for (phase, cell) in Phase::ALL.into_iter().zip(row) {
                assert_eq!(admit(phase, request).is_ok(), cell == "+", "{name} in {phase}");
            }
        }
    }

    #[test]
    fn names_are_those_of_the_json() {
        for phase in Phase::ALL {
            assert_eq!(serde_json::to_value(phase).unwrap(), serde_json::Value::from(phase.name()));
        }
    }

    #[test]
    fn refusals_say_what_why_and_what_to_do() {
        let refusal = admit(Phase::Migrating, &Request::Pause).unwrap_err();
        let sentence = "Cannot pause the guest: the guest is being migrated; wait, or cancel the migration first";
        assert_eq!(refusal.to_string(), sentence);
        let refusal = admit(Phase::Paused, &Request::PowerButton).unwrap_err();
        assert!(refusal.message.ends_with("resume it first"), "{refusal}");
    }

    #[test]
    fn test_requests_need_leave() {
        for request in samples() {
            let refused = TestRequests::Refused.admit(Phase::Running, &request);
            assert_eq!(refused.is_err(), matches!(request, Request::Pulse(_)));
            assert_eq!(TestRequests::Admitted.admit(Phase::Running, &request), Ok(()));
        }
    }

    proptest! {
        #[test]
        fn a_refusal_carries_the_phase_and_a_sentence(phase in 0..Phase::ALL.len(), request in 0..TABLE.len()) {
            let (phase, request) = (Phase::ALL[phase], &samples()[request]);
            if let Err(refusal) = admit(phase, request) {
                prop_assert_eq!(refusal.phase, phase);
                prop_assert_eq!(refusal.code, Code::WrongPhase);
                prop_assert!(refusal.message.starts_with("Cannot "));
                prop_assert!(!refusal.message.ends_with('.'));
            }
        }

        /// Whatever changes the guest is refused wherever it does not belong to this Godwit alone.
        #[test]
        fn nothing_changes_a_guest_of_someone_else(request in 0..TABLE.len()) {
            let request = &samples()[request];
            for phase in [Phase::Incoming, Phase::Migrating, Phase::InDoubt] {
                let harmless = matches!(
                    request,
                    Request::ShowVm | Request::ShowBalloon | Request::ListDisks | Request::ListNics
                        | Request::ShowMigration | Request::CancelMigration | Request::ResolveMigration(_)
                        | Request::ShowDirtyRate
                );
                prop_assert!(harmless || admit(phase, request).is_err());
            }
        }
    }
}
