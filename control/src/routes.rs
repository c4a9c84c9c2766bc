//! The one table of paths. The server dispatches by it, the client finds its requests in it, and a test compares it
//! with `openapi.json`.

use crate::dirty_rate::MeasureDirtyRate;
use crate::error::ApiError;
use crate::request::{Request, Stop};
use hyper::Method;
use serde::Serialize;
use serde::de::{DeserializeOwned, IgnoredAny};

/// What a route does, by the `operationId` of `openapi.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// [`Request::ShowVm`].
    ShowVm,
    /// [`Request::Pause`].
    Pause,
    /// [`Request::Resume`].
    Resume,
    /// [`Request::Stop`].
    Stop,
    /// [`Request::Kill`].
    Kill,
    /// [`Request::Reset`].
    Reset,
    /// [`Request::PowerButton`].
    PowerButton,
    /// [`Request::ShowBalloon`].
    ShowBalloon,
    /// [`Request::SetBalloon`].
    SetBalloon,
    /// [`Request::ListDisks`].
    ListDisks,
    /// [`Request::ResizeDisk`].
    ResizeDisk,
    /// [`Request::ListNics`].
    ListNics,
    /// [`Request::StartMigration`].
    StartMigration,
    /// [`Request::ShowMigration`].
    ShowMigration,
    /// [`Request::CancelMigration`].
    CancelMigration,
    /// [`Request::ResolveMigration`].
    ResolveMigration,
    /// [`Request::MeasureDirtyRate`].
    MeasureDirtyRate,
    /// [`Request::ShowDirtyRate`].
    ShowDirtyRate,
    /// [`Request::Pulse`].
    Pulse,
    /// The stream of events.
    WatchEvents,
    /// The numbers for Prometheus.
    ShowMetrics,
    /// `openapi.json`.
    ShowOpenApi,
}

/// What a route takes as its body. The names are those of schemas in `openapi.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyRule {
    /// Nothing.
    Empty,
    /// This, or nothing for the defaults.
    Optional(&'static str),
    /// This.
    Required(&'static str),
}

/// What a route answers when all went well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing: status 204.
    Nothing,
    /// JSON of this schema.
    Json(&'static str),
    /// A stream of events, each one JSON of this schema.
    Stream(&'static str),
    /// The text format of Prometheus.
    Metrics,
    /// `openapi.json` itself.
    OpenApi,
}

/// One row of the table.
#[derive(Debug)]
pub struct Route {
    /// The HTTP method.
    pub method: Method,
    /// The path. None has a variable part.
    pub path: &'static str,
    /// What it does.
    pub operation: Operation,
    /// What it does, for people.
    pub summary: &'static str,
    /// What it takes.
    pub body: BodyRule,
    /// The status when all went well.
    pub status: u16,
    /// The answer when all went well.
    pub content: Content,
    /// The statuses when not, each with an [`ErrorBody`](crate::ErrorBody).
    pub failures: &'static [u16],
}

/// The server itself can answer these.
const SERVED: &[u16] = &[400, 408, 413];
/// A subscriber may be one too many.
const WATCHED: &[u16] = &[400, 408, 413, 503];
/// A question to the VM.
const ASKED: &[u16] = &[400, 408, 413, 500, 503, 504];
/// A change of the VM, which has its right and its wrong time.
const CHANGED: &[u16] = &[400, 408, 409, 413, 500, 503, 504];
/// A question to, or a change of, a device that the VM may not have.
const DEVICE: &[u16] = &[400, 404, 408, 409, 413, 500, 503, 504];

macro_rules! route {
    ($method:ident $path:literal, $operation:ident, $summary:literal, $body:expr, $status:literal $content:expr, $failures:expr) => {
        Route {
            method: Method::$method,
            path: $path,
            operation: Operation::$operation,
            summary: $summary,
            body: $body,
            status: $status,
            content: $content,
            failures: $failures,
        }
    };
}

use BodyRule::{Empty, Optional, Required};
use Content::{Json, Metrics, Nothing, OpenApi, Stream};

/// Every path and method that the server knows.
#[rustfmt::skip]
pub static ROUTES: [Route; 22] = [
    route!(GET "/v1/vm", ShowVm, "Show the VM", Empty, 200 Json("VmInfo"), ASKED),
    route!(POST "/v1/vm/pause", Pause, "Pause the guest", Empty, 204 Nothing, CHANGED),
    route!(POST "/v1/vm/resume", Resume, "Resume the guest", Empty, 204 Nothing, CHANGED),
    route!(POST "/v1/vm/stop", Stop, "Ask the guest to shut down", Optional("Stop"), 204 Nothing, CHANGED),
    route!(POST "/v1/vm/kill", Kill, "End the guest at once", Empty, 204 Nothing, CHANGED),
    route!(POST "/v1/vm/reset", Reset, "Reset the machine", Empty, 204 Nothing, CHANGED),
    route!(POST "/v1/vm/power-button", PowerButton, "Press the power button", Empty, 204 Nothing, CHANGED),
    route!(GET "/v1/balloon", ShowBalloon, "Show the balloon", Empty, 200 Json("BalloonInfo"), DEVICE),
    route!(PUT "/v1/balloon", SetBalloon, "Change the balloon's target", Required("SetBalloon"), 204 Nothing, DEVICE),
    route!(GET "/v1/disks", ListDisks, "List the disks", Empty, 200 Json("DiskList"), ASKED),
    route!(POST "/v1/disks/resize", ResizeDisk, "Make a disk longer", Required("ResizeDisk"), 204 Nothing, DEVICE),
    route!(GET "/v1/nics", ListNics, "List the network interfaces", Empty, 200 Json("NicList"), ASKED),
    route!(POST "/v1/migration", StartMigration, "Start a migration", Required("StartMigration"), 202 Json("JobStarted"), CHANGED),
    route!(GET "/v1/migration", ShowMigration, "Show the current or last migration", Empty, 200 Json("LastMigration"), ASKED),
    route!(DELETE "/v1/migration", CancelMigration, "Cancel the migration", Empty, 204 Nothing, CHANGED),
    route!(POST "/v1/migration/resolve", ResolveMigration, "Settle a migration in doubt", Required("ResolveMigration"), 204 Nothing, CHANGED),
    route!(POST "/v1/dirty-rate", MeasureDirtyRate, "Measure how fast the guest dirties its memory", Optional("MeasureDirtyRate"), 202 Json("JobStarted"), CHANGED),
    route!(GET "/v1/dirty-rate", ShowDirtyRate, "Show the current or last measurement", Empty, 200 Json("LastDirtyRate"), ASKED),
    route!(POST "/v1/pulse", Pulse, "For tests: save, reset and restore in place", Required("Pulse"), 200 Json("Pulsed"), CHANGED),
    route!(GET "/v1/events", WatchEvents, "Watch what happens", Empty, 200 Stream("Event"), WATCHED),
    route!(GET "/metrics", ShowMetrics, "Show numbers for Prometheus", Empty, 200 Metrics, ASKED),
    route!(GET "/v1/openapi.json", ShowOpenApi, "Show this description", Empty, 200 OpenApi, SERVED),
];

/// What the server was asked for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// Something that the handler answers.
    Call(Request),
    /// The stream of events.
    Events,
    /// The numbers.
    Metrics,
    /// The description.
    OpenApi,
}

impl Route {
    /// The row for a method and a path.
    pub(crate) fn find(method: &Method, path: &str) -> Result<&'static Self, ApiError> {
        let mut allow: Vec<&Self> = ROUTES.iter().filter(|route| route.path == path).collect();
        if let Some(at) = allow.iter().position(|route| route.method == *method) {
            return Ok(allow.swap_remove(at));
        }
        let Some(first) = allow.first() else {
            return Err(ApiError::NoSuchPath { path: path.to_owned() });
        };
        let methods: Vec<_> = allow.iter().map(|route| route.method.as_str()).collect();
        Err(ApiError::MethodNotAllowed { path: first.path, method: method.to_string(), allow: methods.join(", ") })
    }

    /// The row that carries `request`.
    pub(crate) fn of(request: &Request) -> &'static Self {
        Self::with(Operation::of(request))
    }

    /// The row of an operation.
    pub(crate) fn with(operation: Operation) -> &'static Self {
        let row = ROUTES.iter().find(|route| route.operation == operation);
        row.expect("each operation has its row: a test walks through them")
    }

    /// Reads what is asked for out of the body.
    pub(crate) fn read(&self, body: &[u8]) -> Result<Asked, ApiError> {
        if self.body == Empty && !body.is_empty() {
            return Err(ApiError::UnexpectedBody { path: self.path });
        }
        Ok(Asked::Call(match self.operation {
            Operation::WatchEvents => return Ok(Asked::Events),
            Operation::ShowMetrics => return Ok(Asked::Metrics),
            Operation::ShowOpenApi => return Ok(Asked::OpenApi),
            Operation::ShowVm => Request::ShowVm,
            Operation::Pause => Request::Pause,
            Operation::Resume => Request::Resume,
            Operation::Stop if body.is_empty() => Request::Stop(Stop::default()),
            Operation::Stop => Request::Stop(parse(body)?),
            Operation::Kill => Request::Kill,
            Operation::Reset => Request::Reset,
            Operation::PowerButton => Request::PowerButton,
            Operation::ShowBalloon => Request::ShowBalloon,
            Operation::SetBalloon => Request::SetBalloon(parse(body)?),
            Operation::ListDisks => Request::ListDisks,
            Operation::ResizeDisk => Request::ResizeDisk(parse(body)?),
            Operation::ListNics => Request::ListNics,
            Operation::StartMigration => Request::StartMigration(parse(body)?),
            Operation::ShowMigration => Request::ShowMigration,
            Operation::CancelMigration => Request::CancelMigration,
            Operation::ResolveMigration => Request::ResolveMigration(parse(body)?),
            Operation::MeasureDirtyRate if body.is_empty() => Request::MeasureDirtyRate(MeasureDirtyRate::default()),
            Operation::MeasureDirtyRate => Request::MeasureDirtyRate(parse(body)?),
            Operation::ShowDirtyRate => Request::ShowDirtyRate,
            Operation::Pulse => Request::Pulse(parse(body)?),
        }))
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    if body.is_empty() {
        return Err(ApiError::InvalidBody { reason: "it is missing".to_owned() });
    }
    let wrong = |error| ApiError::from_json(&error);
    if !body.trim_ascii_start().starts_with(b"{") {
        // Fields in an array, which serde would take, have no names to check.
        serde_json::from_slice::<IgnoredAny>(body).map_err(wrong)?;
        return Err(ApiError::InvalidBody { reason: "it is not an object".to_owned() });
    }
    serde_json::from_slice(body).map_err(wrong)
}

impl Operation {
    /// The `operationId` in `openapi.json`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ShowVm => "showVm",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Stop => "stop",
            Self::Kill => "kill",
            Self::Reset => "reset",
            Self::PowerButton => "powerButton",
            Self::ShowBalloon => "showBalloon",
            Self::SetBalloon => "setBalloon",
            Self::ListDisks => "listDisks",
            Self::ResizeDisk => "resizeDisk",
            Self::ListNics => "listNics",
            Self::StartMigration => "startMigration",
            Self::ShowMigration => "showMigration",
            Self::CancelMigration => "cancelMigration",
            Self::ResolveMigration => "resolveMigration",
            Self::MeasureDirtyRate => "measureDirtyRate",
            Self::ShowDirtyRate => "showDirtyRate",
            Self::Pulse => "pulse",
            Self::WatchEvents => "watchEvents",
            Self::ShowMetrics => "showMetrics",
            Self::ShowOpenApi => "showOpenApi",
        }
    }

    const fn of(request: &Request) -> Self {
        match request {
            Request::ShowVm => Self::ShowVm,
            Request::Pause => Self::Pause,
            Request::Resume => Self::Resume,
            Request::Stop(_) => Self::Stop,
            Request::Kill => Self::Kill,
            Request::Reset => Self::Reset,
            Request::PowerButton => Self::PowerButton,
            Request::ShowBalloon => Self::ShowBalloon,
            Request::SetBalloon(_) => Self::SetBalloon,
            Request::ListDisks => Self::ListDisks,
            Request::ResizeDisk(_) => Self::ResizeDisk,
            Request::ListNics => Self::ListNics,
            Request::StartMigration(_) => Self::StartMigration,
            Request::ShowMigration => Self::ShowMigration,
            Request::CancelMigration => Self::CancelMigration,
            Request::ResolveMigration(_) => Self::ResolveMigration,
            Request::MeasureDirtyRate(_) => Self::MeasureDirtyRate,
            Request::ShowDirtyRate => Self::ShowDirtyRate,
            Request::Pulse(_) => Self::Pulse,
        }
    }
}

/// The JSON body of a request; `None` where it has none.
pub(crate) fn body_of(request: &Request) -> Result<Option<Vec<u8>>, serde_json::Error> {
    fn json(body: &impl Serialize) -> Result<Option<Vec<u8>>, serde_json::Error> {
        serde_json::to_vec(body).map(Some)
    }
    match request {
        Request::Stop(body) => json(body),
        Request::SetBalloon(body) => json(body),
        Request::ResizeDisk(body) => json(body),
        Request::StartMigration(body) => json(body),
        Request::ResolveMigration(body) => json(body),
        Request::MeasureDirtyRate(body) => json(body),
        Request::Pulse(body) => json(body),
        Request::ShowVm
        | Request::Pause
        | Request::Resume
        | Request::Kill
        | Request::Reset
        | Request::PowerButton
        | Request::ShowBalloon
        | Request::ListDisks
        | Request::ListNics
        | Request::ShowMigration
        | Request::CancelMigration
        | Request::ShowDirtyRate => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::samples;

    #[test]
    fn every_request_travels_by_its_row() {
        for request in samples() {
            let route = Route::of(&request);
            assert!(std::ptr::eq(Route::find(&route.method, route.path).unwrap(), route));
            let body = body_of(&request).unwrap().unwrap_or_default();
            assert_eq!(body.is_empty(), route.body == Empty, "{}", route.path);
            assert_eq!(route.read(&body), Ok(Asked::Call(request)));
        }
        for operation in [Operation::WatchEvents, Operation::ShowMetrics, Operation::ShowOpenApi] {
            assert!(!matches!(Route::with(operation).read(b""), Ok(Asked::Call(_)) | Err(_)));
        }
        assert_eq!(ROUTES.len(), samples().len() + 3);
    }

    #[test]
    fn no_two_rows_are_alike() {
        for (at, route) in ROUTES.iter().enumerate() {
            for other in &ROUTES[..at] {
                assert!(route.operation != other.operation, "{}", route.path);
                assert!((&route.method, route.path) != (&other.method, other.path), "{}", route.path);
            }
        }
    }

    #[test]
    fn wrong_paths_methods_and_bodies() {
        let find = |method, path| Route::find(&method, path).unwrap_err().to_string();
        assert_eq!(find(Method::GET, "/v1/vms"), "There is no /v1/vms; GET /v1/openapi.json lists what there is");
        assert_eq!(find(Method::POST, "/v1/balloon"), "/v1/balloon does not take POST; it takes GET, PUT");
        let read = |operation, body: &[u8]| Route::with(operation).read(body).unwrap_err().to_string();
        assert_eq!(read(Operation::Pause, b"{}"), "/v1/vm/pause takes no body");
        assert_eq!(read(Operation::Pulse, b""), "The body is not valid: it is missing");
        let stop = Route::with(Operation::Stop).read(b"");
        assert_eq!(stop, Ok(Asked::Call(Request::Stop(Stop::default()))));
    }
}
