//! Every way in which a request can fail, with its HTTP status, its stable code and its sentence.
//!
//! The handler returns these, the server adds its own, and both reach the client as one JSON body, [`ErrorBody`].

use crate::phase::{Phase, Refusal};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The reason of a failure, for programs. Codes are never renamed; new ones may come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The request is not admitted in this phase.
    WrongPhase,
    /// The request is for tests and the VM was started without them.
    TestRequestsRefused,
    /// It is too late to cancel: the guest is being handed over.
    TooLate,
    /// The body is not JSON.
    MalformedJson,
    /// The body is JSON, but not what this request takes.
    InvalidBody,
    /// A value is understood and impossible.
    InvalidValue,
    /// The path takes no body.
    UnexpectedBody,
    /// The path takes no query.
    UnexpectedQuery,
    /// There is no such path.
    NoSuchPath,
    /// The VM has no such device.
    NoSuchDevice,
    /// The path does not know the method.
    MethodNotAllowed,
    /// The body did not arrive in time.
    SlowBody,
    /// The body is too large.
    BodyTooLarge,
    /// Something broke on the way.
    Failed,
    /// Too much is asked at once.
    Busy,
    /// The VM did not answer in time.
    TimedOut,
    /// A code that this version does not know.
    #[serde(other)]
    Unknown,
}

impl Code {
    /// Each code that a server of this version sends.
    pub const ALL: [Self; 16] = [
        Self::WrongPhase,
        Self::TestRequestsRefused,
        Self::TooLate,
        Self::MalformedJson,
        Self::InvalidBody,
        Self::InvalidValue,
        Self::UnexpectedBody,
        Self::UnexpectedQuery,
        Self::NoSuchPath,
        Self::NoSuchDevice,
        Self::MethodNotAllowed,
        Self::SlowBody,
        Self::BodyTooLarge,
        Self::Failed,
        Self::Busy,
        Self::TimedOut,
    ];
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ApiError {
    /// Not now.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The body is not JSON.
    #[error("The body is not JSON: {reason}")]
    MalformedJson {
        /// What the parser says, with the place.
        reason: String,
    },
    /// The body has an unknown field, lacks one, or has one of the wrong type.
    #[error("The body is not valid: {reason}")]
    InvalidBody {
        /// What is wrong, with the field's name.
        reason: String,
    },
    /// A field has a value that cannot be.
    #[error("The value of {field} is not possible: {reason}")]
    InvalidValue {
        /// The field.
        field: &'static str,
        /// Why, with the value.
        reason: String,
    },
    /// A body where none belongs.
    #[error("{path} takes no body")]
    UnexpectedBody {
        /// The path.
        path: &'static str,
    },
    /// A query where none belongs.
    #[error("{path} takes no query")]
    UnexpectedQuery {
        /// The path.
        path: &'static str,
    },
    /// No such path.
    #[error("There is no {path}; GET /v1/openapi.json lists what there is")]
    NoSuchPath {
        /// The path.
        path: String,
    },
    /// The VM was made without that device.
    #[error("This VM has no {device}")]
    NoSuchDevice {
        /// The device.
        device: String,
    },
    /// The path exists, the method does not.
    #[error("{path} does not take {method}; it takes {allow}")]
    MethodNotAllowed {
        /// The path.
        path: &'static str,
        /// The method.
        method: String,
        /// The methods that it takes, as in the `Allow` header.
        allow: String,
    },
    /// The body did not arrive in time, or the client went away.
    #[error("The body did not arrive within {seconds} s")]
    SlowBody {
        /// How long it was waited for.
        seconds: u64,
    },
    /// The body is too large.
    #[error("The body is larger than {limit} bytes")]
    BodyTooLarge {
        /// The limit.
        limit: usize,
    },
    /// It was tried and broke.
    #[error("{message}")]
    Failed {
        /// What broke, with its causes.
        message: String,
    },
    /// Too much is asked at once.
    #[error("Too many {what} at once; try again later")]
    Busy {
        /// Of what.
        what: &'static str,
    },
    /// The handler is still at work. Whether it will succeed is not known.
    #[error("The VM did not answer within {seconds} s; it may still do what was asked")]
    TimedOut {
        /// How long it was waited for.
        seconds: u64,
    },
}

impl ApiError {
    /// A failure that ends up with the person who asked, with all of its causes in one sentence.
    #[must_use]
    pub fn failed(error: &dyn std::error::Error) -> Self {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            message = format!("{message}: {error}");
            cause = error.source();
        }
        Self::Failed { message }
    }

    /// The HTTP status.
    #[must_use]
    pub const fn status(&self) -> u16 {
        match self {
            Self::MalformedJson { .. }
            | Self::InvalidBody { .. }
            | Self::InvalidValue { .. }
            | Self::UnexpectedBody { .. }
            | Self::UnexpectedQuery { .. } => 400,
            Self::NoSuchPath { .. } | Self::NoSuchDevice { .. } => 404,
            Self::MethodNotAllowed { .. } => 405,
            Self::SlowBody { .. } => 408,
            Self::Refused(_) => 409,
            Self::BodyTooLarge { .. } => 413,
            Self::Failed { .. } => 500,
            Self::Busy { .. } => 503,
            Self::TimedOut { .. } => 504,
        }
    }

    /// The reason for programs.
    #[must_use]
    pub const fn code(&self) -> Code {
        match self {
            Self::Refused(refusal) => refusal.code,
            Self::MalformedJson { .. } => Code::MalformedJson,
            Self::InvalidBody { .. } => Code::InvalidBody,
            Self::InvalidValue { .. } => Code::InvalidValue,
            Self::UnexpectedBody { .. } => Code::UnexpectedBody,
            Self::UnexpectedQuery { .. } => Code::UnexpectedQuery,
            Self::NoSuchPath { .. } => Code::NoSuchPath,
            Self::NoSuchDevice { .. } => Code::NoSuchDevice,
            Self::MethodNotAllowed { .. } => Code::MethodNotAllowed,
            Self::SlowBody { .. } => Code::SlowBody,
            Self::BodyTooLarge { .. } => Code::BodyTooLarge,
            Self::Failed { .. } => Code::Failed,
            Self::Busy { .. } => Code::Busy,
            Self::TimedOut { .. } => Code::TimedOut,
        }
    }

    /// What the client gets.
    #[must_use]
    pub fn body(&self) -> ErrorBody {
        let phase = if let Self::Refused(refusal) = self { Some(refusal.phase) } else { None };
        ErrorBody { code: self.code(), message: self.to_string(), phase }
    }

    /// Tells broken JSON from JSON that does not fit.
    pub(crate) fn from_json(error: &serde_json::Error) -> Self {
        let reason = error.to_string();
        match error.classify() {
            serde_json::error::Category::Data => Self::InvalidBody { reason },
            serde_json::error::Category::Io
            | serde_json::error::Category::Syntax
            | serde_json::error::Category::Eof => Self::MalformedJson { reason },
        }
    }
}

/// The JSON body of every failure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The reason for programs.
    pub code: Code,
    /// The reason for people: one sentence without a full stop.
    pub message: String,
    /// The phase in which the request was refused; only with status 409.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Error)]
    #[error("Disk blk0 cannot be opened")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn causes_are_told_once() {
        let error = ApiError::failed(&Outer(std::io::Error::other("no such file")));
        assert_eq!(error.to_string(), "Disk blk0 cannot be opened: no such file");
        assert_eq!((error.status(), error.code()), (500, Code::Failed));
    }

    #[test]
    fn broken_json_is_told_from_wrong_json() {
        let parse = |text| ApiError::from_json(&serde_json::from_str::<crate::Pulse>(text).unwrap_err());
        assert_eq!(parse("{").code(), Code::MalformedJson);
        assert_eq!(parse("{]").code(), Code::MalformedJson);
        assert_eq!(parse(r#"{"time":1}"#).code(), Code::InvalidBody);
        assert!(parse(r#"{"time":1}"#).to_string().contains("unknown field `time`, expected `times`"));
    }

    #[test]
    fn unknown_codes_of_a_newer_server_are_read() {
        let body: ErrorBody = serde_json::from_str(r#"{"code":"too_windy","message":"m","since":"v2"}"#).unwrap();
        assert_eq!(body.code, Code::Unknown);
    }

    #[test]
    fn only_refusals_carry_a_phase() {
        let refused = ApiError::from(Refusal::new(Phase::Migrating, Code::TooLate, "Too late"));
        assert_eq!((refused.status(), refused.body().phase), (409, Some(Phase::Migrating)));
        let busy = ApiError::Busy { what: "requests" };
        assert_eq!(
            serde_json::to_string(&busy.body()).unwrap(),
            r#"{"code":"busy","message":"Too many requests at once; try again later"}"#
        );
    }
}
